"""What a run leaves behind: one row for every method on every case, and where, when and with what it was measured.

The CSV holds the rows; the JSON holds them too, with the environment and the settings of the run. Both are written beside
their place and renamed, after every case, so that a run that is stopped keeps what it has.
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
# features that decide how fast a matrix product or a vector loop is
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "asimd", "sve", "bf16")
STATUSES = ("ok", "skipped", "failed", "out of memory")

IDENTITY = {
    "shape": "name of the shape",
    "rows": "tokens",
    "hidden_size": "",
    "vocabulary": "",
    "dtype": "",
    "logits": "random or real",
    "trains": "what is trained: all, half-ignored or frozen-head",
    "device": "",
    "threads": "of the processor",
    "isa": "ONEDNN_MAX_CPU_ISA that the run was held to",
    "method": "",
    "family": "ours or peer",
    "gate": "the gate whose loss it computes; none is plain cross-entropy",
    "computes": "the same in words",
    "status": "ok, skipped, failed or out of memory",
    "reason": "of a status that is not ok",
}
MEASURED = {
    "backend": "that worked, for ours",
    "ratio": "median over pairs of time / time of the bare matrix products",
    "ratio_low": "lowest of the pairs",
    "ratio_high": "highest of the pairs",
    "pairs": "",
    "clock": "clock of the ratio: cpu (all threads of the process), wall or device",
    "cpu_seconds": "median, one forward and backward",
    "wall_seconds": "the same",
    "device_seconds": "the same, between device events",
    "floor_cpu_seconds": "median of the bare matrix products",
    "floor_wall_seconds": "the same",
    "floor_device_seconds": "the same",
    "floor_gflops": "speed of the bare matrix products, 1e9 operations a second",
    "extra_bytes": "peak memory of a call beyond inputs and gradients",
    "gradient_bytes": "gradients that the call leaves",
    "loss": "",
    "loss_error": "relative, against float64",
    "hidden_error": "gradient by the hidden states: relative error against float64 (Frobenius norm, some rows)",
    "weight_error": "gradient by the head: the same (some vocabulary entries)",
}
COLUMNS = {**IDENTITY, **MEASURED}
"""Column -> what it means, where its name does not say so."""


def make_row(case: Case, run: dict, method: dict, result: dict) -> dict:
    """A row with every column; `run` has device, threads and isa, `method` has name, family, gate and computes, and
    `result` is a worker's."""
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
    """A float to six digits: more are noise."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def environment(isa: str | None) -> dict:
    """Where and with what: imports torch."""
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
    """`loss.csv` and `loss.json` in `folder`, which exists."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(COLUMNS), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(folder / "loss.csv", text.getvalue())
    document = {"schema": SCHEMA, **about, "columns": COLUMNS, "results": rows}
    write_atomically(folder / "loss.json", json.dumps(document, indent=1) + "\n")
