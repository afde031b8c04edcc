"""The settings of one training, resolved: what is trained, on which data, and how.

Built once per stage from the sections of the recipe; nothing later rewrites it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from eaftdrope.loss.anchor import Anchor
from eaftdrope.recipe.data_section import Data
from eaftdrope.recipe.probe_sections import Probes
from eaftdrope.recipe.schema import Model, Recipe
from eaftdrope.recipe.stage_sections import Pretrain, Recalibrate, TextData
from eaftdrope.recipe.training_sections import Lora, Loss, Train
from eaftdrope.ttt.config import TTTConfig

from .degrees import Degrees
from .machine import uses_bfloat16


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of one training.

    Args:
        model: the model to start from.
        data: conversations (`Data`), or text that is cut into blocks (`TextData`).
        max_length: tokens of the longest sequence, or of every block of text.
        folder: the run folder.
        lora: None for a full fine-tune.
        merge: also write the model with the adapters merged.
        report_to: experiment trackers.
        anchor: divergence from the model to start from; None without one.
        ttt: settings of the conversion to a model that learns as it reads; None for one that does not.
        stage: the kind of stage that trains.
    """

    model: Model
    data: Data | TextData
    loss: Loss
    train: Train
    probes: Probes
    max_length: int
    folder: str
    lora: Lora | None = None
    merge: bool = False
    report_to: tuple[str, ...] = ()
    anchor: Anchor | None = None
    ttt: TTTConfig | None = None
    stage: str = "eaft"

    @property
    def autocast(self) -> bool:
        """True if the arithmetic is bfloat16 autocast on this machine."""
        return uses_bfloat16(self.train.precision)

    @property
    def data_seed(self) -> int:
        """Seed of a held-out share and of fractional weights: runs of several training seeds can share their rows."""
        return self.data.data_seed(self.train.seed)

    @property
    def needs_second_model(self) -> bool:
        """True if the base of the anchor is a second copy of the model, and not the model without its adapters."""
        return self.anchor is not None and self.lora is None

    @property
    def packing(self) -> bool:
        """True if several rows share a sequence. Blocks of text are full already."""
        return isinstance(self.data, Data) and self.data.packing

    @property
    def separate_documents(self) -> bool:
        """True if the documents of a block of text do not attend to each other."""
        return isinstance(self.data, TextData) and self.data.documents == "separate"

    @property
    def tokens_per_step(self) -> int:
        """Tokens per step over all data-parallel ranks when every sequence has the full length."""
        return self.train.batch_size * self.train.accumulation * Degrees.present().ranks * self.max_length


def text_settings(recipe: Recipe, stage: str, model: Model, folder: Path, *, length: int) -> TrainingSettings:
    """The settings of a stage that trains all weights on blocks of text.

    Args:
        stage: pretrain or recalibrate.
        length: tokens of a block.
    """
    section: Pretrain | Recalibrate = getattr(recipe, stage)
    settings = TrainingSettings(
        model=model,
        data=section.data,
        loss=section.loss,
        train=Train.model_validate(section.train.model_dump()),
        probes=section.probes,
        max_length=length,
        folder=str(folder),
        report_to=tuple(recipe.output.report_to),
        stage=stage,
    )
    if section.budget is None:
        return settings
    steps = math.ceil(section.budget / settings.tokens_per_step)
    return replace(settings, train=Train.model_validate({**section.train.model_dump(), "steps": steps}))


def eaft_settings(
    recipe: Recipe, *, model: Model | None = None, folder: str | None = None, ttt: TTTConfig | None = None
) -> TrainingSettings:
    """The settings of the stage eaft of a recipe.

    Args:
        model: the model to start from, the recipe's by default.
        folder: the run folder, the recipe's by default.
        ttt: settings of a model that learns as it reads already; None for one that does not.
    """
    assert recipe.data is not None, "a recipe with the stage eaft has the section data"
    return TrainingSettings(
        model=model or recipe.model,
        data=recipe.data,
        loss=recipe.loss,
        train=recipe.train,
        probes=recipe.probes,
        max_length=recipe.data.max_length,
        folder=folder or recipe.output.dir,
        lora=recipe.lora,
        merge=recipe.output.merge,
        report_to=tuple(recipe.output.report_to),
        anchor=recipe.loss.anchor_of_loss,
        ttt=ttt,
    )
