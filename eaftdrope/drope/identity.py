"""The rotation of a live model replaced by the identity: the reference for a converted checkpoint."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from eaftdrope.errors import UserError

OTHER_TOWERS = re.compile(r"vision|visual|audio|image|speech")
"""Names of modules and tensors outside the language model."""


@contextlib.contextmanager
def identity_rotation(
    model: nn.Module, layers: set[int] | None = None, lengths: list[float] | None = None
) -> Iterator[None]:
    """Give the attention of the language model cos = 1 and sin = 0 until the block ends.

    Args:
        model (`nn.Module`): a causal language model.
        layers (`set[int]`, *optional*): numbers of the layers; by default all.
        lengths (`list[float]`, *optional*): if given, only the angle is removed (cos = sqrt(cos^2 + sin^2): the attention
            factor of YaRN and LongRoPE stays), and the largest factor of each call is appended.

    Raises:
        UserError: no module computes or receives cosines and sines.
    """

    def rotary(module: nn.Module, args: Any, output: Any) -> Any:
        return _straight(output, lengths)

    def attention(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        # some classes pass it by position
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        if bound.arguments.get("position_embeddings") is not None:
            bound.arguments["position_embeddings"] = _straight(bound.arguments["position_embeddings"], lengths)
        return bound.args, bound.kwargs

    if layers is None:
        modules = [module for _, module in text_modules(model) if "RotaryEmbedding" in type(module).__name__]
        handles = [module.register_forward_hook(rotary) for module in modules]
    else:
        modules = [module for _, module in text_modules(model) if _receives_rotation(module)]
        handles = [
            module.register_forward_pre_hook(attention, with_kwargs=True)
            for module in modules
            if module.layer_idx in layers
        ]
    if not modules:
        raise UserError(f"{type(model).__name__} has no module that computes cosines and sines: it cannot be checked.")
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def text_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield names and modules of the language model, without the other towers of a multimodal one."""
    return ((name, module) for name, module in model.named_modules() if not OTHER_TOWERS.search(name))


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the language model's modules that keep the factor on their attention scores as `scaling`, by name."""
    return {name: module for name, module in text_modules(model) if isinstance(getattr(module, "scaling", None), float)}


def scaling_of(module: nn.Module) -> float:
    """Return the factor on the scores of one of the `attention_modules`."""
    scaling = module.scaling
    assert isinstance(scaling, float)
    return scaling


def set_scaling(module: nn.Module, scaling: float) -> None:
    """Set the factor on the scores of one of the `attention_modules`."""
    module.scaling = scaling  # pyrefly: ignore[bad-argument-type]  # a plain attribute, not a parameter or module


def _receives_rotation(module: nn.Module) -> bool:
    return (
        isinstance(getattr(module, "layer_idx", None), int)
        and "position_embeddings" in inspect.signature(module.forward).parameters
    )


def _straight(rotation: Any, lengths: list[float] | None) -> Any:
    """Return a pair of cosines and sines, or complex numbers, or a mapping of such, without the rotation."""
    if isinstance(rotation, dict):
        return {name: _straight(value, lengths) for name, value in rotation.items()}
    if isinstance(rotation, torch.Tensor) and rotation.is_complex():
        length = rotation.abs()
        if lengths is None:
            return torch.ones_like(rotation)
        lengths.append(length.max().item())
        return length.to(rotation.dtype)
    if not isinstance(rotation, (tuple, list)) or len(rotation) != 2:
        raise UserError(
            f"the rotation comes as {type(rotation).__name__}, not as cosines and sines: it cannot be checked."
        )
    cos, sin = rotation
    if lengths is None:
        return type(rotation)((torch.ones_like(cos), torch.zeros_like(sin)))
    length = (cos.double() ** 2 + sin.double() ** 2).sqrt()
    lengths.append(length.max().item())
    return type(rotation)((length.to(cos.dtype), torch.zeros_like(sin)))
