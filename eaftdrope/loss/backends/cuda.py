"""The CUDA C++ backend: loads `libeaft_cuda.so` (sources, derivation and build script in `cuda/`) and launches its kernels
on PyTorch's current stream. Nothing here waits for the device.

The library is searched for, in this order: the file in the environment variable EAFTDROPE_CUDA_LIBRARY (if it is set,
nowhere else), this folder, the cache (`eaftdrope.files`).

Legend: R rows of a tile, V vocabulary.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from eaftdrope.files import cache_dir

from .tile import LogitsTransform, TileStats

LIBRARY_NAME = "libeaft_cuda.so"
ABI_VERSION = 1
# a wheel carries the sources inside the package
_PACKAGED = (Path(__file__).parents[2] / "_cuda").is_dir()
BUILD_COMMAND = "python -m eaftdrope._cuda.build" if _PACKAGED else "python cuda/build.py"
BUILD = f"{BUILD_COMMAND} (needs nvcc)"

_SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
_POINTER, _INT64, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_TILE = [_POINTER, _INT64, _POINTER, _INT64, _INT64, _FLOAT, _FLOAT]
_SIGNATURES = {
    "tile_statistics": [*_TILE, _INT, *[_POINTER] * 6, _POINTER],
    "tile_gradient": [*_TILE, *[_POINTER] * 4, _POINTER],
    "tile_columns": [_POINTER, _INT64, _INT64, _INT64, _FLOAT, _POINTER, _POINTER, _POINTER],
}
# Errors of the CUDA runtime if the library has no code for a device.
_NOT_COVERED = ("cudaErrorNoKernelImageForDevice", "cudaErrorInvalidDeviceFunction", "cudaErrorUnsupportedPtxVersion")


@contextmanager
def current_stream(device: torch.device) -> Iterator[int]:
    """Yield the stream to launch on, with its device made the current one."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream


