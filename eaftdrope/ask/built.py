"""What a run built: the models of its finished stages, and its section `serve`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from eaftdrope.errors import UserError
from eaftdrope.files import usable_path
from eaftdrope.recipe.load import load_recipe
from eaftdrope.recipe.serve_section import Serve
from eaftdrope.recipe.stage_sections import STAGES
from eaftdrope.recipe.yaml_lines import read_yaml
from eaftdrope.run.record import SERVE_FILE, read_record

_RECIPES = (".yaml", ".yml")
_ASKED = "ask"


@dataclass(frozen=True)
class BuiltRun:
    """A run with at least one finished model.

    Attributes:
        folder: `output.dir`.
        serve: how its models are used.
        plain: folder of the last model that does not learn as it reads, or of its adapter; None without one.
        ttt: folder of the last model that does.
    """

    folder: Path
    serve: Serve
    plain: str | None = None
    ttt: str | None = None

    @property
    def asked(self) -> Path:
        """The folder for journals, and for states of texts that were read."""
        return self.folder / _ASKED


def find_run(reference: str) -> BuiltRun:
    """Find a run by its folder, or by its recipe, whose section `serve` then counts.

    Raises:
        UserError: no such folder or recipe, no finished stage, or a damaged section.
    """
    path = usable_path(reference)
    if path.suffix in _RECIPES:
        recipe = load_recipe(path)
        folder, serve = Path(recipe.output.dir).expanduser(), recipe.serve or Serve()
    else:
        folder, serve = path, _stored(path / SERVE_FILE)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder. Train first: eaftdrope train RECIPE.")
    plain, ttt = _models(folder)
    if plain is None and ttt is None:
        raise UserError(f"{folder} holds no finished run. Train first, or pass the output.dir of a run.")
    return BuiltRun(folder, serve, plain, ttt)


def _models(folder: Path) -> tuple[str | None, str | None]:
    """The last model that does not learn as it reads, and the last one that does."""
    found: dict[bool, tuple[int, str]] = {}
    for stage in (folder, *(folder / name for name in STAGES)):
        record = read_record(stage)
        if record is None or record["status"] == "running":
            continue
        # of a stage: those up to it
        stages = record["recipe"].get("stages") or ["eaft"]
        learns = "ttt" in stages
        found[learns] = max(found.get(learns, (0, "")), (len(stages), str(stage)))
    return tuple(found[learns][1] if learns in found else None for learns in (False, True))


def _stored(file: Path) -> Serve:
    if not file.is_file():
        return Serve()
    document = read_yaml(file.read_text(encoding="utf-8"))
    try:
        return Serve.model_validate(document.data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{file}: {where}: {first['msg']}. Correct it, or pass the recipe instead of the folder."
        ) from error
