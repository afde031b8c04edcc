"""The folder of a run: whose it is, how far it got, and what a second start of the same command may do with it.

    run.json            recipe, status ("running" or "finished"), versions; written first, and last
    recipe.yaml         the resolved recipe
    metrics.jsonl       one line a log
    landscape.jsonl     one line a window of steps: where the trained tokens lay
    probes_before.json, probes_after.json
    checkpoints/        what a killed run goes on from
    and beside them     the result: adapter or weights, tokenizer, README.md

An unfinished run of the same recipe is resumed, a finished one is left alone, anybody else's folder is not touched.
The folder of a stage is such a folder too; its finished run is the model of the next stage.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from ..evaluate import Score
    from .plan import DataStats
    from .schema import Recipe

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
WAYS_OUT = (
    "Nothing was touched: name another folder with output.dir=..., or pass --overwrite to delete it and start anew."
)


class RunFolder:
    """A run's folder, opened for one recipe. Making one only looks; `begin` is the first to write.

    Args:
        path: the folder; it need not exist.
        recipe: the recipe to run. `output` is not compared with the folder's: where results go does not change them.
        overwrite: `begin` deletes the run that is there.
        keep_finished: a finished run of this recipe is no error; `finished` tells of it.

    Raises:
        UserError: the folder holds a finished run, a run of another recipe or files that are not a run's, or can not be
            written to.
    """

    def __init__(self, path: str | Path, recipe: Recipe, *, overwrite: bool = False, keep_finished: bool = False):
        self.path = Path(path).expanduser()
        self._overwrite = overwrite
        self._recipe = _dumped(recipe)
        self._schema = type(recipe)
        # how many share a batch changes the steps, as a key of the recipe does
        self._processes = int(os.environ.get("WORLD_SIZE", "1"))
        self._keep_finished = keep_finished
        self._check_writable()
        self._check()

    def _check_writable(self) -> None:
        place = self.path
        while not place.exists() and place != place.parent:
            place = place.parent
        if not place.is_dir():
            raise UserError(f"{self.path} can not be made: {place} is a file. Name another folder with output.dir=...")
        if not os.access(place, os.W_OK | os.X_OK):
            raise UserError(
                f"{self.path} can not be written to: no permission to write in {place}. Name another folder with "
                "output.dir=..., or change its permissions."
            )

    def _check(self) -> None:
        run = self._read()
        if run is None:
            if not self._is_free():
                raise UserError(
                    f"{self.path} is not empty and holds no run of eaftdrope (no run.json of ours). Nothing was touched: "
                    "name another folder with output.dir=..."
                )
            return
        if self._overwrite:
            return
        finished = run["status"] == "finished"
        if finished and not self._keep_finished:
            raise UserError(f"{self.path} holds a finished run. {WAYS_OUT}")
        if keys := differences(self._as_now(run["recipe"]), self._recipe):
            kind = "a finished run" if finished else "an unfinished run"
            raise UserError(f"{self.path} holds {kind} of another recipe (different: {keys}). {WAYS_OUT}")
        if not finished and run["processes"] != self._processes:
            raise UserError(
                f"{self.path} holds an unfinished run on {run['processes']} processes, and this is one on "
                f"{self._processes}: a step would have other rows. {WAYS_OUT}"
            )

    def _as_now(self, recipe: dict) -> dict:
        """A recipe that an older version dumped, with the defaults of keys that it did not have."""
        try:
            return _dumped(self._schema.model_validate({**_without_nulls(recipe), "output": {"dir": "unused"}}))
        except ValueError:
            # it had keys that are no more
            return recipe

    def begin(self, recipe_yaml: str, versions: dict[str, str], data: DataStats) -> None:
        """Makes the folder, deletes an overwritten run and broken checkpoints, and says that a run is on. For the main
        process, once everything that can be checked is.

        Raises:
            UserError: the data are not those that the unfinished run began with.
        """
        counts = dataclasses.asdict(data)
        run = self._read()
        if run and self._overwrite:
            self._delete()
        elif run and run["data"] != counts:
            raise UserError(
                f"{self.path} holds an unfinished run on other data: {_data_text(run['data'])} then, {_data_text(counts)} "
                f"now. {WAYS_OUT}"
            )
        self._overwrite = False
        self.path.mkdir(parents=True, exist_ok=True)
        self._write_run(
            status="running", versions=versions, processes=self._processes, data=counts, recipe=self._recipe
        )
        self.write("recipe.yaml", recipe_yaml)
        for folder in self._checkpoint_folders().values():
            if not self._is_whole(folder):
                shutil.rmtree(folder)

    def take(self, made: Path, recipe_yaml: str, versions: dict[str, str]) -> None:
        """Puts a folder that was made beside it in its place, as a finished run: whole or not at all."""
        run = {
            "status": "finished",
            "versions": versions,
            "processes": self._processes,
            "data": {},
            "recipe": self._recipe,
        }
        for name, text in {"run.json": json.dumps(run, indent=2) + "\n", "recipe.yaml": recipe_yaml}.items():
            # a file of that name may be a link to somebody else's
            (made / name).unlink(missing_ok=True)
            (made / name).write_text(text, encoding="utf-8")
        self.discard()
        # rename(2) puts a folder over an empty one
        os.replace(made, self.path)

    def discard(self) -> None:
        """Deletes the run that is there, if the folder was opened to be overwritten."""
        if self._overwrite and self._read():
            self._delete()
        self._overwrite = False

    @property
    def finished(self) -> bool:
        """Whether it holds a finished run that is to be kept."""
        run = None if self._overwrite else self._read()
        return run is not None and run["status"] == "finished"

    @property
    def begun(self) -> bool:
        return self._read() is not None

    def finish(self, about: dict[str, str]) -> None:
        """Says that the run is complete; `about` is when and how it was made, for its report."""
        self._write_run(**{**self._read(), "status": "finished", "about": about})

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that was written to its end."""
        whole = {step: folder for step, folder in self._checkpoint_folders().items() if self._is_whole(folder)}
        return whole[max(whole)] if whole else None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def save_scores(self, when: str, scores: list[Score]) -> None:
        from ..evaluate import scores_to_json

        self.write(f"probes_{when}.json", scores_to_json(scores))

    def load_scores(self, when: str) -> list[Score] | None:
        from ..evaluate import scores_from_json

        file = self.path / f"probes_{when}.json"
        return scores_from_json(file.read_text(encoding="utf-8")) if file.is_file() else None

    def kept(self, name: str) -> str | None:
        """The text of a file of the run that is to be gone on with, None where there is none."""
        file = self.path / name
        return None if self._overwrite or not file.is_file() else file.read_text(encoding="utf-8")

    def write(self, name: str, text: str) -> None:
        """A small file, whole or not at all."""
        partial = self.path / f".{name}.partial"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, self.path / name)

    def _write_run(self, **run) -> None:
        self.write("run.json", json.dumps(run, indent=2) + "\n")

    def _read(self) -> dict | None:
        """run.json; None where there is none, or another program's of that name."""
        run = _json(self.path / "run.json")
        return run if isinstance(run, dict) and {"status", "recipe", "processes", "data"} <= run.keys() else None

    def _is_free(self) -> bool:
        """Nothing there, or only what a start of ours leaves that was killed before it wrote run.json."""
        if not self.path.exists():
            return True
        for entry in self.path.iterdir():
            ours = entry.name == ".run.json.partial" or (entry == self.checkpoints and not any(entry.iterdir()))
            if not ours:
                return False
        return True

    def _delete(self) -> None:
        """Empties the folder; run.json goes last, so that a kill in between leaves a run and not a stranger's folder."""
        for entry in sorted(self.path.iterdir(), key=lambda entry: entry.name == "run.json"):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def _checkpoint_folders(self) -> dict[int, Path]:
        matches = {folder: _CHECKPOINT.fullmatch(folder.name) for folder in self.checkpoints.glob("checkpoint-*")}
        return {int(match[1]): folder for folder, match in matches.items() if match}

    def _is_whole(self, folder: Path) -> bool:
        """The main process writes trainer_state.json last; the others' last is their state of the random generators,
        a zip file whose directory is at its end."""
        random_states = list(folder.glob("rng_state*.pth"))
        written = len(random_states) == self._processes and all(map(zipfile.is_zipfile, random_states))
        return written and _json(folder / "trainer_state.json") is not None


def _dumped(recipe: Recipe) -> dict:
    return recipe.model_dump(mode="json", exclude={"output"})


def _without_nulls(data: object) -> object:
    """As `dump_recipe` writes a recipe: an entry of the probes has one name, and not every other one set to null."""
    if isinstance(data, dict):
        return {key: _without_nulls(value) for key, value in data.items() if value is not None}
    return [_without_nulls(value) for value in data] if isinstance(data, list) else data


def _json(file: Path) -> object:
    """The content, None where there is no file or it is not (all of) a JSON document."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _data_text(counts: dict[str, int]) -> str:
    return f"{counts['rows']:,} rows with {counts['tokens']:,} tokens, {counts['trained_tokens']:,} of them trained"


def differences(old: dict, new: dict) -> str:
    """Dotted keys whose values differ; "" where none do."""

    def flat(data, prefix=""):
        if isinstance(data, dict):
            return {key: value for name in data for key, value in flat(data[name], f"{prefix}{name}.").items()}
        return {prefix[:-1]: data}

    before, after = flat(old), flat(new)
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return ", ".join(keys[:6]) + (", ..." if len(keys) > 6 else "")
