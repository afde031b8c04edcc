"""The stages of a recipe, each a run of its own in a folder below `output.dir`, on the model that the one before it left.

    output.dir/pretrain         a new model, trained from random weights
    output.dir/drope            the converted checkpoint
    output.dir/recalibrate      the recalibrated one, with the records of its training
    output.dir/eaft             adapters or weights, with theirs; where a stage follows, adapters are also merged
    output.dir/ttt              adapters or weights, and the fast MLPs

A recipe without `stages` is one eaft stage in `output.dir` itself. A stage's folder keeps, and is compared by, the recipe
up to that stage: later stages do not change it, and any change of an earlier one does.
"""

from __future__ import annotations

from pathlib import Path

from eaftdrope.errors import UserError
from eaftdrope.recipe.probe_sections import Probes
from eaftdrope.recipe.schema import Recipe
from eaftdrope.recipe.stage_sections import STAGE_SECTIONS, STAGES
from eaftdrope.report import page

from ..folder import WAYS_OUT, RunFolder
from .drope import DropeStage
from .eaft import EaftStage
from .pretrain import PretrainStage
from .recalibrate import RecalibrateStage
from .stage import Stage
from .ttt import TTTStage

KINDS: dict[str, type[Stage]] = {
    kind.name: kind for kind in (PretrainStage, DropeStage, RecalibrateStage, EaftStage, TTTStage)
}


def open_stages(recipe: Recipe, *, overwrite: bool = False) -> list[Stage]:
    """The stages of `recipe` with their folders, which are only read.

    Raises:
        UserError: the run is finished already; a folder holds another run, or files that are not a run's (see `RunFolder`);
            a stage is not finished that a later one has already used.
    """
    if recipe.stages is None:
        uploads = recipe.output.push_to_hub
        return [EaftStage(recipe, RunFolder(recipe.output.dir, recipe, overwrite=overwrite, uploads=uploads))]
    top = Path(recipe.output.dir).expanduser()
    if (top / "run.json").exists():
        raise UserError(
            f"{top} holds a run of a recipe without stages. Nothing was changed: choose another folder with output.dir=..."
        )
    records = [_up_to(recipe, recipe.stages[: index + 1]) for index in range(len(recipe.stages))]
    folders = [
        RunFolder(
            top / name,
            record,
            overwrite=overwrite,
            keep_finished=True,
            # the last stage's result is the run's
            uploads=recipe.output.push_to_hub if record is records[-1] else None,
        )
        for name, record in zip(recipe.stages, records, strict=True)
    ]
    if all(folder.finished and not folder.missing for folder in folders) and (top / page.NAME).is_file():
        raise UserError(f"{top} holds a finished run. {WAYS_OUT}")
    stages: list[Stage] = []
    for index, (name, record, folder) in enumerate(zip(recipe.stages, records, folders, strict=True)):
        later = tuple(folders[index + 1 :])
        if not overwrite:
            _check_order(name, folder, later)
        heading = f"stage {index + 1} of {len(folders)}: {name}"
        stages.append(KINDS[name](record, folder, stages[-1] if stages else None, later, heading))
    return stages


def _check_order(name: str, folder: RunFolder, later: tuple[RunFolder, ...]) -> None:
    """
    Raises:
        UserError: the stage is not finished, or its record is damaged, and a later one holds a run on its result.
    """
    begun = next((other.path for other in later if other.begun), None)
    if begun is None:
        return
    if folder.rebuilt:
        raise UserError(
            f"{folder.path / 'run.json'} is damaged or missing, and {begun} holds a run on the result of the stage "
            f"{name}. Put back a copy of that file and run the same command again. {WAYS_OUT}"
        )
    if not folder.finished:
        raise UserError(
            f"{begun} holds a run on the result of the stage {name}, which is not finished in {folder.path}. "
            f"Nothing was changed: move {begun.name}/ away, choose another folder with output.dir=..., or pass "
            "--overwrite to delete every stage and start over."
        )


def _up_to(recipe: Recipe, stages: list[str]) -> Recipe:
    """The recipe with `stages` only. Sections of other stages get their defaults, which nothing reads.

    Adapters that a later stage starts from are merged, whatever the recipe sets for those of the last one.
    """
    dropped = [key for stage, keys in STAGE_SECTIONS.items() if stage not in stages for key in keys]
    defaults = {key: Recipe.model_fields[key].default for key in dropped}
    if "probes" in defaults:
        defaults["probes"] = Probes().with_defaults(held_out=False)
    is_sorted = stages == sorted(stages, key=STAGES.index)
    record = recipe.model_copy(update={"stages": stages, "any_order": recipe.any_order and not is_sorted, **defaults})
    is_last = len(stages) == len(recipe.stages or [])
    merge = record.adapters is not None and (recipe.output.merge or not is_last)
    return record.model_copy(update={"output": recipe.output.model_copy(update={"merge": merge})})
