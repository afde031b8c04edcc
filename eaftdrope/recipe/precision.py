"""In which types a run computes and keeps its weights: what the recipe says, or what the device is fast at."""

from __future__ import annotations

from .machine import Device, cpu_flags, training_device
from .schema import Recipe

# Of these processors it is known that bfloat16 is faster than float32. On ARM (bf16) nobody has measured.
_FAST_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})


def uses_bfloat16(recipe: Recipe) -> bool:
    """Whether the run computes under bfloat16 autocast; `auto` says yes where the device is fast at it."""
    if recipe.train.precision != "auto":
        return recipe.train.precision == "bfloat16"
    return fast_in_bfloat16(training_device())


def weights_dtype(recipe: Recipe, device: Device | None = None) -> str:
    """The type the weights are loaded in, as [`load_model`] takes it: `fast` is settled by the device, which is the one
    that training takes unless another is given."""
    if recipe.model.dtype != "fast":
        return recipe.model.dtype
    return "bfloat16" if fast_in_bfloat16(device or training_device()) else "float32"


def precision_line(recipe: Recipe, autocast: bool, device: Device) -> str:
    """For people, as a plan says it."""
    return f"{weights_dtype(recipe, device)} weights" + (", bfloat16 autocast" if autocast else "")


def fast_in_bfloat16(device: Device) -> bool:
    """Whether the device, one of this machine, is known to be faster in bfloat16 than in float32."""
    if device.kind == "cuda":
        import torch

        return torch.cuda.is_bf16_supported()
    if device.kind == "cpu":
        return bool(cpu_flags() & _FAST_FLAGS) and not slow_in_bfloat16()
    return device.kind == "xpu"


def slow_in_bfloat16() -> bool:
    """Whether torch has no fast product of bfloat16 matrices on this processor: it is then many times as fast in float32.
    The loss and the trainer decide by the same answer."""
    import torch

    from ..loss.products import has_instructions

    return not has_instructions(torch.bfloat16)
