"""The loss under tensor parallelism with the head gathered, and with the head sharded by vocabulary:
`python -m benchmarks.loss.tensor_parallel`.

Each rank is a process on one thread; they communicate through gloo. Both ways compute value and gradients of the same rows
on every rank, from the shard of the head that the rank holds. In a round they take turns. Memory is what a call needs beyond
its inputs, at its peak, and what it returns is included: the gradients of the hidden states and of the shard.

Legend: P ranks, N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import torch.multiprocessing
import typer
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard

from benchmarks.command import as_typed, run_typer
from eaftdrope.files import write_atomically
from eaftdrope.loss import VocabularyShard, fused_linear_eaft
from eaftdrope.loss.backends import select_backend
from eaftdrope.loss.buffers import release_buffers
from eaftdrope.peak_memory import peak_of

from .cases import SHAPES, choose
from .results import environment

GATHERED, PARALLEL = "head gathered", "vocabulary-parallel"
_SEED = 20261128
# numbers per row that are merged: four statistics, and the 20 largest logits of the gate `eaft`
_MERGED = 4 + 20


def _gathered(hidden_ND: Tensor, weight: DTensor, labels_N: Tensor) -> Tensor:
    return fused_linear_eaft(hidden_ND, weight.full_tensor(grad_placements=[Partial("avg")]), labels_N)


def _parallel(hidden_ND: Tensor, weight: DTensor, labels_N: Tensor) -> Tensor:
    part = weight.to_local(grad_placements=[Shard(0)])
    return fused_linear_eaft(hidden_ND, part, labels_N, shard=VocabularyShard.chunked(weight.shape[0]))


METHODS = {GATHERED: _gathered, PARALLEL: _parallel}


class Traffic:
    """Counts the bytes that this rank receives in the collectives of the vocabulary-parallel loss."""

    def __init__(self, ranks: int) -> None:
        self.gathered = self.reduced = 0
        self._ranks, self._gather, self._reduce = ranks, dist.all_gather, dist.all_reduce

    def __enter__(self) -> Traffic:
        dist.all_gather, dist.all_reduce = self._count_gather, self._count_reduce
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_gather, dist.all_reduce = self._gather, self._reduce

    def _count_gather(self, parts: list[Tensor], value: Tensor, **options: object) -> object:
        self.gathered += (self._ranks - 1) * value.nbytes
        return self._gather(parts, value, **options)

    def _count_reduce(self, value: Tensor, **options: object) -> object:
        self.reduced += 2 * (self._ranks - 1) * value.nbytes // self._ranks
        return self._reduce(value, **options)


def _inputs(rank: int, ranks: int, rows: int, hidden_size: int, vocabulary: int, dtype: torch.dtype):
    """Hidden states and labels, the same on every rank, and the head, of which a rank draws its shard."""
    generator = torch.Generator().manual_seed(_SEED)
    hidden_ND = torch.randn(rows, hidden_size, generator=generator).to(dtype)
    labels_N = torch.randint(0, vocabulary, (rows,), generator=generator)
    size = VocabularyShard.chunked(vocabulary).sizes[rank]
    own = torch.empty(size, hidden_size, dtype=dtype)
    generator.manual_seed(_SEED + 1 + rank)
    own.normal_(std=1 / math.sqrt(hidden_size), generator=generator)
    mesh = init_device_mesh("cpu", (ranks,))
    head = DTensor.from_local(
        own, mesh, [Shard(0)], shape=torch.Size((vocabulary, hidden_size)), stride=(hidden_size, 1)
    )
    return hidden_ND, head, labels_N


def _call(loss: Callable[..., Tensor], hidden_ND: Tensor, head: DTensor, labels_N: Tensor) -> tuple[Tensor, ...]:
    leaves = hidden_ND.detach().requires_grad_(), head.detach().requires_grad_()
    value = loss(*leaves, labels_N)
    value.backward()
    return value.detach(), *(leaf.grad for leaf in leaves)


def _difference(gradient: Tensor, other: Tensor) -> float:
    own, other = (value.to_local() if isinstance(value, DTensor) else value for value in (gradient, other))
    return float((own.float() - other.float()).norm() / other.float().norm())


def measure(rows: int, hidden_size: int, vocabulary: int, dtype: torch.dtype, repeat: int) -> dict[str, dict]:
    """Measure both ways on this rank of the process group, which all ranks must call."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    inputs = _inputs(rank, ranks, rows, hidden_size, vocabulary, dtype)
    found, measured, seconds = {}, {}, {name: [] for name in METHODS}
    for name, loss in METHODS.items():
        _call(loss, *inputs)
        # the tiles that were kept for the next call are part of its memory
        release_buffers()
        with Traffic(ranks) as traffic:
            peak = peak_of(lambda loss=loss, name=name: found.update({name: _call(loss, *inputs)}), "cpu")
        measured[name] = {"peak_bytes": peak}
        if name == PARALLEL:
            measured[name] |= {"merge_bytes": traffic.gathered, "gradient_bytes": traffic.reduced}
    differences = [_difference(*pair) for pair in zip(found.pop(PARALLEL), found.pop(GATHERED), strict=True)]
    measured[PARALLEL]["difference"] = dict(zip(("loss", "hidden", "weight"), differences, strict=True))
    for _ in range(repeat):
        for name, loss in METHODS.items():
            dist.barrier()
            started = time.process_time()
            _call(loss, *inputs)
            seconds[name].append(time.process_time() - started)
    for name, values in seconds.items():
        measured[name]["cpu_seconds"] = statistics.median(values)
    return measured


