"""The MLPs that learn, and how they enter a stock model without a change of its class.

A fast ("prime") MLP stands in series before the MLP of a block, `h += prime(norm'(h)); h += mlp(norm(h))`, by two hooks: one
before the block's norm adds it to the norm's input, one after the block adds it to the block's output. With the layout
in_place the block's own MLP learns.

Legend: B rows, n tokens of a chunk, D hidden size, F width of a fast MLP.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eaftdrope.errors import UserError
from eaftdrope.trainer.head import backbone

from .config import TTTConfig

ATTRIBUTE = "ttt"
"""The attribute of a causal language model that holds its fast MLPs, and so the prefix of their names in its weights."""


def swiglu(x_BnD: Tensor, weights: list[Tensor], activation: Callable[[Tensor], Tensor]) -> Tensor:
    """A gated MLP with one set of weights (gate, up `[F, D]`, down `[D, F]`), or one per row (`[B, F, D]`, ...)."""
    gate, up, down = weights
    product = nn.functional.linear if gate.ndim == 2 else _rowwise
    return product(activation(product(x_BnD, gate)) * product(x_BnD, up), down)


def _rowwise(x_BnD: Tensor, weight_BFD: Tensor) -> Tensor:
    return torch.bmm(x_BnD, weight_BFD.mT)


class PrimeMLP(nn.Module):
    """A norm and a gated MLP whose output is zero at first: gate, up and the norm are copies of the block's own.

    With copies, the first gradient of `down` sees features that a language model has learned; with random weights, learning
    at test time gained next to nothing. It has no norm after it: the norm of zero has no finite gradient.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        mlp: Any = block.mlp
        self.norm = copy.deepcopy(getattr(block, norm_before_mlp(block)))
        self.gate = nn.Parameter(mlp.gate_proj.weight.detach().clone())
        self.up = nn.Parameter(mlp.up_proj.weight.detach().clone())
        self.down = nn.Parameter(torch.zeros_like(mlp.down_proj.weight))
        self.activation = mlp.act_fn

    def weights(self) -> list[Tensor]:
        return [self.gate, self.up, self.down]


