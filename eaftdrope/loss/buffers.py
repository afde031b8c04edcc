"""The tile of logits is kept between calls on a CPU: fresh memory costs a page fault every 4 KiB, several per cent of a
small call. Devices have an allocator that keeps what is freed."""

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
    """`[rows, columns]`, uninitialised, in the dtype and on the device of `like`. One user at a time; another thread, or
    a call within a call, gets memory of its own."""
    if like.device.type != "cpu":
        stride = -(-columns // _ALIGN) * _ALIGN
        yield like.new_empty(rows, stride)[:, :columns]
        return
    wanted = rows * columns * like.element_size()
    with _lock:
        memory = _kept.pop() if _kept else None
    if memory is None or memory.numel() < wanted:
        # the smaller one goes before the larger one comes
        memory = None
        memory = torch.empty(wanted, dtype=torch.uint8)
    try:
        yield memory[:wanted].view(like.dtype).view(rows, columns)
    finally:
        with _lock:
            if not _kept:
                _kept.append(memory)


def release_buffers() -> None:
    """Gives the kept tile back to the system."""
    with _lock:
        _kept.clear()
