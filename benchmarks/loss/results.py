"""Results of a run: one row per method and case, with hardware, versions and date.

The CSV contains the rows; the JSON also the environment and the settings of the run. Both are written atomically after
every case, so that an interrupted run keeps its results.
"""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from eaftdrope.files import write_atomically
from eaftdrope.run.machine import accelerators, cpu_flags, cpu_name, ram

from .cases import Case

SCHEMA = 1
PACKAGES = ("eaftdrope", "torch", "triton", "trl", "transformers", "liger-kernel", "cut-cross-entropy")
# CPU features that determine the speed of matrix products and vector loops
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "asimd", "sve", "bf16")
STATUSES = ("ok", "skipped", "failed", "out of memory")

IDENTITY = {
    "shape": "name of the shape",
    "rows": "tokens",
    "hidden_size": "",
    "vocabulary": "",
    "dtype": "",
    "logits": "random or real",
    "trains": "the trained tensors and labels: all, half-ignored or frozen-head",
    "device": "",
    "threads": "CPU threads",
    "isa": "ONEDNN_MAX_CPU_ISA of the run",
    "method": "",
    "family": "ours or peer",
    "gate": "the gate whose loss it computes; none is plain cross-entropy",
    "computes": "description of the method",
    "status": "ok, skipped, failed or out of memory",
    "reason": "of a status other than ok",
}
MEASURED = {
    "backend": "the backend that was used, for ours",
    "ratio": "median over pairs of time / time of the bare matrix products",
    "ratio_low": "lowest ratio",
    "ratio_high": "highest ratio",
    "pairs": "",
    "clock": "clock of the ratio: cpu (all threads of the process), wall or device",
    "cpu_seconds": "median, one forward and backward",
    "wall_seconds": "the same",
    "device_seconds": "the same, between device events",
    "floor_cpu_seconds": "median of the bare matrix products",
    "floor_wall_seconds": "the same",
    "floor_device_seconds": "the same",
    "floor_gflops": "speed of the bare matrix products, 1e9 operations per second",
    "extra_bytes": "peak memory of a call beyond inputs and gradients",
    "gradient_bytes": "size of the gradients that the call returns",
    "loss": "",
    "loss_error": "relative, against float64",
    "hidden_error": "gradient with respect to the hidden states: relative error against float64 (Frobenius norm, some rows)",
    "weight_error": "gradient with respect to the head: the same (some vocabulary entries)",
}
COLUMNS = {**IDENTITY, **MEASURED}
"""Column -> meaning, where the name does not state it."""


def make_row(case: Case, run: dict, method: dict, result: dict) -> dict:
    """Return a row with every column; `run` has device, threads and isa, `method` has name, family, gate and computes,
    and `result` comes from a worker."""
    assert result["status"] in STATUSES, result
    known = {
        "shape": case.shape,
        "rows": case.rows,
        "hidden_size": case.hidden_size,
        "vocabulary": case.vocabulary,
        "dtype": case.dtype,
        "logits": case.logits,
        "trains": case.trains,
        **run,
        **method,
        **result,
    }
    assert set(known) <= set(COLUMNS), set(known) - set(COLUMNS)
    return {column: _shortened(known.get(column)) for column in COLUMNS}


def _shortened(value):
    """Round a float to six digits; more are noise."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def environment(isa: str | None) -> dict:
    """Return hardware and versions; imports torch."""
    import torch

    flags = cpu_flags()
    devices = [{"kind": device.kind, "name": device.name, "memory": device.memory} for device in accelerators()]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": cpu_name(),
        "processor_features": [flag for flag in _FLAGS if flag in flags],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": ram(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "onednn_max_cpu_isa": isa,
        "devices": devices,
        "driver": _driver() if devices and devices[0]["kind"] == "cuda" else None,
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write(folder: Path, rows: list[dict], about: dict) -> None:
    """Write `loss.csv` and `loss.json` into `folder`, which must exist."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(COLUMNS), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(folder / "loss.csv", text.getvalue())
    document = {"schema": SCHEMA, **about, "columns": COLUMNS, "results": rows}
    write_atomically(folder / "loss.json", json.dumps(document, indent=1) + "\n")
