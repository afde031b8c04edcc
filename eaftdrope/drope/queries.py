"""A temperature inside weight files: the query tensors are rewritten in place of a copy, everything else stays as it is.

The header of a safetensors file does not change (same names, shapes and types), so only the tensors' own bytes are
written, a few megabytes at a time, and the bytes that stood there go to one side file from which `undo` restores
them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from eaftdrope.errors import UserError

from .checkpoint import Tensor, read_header
from .temperature import query_rows, query_tensors, scaled_rows

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SAVED = "queries.raw"
_BLOCK = 4 << 20
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Patch(NamedTuple):
    """Bytes of `file` from `start` on that were replaced; the former ones stand in the side file, one after another."""

    file: str
    start: int
    length: int


def find_queries(folder: Path, files: dict[str, str], config: PretrainedConfig) -> dict[str, dict[str, Tensor]]:
    """File -> query tensors in it. `files` maps tensor names to files.

    Raises:
        UserError: no query tensor is known by its name, or one is quantised.
    """
    by_file: dict[str, dict[str, Tensor]] = defaultdict(dict)
    headers = {file: read_header(folder / file)[0] for file in sorted(set(files.values()))}
    for name in query_tensors(list(files), config):
        tensor = headers[files[name]][name]
        if tensor.dtype not in _DTYPES:
            raise UserError(
                f"{name} is stored as {tensor.dtype}: a temperature cannot be folded into quantised weights. Convert the "
                "model before it is quantised, or leave the temperature out."
            )
        by_file[files[name]][name] = tensor
    return dict(by_file)


def rescale(folder: Path, queries: dict[str, dict[str, Tensor]], beta: float, config, side: Path) -> list[Patch]:
    """Make every query `beta` times as long in the files of `folder`, which must be copies; former bytes go to `side`."""
    patches = []
    with side.open("wb") as saved:
        for file, tensors in queries.items():
            with (folder / file).open("r+b") as stream:
                for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
                    for patch in _blocks(file, name, tensor, config):
                        stream.seek(patch.start)
                        old = bytearray(stream.read(patch.length))
                        saved.write(old)
                        stream.seek(patch.start)
                        stream.write(_rescaled(name, tensor, old, beta, config))
                        patches.append(patch)
    return patches


def _blocks(file: str, name: str, tensor: Tensor, config) -> Iterator[Patch]:
    """The bytes of a tensor's query rows, at most `_BLOCK` (or one row) at a time."""
    row = tensor.length // tensor.shape[0]
    step = max(1, _BLOCK // row)
    for rows in query_rows(name, tensor.shape[0], config):
        for first in range(rows.start, rows.stop, step):
            yield Patch(file, tensor.start + first * row, (min(first + step, rows.stop) - first) * row)


def _rescaled(name: str, tensor: Tensor, old: bytearray, beta: float, config) -> bytes:
    import torch

    values = torch.frombuffer(old, dtype=getattr(torch, _DTYPES[tensor.dtype]))
    return scaled_rows(name, values, beta, config).view(torch.uint8).numpy().tobytes()


def restore(folder: Path, patches: list[Patch], side: Path) -> None:
    """The former bytes back into the files of `folder`, which must be copies."""
    with side.open("rb") as saved:
        for patch in patches:
            with (folder / patch.file).open("r+b") as stream:
                stream.seek(patch.start)
                stream.write(saved.read(patch.length))
