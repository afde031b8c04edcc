"""Tiles handed to a driver program and what it made of them: the binary format of driver.cpp.

Legend: R rows of a tile, V vocabulary.
"""

import os
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tests.loss.tile_cases import TileCase

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
THRESHOLD = 1e-3


@dataclass(frozen=True)
class Record:
    """A case and where its rows lie: `offset` elements after an aligned address, `row_stride` apart."""

    case: TileCase
    offset: int = 0
    row_stride: int | None = None

    @property
    def stride(self) -> int:
        return self.row_stride or self.case.logits.shape[1]

    def __str__(self) -> str:
        return f"{self.case}+{self.offset}" + (f"-stride{self.row_stride}" if self.row_stride else "")


def write_records(path: Path, records: list[Record]) -> None:
    with path.open("wb") as file:
        for record in records:
            case = record.case
            rows, vocab = case.logits.shape
            transform = case.transform
            file.write(
                struct.pack(
                    "6q4f",
                    *(DTYPES[case.logits.dtype], rows, vocab, record.stride, record.offset, min(case.topk or 0, vocab)),
                    *(transform.scale, transform.softcap or 0.0, THRESHOLD, 0.0),
                )
            )
            for tensor in (case.labels, case.weight, case.logits):
                file.write(_bytes(tensor))


def read_results(path: Path, records: list[Record]) -> list[dict[str, Tensor]]:
    """What the driver wrote, record by record."""
    data, at, results = bytearray(path.read_bytes()), 0, []

    def take(dtype: torch.dtype, *shape: int) -> Tensor:
        nonlocal at
        count = torch.Size(shape).numel()
        tensor = torch.frombuffer(data, dtype=dtype, count=count, offset=at) if count else torch.empty(0, dtype=dtype)
        at += count * dtype.itemsize
        return tensor.view(shape).clone()

    for record in records:
        rows, vocab = record.case.logits.shape
        result = {name: take(torch.float32, rows) for name in ("nll", "entropy", "topk_entropy", "maximum", "rest")}
        result["correct"] = take(torch.uint8, rows).bool()
        result["gradient"] = take(record.case.logits.dtype, rows, vocab)
        result["keep"] = take(torch.uint8, vocab).bool()
        result["mass"] = take(torch.float32, vocab)
        results.append(result)
    assert at == len(data), "the driver wrote more than its records"
    return results


def run_driver(driver: Path, folder: Path, records: list[Record], **environment: str) -> subprocess.CompletedProcess:
    """Runs the driver on the records; results are at `folder / "results"`."""
    write_records(folder / "records", records)
    command = [driver, folder / "records", folder / "results"]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=300)


def compute(library, record: Record) -> dict[str, Tensor]:
    """What a library makes of a record, in the layout the record asks for."""
    case = record.case
    rows, vocab = case.logits.shape
    device = case.logits.device
    # storages are aligned, so the offset alone decides where the rows start
    buffer = torch.empty(record.offset + rows * record.stride, dtype=case.logits.dtype, device=device)
    tile = buffer.as_strided((rows, vocab), (record.stride, 1), record.offset)
    tile.copy_(case.logits)
    stats = library.tile_statistics(tile, case.labels, case.transform, case.topk)
    library.tile_gradient_(tile, case.labels, stats, case.weight, case.transform)
    keep, mass = library.tile_columns(tile, THRESHOLD)
    topk = torch.zeros(rows, device=device) if stats.topk_entropy is None else stats.topk_entropy
    return {
        **{"nll": stats.nll, "entropy": stats.entropy, "topk_entropy": topk, "maximum": stats.maximum},
        **{"rest": stats.rest, "correct": stats.correct, "gradient": tile.contiguous(), "keep": keep, "mass": mass},
    }


def differences(record: Record, actual: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Names of the results that are not equal to the last bit."""
    return [f"{record}: {name}" for name in expected if _bytes(actual[name]) != _bytes(expected[name])]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
