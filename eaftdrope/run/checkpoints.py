"""Verified checkpoints: each has a manifest of all its files, written last and checked before the checkpoint is used.

    checkpoints/checkpoint-12/manifest.json     {"files": {"optimizer.pt": {"bytes": 4812, "sha256": "..."}, ...}}

A checkpoint is complete once every process has written its part, all of it is on the disk, and the manifest exists. The
one that a run resumes from is read and hashed first; one that is skipped is reported, and kept until its step is trained
and saved again. A callback seals each checkpoint once every process has written it, and deletes old ones.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from eaftdrope.errors import UserError
from eaftdrope.files import flush, flush_tree, write_atomically

from .record import read_json

MANIFEST = "manifest.json"
STATE = "trainer_state.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_WEIGHTS = ("model*.safetensors", "adapter_model.safetensors", "pytorch_model*", "*/adapter_model.safetensors")


@dataclass(frozen=True)
class PassedOver:
    """A checkpoint that was skipped; `damaged` unless it was never complete (a kill while it was written)."""

    step: int
    reason: str
    damaged: bool

    def __str__(self) -> str:
        return f"checkpoint-{self.step} {'is damaged' if self.damaged else 'is incomplete'} ({self.reason})"


@dataclass(frozen=True)
class Found:
    """The checkpoint to resume from, None to start from the beginning, and the newer ones that were skipped."""

    checkpoint: Path | None
    passed_over: tuple[PassedOver, ...] = ()

    @property
    def has_manifest(self) -> bool:
        return self.checkpoint is not None and (self.checkpoint / MANIFEST).is_file()

    def notes(self) -> list[str]:
        """Notes for the user, one sentence each."""
        name = self.checkpoint.name if self.checkpoint else "the beginning"
        notes = [f"{passed}; resuming from {name}" for passed in self.passed_over]
        if self.checkpoint and not self.has_manifest:
            notes.append(
                f"{name} was written by an older version, without a manifest: its files are complete, but whether their "
                "contents are as they were written cannot be checked"
            )
        return notes


class Checkpoints:
    """The checkpoints of a run.

    Args:
        folder: their folder; it need not exist.
        processes: the number that write a checkpoint together.
    """

    def __init__(self, folder: Path, processes: int) -> None:
        self.folder = folder
        self._processes = processes

    def steps(self) -> dict[int, Path]:
        """Every checkpoint, complete or not, by its step, the newest first."""
        matches = {path: _CHECKPOINT.fullmatch(path.name) for path in self.folder.glob("checkpoint-*")}
        return dict(sorted(((int(match[1]), path) for path, match in matches.items() if match), reverse=True))

    def newest(self, *, manifests: bool, contents: bool = True) -> Found:
        """The newest checkpoint that is intact.

        Args:
            manifests: a complete checkpoint has a manifest. If False, the run was begun by a version that wrote none, and a
                checkpoint without one is judged by its files.
            contents: hash the files instead of only comparing their sizes.

        Raises:
            UserError: every checkpoint was complete once and is damaged now.
        """
        passed_over: list[PassedOver] = []
        for step, path in self.steps().items():
            reason, damaged = self._fault(path, manifests, contents)
            if reason is None:
                return Found(path, tuple(passed_over))
            passed_over.append(PassedOver(step, reason, damaged))
        if any(passed.damaged for passed in passed_over):
            raise UserError(
                f"{self.folder} holds no checkpoint to resume from: {', '.join(map(str, passed_over))}. Nothing was "
                "changed: put back a copy of one of them; to train from the beginning, delete this folder, or pass "
                "--overwrite to delete the whole run."
            )
        return Found(None, tuple(passed_over))

    def seal(self, step: int) -> None:
        """Complete a checkpoint that every process has written: its files reach the disk, then the manifest is written."""
        path = self.folder / f"checkpoint-{step}"
        (path / MANIFEST).unlink(missing_ok=True)
        files = {file.relative_to(path).as_posix(): file for file in sorted(path.rglob("*")) if file.is_file()}
        flush_tree(path)
        flush(self.folder)
        hashes = _hashes(list(files.values()))
        listed = {name: {"bytes": file.stat().st_size, "sha256": hashes[file]} for name, file in files.items()}
        write_atomically(path / MANIFEST, json.dumps({"files": listed}, indent=2) + "\n", durable=True)

    def discard(self, step: int) -> None:
        """Delete a checkpoint that was skipped, because its step is about to be saved again."""
        _remove(self.folder / f"checkpoint-{step}")

    def rotate(self, step: int, keep: int, *, passed_over: tuple[int, ...] = ()) -> None:
        """Delete all but the newest `keep` checkpoints up to the one of `step`, which was just sealed."""
        older = {number: path for number, path in self.steps().items() if number <= step}
        kept = [number for number, path in older.items() if (path / MANIFEST).is_file() and number not in passed_over]
        for number, path in older.items():
            if number not in kept[:keep]:
                _remove(path)

    def _fault(self, path: Path, manifests: bool, contents: bool) -> tuple[str | None, bool]:
        """The fault of a checkpoint (None if it is intact), and whether it was complete once."""
        if not path.is_dir():
            return ("a broken link" if not path.exists() else "a file, and not a folder"), True
        if os.path.lexists(path / MANIFEST):
            return _manifest_fault(path, contents), True
        if manifests:
            return f"no {MANIFEST}: it was not written completely", False
        return self._structure_fault(path)

    def _structure_fault(self, path: Path) -> tuple[str | None, bool]:
        """The fault of a checkpoint without a manifest. The main process writes the trainer's state last, others their random
        state."""
        state = read_json(path / STATE)
        random_states = list(path.glob("rng_state*.pth"))
        if not (path / STATE).is_file() or len(random_states) < self._processes:
            return "it was not written completely", False
        if not isinstance(state, dict) or not {"global_step", "max_steps"} <= state.keys():
            return f"{STATE}: not the state of a trainer", True
        engine = any(path.glob("global_step*"))
        if not engine and not any(entry for pattern in _WEIGHTS for entry in path.glob(pattern)):
            return "no weights", True
        if not engine and not any(path.glob("optimizer*")):
            return "optimizer.pt: missing", True
        if not engine and not (path / "scheduler.pt").is_file():
            return "scheduler.pt: missing", True
        for file in sorted(path.rglob("*")):
            if file.is_file() and (fault := unreadable(file)):
                return f"{file.relative_to(path).as_posix()}: {fault}", True
        return None, True


def _manifest_fault(path: Path, contents: bool) -> str | None:
    manifest = read_json(path / MANIFEST)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not files:
        return f"{MANIFEST}: not a list of files"
    try:
        expected = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (TypeError, KeyError, ValueError):
        return f"{MANIFEST}: not a list of files with sizes and hashes"
    # every size before the first hash: reading takes long
    for name, (size, _) in expected.items():
        file = path / name
        if not file.is_file():
            return f"{name}: missing"
        if file.stat().st_size != size:
            return f"{name}: {file.stat().st_size:,} bytes, {size:,} expected"
    hashes = _hashes([path / name for name in expected]) if contents else {}
    for name, (_, digest) in expected.items():
        if hashes.get(path / name, digest) != digest:
            return f"{name}: its contents have changed"
    return None


def unreadable(file: Path) -> str | None:
    """The fault of a file of torch or safetensors, as far as it can be seen; None for intact and for other files."""
    if file.suffix in (".pt", ".pth", ".bin") and file.name != "training_args.bin":
        try:
            with zipfile.ZipFile(file) as archive:
                return None if archive.testzip() is None else "its contents have changed"
        except (zipfile.BadZipFile, OSError, EOFError):
            return "truncated"
    if file.suffix == ".safetensors":
        return _unreadable_safetensors(file)
    return None


def _unreadable_safetensors(file: Path) -> str | None:
    size = file.stat().st_size
    with open(file, "rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            return "truncated"
        try:
            header = json.loads(opened.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return "not a safetensors file"
    return None if 8 + length + max(ends, default=0) == size else "truncated"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _hashes(files: list[Path]) -> dict[Path, str]:
    """SHA-256 of files, several in parallel: hashing releases the interpreter's lock."""

    def sha256(file: Path) -> str:
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(files, pool.map(sha256, files), strict=True))


class SealCheckpoints(TrainerCallback):
    """Write the manifests of checkpoints, and delete old checkpoints.

    The Trainer's own rotation must be off (`save_total_limit=None`): it would delete the last complete checkpoint before the
    new one is complete.

    Args:
        checkpoints (`Checkpoints`): those of the run.
        keep (`int`): the number to keep.
        passed_over (`tuple[int, ...]`): steps of checkpoints that were skipped, the same on every process.
    """

    def __init__(self, checkpoints: Checkpoints, keep: int, passed_over: tuple[int, ...] = ()) -> None:
        self._checkpoints, self._keep, self._passed_over = checkpoints, keep, set(passed_over)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log, evaluate and save at the recipe's present intervals: a resumed state has those of its first start."""
        state.compute_steps(args, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Delete a checkpoint of this step that was skipped: its files must not get into the new one."""
        if state.global_step in self._passed_over:
            self._passed_over.discard(state.global_step)
            if state.is_world_process_zero:
                self._checkpoints.discard(state.global_step)
            PartialState().wait_for_everyone()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            self._checkpoints.seal(state.global_step)
            self._checkpoints.rotate(state.global_step, self._keep, passed_over=tuple(self._passed_over))