def received(rows: int, hidden_size: int, dtype: torch.dtype, ranks: int) -> dict[str, int]:
    """The bytes that a rank receives, by formula."""
    return {
        "merge_bytes": (ranks - 1) * (rows * 4 * _MERGED + 16),
        "gradient_bytes": 2 * (ranks - 1) * rows * hidden_size * dtype.itemsize // ranks,
    }


def _work(rank: int, ranks: int, store: str, sizes: tuple[int, int, int], dtype: str, repeat: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    collected: list[dict] = [{}] * ranks
    dist.all_gather_object(collected, measure(*sizes, getattr(torch, dtype), repeat))
    if rank == 0:
        Path(store).with_name("found.json").write_text(json.dumps(collected))
    dist.destroy_process_group()


def tensor_parallel(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "qwen",
    rows: Annotated[int, typer.Option(min=1, help="Tokens.")] = 256,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    ranks: Annotated[int, typer.Option(min=2, help="Processes.")] = 2,
    repeat: Annotated[int, typer.Option(min=1, help="Rounds.")] = 3,
    output: Annotated[Path | None, typer.Option(help="File of results, JSON.", show_default=False)] = None,
) -> None:
    """Measure the loss under tensor parallelism: memory and CPU seconds per rank, and the bytes that a rank receives."""
    sizes = SHAPES[choose(shape, list(SHAPES), "--shape")[0]]
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, str(Path(folder) / "store"), (rows, sizes.hidden_size, sizes.vocabulary), dtype, repeat)
        torch.multiprocessing.spawn(_work, arguments, nprocs=ranks)
        collected = json.loads((Path(folder) / "found.json").read_text())
    formula = received(rows, sizes.hidden_size, getattr(torch, dtype), ranks)
    counted = {name: collected[0][PARALLEL][name] for name in formula}
    assert counted == formula, (counted, formula)
    about = {
        "what": "value and gradients of the gated loss on every rank of a tensor-parallel group, by the way the head is read",
        "command": as_typed("benchmarks.loss.tensor_parallel", sys.argv[1:]),
        "shape": {"name": shape, "rows": rows, "hidden_size": sizes.hidden_size, "vocabulary": sizes.vocabulary},
        "dtype": dtype,
        "ranks": ranks,
        "backend": select_backend("auto", torch.device("cpu"), getattr(torch, dtype)).name,
        "rounds": repeat,
        "bytes_received_per_row": {name: value / rows for name, value in counted.items()},
        "environment": environment(None),
        "by_rank": collected,
    }
    print(json.dumps({key: about[key] for key in ("shape", "bytes_received_per_row", "by_rank")}, indent=1))
    if output is not None:
        write_atomically(output, json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    run_typer(tensor_parallel)