class Library:
    """One loaded library.

    Args:
        path (`Path`):
            The shared library.
        stream (callable, *optional*):
            From a device to a context that yields the stream to launch on (`None`: the default stream).

    Raises:
        OSError: it cannot be loaded.
        RuntimeError: it was built from other sources than this file expects.
    """

    def __init__(
        self, path: Path, stream: Callable[[torch.device], AbstractContextManager[int | None]] = current_stream
    ):
        self.path, self._stream = path, stream
        self._c = ctypes.CDLL(str(path))
        version = self._c.eaft_abi_version() if hasattr(self._c, "eaft_abi_version") else "none"
        if version != ABI_VERSION:
            raise RuntimeError(
                f"{path} has interface {version}, this version of eaftdrope needs {ABI_VERSION}. Build it again: {BUILD}."
            )
        self._c.eaft_error_name.restype = self._c.eaft_architectures.restype = ctypes.c_char_p
        for name, arguments in _SIGNATURES.items():
            for suffix in _SUFFIXES.values():
                getattr(self._c, f"eaft_{name}_{suffix}").argtypes = arguments

    @property
    def architectures(self) -> str:
        """The architectures it was built for: `"80 90 ..."`."""
        return self._c.eaft_architectures().decode()

    def probe(self, device_index: int) -> str | None:
        """Return the name of the error that keeps the library from working on that device, or None."""
        error = self._c.eaft_probe(device_index)
        return self._error_name(error) if error else None

    def tile_statistics(
        self, logits_RV: Tensor, labels_R: Tensor, transform: LogitsTransform, topk: int | None
    ) -> TileStats:
        if topk is not None and topk < 1:
            raise ValueError(f"topk is {topk}: the entropy of the K largest logits needs K >= 1 (or None for none).")
        rows, device = logits_RV.shape[0], logits_RV.device
        labels_R = _vector(labels_R, torch.int64, logits_RV, "labels")
        nll_R, entropy_R, maximum_R, rest_R, topk_R = (
            torch.empty(rows, dtype=torch.float32, device=device) if wanted else None
            for wanted in (True, True, True, True, topk is not None)
        )
        correct_R = torch.empty(rows, dtype=torch.bool, device=device)
        outputs = (nll_R, entropy_R, topk_R, correct_R, maximum_R, rest_R)
        k = 0 if topk is None else min(topk, logits_RV.shape[1])
        self._launch("tile_statistics", logits_RV, *_tile(logits_RV, labels_R, transform), k, *map(_pointer, outputs))
        return TileStats(
            nll=nll_R, entropy=entropy_R, topk_entropy=topk_R, correct=correct_R, maximum=maximum_R, rest=rest_R
        )

    def tile_gradient_(
        self, logits_RV: Tensor, labels_R: Tensor, stats: TileStats, weight_R: Tensor, transform: LogitsTransform
    ) -> None:
        labels_R = _vector(labels_R, torch.int64, logits_RV, "labels")
        named = {"nll": stats.nll, "maximum": stats.maximum, "rest": stats.rest, "weight": weight_R}
        inputs = [_vector(vector_R, torch.float32, logits_RV, name) for name, vector_R in named.items()]
        self._launch("tile_gradient", logits_RV, *_tile(logits_RV, labels_R, transform), *map(_pointer, inputs))

    def tile_columns(self, grad_RV: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
        rows, vocab = grad_RV.shape
        keep_V = torch.empty(vocab, dtype=torch.bool, device=grad_RV.device)
        mass_V = torch.empty(vocab, dtype=torch.float32, device=grad_RV.device)
        shape = (_pointer(grad_RV), grad_RV.stride(0), rows, vocab)
        self._launch("tile_columns", grad_RV, *shape, threshold, _pointer(keep_V), _pointer(mass_V))
        return keep_V, mass_V

    def _launch(self, name: str, tile_RV: Tensor, *arguments: float | None) -> None:
        if tile_RV.dtype not in _SUFFIXES:
            raise ValueError(f"{name}: a tile of {tile_RV.dtype}. The CUDA kernels support {_dtypes()}.")
        if tile_RV.stride(1) != 1:
            raise ValueError(f"{name}: columns {tile_RV.stride(1)} elements apart. They must be contiguous.")
        with self._stream(tile_RV.device) as stream:
            error = getattr(self._c, f"eaft_{name}_{_SUFFIXES[tile_RV.dtype]}")(*arguments, stream)
        if error:
            raise RuntimeError(
                f"{name} on {tile_RV.device} failed to launch: {self._error_name(error)} ({error}), tile "
                f"{tuple(tile_RV.shape)} {tile_RV.dtype}. Library: {self.path}, built for {self.architectures}."
            )

    def _error_name(self, error: int) -> str:
        return self._c.eaft_error_name(error).decode()


def library_path() -> Path | None:
    """Return the path of the library, or None. A file in the environment variable is returned even if it does not exist."""
    named = os.environ.get("EAFTDROPE_CUDA_LIBRARY")
    if named:
        return Path(named)
    folders = (Path(__file__).parent, cache_dir())
    return next((path for folder in folders if (path := folder / LIBRARY_NAME).exists()), None)


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return the reason why the kernels cannot work on tensors of that device and dtype, and what to do, or None."""
    if device.type != "cuda" or torch.version.hip is not None:
        what = "ROCm devices" if torch.version.hip is not None and device.type == "cuda" else f"{device.type!r} tensors"
        return f"the cuda backend works on NVIDIA devices, not on {what}. Use another backend."
    if dtype not in _SUFFIXES:
        return f"the cuda backend supports {_dtypes()} logits, not {dtype}. Use the torch backend."
    path = library_path()
    if path is None:
        return f"the cuda backend is not built: no {LIBRARY_NAME}. Build it with {BUILD}."
    if not path.is_file():
        return f"EAFTDROPE_CUDA_LIBRARY is {path}, which is not a file. Unset it, or build that file: {BUILD}."
    try:
        library = _load(path)
    except (OSError, RuntimeError) as error:
        return f"the cuda backend cannot load {path}: {error}"
    index = device.index if device.index is not None else _current_device()
    error = library.probe(index)
    if error is None:
        return None
    if error in _NOT_COVERED:
        capability = "".join(map(str, torch.cuda.get_device_capability(index)))
        return (
            f"{path} has no code for cuda:{index}, which is sm_{capability}; it was built for {library.architectures} "
            f"({error}). Build it for yours: {BUILD_COMMAND} --arch {capability}."
        )
    return f"no CUDA device {index} can be used: {error}. Install or update the NVIDIA driver (nvidia-smi shows it)."


def tile_statistics(logits_RV: Tensor, labels_R: Tensor, transform: LogitsTransform, topk: int | None) -> TileStats:
    """Return the statistics of every row of a tile, which is only read.

    Args:
        logits_RV (`Tensor` `[R, V]`, float32, bfloat16 or float16): raw projections, `stride(1) == 1`.
        labels_R (`Tensor` `[R]`, int64): in `[0, V)`; another one gives a NaN.
        transform ([`LogitsTransform`]): from projections to logits.
        topk (`int`, *optional*): K of the top-K entropy; exact for every K, slower beyond 512.

    Raises:
        ValueError: dtypes, shapes or strides that the kernels do not support.
        RuntimeError: no library (OSError: one that cannot be loaded), or the launch failed.
    """
    return _library().tile_statistics(logits_RV, labels_R, transform, topk)


def tile_gradient_(
    logits_RV: Tensor, labels_R: Tensor, stats: TileStats, weight_R: Tensor, transform: LogitsTransform
) -> None:
    """Overwrite the tile `[R, V]`, or a slice of the vocabulary with labels counted from its start, with
    `w (softmax(z) - onehot(y))` times the derivative of the transform.

    Raises:
        ValueError: dtypes, shapes or strides that the kernels do not support.
        RuntimeError: no library (OSError: one that cannot be loaded), or the launch failed.
    """
    _library().tile_gradient_(logits_RV, labels_R, stats, weight_R, transform)


def tile_columns(grad_RV: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Return the columns of a gradient tile `[R, V]` in which an absolute value reaches the threshold or is NaN (`[V]`
    bool), and the sum of every column (`[V]` float32).

    Raises:
        ValueError: a dtype or strides that the kernel does not support.
        RuntimeError: no library (OSError: one that cannot be loaded), or the launch failed.
    """
    return _library().tile_columns(grad_RV, threshold)


@functools.cache
def _load(path: Path) -> Library:
    return Library(path)


def _library() -> Library:
    path = library_path()
    if path is None:
        raise RuntimeError(f"the cuda backend is not built: no {LIBRARY_NAME}. Build it with {BUILD}.")
    return _load(path)


def _current_device() -> int:
    return torch.cuda.current_device() if torch.cuda.is_available() else 0


def _tile(logits_RV: Tensor, labels_R: Tensor, transform: LogitsTransform) -> tuple:
    softcap = 0.0 if transform.softcap is None else transform.softcap
    rows, vocab = logits_RV.shape
    return (
        _pointer(logits_RV), logits_RV.stride(0), _pointer(labels_R), rows, vocab, transform.scale, softcap
    )  # fmt: skip


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _vector(vector_R: Tensor, dtype: torch.dtype, tile_RV: Tensor, name: str) -> Tensor:
    """Return the vector with contiguous elements, as the kernels read it."""
    if vector_R.dtype != dtype or vector_R.shape != tile_RV.shape[:1] or vector_R.device != tile_RV.device:
        raise ValueError(
            f"{name} is {vector_R.dtype} {tuple(vector_R.shape)} on {vector_R.device}; a tile {tuple(tile_RV.shape)} on "
            f"{tile_RV.device} needs {dtype} [{tile_RV.shape[0]}] on the same device."
        )
    return vector_R.contiguous()


def _dtypes() -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in _SUFFIXES)
