"""CPU tensors that end (or begin) exactly at an unreadable page, so an access out of bounds of an interpreted Triton kernel
dies with SIGSEGV instead of reading the neighbour. Linux.

    x = guarded((rows, vocab), torch.bfloat16)                 # catches reads and writes past the end
    x = guarded((rows, vocab), torch.bfloat16, side="start")   # catches those before the start (a label of -100!)

The crash takes the process with it: `dies(function)` runs it in a forked child and tells whether it crashed.
One contiguous tensor per mapping; the mapping is never freed. Only the guarded side is exact: beyond the other side lies
up to a page of slack. An access that jumps more than GUARD bytes, or lands in another row of the same tensor, is not seen.
"""

import ctypes
import faulthandler
import math
import mmap
import os
import signal
import traceback

import torch

# Address space only, no memory. One page would not do: a label of a wrong slice reads tens of kilobytes away, and what
# is mapped there differs from process to process.
GUARD = 1 << 20

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def guarded(shape, dtype, side="end"):
    """An uninitialised tensor whose `side` ("end" or "start") touches a megabyte without access rights."""
    if side not in ("end", "start"):
        raise ValueError(f"side must be 'end' or 'start', not {side!r}")
    count, page = math.prod(shape), mmap.PAGESIZE
    size = count * dtype.itemsize
    usable = -(-size // page) * page
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    base = _libc.mmap(None, usable + 2 * GUARD, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    if base in (None, ctypes.c_void_p(-1).value):
        raise MemoryError("mmap failed")
    for guard in (base, base + GUARD + usable):
        if _libc.mprotect(guard, GUARD, 0):
            raise OSError(ctypes.get_errno(), "mprotect failed")
    start = base + GUARD + (usable - size if side == "end" else 0)
    buffer = (ctypes.c_char * size).from_address(start)
    return torch.frombuffer(buffer, dtype=dtype, count=count).view(shape)


def dies(function):
    """Runs the function in a forked child: True if it died with SIGSEGV, False if it came through.

    Raises:
        RuntimeError: it ended in another way; the child has printed its traceback.
    """
    child = os.fork()
    if child == 0:
        # pytest's, which would print every thread's stack of a death that is wanted
        faulthandler.disable()
        # os._exit: what the parent left unflushed is the parent's to write
        try:
            function()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGSEGV:
        return True
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
        return False
    raise RuntimeError(f"the child ended with wait status {status}, neither well nor with SIGSEGV")
