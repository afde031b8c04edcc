"""Is a converted checkpoint really without rotary embedding? Measured on the architecture's own class, not believed.

    identity   logits equal those of the unconverted configuration whose dropped layers are handed cos = 1, sin = 0
    shift      logits do not change when all positions move by 100,000           (every layer dropped)
    order      with one layer, the last token's logits do not depend on the order of those before it
    control    the unconverted configuration, untouched, gives other logits: the checks above can fail

The first two are asked to the last bit, in float32 and bfloat16. They run on a slice: the architecture with its real head
size and rotary frequencies, one or two layers of each kind, a few heads and random weights; or on the weights themselves.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from .checkpoint import read_json
from .config import before, text_part

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig

_SHIFT = 100_000
_ORDER_LIMIT = 1e-4
_LENGTH = 24
# What a slice has less of; every name that the architecture's configuration does not have is passed over.
_SMALL = {
    "vocab_size": 64,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Check:
    """`value` is a largest difference of logits; it passes within `limit`, or beyond it for a control."""

    name: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def passed(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        wanted = f"{'at least' if self.at_least else 'at most'} {self.limit:g}"
        return f"{'ok    ' if self.passed else 'FAILED'} {self.name}: {self.value:.3g} ({wanted})"


def check_folder(folder: str | Path, *, weights: bool = False) -> list[Check]:
    """The checks on the converted checkpoint `folder`; on its own weights where asked, which loads them.

    Raises:
        UserError: the folder is no converted checkpoint, or its architecture cannot be built or looked into.
    """
    import torch

    raw = read_json(Path(folder) / "config.json")
    if "drope" not in raw:
        raise UserError(f"{folder} is not a converted checkpoint: its config.json has no `drope` record.")
    new, old = _config(raw), _with_temperature_of(_config(raw), before(raw))
    if not weights:
        layers = _one_of_each_kind(new, old)
        new, old = _shrunk(new, layers), _shrunk(old, layers)
    dropped = _dropped_layers(raw["drope"]["layers"], new)
    is_whole = len(dropped) == new.num_hidden_layers
    checks = []
    for dtype in (torch.float32, torch.bfloat16):
        checks += _exact_checks(new, old, dropped if not is_whole else None, folder if weights else None, dtype)
    if is_whole:
        checks.append(_order(_shrunk(_without_temperature(new), [0])))
    return checks


def _exact_checks(
    new: PretrainedConfig,
    old: PretrainedConfig,
    dropped: set[int] | None,
    folder: str | Path | None,
    dtype: torch.dtype,
) -> list[Check]:
    """Identity, control and shift in one dtype; `dropped` None: all layers."""
    import torch

    name = str(dtype).removeprefix("torch.")
    model, reference = _pair(new, old, folder, dtype)
    ids = torch.randint(3, new.vocab_size, (2, _LENGTH), generator=_seeded())
    got = _logits(model, ids)
    with identity_rotation(reference, dropped):
        difference = _difference(got, _logits(reference, ids))
    checks = [Check(f"equal to the identity rotation, {name}", difference, 0.0)]
    if dtype is torch.float32:
        difference = _difference(got, _logits(reference, ids))
        checks.append(Check("control: differs from the rotation as it was", difference, 1e-3, at_least=True))
    if dropped is None:
        # Ministral-3's own temperature looks at positions, and is no rotation
        still = _without_temperature(new)
        model = model if still is new else _pair(still, old, folder, dtype)[0]
        shifted = _logits(model, ids, torch.arange(_LENGTH) + _SHIFT)
        difference = _difference(_logits(model, ids), shifted)
        checks.append(Check(f"unchanged by a shift of positions, {name}", difference, 0.0))
    return checks


def _order(config: PretrainedConfig) -> Check:
    import torch

    model = _slice(config, torch.float32)
    length = min(_LENGTH, getattr(config, "sliding_window", None) or _LENGTH)
    ids = torch.randint(3, config.vocab_size, (1, length), generator=_seeded())
    mixed = torch.cat([ids[:, torch.randperm(length - 1, generator=_seeded())], ids[:, -1:]], dim=1)
    last, last_mixed = _logits(model, ids)[:, -1], _logits(model, mixed)[:, -1]
    return Check("one layer does not see the order of tokens", _difference(last, last_mixed), _ORDER_LIMIT)


@contextlib.contextmanager
def identity_rotation(model: nn.Module, layers: set[int] | None = None) -> Iterator[None]:
    """The attention layers of `model` (those numbered in `layers`; None: all) are handed cos = 1 and sin = 0.

    Raises:
        UserError: no attention module takes `position_embeddings`.
    """
    import torch

    def without_rotation(module, args, kwargs):
        cos, sin = kwargs["position_embeddings"]
        return args, {**kwargs, "position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}

    modules = [
        module
        for module in model.modules()
        if isinstance(getattr(module, "scaling", None), float)
        and "position_embeddings" in inspect.signature(module.forward).parameters
    ]
    if not modules:
        raise UserError(f"{type(model).__name__} hands its attention no `position_embeddings`: it cannot be checked.")
    handles = [
        module.register_forward_pre_hook(without_rotation, with_kwargs=True)
        for index, module in enumerate(modules)
        if layers is None or index in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _config(raw: dict) -> PretrainedConfig:
    """The language model's configuration of a config.json's content, as this transformers reads it."""
    from transformers import AutoConfig

    # the checks look at the rotation, whatever the weights are packed in
    part = {key: value for key, value in text_part(raw).items() if key != "quantization_config"}
    try:
        return AutoConfig.for_model(**copy.deepcopy(part))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"transformers cannot read this configuration of {part.get('model_type')}: {error}") from error


def _dropped_layers(wanted: str, config: PretrainedConfig) -> set[int]:
    """Numbers of the layers without rotation, by the record's words. (Those of SmolLM3 that never had one are among
    them: handing them the identity changes nothing.)"""
    if wanted == "all":
        return set(range(config.num_hidden_layers))
    if hasattr(config, "no_rope_layers"):
        return {index for index, rotates in enumerate(config.no_rope_layers) if not rotates}
    return {index for index, kind in enumerate(config.layer_types) if kind in wanted.split(",")}


def _with_temperature_of(new: PretrainedConfig, raw: dict) -> PretrainedConfig:
    """The configuration of `raw` with Ministral-3's temperature by position as in `new`: it is no part of the rotation."""
    rope = new.get_text_config().rope_parameters
    part = text_part(raw)
    if "llama_4_scaling_beta" in rope:
        kept = {key: rope[key] for key in ("llama_4_scaling_beta", "original_max_position_embeddings")}
        part["rope_parameters"] = {**(part.get("rope_parameters") or {"rope_type": "default"}), **kept}
        part.setdefault("rope_theta", rope["rope_theta"])
    return _config(raw)


