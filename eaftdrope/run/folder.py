"""The run folder: its recipe, its progress, and whether a second start of the same command may resume it.

    run.json            recipe, status, fingerprints (see record.py); written first, and last
    recipe.yaml         the resolved recipe
    metrics.jsonl       one line per log
    landscape.jsonl     one line per window of steps: entropy and probability of the trained tokens
    probes_before.json, probes_after.json
    checkpoints/        a killed run resumes from these
    and beside them     the result: adapter or weights, tokenizer, README.md

An unfinished run of the same recipe is resumed, a finished one is left as it is, and any other folder is not touched. The
folder of a stage is such a folder too; its finished run is the model of the next stage.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

from eaftdrope.errors import UserError
from eaftdrope.evaluate import Score, scores_from_json, scores_to_json
from eaftdrope.files import check_writable, flush, flush_tree, write_atomically
from eaftdrope.recipe.schema import Recipe
from eaftdrope.ttt.saved import WEIGHTS_FILE

from .checkpoints import MANIFEST, Checkpoints, Found
from .continuing import Continuation, other_engine
from .degrees import Degrees
from .interrupts import LOCK_FILE
from .record import (
    NAME,
    RECIPE_NAME,
    DataStats,
    changes,
    differences,
    dumped,
    is_damaged,
    read_record,
    recorded_recipe,
    without_nulls,
)

CAPTURE_FILE = "agreement.safetensors"
"""The base model's predictions, which the probe agreement compares with; deleted once the run is finished."""
MERGED = "merged"
"""The folder of the model with its adapters merged, inside the run folder."""
WAYS_OUT = (
    "Nothing was changed: choose another folder with output.dir=..., or pass --overwrite to delete it and start over."
)
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "adapter_model.*")


