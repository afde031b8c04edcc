"""Peak memory of one call, relative to the memory of the process before it.

On the CPU it is the high-water mark of the resident pages, which Linux lets a process reset; other systems report none. On
a CUDA device it is the peak of torch's allocator. The caller subtracts the gradients that the call returns.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path


def peak_of(call: Callable[[], None], device_type: str) -> int | None:
    """Return bytes; None if this system cannot measure it."""
    gc.collect()
    if device_type == "cuda":
        return _peak_on_cuda(call)
    if not sys.platform.startswith("linux"):
        call()
        return None
    return _peak_of_process(call)


def _peak_on_cuda(call: Callable[[], None]) -> int:
    import torch

    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_of_process(call: Callable[[], None]) -> int:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        # memory that the C library kept after the warm-up would be reused without being counted
        libc.malloc_trim(0)
    # 5 resets the high-water mark; see proc(5)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    raise KeyError(name)
