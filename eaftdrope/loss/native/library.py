"""Loading the compiled loss into this process, with the types of its functions.

The library is linked with no OpenMP runtime. It receives `GOMP_parallel` of the runtime that torch is linked with, so it
uses torch's own pool of threads; a second pool would spin on cores that the first one needs.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_float, c_int, c_int64, c_void_p
from pathlib import Path

import torch

from . import build

_POINTER, _SIZE = c_void_p, c_int64
_TRANSFORM = (c_int, c_float, c_float)

_STATISTICS = (
    *(_POINTER, c_int, _SIZE, _SIZE, _SIZE, _POINTER, *_TRANSFORM, _SIZE),
    *(_POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER),
)
_GRADIENT = (
    *(_POINTER, c_int, _SIZE, _SIZE, _SIZE, _POINTER, *_TRANSFORM),
    *(_POINTER, _POINTER, _POINTER, _POINTER),
)
_BASE = (_POINTER, _SIZE, *_TRANSFORM, c_int, c_int, _POINTER)

# Argument types of the functions of eaft_cpu.cpp, in order.
_ARGUMENTS = {
    "eaft_isa": (),
    "eaft_set_isa": (c_int,),
    "eaft_set_parallel": (_POINTER,),
    "eaft_tile_statistics": (*_STATISTICS, c_int),
    "eaft_tile_gradient": (*_GRADIENT, c_int),
    "eaft_anchored_statistics": (*_STATISTICS, *_BASE, c_int),
    "eaft_anchored_gradient": (*_GRADIENT, *_BASE, _POINTER, c_int),
    "eaft_tile_columns": (_POINTER, c_int, _SIZE, _SIZE, _SIZE, c_float, _POINTER, _POINTER, c_int),
    "eaft_add_rows": (_POINTER, c_int, _SIZE, _POINTER, c_int, _SIZE, _POINTER, _SIZE, _SIZE, c_float, c_int, c_int),
    "eaft_gather_columns": (_POINTER, c_int, _SIZE, _SIZE, _POINTER, _SIZE, _POINTER, c_int),
}


@functools.cache
def load() -> ctypes.CDLL | str:
    """Return the library, or the reason in one line why it cannot be used. Compiled at first use if it was not installed."""
    try:
        path = build.library_path()
    except build.BuildError as error:
        return f"the CPU kernels of the loss are not compiled: {error}"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return (
            f"the CPU kernels of the loss do not load ({error}). Delete {path} to have them compiled for this machine."
        )
    for name, types in _ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes = types
        function.restype = None if name == "eaft_set_parallel" else c_int
    library.parallel = _parallel_of_torch()  # pyrefly: ignore[missing-attribute]  # kept on the library for tests
    library.eaft_set_parallel(library.parallel)
    return library


def _parallel_of_torch() -> int | None:
    """Return the address of `GOMP_parallel` as torch would call it (GNU, LLVM and Intel runtimes have it), or None."""
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*")):
        try:
            # the symbol is searched for in the library and in the libraries it is linked with
            return ctypes.cast(ctypes.CDLL(str(path)).GOMP_parallel, c_void_p).value
        except (OSError, AttributeError):
            continue
    return None
