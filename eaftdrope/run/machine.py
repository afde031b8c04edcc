"""What this machine has: devices and their memory. Imports torch when asked.

In which types a run computes and keeps its weights: what the recipe says, or what the device is fast at.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from eaftdrope.recipe.schema import Recipe

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """`kind` is torch's device type; `memory` in bytes: all of it (None where it cannot be known)."""

    kind: str
    name: str
    memory: int | None


def accelerators() -> list[Device]:
    """The cuda (also ROCm), xpu and mps devices that torch sees."""
    import torch

    found = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            found.append(Device("cuda", properties.name, properties.total_memory))
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        for index in range(torch.xpu.device_count()):
            properties = torch.xpu.get_device_properties(index)
            found.append(Device("xpu", properties.name, properties.total_memory))
    if torch.backends.mps.is_available():
        found.append(Device("mps", "Apple GPU", torch.mps.recommended_max_memory()))
    return found


def training_device() -> Device:
    """The device that training takes: the first accelerator, else the processor with its memory."""
    found = accelerators()
    return found[0] if found else Device("cpu", cpu_name(), ram())


def ram() -> int:
    """Bytes of memory this process may use: the machine's, or its container's limit where that is lower."""
    import psutil

    total = psutil.virtual_memory().total
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(text)) if text.isdecimal() else total


def keep_freed_memory() -> bool:
    """Lets large tensors reuse freed memory instead of having the kernel map and clear fresh pages at every step; for
    training on the processor. Returns whether the C library took it: glibc does, others have no such setting."""
    import ctypes

    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    # from malloc.h; see mallopt(3): never by mmap, never give back the top of the heap
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    return libc.mallopt(M_MMAP_MAX, 0) == 1 and libc.mallopt(M_TRIM_THRESHOLD, -1) == 1


def cpu_flags() -> set[str]:
    """The processor's feature flags as Linux names them (avx512f, avx512_bf16, ...); empty on other systems."""
    return set(_cpuinfo("flags").split()) | set(_cpuinfo("Features").split())


def cpu_name() -> str:
    import platform

    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(key: str) -> str:
    file = Path("/proc/cpuinfo")
    if not file.is_file():
        return ""
    for line in file.read_text(errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def gib(size: float) -> str:
    """Bytes for people: `85 MB`, `2.31 GB` (powers of 1024, as tools that watch memory count)."""
    if size < GIB:
        return f"{size / 2**20:.0f} MB"
    return f"{size / GIB:.2f} GB" if size < 100 * GIB else f"{size / GIB:.0f} GB"


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

    from eaftdrope.loss.products import has_instructions

    return not has_instructions(torch.bfloat16)