class RunFolder:
    """A run folder, opened for one recipe. The constructor only reads; `begin` is the first to write.

    Args:
        path: the folder; it need not exist.
        recipe: the recipe to run. Its sections `output` and `serve` are not compared: they do not affect results.
        overwrite: `begin` deletes the run in the folder.
        keep_finished: accept a finished run of this recipe; see `finished`.
        uploads: the repository to upload the result to.

    Raises:
        UserError: the folder holds a complete, finished run, a run of another recipe or files that are not a run's, or it
            cannot be written to.
    """

    def __init__(
        self,
        path: str | Path,
        recipe: Recipe,
        *,
        overwrite: bool = False,
        keep_finished: bool = False,
        uploads: str | None = None,
    ) -> None:
        self.path = Path(path).expanduser()
        self._notes: list[str] = []
        self._overwrite = overwrite
        self._recipe = dumped(recipe)
        self._merges = recipe.output.merge and recipe.adapters is not None
        learns = recipe.ttt if recipe.stages and "ttt" in recipe.stages else None
        self._has_fast_mlps = learns is not None and learns.layout == "prime"
        self.uploads = uploads
        self._schema = type(recipe)
        # their number changes the steps, as a key of the recipe does
        self._processes = Degrees.present().ranks
        self._keep_finished = keep_finished
        self._run: dict[str, Any] | None = None
        self._found: Found | None = None
        check_writable(self.path)
        self._check()

    def _check(self) -> None:
        run = self._run = self._opened()
        if run is None:
            if not self._is_free():
                raise UserError(
                    f"{self.path} is not empty and does not contain an eaftdrope run (no run.json). Nothing was changed: "
                    "choose another folder with output.dir=..."
                )
            return
        if self._overwrite:
            return
        finished = run["status"] == "finished"
        now = Continuation(self._as_now(run["recipe"]), self._recipe, run["processes"], self._processes)
        if finished and not self._keep_finished and not self.missing and not now.lengthened:
            raise UserError(f"{self.path} holds a finished run. {WAYS_OUT}")
        holds = f"{self.path} holds {'a finished' if finished else 'an unfinished'} run"
        if keys := differences(now.recipe, self._recipe, free=True, also_free=now.free_keys):
            raise UserError(f"{holds} of another recipe (different: {keys}). {WAYS_OUT}")
        checkpoint = self.last_checkpoint()
        if now.lengthened and not checkpoint and run["status"] != "running":
            raise UserError(f"{holds} without a checkpoint to continue from. {WAYS_OUT}")
        if now.lengthened:
            self._notes.append(f"{self.path}: {now.lengthened}")
            run = self._run = {**run, "status": "running"}
        if run["status"] == "running" and (reason := now.refusal() or other_engine(checkpoint, moved=now.moved)):
            raise UserError(f"{holds} {reason} {WAYS_OUT}")

    def _opened(self) -> dict[str, Any] | None:
        """run.json, rebuilt from recipe.yaml if it is damaged, and set back to "running" if the result is incomplete."""
        run = read_record(self.path)
        if run is None:
            return self._rebuilt()
        if run["data"] and run["status"] != "running" and not self._overwrite and (lost := self._lost()):
            self._run = run
            if self.last_checkpoint():
                self._notes.append(f"{self.path} no longer has {lost}: made again from the last checkpoint")
                return {**run, "status": "running"}
            if run["status"] == "trained":
                raise UserError(f"{self.path} no longer has {lost}, nor a checkpoint to make it from again. {WAYS_OUT}")
        return run

    def _rebuilt(self) -> dict[str, Any] | None:
        """The record of a run whose run.json is damaged or lost, as far as it can be rebuilt; None without a run."""
        sealed = any(self.checkpoints.glob(f"checkpoint-*/{MANIFEST}"))
        damaged = is_damaged(self.path)
        if not damaged and ((self.path / NAME).exists() or not sealed):
            return None
        recipe = recorded_recipe(self.path)
        if recipe is None and not sealed:
            return None
        if recipe is None and not self._overwrite:
            raise UserError(
                f"{self.path / NAME} is damaged or missing, and so is {RECIPE_NAME} beside it, from which it could be "
                f"rebuilt. Put back a copy of either and run the same command again. {WAYS_OUT}"
            )
        if not self._overwrite:
            self._notes.append(
                f"{self.path / NAME} is damaged or missing and was rebuilt from {RECIPE_NAME}: whether data and base model "
                "are those that the run began with cannot be checked"
            )
        record = dumped(recipe) if recipe else {}
        return {"status": "running", "recipe": record, "processes": self._processes, "data": {}, "rebuilt": True}

    def _lost(self) -> str | None:
        """The part of the result or its scores that is missing although run.json records it as done; None without any."""
        if not any(file for pattern in _WEIGHTS for file in self.path.glob(pattern)):
            return "weights"
        if self._has_fast_mlps and not (self.path / WEIGHTS_FILE).is_file():
            return "fast MLPs"
        scores = [f"probes_{when}.json" for when in ("before", "after")]
        if any((self.path / name).exists() for name in scores):
            return next((f"readable {name}" for name in scores if self.load_scores(name[7:-5]) is None), None)
        return None

    def _as_now(self, recipe: dict[str, Any]) -> dict[str, Any]:
        """A recipe that an older version stored, with the defaults of keys that it did not have."""
        try:
            return dumped(self._schema.model_validate({**without_nulls(recipe), "output": {"dir": "unused"}}))
        except ValueError:
            # it has keys that no longer exist
            return recipe

    def pop_notes(self) -> list[str]:
        """Notes about the folder's state for the user, one sentence each; they are returned once."""
        notes, self._notes = self._notes, []
        return notes

    def check_unchanged(self, data: DataStats, fingerprints: dict[str, str]) -> None:
        """Compare the data and the base model with those that the run began with.

        Raises:
            UserError: any of them has changed; the message lists them.
        """
        if not self._run or self._overwrite or self.rebuilt:
            return
        if changed := changes(self._run, data, fingerprints):
            raise UserError(f"{self.path} holds an unfinished run{changed} {WAYS_OUT}")
        if "fingerprints" not in self._run:
            self._notes.append(
                f"{self.path} was begun by an older version, which stored no fingerprints: whether data and base model are "
                "as they were at its start cannot be checked"
            )

    def begin(
        self, recipe_yaml: str, versions: dict[str, str], data: DataStats, fingerprints: dict[str, str] | None = None
    ) -> None:
        """Make the folder, delete an overwritten run, and record that a run is in progress.

        For the main process, after everything that can be checked was checked.

        Raises:
            UserError: the data are not those that the unfinished run began with (see `check_unchanged`), or none of its
                checkpoints can be used.
        """
        fingerprints = fingerprints or {}
        self.check_unchanged(data, fingerprints)
        found = self.resume_point()
        if self._run and self._overwrite:
            self._delete()
        self._overwrite = False
        self.path.mkdir(parents=True, exist_ok=True)
        if found.checkpoint and not found.has_manifest:
            # before run.json records that complete checkpoints have a manifest
            self.sealed.seal(int(found.checkpoint.name.removeprefix("checkpoint-")))
        self._write_run(
            status="running",
            versions=versions,
            processes=self._processes,
            data=dataclasses.asdict(data),
            fingerprints=fingerprints,
            recipe=self._recipe,
        )
        self.write(RECIPE_NAME, recipe_yaml)

    def take(self, made: Path, recipe_yaml: str, versions: dict[str, str]) -> None:
        """Move a folder that was made beside it into its place, as a finished run: whole or not at all."""
        run: dict[str, Any] = {
            "status": "finished",
            "versions": versions,
            "processes": self._processes,
            "data": {},
            "recipe": self._recipe,
        }
        for name, text in {NAME: json.dumps(run, indent=2) + "\n", RECIPE_NAME: recipe_yaml}.items():
            # a file of that name may be a link into the source
            (made / name).unlink(missing_ok=True)
            (made / name).write_text(text, encoding="utf-8")
        flush_tree(made)
        if self.rebuilt:
            self._delete()
        self.discard()
        # rename(2) puts a folder over an empty one
        os.replace(made, self.path)
        flush(self.path.parent)
        self._run = read_record(self.path)

    def discard(self) -> None:
        """Delete the run in the folder, if the folder was opened to be overwritten."""
        if self._overwrite and self._run:
            self._delete()
        self._overwrite = False

    @property
    def finished(self) -> bool:
        """True if the folder holds a finished run that is to be kept."""
        return self._status == "finished"

    @property
    def trained(self) -> bool:
        """True if everything is trained and measured, and something is left to write (see `missing`)."""
        return self._status == "trained" or bool(self._status == "finished" and self.missing)

    @property
    def _status(self) -> str | None:
        return self._run["status"] if self._run and not self._overwrite else None

    @property
    def missing(self) -> list[str]:
        """Missing parts of a trained run: card, merged model, report, upload. Always empty for a stage without training."""
        if not self._run or not self._run["data"] or self._lost():
            return []
        lacks = [name for name in ("README.md", "report.html") if not (self.path / name).is_file()]
        if self._merges and not (self.path / MERGED).is_dir():
            lacks.append(f"{MERGED}/")
        if self.uploads and self._run.get("uploaded") != self.uploads:
            lacks.append(f"upload to {self.uploads}")
        return lacks

    @property
    def about(self) -> dict[str, str]:
        """When and how the run was made, for its report."""
        return self._begun["about"]

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the packages that trained it."""
        return self._begun["versions"]

    @property
    def begun(self) -> bool:
        """True if the folder holds a run."""
        return self._run is not None

    @property
    def _begun(self) -> dict[str, Any]:
        assert self._run is not None, "the run was begun"
        return self._run

    @property
    def rebuilt(self) -> bool:
        """True if run.json is damaged or missing, and only recipe.yaml is left of the record."""
        return bool(self._run and self._run.get("rebuilt"))

    def note_trained(self, about: dict[str, str]) -> None:
        """Record that the result and its scores are complete on the disk; `about` is when and how they were made."""
        flush_tree(self.path, without=(self.checkpoints.name, LOCK_FILE))
        self._write_run(**{**self._begun, "status": "trained", "about": about})

    def finish(self) -> None:
        """Record that the run is finished. Written last."""
        flush_tree(self.path, without=(self.checkpoints.name, LOCK_FILE))
        uploaded = {"uploaded": self.uploads} if self.uploads else {}
        self._write_run(**{**self._begun, "status": "finished", **uploaded})

    def resume_point(self) -> Found:
        """The checkpoint to resume from, its contents verified. For one process: it reads the whole checkpoint, once.

        Raises:
            UserError: every checkpoint was complete once and is damaged now.
        """
        if self._found is None:
            if self._overwrite or self._run is None:
                self._found = Found(None)
            else:
                self._found = self.sealed.newest(manifests=self._has_manifests)
        return self._found

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint with all its files, whose contents are not read; None also if all are damaged."""
        try:
            return self.sealed.newest(manifests=self._has_manifests, contents=False).checkpoint
        except UserError:
            return None

    @property
    def _has_manifests(self) -> bool:
        """True if the run writes manifests: a checkpoint without one is then incomplete."""
        if self.rebuilt:
            return any(self.checkpoints.glob(f"checkpoint-*/{MANIFEST}"))
        return "fingerprints" in (self._run or read_record(self.path) or {})

    @property
    def sealed(self) -> Checkpoints:
        """The checkpoints with their manifests."""
        return Checkpoints(self.checkpoints, self._processes)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def save_scores(self, when: str, scores: list[Score]) -> None:
        self.write(f"probes_{when}.json", scores_to_json(scores))

    def load_scores(self, when: str) -> list[Score] | None:
        """The scores of "before" or "after"; None if they are missing or cannot be read."""
        try:
            return scores_from_json((self.path / f"probes_{when}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def stored(self, name: str) -> str | None:
        """The text of a file of the run that is to be resumed; None if it is missing or not UTF-8."""
        try:
            return None if self._overwrite else (self.path / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return None

    def write(self, name: str, text: str) -> None:
        """Write a small file, whole or not at all."""
        write_atomically(self.path / name, text, durable=True)

    def _write_run(self, **run: Any) -> None:
        self.write(NAME, json.dumps(run, indent=2) + "\n")
        self._run = run

    def _is_free(self) -> bool:
        """True if nothing is in the folder, or only files of a start that was killed before it wrote run.json."""
        if not self.path.exists():
            return True
        leftovers = (f".{NAME}.partial", LOCK_FILE)
        for entry in self.path.iterdir():
            if entry.name not in leftovers and not (entry == self.checkpoints and not any(entry.iterdir())):
                return False
        return True

    def _delete(self) -> None:
        """Empty the folder; run.json goes last, so that after a kill in between it is still recognised as a run's."""
        for entry in sorted(self.path.iterdir(), key=lambda entry: entry.name == NAME):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != LOCK_FILE:
                entry.unlink()
        self._run = self._found = None
