"""Which common GPUs a run fits on: the estimate of `memory.py`, on one of them or sharded over several with FSDP.

One device holds everything. Of n devices under FSDP (full shard, one decoder layer a unit) each holds

    (weights + gradients + optimizer) / n + gathered + activations + loss tile

`gathered` is what is whole for a moment: two layers (one at work, the next fetched ahead) and the gradient of one, and
what is in no layer, embeddings and head, with their gradients where they are trained. It is in bfloat16 under autocast,
but for the head's gradient, which the loss adds up in float32. Each device has a batch of its own, so activations and
tile stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .memory import Memory, estimate

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

    from .schema import Recipe

SIZES = (16, 24, 40, 48, 80, 141)
"""Memory of common GPUs in GB, as they are sold; a little more, in powers of 1024, is really there."""
COUNTS = (1, 2, 4, 8)
USABLE = 0.9
"""The rest is for what the estimate leaves out: the CUDA context, short-lived buffers, fragmentation."""


@dataclass(frozen=True)
class Fit:
    """`devices` GPUs of `size` GB, the smallest that will do; each needs `needed` bytes. None: no common size will."""

    devices: int
    needed: int
    size: int | None


def fits(recipe: Recipe, config: PretrainedConfig, model: nn.Module, *, autocast: bool) -> tuple[Fit, ...]:
    """One entry for each number of devices, up to the one that the smallest GPU is enough for.

    A base in 4 bits is never sharded: bitsandbytes' bytes are not.
    """
    whole = estimate(recipe, config, model, device="cuda", autocast=autocast)
    shared = gathered_bytes(model, autocast=autocast)
    found = []
    for devices in COUNTS if recipe.model.quantization == "none" else (1,):
        needed = whole.total if devices == 1 else on_each(whole, shared, devices)
        found.append(Fit(devices, needed, smallest(needed)))
        if found[-1].size == SIZES[0]:
            break
    return tuple(found)


def on_each(whole: Memory, gathered: int, devices: int) -> int:
    """Bytes on each of several devices, as above."""
    return (
        (whole.weights + whole.gradients + whole.optimizer) // devices + gathered + whole.activations + whole.loss_tile
    )


def smallest(needed: int) -> int | None:
    """The smallest common size, in GB, that has room for this many bytes."""
    return next((size for size in SIZES if needed <= USABLE * size * 1e9), None)


def gathered_bytes(model: nn.Module, *, autocast: bool) -> int:
    """What FSDP has whole on every device for a moment."""
    from torch import nn

    blocks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = max(blocks, key=_size)
    layer = max(layers, key=_size)
    inside = {id(parameter) for parameter in layers.parameters()}
    outside = [parameter for parameter in model.parameters() if id(parameter) not in inside]

    def held(parameters) -> int:
        return sum(parameter.numel() * (2 if autocast else parameter.element_size()) for parameter in parameters)

    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    head = model.get_output_embeddings().weight
    gradients = sum(4 * p.numel() if p is head else held([p]) for p in outside if p.requires_grad)
    return 2 * held(layer.parameters()) + held(trained) + held(outside) + gradients


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def fit_lines(found: tuple[Fit, ...]) -> list[str]:
    """The table, a line for each number of devices."""
    from .machine import gib

    lines = []
    for fit in found:
        gpus = "1 GPU" if fit.devices == 1 else f"{fit.devices} GPUs with FSDP"
        if fit.size is None:
            lines.append(f"{gpus}: no, {gib(fit.needed)} needed on each")
        else:
            lines.append(f"{gpus}: from {fit.size} GB ({gib(fit.needed)} needed on each)")
    return lines
