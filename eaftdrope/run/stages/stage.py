"""The interface of a stage: one run of a recipe's chain, in its own folder, on the model that the stage before it left."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

from rich.console import Console
from transformers import PretrainedConfig

from eaftdrope.evaluate import Score
from eaftdrope.processes import is_main_process
from eaftdrope.recipe.schema import Model, Recipe

from ..folder import RunFolder
from ..plan import Lines

P = TypeVar("P")
"""Whatever a kind of stage reads before it runs."""


@dataclass(frozen=True)
class StageResult:
    """The folder of a finished stage and its scores, which are empty without probes and outside the main process."""

    folder: Path
    before: list[Score]
    after: list[Score]


@dataclass(frozen=True)
class Stage(ABC, Generic[P]):
    """One stage.

    Args:
        record: the recipe up to this stage.
        folder: the stage's folder, opened for `record`.
        before: the stage whose model this one starts from, None for the first.
        later: folders of the stages after it.
        heading: the line above its plan; "" for a recipe without stages.
    """

    name: ClassVar[str]

    record: Recipe
    folder: RunFolder
    before: Stage | None = None
    later: tuple[RunFolder, ...] = ()
    heading: str = ""

    @abstractmethod
    def prepare(self, console: Console) -> P:
        """Read and check everything that needs no weights, and print the plan. Nothing is written.

        Raises:
            UserError: anything that would stop the stage before its weights are read.
        """

    @abstractmethod
    def plan(self, prepared: P) -> Lines:
        """The plan as (name, text) lines."""

    @abstractmethod
    def run(self, prepared: P, console: Console, *, command: str, progress: Progress) -> None:
        """Run the stage, or resume it, and write its result.

        Args:
            command: as the user typed it, for the model card.
            progress: kept up to date, for the message after an interruption.
        """

    def complete(self, console: Console) -> None:
        """Write whatever a stage lacks that is trained and measured. A stage without training lacks nothing."""

    def result(self) -> StageResult:
        """The result of the finished stage."""
        before, after = ((is_main_process() and self.folder.load_scores(when)) or [] for when in ("before", "after"))
        return StageResult(self.folder.path, before, after)

    def output_config(self, config: PretrainedConfig) -> PretrainedConfig:
        """The configuration of the model that this stage leaves, as far as a plan reads it.

        Args:
            config: of the model that the first stage starts from, or of one that a finished stage left.
        """
        return self.before.output_config(config) if self.before else config

    @property
    def model(self) -> Model:
        """The model that this stage starts from; the one of another stage exists once that is finished."""
        if self.before is None:
            return self.record.model
        return self.record.model.model_copy(update={"reference": str(self.before.model_folder), "revision": None})

    @property
    def model_folder(self) -> Path:
        """The folder of the model that a later stage starts from."""
        return self.folder.path

    @property
    def readable_model(self) -> Model:
        """A model that can be read now, with the tokenizer and (nearly) the configuration of `model`."""
        if self.before is None or (self.before.folder.finished and not self.before.folder.missing):
            return self.model
        return self.before.readable_model


class Progress:
    """How far a run is, for the message after an interruption.

    Attributes:
        stage: the current stage.
        phase: the current phase ("while loading").
        changed: True once anything was written.
    """

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.phase = "while loading"
        self.changed = False

    @contextmanager
    def at(self, phase: str) -> Iterator[None]:
        """The phase inside the block. An exception leaves it in place: the message is about where it happened."""
        outer, self.phase = self.phase, phase
        yield
        self.phase = outer

    def interrupted(self, *, overwrite: bool) -> str:
        """The message after Ctrl-C or SIGTERM: where the run stopped, and how to resume it."""
        if not self.changed:
            return f"Interrupted {self.phase}, before anything was changed. Start the same command again."
        where = f" of the stage {self.stage.name}" if self.stage.heading else ""
        return f"Interrupted {self.phase}{where}. {self.how_to_resume(overwrite=overwrite)}"

    def how_to_resume(self, *, overwrite: bool) -> str:
        """What the same command will do, as a sentence."""
        stage = self.stage
        command = "The same command without --overwrite" if overwrite and self.changed else "The same command"
        checkpoint = stage.folder.last_checkpoint() if self.changed or not overwrite else None
        if checkpoint:
            return f"{command} resumes from {checkpoint.name}."
        return f"{command} {'trains from the beginning' if stage.folder.begun else f'begins the stage {stage.name}'}."
