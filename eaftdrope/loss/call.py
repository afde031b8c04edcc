"""One call of the operator: its settings, and how it is carried out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .backends import select_backend
from .backends.tile import LogitsTransform
from .compute import Options, Result, compute
from .gates import Gate
from .gradients import Needed
from .rows import TrainedRows, trained_rows

# Bytes of one tile of logits. 160 MiB holds 552 bfloat16 rows of a 151,936-token vocabulary: enough rows for a GEMM to
# run at full speed on a CPU. A device wants more rows to fill it.
TILE_BYTES = {"cpu": 160 << 20}
TILE_BYTES_DEVICE = 512 << 20

# And at least 512 bfloat16 rows, or 256 in float32: every tile reads and writes the whole weight gradient, which with
# fewer rows takes as long as the GEMM itself (a vocabulary of 262,144 at 256 rows: 1.3 times the cost of 512).
_TILE_BYTES_PER_TOKEN = 1024


@dataclass(frozen=True)
class Call:
    """Settings of a call; see [`fused_linear_eaft`] for their meaning."""

    gate: Gate
    logit_scale: float
    softcap: float | None
    backend: str
    tile_bytes: int | None
    tail_threshold: float | None
    gate_threshold: float
    recompute: bool
    ignore_index: int


def default_tile_bytes(tile_bytes: int | None, device: torch.device, vocab_size: int) -> int:
    """The bytes asked for, or what suits the device and the vocabulary."""
    if tile_bytes is not None:
        return tile_bytes
    return max(TILE_BYTES.get(device.type, TILE_BYTES_DEVICE), _TILE_BYTES_PER_TOKEN * vocab_size)


def run(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    sequence_N: Tensor | None,
    call: Call,
    needed: Needed,
) -> tuple[Result, TrainedRows]:
    """Carries a call out; the gradients that are `needed` come with it."""
    rows = trained_rows(labels_N, sequence_N, call.ignore_index, weight_VH.shape[0])
    if rows.is_static and not call.gate.row_local:
        raise RuntimeError(
            f"the gate {call.gate.formula} compares tokens with each other and can not be captured in a CUDA graph, where "
            "ignored rows can not be told apart. Use a gate that looks at one token at a time, such as eaft."
        )
    options = Options(
        gate=call.gate,
        transform=LogitsTransform(call.logit_scale, call.softcap),
        backend=select_backend(call.backend, hidden_NH.device, hidden_NH.dtype),
        tile_bytes=default_tile_bytes(call.tile_bytes, hidden_NH.device, weight_VH.shape[0]),
        tail_threshold=call.tail_threshold,
        gate_threshold=call.gate_threshold,
        recompute=call.recompute,
    )
    with torch.autocast(hidden_NH.device.type, enabled=False):
        return compute(hidden_NH, weight_VH, bias_V, rows, options, needed), rows
