"""Run the groups in parallel processes; a second start resumes the first."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from benchmarks.command import child_environment
from eaftdrope.errors import UserError
from eaftdrope.loss.native.build import BuildError, find_compiler

from .arms import Group, MiniatureSettings, as_job, groups, write_json

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")
_POLL = 0.5


def prepare(folder: Path, settings: MiniatureSettings) -> None:
    """Create `folder`, or check that its contents have the same settings.

    Raises:
        UserError: the settings differ, it is not a folder, or there is no compiler for the training step.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file. Pass a folder.")
    if settings.compiled:
        try:
            find_compiler()
        except BuildError as error:
            raise UserError(f"the training step is compiled, and {error}") from error
    for part in ("pieces", "snapshots", "jobs"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    kept, ours = folder / "settings.json", json.loads(json.dumps(asdict(settings)))
    if kept.is_file():
        theirs = json.loads(kept.read_text(encoding="utf-8"))
        if theirs != ours:
            names = [name for name in ours if theirs.get(name) != ours[name]]
            raise UserError(
                f"--output {folder} has pieces of a run with other settings ({', '.join(names)}). Choose another folder, "
                "or repeat that run's command to continue it."
            )
    write_json(kept, ours)


def run(folder: Path, settings: MiniatureSettings, workers: int, report: Callable[[str], None]) -> list[str]:
    """Run the incomplete groups and return the failures. `report` is called with a line for every piece and failure."""
    waiting = [group for group in groups(settings) if _missing(folder, group)]
    running: dict[Group, subprocess.Popen] = {}
    seen = {path.name for path in (folder / "pieces").glob("*.json")}
    failures = []
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                group = waiting.pop(0)
                running[group] = _start(folder, settings, group)
            time.sleep(_POLL)
            for path in sorted((folder / "pieces").glob("*.json")):
                if path.name not in seen:
                    seen.add(path.name)
                    report(path.stem)
            for group in [group for group, process in running.items() if process.poll() is not None]:
                process = running.pop(group)
                if process.returncode or _missing(folder, group):
                    failures.append(_failure(folder, group, process.returncode))
                    report(failures[-1])
    finally:
        for process in running.values():
            process.terminate()
    return failures


def _missing(folder: Path, group: Group) -> bool:
    return not all(group.piece(folder, arm).is_file() for arm in group.arms)


def _start(folder: Path, settings: MiniatureSettings, group: Group) -> subprocess.Popen:
    job = folder / "jobs" / f"{group.name}.json"
    write_json(job, as_job(group, settings))
    command = [sys.executable, "-m", "benchmarks.miniature.worker", str(job), str(folder)]
    with job.with_suffix(".log").open("w", encoding="utf-8") as log:
        return subprocess.Popen(
            command, env=child_environment() | dict.fromkeys(_THREADS, "1"), stdout=log, stderr=subprocess.STDOUT
        )


def _failure(folder: Path, group: Group, code: int) -> str:
    log = (folder / "jobs" / f"{group.name}.log").read_text(encoding="utf-8")
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return f"{group.name} failed (exit status {code}): {lines[-1] if lines else 'no message'}"[:300]
