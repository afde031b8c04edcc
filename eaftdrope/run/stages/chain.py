"""The stages of a recipe, each a run of its own in a folder below `output.dir`, on the model that the one before it left.

    output.dir/drope            the converted checkpoint
    output.dir/recalibrate      the recalibrated one, with the records of its training
    output.dir/eaft             adapters or weights, and theirs

A recipe without `stages` is one eaft stage in `output.dir` itself. A stage's folder keeps, and is compared by, the recipe
up to that stage: what later stages do does not change it, and any change of what came before it does.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from eaftdrope.drope.config import trained_length
from eaftdrope.errors import UserError
from eaftdrope.recipe.schema import Recipe
from eaftdrope.recipe.stage_sections import TextData

from ..folder import WAYS_OUT, RunFolder

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_SECTIONS = {
    "drope": ("drope",),
    "recalibrate": ("recalibrate",),
    "eaft": ("data", "loss", "lora", "train", "probes"),
}


@dataclass(frozen=True)
class Stage:
    """One stage.

    Args:
        name: one of `STAGES`.
        record: the recipe up to this stage.
        folder: the stage's folder, opened for `record`.
        before: the stage whose model this one takes, None for the first.
        later: folders of the stages after it.
        heading: what a person reads above its plan; "" for a recipe without stages.
    """

    name: str
    record: Recipe
    folder: RunFolder
    before: Stage | None = None
    later: tuple[RunFolder, ...] = ()
    heading: str = ""

    @property
    def model(self) -> str:
        """Reference of the model that this stage takes; that of another stage exists once it is finished."""
        return str(self.before.folder.path) if self.before else self.record.model.reference

    @property
    def readable_model(self) -> str:
        """A model with the tokenizer and (nearly) the configuration of `model` that can be read now."""
        ready = self.before is None or self.before.folder.finished
        return self.model if ready else self.before.readable_model

    def revision(self, reference: str) -> str | None:
        """The revision that the recipe wants of a model, None for one of its own stages."""
        return self.record.model.revision if reference == self.record.model.reference else None


def open_stages(recipe: Recipe, *, overwrite: bool = False) -> list[Stage]:
    """The stages of `recipe`, their folders looked at and nothing written.

    Raises:
        UserError: all of it is finished already; a folder holds another run or is not ours (see `RunFolder`); a stage
            is to be run of which a later one has a run.
    """
    if recipe.stages is None:
        uploads = recipe.output.push_to_hub
        return [Stage("eaft", recipe, RunFolder(recipe.output.dir, recipe, overwrite=overwrite, uploads=uploads))]
    top = Path(recipe.output.dir).expanduser()
    if (top / "run.json").exists():
        raise UserError(
            f"{top} holds a run of a recipe without stages. Nothing was touched: name another folder with output.dir=..."
        )
    records = [_up_to(recipe, stage) for stage in recipe.stages]
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
    if all(folder.finished and not folder.missing for folder in folders):
        raise UserError(f"{top} holds a finished run. {WAYS_OUT}")
    stages: list[Stage] = []
    for index, (name, record, folder) in enumerate(zip(recipe.stages, records, folders, strict=True)):
        later = tuple(folders[index + 1 :])
        stale = [other.path for other in later if other.begun]
        if folder.rebuilt and not overwrite and stale:
            raise UserError(
                f"{folder.path / 'run.json'} is damaged or missing, and {stale[0]} holds a run on the result of the stage "
                f"{name}. Put back a copy of that file and run the same command again. {WAYS_OUT}"
            )
        if not folder.finished and not overwrite and stale:
            raise UserError(
                f"{stale[0]} holds a run on the result of the stage {name}, which is not finished in {folder.path}. "
                f"Nothing was touched: move {stale[0].name}/ away, name another folder with output.dir=..., or pass "
                "--overwrite to delete every stage and start anew."
            )
        heading = f"stage {index + 1} of {len(folders)}: {name}"
        stages.append(Stage(name, record, folder, stages[-1] if stages else None, later, heading))
    return stages


def _up_to(recipe: Recipe, last: str) -> Recipe:
    """The recipe with `last` as its last stage. Sections of later stages get their defaults, which nothing reads."""
    stages = recipe.stages[: recipe.stages.index(last) + 1]
    fields = Recipe.model_fields
    dropped = [key for stage, keys in _SECTIONS.items() if stage not in stages for key in keys]
    return recipe.model_copy(
        update={"stages": stages, **{key: _filled(key, fields[key].default) for key in dropped}},
    )


def _filled(key: str, default: object) -> object:
    return default.with_defaults(held_out=False) if key == "probes" else default


def training_recipe(stage: Stage) -> Recipe:
    """A training stage as one run: its sections where those of a recipe stand, its model and its folder named."""
    record = stage.record
    model = record.model.model_copy(update={"reference": stage.model, "revision": stage.revision(stage.model)})
    output = record.output.model_copy(update={"dir": str(stage.folder.path)})
    if stage.name == "eaft":
        return record.model_copy(update={"model": model, "output": output})
    section = record.recalibrate
    return record.model_copy(
        update={
            "model": model.model_copy(update={"quantization": "none"}),
            "data": section.data,
            "loss": section.loss,
            "lora": None,
            "train": section.train,
            "probes": section.probes,
            "output": output.model_copy(update={"merge": False}),
        }
    )


def with_steps(recipe: Recipe, config: PretrainedConfig) -> Recipe:
    """The recipe of `training_recipe` with what follows from its model: the length of a block of text, and the steps that
    a budget in tokens makes.

    Args:
        config: of the model that the stage takes, or of the one that is converted to it.
    """
    if not isinstance(recipe.data, TextData):
        return recipe
    length = recipe.data.max_length or trained_length(config)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_length": length})})
    budget = recipe.recalibrate.budget
    if budget is None:
        return recipe
    steps = math.ceil(budget / tokens_of_a_step(recipe))
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": steps})})


def tokens_of_a_step(recipe: Recipe) -> int:
    """Tokens of a step when every sequence has the full length, over all processes."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return recipe.train.batch_size * recipe.train.accumulation * processes * recipe.data.max_length
