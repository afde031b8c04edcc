"""Weights on the disk, a few rows at a time: the safetensors files of a model, and a file of the same form that is written
tensor by tensor.

A file of safetensors is the length of its header (8 bytes, little-endian), the header (JSON: name -> dtype, shape, offsets),
and the tensors one after the other. It is read with the library; each read maps the file only for a moment, so that pages
that were read do not add up.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from eaftdrope.errors import UserError
from eaftdrope.models import resolve_model
from eaftdrope.models.loading import find_file

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_BLOCK_BYTES = 64 << 20


@dataclass(frozen=True)
class TensorPlace:
    """A tensor in a file; `dtype` is None if it has no floating-point type that is read here."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None

    @property
    def is_number(self) -> bool:
        """True for a tensor without dimensions."""
        return not self.shape

    def rows(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (index of the first row, rows) in blocks of at most 64 MiB in float32, in the tensor's own type."""
        with _readable(self.file), safe_open(self.file, "pt") as opened:
            if self.is_number:
                yield 0, opened.get_tensor(self.name)[None]
                return
        size = max(1, self.shape[0] * _BLOCK_BYTES // max(1, 4 * self._count))
        for first in range(0, self.shape[0], size):
            # opened each time: the pages of a map count as memory until it is closed
            with _readable(self.file), safe_open(self.file, "pt") as opened:
                block = opened.get_slice(self.name)[first : first + size].clone()
            yield first, block

    @property
    def _count(self) -> int:
        return torch.Size(self.shape).numel()


def find_tensors(reference: str, *, revision: str | None = None) -> dict[str, TensorPlace]:
    """Return the tensors of a model by name, in the order of its files; of a model on the hub the files are fetched.

    Raises:
        UserError: an unknown model, or one without safetensors.
    """
    source = resolve_model(reference, revision=revision)
    places: dict[str, TensorPlace] = {}
    for file in _files(source.path, reference, source.revision):
        with _readable(file), safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                part = opened.get_slice(name)
                places[name] = TensorPlace(file, name, tuple(part.get_shape()), _DTYPES.get(part.get_dtype()))
    return places


def _files(place: str, reference: str, revision: str | None) -> list[Path]:
    index = find_file(place, INDEX, revision=revision)
    names = [SINGLE]
    if index is not None:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    files = [find_file(place, name, revision=revision) for name in names]
    missing = [name for name, file in zip(names, files) if file is None]
    if missing:
        raise UserError(
            f"{reference!r} has no {missing[0]}, and only weights in safetensors are read tensor by tensor. Save the model "
            "once with transformers' save_pretrained, and use that folder."
        )
    return [file for file in files if file is not None]


class TensorWriter:
    """A safetensors file that is written tensor by tensor, in the order of its header.

    Args:
        file: opened for writing in binary mode.
        tensors: name -> (dtype, shape).
    """

    def __init__(self, file: IO[bytes], tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        self._file = file
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (dtype, shape) in tensors.items():
            begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        # the tensors begin at a multiple of 8 bytes
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)

    def write(self, rows: Tensor) -> None:
        """Write the next rows of the current tensor, in the type of the header."""
        self._file.write(rows.contiguous().reshape(-1).view(torch.uint8).numpy())


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Turns the library's errors on a file into a UserError."""
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"{file} cannot be read ({error}). Download or copy it again.") from error
