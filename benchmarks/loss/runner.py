"""Run every method on every case, each in its own process, one at a time.

A method that fails, runs out of memory or is killed is a row of the table like any other, with its reason.
"""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.command import child_environment
from eaftdrope.errors import UserError
from eaftdrope.loss.backends import VARIABLE

from .cases import Case, as_json
from .methods import Method
from .results import make_row

# Seconds after which a worker without a result is considered stuck.
_TIMEOUT = 3600
_INPUTS = "inputs.pt"
# oneDNN and OpenMP read these when they are loaded, so they are set in the environment of a worker.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class MeasurementSettings:
    """Settings of the measurement; `seconds` limits the time of one method on one case."""

    device: str
    threads: int | None
    repeat: int
    seconds: float
    isa: str | None = None
    text: str | None = None


def resolve_device(name: str) -> str:
    """Resolve `auto` to the first CUDA (or ROCm) device, else the CPU. Raises UserError for a missing device."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise UserError(f"--device {name}: memory and time are measured on cpu and cuda (also ROCm). Use auto.")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices. Use --device cpu.")
    return f"cuda:{int(index or 0)}" if kind == "cuda" else name


def run(
    cases: Sequence[Case],
    chosen: Sequence[Method],
    settings: MeasurementSettings,
    started: Callable[[Case, str], None],
    finished: Callable[[Case, list[dict]], None],
) -> list[dict]:
    """Return all rows. `started(case, what)` is called before each process, `finished(case, rows)` after each case."""
    rows = []
    how = {"device": settings.device, "threads": settings.threads, "isa": settings.isa}
    answers: dict[str, dict] = {}
    with tempfile.TemporaryDirectory(prefix="eaftdrope-bench-") as name:
        folder = Path(name)
        for _, group in itertools.groupby(cases, key=lambda case: case.inputs):
            sharing = list(group)
            case = sharing[0]
            if case.dtype not in answers:
                started(case, "which methods can run here")
                answers[case.dtype] = _probe(case, chosen, settings, folder)
            started(case, "inputs and float64 gradients")
            job = {"task": "prepare", "inputs": str(folder / _INPUTS), "text": settings.text}
            made = _work(settings, folder, case, job)
            for case in sharing:
                case_rows = []
                for method in chosen:
                    result = answers[case.dtype][method.name]
                    if result is None and made["status"] != "ok":
                        result = made
                    if result is None:
                        started(case, method.name)
                        result = _measure(case, method, settings, folder)
                    case_rows.append(make_row(case, how, describe(method), result))
                rows.extend(case_rows)
                finished(case, case_rows)
            (folder / _INPUTS).unlink(missing_ok=True)
    return rows


def describe(method: Method) -> dict:
    return {"method": method.name, "family": method.family, "gate": method.gate, "computes": method.computes}


def _probe(case: Case, chosen: Sequence[Method], settings: MeasurementSettings, folder: Path) -> dict[str, dict | None]:
    names = [method.name for method in chosen]
    answer = _work(settings, folder, case, {"task": "probe", "names": names})
    return answer["answers"] if answer["status"] == "ok" else dict.fromkeys(names, answer)


def _measure(case: Case, method: Method, settings: MeasurementSettings, folder: Path) -> dict:
    job = {
        "task": "measure",
        "method": method.name,
        "inputs": str(folder / _INPUTS),
        "threads": settings.threads,
        "repeat": settings.repeat,
        "seconds": settings.seconds,
    }
    return _work(settings, folder, case, job)


def _work(settings: MeasurementSettings, folder: Path, case: Case, job: dict) -> dict:
    """Run one worker and return its result, or the reason for its failure."""
    job_file, result_file = folder / "job.json", folder / "result.json"
    result_file.unlink(missing_ok=True)
    job_file.write_text(json.dumps({**job, "case": as_json(case), "device": settings.device}), encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.loss.worker", str(job_file), str(result_file)]
    try:
        done = subprocess.run(
            command, env=worker_environment(settings), capture_output=True, text=True, timeout=_TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return {"status": "failed", "reason": f"stopped: no result after {_TIMEOUT} s"}
    if result_file.is_file():
        return json.loads(result_file.read_text(encoding="utf-8"))
    return _death(done.returncode, done.stderr)


def worker_environment(settings: MeasurementSettings) -> dict[str, str]:
    """Return the environment of a worker, with the requested threads and instructions. A backend set in the environment is
    removed: each method has its own."""
    environment = {name: value for name, value in child_environment().items() if name != VARIABLE}
    if settings.threads is not None:
        environment.update(dict.fromkeys(_THREADS, str(settings.threads)))
    if settings.isa is not None:
        environment["ONEDNN_MAX_CPU_ISA"] = settings.isa
    return environment


def _death(code: int, stderr: str) -> dict:
    """Return the status of a process that left no result. Linux sends SIGKILL when memory runs out."""
    if code == -signal.SIGKILL:
        return {"status": "out of memory", "reason": "killed (SIGKILL), which is how Linux answers a lack of memory"}
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return {"status": "failed", "reason": f"{name}: {lines[-1] if lines else 'no message'}"[:300]}