def _without_temperature(config: PretrainedConfig) -> PretrainedConfig:
    if not config.rope_parameters.get("llama_4_scaling_beta"):
        return config
    still = copy.deepcopy(config)
    still.rope_parameters["llama_4_scaling_beta"] = 0.0
    return still


def _pair(new: PretrainedConfig, old: PretrainedConfig, folder, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """Two models of the same weights: the converted configuration's, and the one before it."""
    if folder is None:
        model = _slice(new, dtype)
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    reference = type(model)._from_config(copy.deepcopy(old), dtype=dtype, attn_implementation="eager").eval()
    # takes the tensors themselves: the second model costs no memory beyond its buffers
    reference.load_state_dict(model.state_dict(), assign=True)
    return model, reference


def _slice(config: PretrainedConfig, dtype: torch.dtype) -> nn.Module:
    """A model of random weights, large enough for attention to be far from uniform."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    parameter.normal_(0.0, 2.0 * parameter.shape[-1] ** -0.5)
                else:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    for parameter in model.parameters():
        # not the buffers: loading leaves the rotary frequencies in float32
        parameter.data = parameter.data.to(dtype)
    return model


def _one_of_each_kind(new: PretrainedConfig, old: PretrainedConfig) -> list[int]:
    """The first layer of each kind (attention type, rotation before and after), and two layers at least."""
    lists = [getattr(config, key, None) for config in (new, old) for key in ("layer_types", "no_rope_layers")]
    kinds = list(zip(*(values for values in lists if values))) or [()] * new.num_hidden_layers
    first = {kinds.index(kind) for kind in kinds}
    return sorted(first | set(range(min(2, len(kinds)))))


def _shrunk(config: PretrainedConfig, layers: list[int]) -> PretrainedConfig:
    """The same architecture, small: these layers, its own head size, two heads."""
    data = config.to_dict()
    unknown = [key for key in ("hidden_size", "num_attention_heads", "num_hidden_layers") if key not in data]
    if unknown:
        raise UserError(
            f"{config.model_type} has no {', '.join(unknown)} in its configuration, so no small model of it can be made to "
            "check the conversion on. Check on the weights themselves (--check-weights)."
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    small = {key: value for key, value in _SMALL.items() if data.get(key) is not None}
    small |= {
        "num_hidden_layers": len(layers),
        "num_attention_heads": 2,
        "hidden_size": 2 * head_dim,
        **{key: [data[key][i] for i in layers] for key in ("layer_types", "no_rope_layers") if data.get(key)},
    }
    if data.get("num_key_value_heads"):
        small["num_key_value_heads"] = 1 if data["num_key_value_heads"] < data["num_attention_heads"] else 2
    return type(config).from_dict({**data, **small})


def _logits(model: nn.Module, ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
    import torch

    with torch.no_grad():
        positions = None if position_ids is None else position_ids[None].expand(len(ids), -1)
        return model(input_ids=ids, position_ids=positions, use_cache=False).logits.float()


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


def _seeded() -> torch.Generator:
    import torch

    return torch.Generator().manual_seed(0)
