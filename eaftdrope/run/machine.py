"""The machine: its devices and their memory, the processes of a launch, its precision, the installed packages."""

from __future__ import annotations

import ctypes
import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from eaftdrope.loss import products

GIB = 2**30
_PACKAGES = ("eaftdrope", "torch", "transformers", "trl", "peft", "accelerate", "datasets")
# CPUs with these flags were measured to be faster in bfloat16 than in float32. ARM's bf16 has not been measured.
_FAST_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})


@dataclass(frozen=True)
class Device:
    """A device. `kind` is torch's device type; `memory` is its total memory in bytes, None if unknown."""

    kind: str
    name: str
    memory: int | None


def accelerators() -> list[Device]:
    """The cuda (also ROCm), xpu and mps devices that torch finds."""
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
    """The device that training uses: the first accelerator, else the CPU."""
    found = accelerators()
    return found[0] if found else Device("cpu", cpu_name(), ram())


def ram() -> int:
    """Bytes of memory that this process may use: the machine's, or its container's limit where that is lower."""
    import psutil

    total = psutil.virtual_memory().total
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(text)) if text.isdecimal() else total


def keep_freed_memory() -> bool:
    """Let large tensors reuse freed memory, so that the kernel need not map and clear fresh pages in every step.

    For training on the CPU. Returns whether the C library accepted the setting: glibc does, others have none.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    # from malloc.h; see mallopt(3): never by mmap, never give back the top of the heap
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    return libc.mallopt(M_MMAP_MAX, 0) == 1 and libc.mallopt(M_TRIM_THRESHOLD, -1) == 1


def cpu_flags() -> set[str]:
    """Feature flags of the CPU as Linux names them (avx512f, avx512_bf16, ...); empty on other systems."""
    return set(_cpuinfo("flags").split()) | set(_cpuinfo("Features").split())


def cpu_name() -> str:
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


def format_bytes(size: float) -> str:
    """A size for people: `85 MB`, `2.31 GB` (powers of 1024, as memory monitors count)."""
    if size < GIB:
        return f"{size / 2**20:.0f} MB"
    return f"{size / GIB:.2f} GB" if size < 100 * GIB else f"{size / GIB:.0f} GB"


# Processes


def sharding_engine() -> str | None:
    """The engine that the launcher chose to shard the weights with; None if each process has all of them."""
    # imported here: a measurement reads this file too, beside few packages
    from accelerate.utils import str_to_bool

    if str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false")):
        return "FSDP"
    if is_deepspeed_zero3_enabled() or os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3":
        return "DeepSpeed ZeRO-3"
    return None


# Precision


def uses_bfloat16(precision: str) -> bool:
    """True if `train.precision` means bfloat16 autocast; `auto` does where the device is fast at it."""
    if precision != "auto":
        return precision == "bfloat16"
    return fast_in_bfloat16(training_device())


def weights_dtype(dtype: str, device: Device | None = None) -> str:
    """`model.dtype` with `fast` resolved for a device, by default the one that training uses."""
    if dtype != "fast":
        return dtype
    return "bfloat16" if fast_in_bfloat16(device or training_device()) else "float32"


def precision_line(dtype: str, autocast: bool, device: Device) -> str:
    """The precision in the words of a plan: `float32 weights, bfloat16 autocast`."""
    return f"{weights_dtype(dtype, device)} weights" + (", bfloat16 autocast" if autocast else "")


def fast_in_bfloat16(device: Device) -> bool:
    """True if the device, one of this machine, is known to be faster in bfloat16 than in float32."""
    if device.kind == "cuda":
        return torch.cuda.is_bf16_supported()
    if device.kind == "cpu":
        return bool(cpu_flags() & _FAST_FLAGS) and not slow_in_bfloat16()
    return device.kind == "xpu"


def slow_in_bfloat16() -> bool:
    """True if torch has no fast bfloat16 matrix product on this CPU, where float32 is then many times as fast.

    The loss and the trainer decide by the same function.
    """
    return not products.has_instructions(torch.bfloat16)


def versions() -> dict[str, str]:
    """Versions of the packages that decide a result."""
    return {name: version(name) for name in _PACKAGES}
