"""The buffer of a tile of logits, kept between calls on a CPU: fresh memory costs a page fault every 4 KiB, several per
cent of a small call. Devices have an allocator that reuses freed memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Rows of a device's tile start at multiples of 16 elements, so that any vocabulary size is read in whole vectors.
_ALIGN = 16

_kept: list[Tensor] = []
_lock = threading.Lock()


@contextmanager
def tile_buffer(rows: int, columns: int, like: Tensor) -> Iterator[Tensor]:
    """Yield an uninitialised tensor `[rows, columns]` with the dtype and device of `like`. The kept memory has one user at
    a time; another thread, or a nested call, gets its own."""
    if like.device.type != "cpu":
        stride = -(-columns // _ALIGN) * _ALIGN
        yield like.new_empty(rows, stride)[:, :columns]
        return
    wanted = rows * columns * like.element_size()
    with _lock:
        memory = _kept.pop() if _kept else None
    if memory is None or memory.numel() < wanted:
        # free the smaller buffer before the larger one is allocated
        memory = None
        memory = torch.empty(wanted, dtype=torch.uint8)
    try:
        yield memory[:wanted].view(like.dtype).view(rows, columns)
    finally:
        with _lock:
            if not _kept:
                _kept.append(memory)


def release_buffers() -> None:
    """Return the kept memory to the system."""
    with _lock:
        _kept.clear()
