"""One job in its own process: check which methods can run, create the inputs of a case, or measure one method on them.

    python -m benchmarks.loss.worker JOB.json RESULT.json

The order of a measurement: a warm-up on tiny shapes (imports, compilation), then memory and gradients of the first full
call, then pairs with the floor. The result file has a `status`: "ok", "skipped", "failed" or "out of memory", with the
reason; only a process that is killed leaves no file.

Legend: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from eaftdrope.errors import UserError
from eaftdrope.loss.backends import select_backend
from eaftdrope.peak_memory import peak_of

from .cases import Case
from .inputs import errors, make_inputs, reference
from .methods import Loss, methods
from .pairs import row_slices, summarise, take_pairs, time_on_cpu, time_on_cuda

# Rows and vocabulary. Two sizes, since a compiler treats a single one as a constant.
_WARM_UP = ((64, 1024), (96, 2048))
# Rows of a product of the floor: enough for full speed, few enough for the CPU's caches.
_FLOOR_ROWS = {"bfloat16": 512, "float32": 256}
_FLOOR_ROWS_DEVICE = 4096


def main() -> None:
    job_file, result_file = map(Path, sys.argv[1:])
    job = json.loads(job_file.read_text(encoding="utf-8"))
    # deprecation warnings of libraries are irrelevant here
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    case = Case(**job.pop("case"))
    if job["device"].startswith("cuda"):
        # events and memory statistics belong to the current device
        torch.cuda.set_device(job["device"])
    try:
        result = {"status": "ok", **_TASKS[job.pop("task")](case, **job)}
    except UserError as error:
        result = {"status": "failed", "reason": str(error)}
    except Exception as error:
        result = {"status": "out of memory" if _is_memory(error) else "failed", "reason": _one_line(error)}
    result_file.write_text(json.dumps(result), encoding="utf-8")


def _is_memory(error: Exception) -> bool:
    messages = ("can't allocate memory", "out of memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        message in str(error) for message in messages
    )


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def probe(case: Case, *, names: list[str], device: str) -> dict:
    """Return for each method its row if it cannot run on this device and dtype, else None."""
    where, dtype, known = torch.device(device), getattr(torch, case.dtype), methods()
    answers = {}
    for name in names:
        try:
            reason = known[name].unavailable(where, dtype)
        except Exception as error:
            answers[name] = {"status": "failed", "reason": _one_line(error)}
        else:
            answers[name] = None if reason is None else {"status": "skipped", "reason": reason}
    return {"answers": answers}


def prepare(case: Case, *, inputs: str, device: str, text: str | None) -> dict:
    """Write the inputs of the case and their float64 gradients to the file `inputs`."""
    made = make_inputs(case, None if text is None else Path(text))
    truth = reference(*(tensor.to(device) for tensor in made))
    torch.save({"made": made, "truth": truth}, inputs)
    return {"rows_checked": truth["rows"].numel(), "entries_checked": truth["entries"].numel()}


def measure(
    case: Case, *, method: str, inputs: str, device: str, threads: int | None, repeat: int, seconds: float
) -> dict:
    """Measure one method on one case."""
    chosen = methods()[method]
    where, dtype = torch.device(device), getattr(torch, case.dtype)
    if threads is not None:
        torch.set_num_threads(threads)
    stored = torch.load(inputs)
    hidden_ND, weight_VD, labels_N = (tensor.to(where) for tensor in stored["made"])
    hidden_ND.requires_grad_()
    weight_VD.requires_grad_(case.trains != "frozen-head")
    warm_up(chosen.loss, hidden_ND, weight_VD, labels_N)

    step = make_step(chosen.loss, hidden_ND, weight_VD, labels_N)
    losses: list[Tensor] = []
    peak = peak_of(lambda: losses.append(step()), where.type)
    loss = losses.pop().item()
    kept = sum(tensor.grad.nbytes for tensor in (hidden_ND, weight_VD) if tensor.grad is not None)
    result = {
        "backend": None if chosen.backend is None else select_backend(chosen.backend, where, dtype).name,
        "loss": loss,
        "extra_bytes": None if peak is None else max(0, peak - kept),
        "gradient_bytes": kept,
        **errors(loss, hidden_ND.grad, weight_VD.grad, stored["truth"], chosen.gate),
    }
    floor = make_floor(hidden_ND.detach(), weight_VD.detach(), products=case.products)
    floor()
    on_cuda = where.type == "cuda"
    pairs = take_pairs(step, floor, time_on_cuda if on_cuda else time_on_cpu, repeat=repeat, seconds=seconds)
    clock = "device" if on_cuda else "cpu" if torch.get_num_threads() == 1 else "wall"
    result.update(summarise(pairs, clock))
    operations = 2 * case.products * case.rows * case.hidden_size * case.vocabulary
    result["floor_gflops"] = operations / result[f"floor_{clock}_seconds"] / 1e9
    return result


def warm_up(loss: Loss, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> None:
    for rows, entries in _WARM_UP:
        small_RD = hidden_ND.detach()[:rows].clone().requires_grad_()
        small_ED = weight_VD.detach()[:entries].clone().requires_grad_(weight_VD.requires_grad)
        make_step(loss, small_RD, small_ED, labels_N[:rows].clamp_max(small_ED.shape[0] - 1))()


def make_step(loss: Loss, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Callable[[], Tensor]:
    """Return a call that computes the loss and new gradients, as a training step after `zero_grad` does."""

    def step() -> Tensor:
        hidden_ND.grad = weight_VD.grad = None
        value = loss(hidden_ND, weight_VD, labels_N)
        value.backward()
        return value.detach()

    return step


def make_floor(hidden_ND: Tensor, weight_VD: Tensor, *, products: int) -> Callable[[], None]:
    """Return a call of the bare matrix products of a step (logits, gradients with respect to hidden states and head), tile
    by tile, into allocated memory. With two products the head is frozen. Every row counts as trained."""
    on_cpu = hidden_ND.device.type == "cpu"
    step = _FLOOR_ROWS[str(hidden_ND.dtype).removeprefix("torch.")] if on_cpu else _FLOOR_ROWS_DEVICE
    tiles = list(row_slices(hidden_ND.shape[0], step))
    logits = weight_VD.new_empty(min(step, hidden_ND.shape[0]), weight_VD.shape[0])
    by_hidden, by_weight = torch.empty_like(hidden_ND), torch.empty_like(weight_VD)

    def floor() -> None:
        for tile in tiles:
            hidden_RD = hidden_ND[tile]
            logits_RV = logits[: hidden_RD.shape[0]]
            torch.mm(hidden_RD, weight_VD.t(), out=logits_RV)
            torch.mm(logits_RV, weight_VD, out=by_hidden[tile])
            if products == 3 and tile.start == 0:
                torch.mm(logits_RV.t(), hidden_RD, out=by_weight)
            elif products == 3:
                by_weight.addmm_(logits_RV.t(), hidden_RD)

    return floor


_TASKS = {"probe": probe, "prepare": prepare, "measure": measure}

if __name__ == "__main__":
    main()