class FastMLPs(nn.Module):
    """What a model with TTT has as `model.ttt`.

    Attributes:
        config (`TTTConfig`): may be replaced at any time (`model.ttt.config = replace(model.ttt.config, lr=0.0)`), but for
            `layout` and `fast_blocks`. A state continues only with the `window`, `sink` and `chunk` that it began with.
        primes (`nn.ModuleList`): the added MLPs, empty with the layout in_place.
        rule (callable or None): for research, steps in place of clipped gradients: `rule(gradients, config)` gives tensors
            of the gradients' shapes `[B, ...]`, which are multiplied by the rate.
    """

    def __init__(self, model: PreTrainedModel, config: TTTConfig) -> None:
        super().__init__()
        blocks: Any = backbone(model).layers
        self._config = config
        self.fast_blocks = config.fast_blocks or max(1, round(len(blocks) / 4))
        self.first = len(blocks) - self.fast_blocks
        self.rule: Callable[[list[Tensor], TTTConfig], list[Tensor]] | None = None
        fast: list[Any] = list(blocks[self.first :])
        self.primes = nn.ModuleList(PrimeMLP(block) for block in fast if config.layout == "prime")
        # the MLPs of the layout in_place belong to the model, not to this module
        owners = list(self.primes) if config.layout == "prime" else [block.mlp for block in fast]
        self._hidden_from_modules = {"owners": owners}
        self._in_use: list[list[Tensor]] = []
        self._handles = [handle for index, block in enumerate(fast) for handle in self._enter(index, block)]

    def _enter(self, index: int, block: Any) -> list[Any]:
        if self.config.layout == "in_place":
            block.mlp.forward = _InPlace(self, index)
            return []
        hook = _Series(self, index)
        norm = getattr(block, norm_before_mlp(block))
        return [norm.register_forward_pre_hook(hook.before), block.register_forward_hook(hook.after)]

    @property
    def config(self) -> TTTConfig:
        return self._config

    @config.setter
    def config(self, config: TTTConfig) -> None:
        for name in ("layout", "fast_blocks"):
            if getattr(config, name) != getattr(self._config, name):
                raise UserError(
                    f"{name} cannot change once TTT is applied: call remove_ttt(model) and apply_ttt again."
                )
        self._config = config

    @property
    def settings(self) -> tuple[Any, ...]:
        """The settings that shape a state."""
        config = self.config
        return config.window, config.sink, config.chunk, self.fast_blocks, config.layout

    @property
    def owners(self) -> list[Any]:
        """The modules whose weights learn: prime MLPs, or the blocks' own."""
        return self._hidden_from_modules["owners"]

    def w0(self) -> list[Tensor]:
        """The initial fast weights, three per fast block (gate, up, down), as they are now."""
        if self.config.layout == "prime":
            return [weight for prime in self.owners for weight in prime.weights()]
        layers = [layer for mlp in self.owners for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
        if any(hasattr(layer, "base_layer") for layer in layers):
            raise UserError(
                "the MLPs that learn at test time (layout in_place) have adapters, which would not take part. Leave the MLPs "
                f"of the last {self.fast_blocks} blocks out of target_modules, or use the layout prime."
            )
        return [layer.weight for layer in layers]

    def weights(self, rows: int, delta: list[Tensor] | None, *, per_row: bool = False) -> list[Tensor]:
        """The fast weights W0 + delta: one per row, or W0 itself before anything was learned unless `per_row`.

        They are added in float32 at least, as a step in bfloat16 would be lost in rounding, and given in the precision of
        the computation.
        """
        w0 = self.w0()
        if delta is None and not per_row:
            return w0
        device, dtype = w0[0].device.type, w0[0].dtype
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype
        # the gradient of a new axis is a view, that of a broadcast one a sum over all weights
        single = [weight[None] for weight in w0]
        if delta is None:
            return [weight.to(dtype).expand(rows, -1, -1) for weight in single]
        return [(weight + change).to(dtype) for weight, change in zip(single, delta, strict=True)]

    @contextmanager
    def using(self, weights: list[Tensor]) -> Generator[None]:
        """Let the fast MLPs compute with `weights`, three per block, inside the block."""
        outer = self._in_use
        self._in_use = [weights[i : i + 3] for i in range(0, len(weights), 3)]
        try:
            yield
        finally:
            self._in_use = outer

    def in_use(self, index: int) -> list[Tensor]:
        if not self._in_use:
            raise UserError(
                "a block of a model with TTT was called on its own. Call the model or its base model: only they choose the "
                "weights of the fast MLPs."
            )
        return self._in_use[index]

    def remove(self) -> None:
        """Take the fast MLPs out of the blocks."""
        for handle in self._handles:
            handle.remove()
        if self.config.layout == "in_place":
            for mlp in self.owners:
                del mlp.forward


# Hooks are objects and not closures: a deep copy of the model then has hooks of its own.


class _Series:
    def __init__(self, fast: FastMLPs, index: int) -> None:
        self.fast, self.index = fast, index
        self.output: Tensor | None = None

    def before(self, norm: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
        prime: Any = self.fast.primes[self.index]
        x = arguments[0]
        self.output = swiglu(prime.norm(x), self.fast.in_use(self.index), prime.activation)
        return (x + self.output,)

    def after(self, block: nn.Module, arguments: Any, output: Any) -> Any:
        added, self.output = self.output, None
        if isinstance(output, tuple):
            return (output[0] + added, *output[1:])
        return output + added


class _InPlace:
    def __init__(self, fast: FastMLPs, index: int) -> None:
        self.fast, self.index = fast, index

    def __call__(self, x_BnD: Tensor) -> Tensor:
        return swiglu(x_BnD, self.fast.in_use(self.index), self.fast.owners[self.index].act_fn)


def norm_before_mlp(block: nn.Module) -> str:
    """The name of the norm whose output the block's MLP reads."""
    # Gemma has a norm of the other name too, after its attention
    return "pre_feedforward_layernorm" if hasattr(block, "pre_feedforward_layernorm") else "post_attention_layernorm"


def is_ttt(model: Any) -> bool:
    """Return whether TTT is applied to a model, or to the one inside a PEFT model."""
    return isinstance(getattr(causal_lm(model), ATTRIBUTE, None), FastMLPs)


def fast_mlps(model: Any) -> FastMLPs:
    """`model.ttt` of a causal language model, or of the one inside a PEFT model.

    Raises:
        UserError: TTT is not applied to the model.
    """
    base_model = causal_lm(model)
    found = getattr(base_model, ATTRIBUTE, None)
    if found is not None and not isinstance(found, FastMLPs):
        raise UserError(
            f"model.{ATTRIBUTE} is a {type(found).__name__}: modules_to_save has the MLPs that learn, and a copy of them is "
            f"not the one in the blocks. Leave '{ATTRIBUTE}' out of it; model.{ATTRIBUTE}.requires_grad_(True) trains them."
        )
    if found is None:
        raise UserError(f"TTT is not applied to this {type(base_model).__name__}: call apply_ttt(model) first.")
    return found


def causal_lm(model: Any) -> Any:
    """The transformers model inside a PEFT model or a distributed wrapper; any other is returned as it is."""
    model = getattr(model, "module", model) if isinstance(model, nn.parallel.DistributedDataParallel) else model
    inner = getattr(model, "get_base_model", None)
    return model if inner is None else inner()
