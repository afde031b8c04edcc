"""A temperature inside weight files: the query tensors are rewritten in place of a copy, everything else stays as it is.

The header of a safetensors file does not change (same names, shapes and types), so only the tensors' own bytes are
written, one tensor in memory at a time, and the bytes that stood there go to one side file from which `undo` restores
them.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..errors import UserError
from .checkpoint import Tensor, read_header
from .temperature import fold, query_tensors

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SAVED = "queries.bin"
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
    import torch

    patches = []
    with side.open("wb") as saved:
        for file, tensors in queries.items():
            with (folder / file).open("r+b") as stream:
                for name, place in sorted(tensors.items(), key=lambda item: item[1].start):
                    stream.seek(place.start)
                    old = bytearray(stream.read(place.length))
                    saved.write(old)
                    dtype = getattr(torch, _DTYPES[place.dtype])
                    tensor = torch.frombuffer(old, dtype=dtype).reshape(place.shape)
                    new = fold(name, tensor, beta, config)
                    stream.seek(place.start)
                    stream.write(new.contiguous().view(torch.uint8).numpy().tobytes())
                    patches.append(Patch(file, place.start, place.length))
    return patches


def restore(folder: Path, patches: list[Patch], side: Path) -> None:
    """The former bytes back into the files of `folder`, which must be copies."""
    with side.open("rb") as saved:
        for patch in patches:
            with (folder / patch.file).open("r+b") as stream:
                stream.seek(patch.start)
                stream.write(saved.read(patch.length))
