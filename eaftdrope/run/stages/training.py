"""Everything that the stages with a training have in common: what they read first, the training itself, and its end.

    tokenizer, configuration -> settings -> data, probes -> plan
    model -> probes before -> training -> result -> probes after -> card, table, report

Every step leaves its result in the stage's folder, so the same command after a kill resumes where the folder ends.
"""

from __future__ import annotations

import json
import signal
from abc import abstractmethod
from collections.abc import Sized
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

from rich.console import Console
from transformers import PretrainedConfig, PreTrainedTokenizerBase, set_seed

from eaftdrope.evaluate import Probe, Score
from eaftdrope.models import load_config, load_tokenizer, needs_dequantising, refuse_ttt
from eaftdrope.processes import is_main_process
from eaftdrope.recipe.data_section import Data
from eaftdrope.recipe.dump import dump_recipe
from eaftdrope.recipe.stage_sections import TextData, TextTrain
from eaftdrope.recipe.training_sections import Lora, Loss, Train
from eaftdrope.trainer import EAFTTrainer
from eaftdrope.trainer.callbacks.landscape import LandscapeFileCallback
from eaftdrope.trainer.callbacks.metrics import BoundedHistory, MetricsFileCallback
from eaftdrope.trainer.callbacks.probes import ProbeOnceSharded
from eaftdrope.trainer.callbacks.progress import use_progress_display
from eaftdrope.trainer.callbacks.recovery import RecoveryCallback
from eaftdrope.trainer.callbacks.stop_at_loss import StopAtLoss
from eaftdrope.trainer.callbacks.stopping import SaveAndStop

from ..arguments import build_trainer
from ..build import build_run_probes, check_backend, generate_replay
from ..checkpoints import SealCheckpoints
from ..data import RunData, build_data, check_vocabulary, print_audit
from ..degrees import Degrees
from ..fingerprint import fingerprints
from ..finish import Card, about_run, finish
from ..folder import MERGED, RunFolder
from ..interrupts import Terminated
from ..launch import refused_together, wait_for_everyone
from ..machine import versions
from ..plan import Lines, make_plan, plan_lines, print_plan, steps_of_rows
from ..probing import RunProbes
from ..recovery import RECOVERY_FILE, RecoveryProbe
from ..result import is_sharded, save_result
from ..resuming import PresentSchedule, agreed_checkpoint, load_only, lost_lines
from ..settings import TrainingSettings
from .stage import Progress, Stage


@dataclass(frozen=True)
class Prepared:
    """Everything a training needs but the weights of its model.

    Args:
        config: of a model that can be read now (see `Stage.readable_model`).
    """

    settings: TrainingSettings
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    data: RunData
    probes: list[Probe]
    recovery: RecoveryProbe | None = None


@dataclass(frozen=True)
class TrainingStage(Stage[Prepared]):
    """A stage that trains. Its kind has the recipe's sections and resolves them into `TrainingSettings`."""

    @property
    @abstractmethod
    def data(self) -> Data | TextData: ...

    @property
    @abstractmethod
    def loss(self) -> Loss: ...

    @property
    @abstractmethod
    def train(self) -> Train | TextTrain: ...

    @property
    def lora(self) -> Lora | None:
        return None

    @property
    def merge(self) -> bool:
        """True if the model with its adapters merged is written too."""
        return False

    @property
    def learns(self) -> bool:
        """True if the model that this stage leaves learns as it reads."""
        return False

    @property
    def model_folder(self) -> Path:
        return self.folder.path / MERGED if self.lora else self.folder.path

    @abstractmethod
    def settings(self, config: PretrainedConfig) -> TrainingSettings:
        """The settings of the training, for a model of this configuration."""

    @abstractmethod
    def method(self, settings: TrainingSettings) -> str:
        """The training in a sentence, for the model card."""

    def recovery(
        self, settings: TrainingSettings, config: PretrainedConfig, data: RunData, tokenizer: PreTrainedTokenizerBase
    ) -> RecoveryProbe | None:
        """The measure of recovered perplexity, for a kind that has one."""
        return None

    def card_tags(self) -> list[str]:
        return ["eaft"]

    def card_sections(self) -> list[str]:
        """Markdown sections that this kind adds to the model card."""
        return []

    def show_result(self, console: Console) -> None:
        """Print the results of this kind that are not probes."""

    # Before anything is loaded

    def prepare(self, console: Console) -> Prepared:
        if is_main_process():
            _print_notes([*self.folder.resume_point().notes(), *self.folder.pop_notes()], console)
        check_backend(self.model, self.loss, self.train.precision)

        # tokenizer and settings, from the model that an unfinished stage before this one starts from if need be
        readable = self.readable_model
        if needs_dequantising(readable.reference):
            console.print("dequantising the model once, about half a minute ...", highlight=False)
        tokenizer = load_tokenizer(
            readable.reference, revision=readable.revision, trust_remote_code=readable.trust_remote_code
        )
        config = load_config(
            readable.reference, revision=readable.revision, trust_remote_code=readable.trust_remote_code
        )
        if not self.learns:
            refuse_ttt(readable.reference, revision=readable.revision)
        settings = self.settings(config)

        # data and probes
        data = build_data(settings, tokenizer)
        check_vocabulary(data, tokenizer, config)
        probes = build_run_probes(settings.probes, data, length=settings.max_length)
        recovery = self.recovery(settings, config, data, tokenizer)
        prepared = Prepared(settings, config, tokenizer, data, probes, recovery)

        # the plan, and the warnings about the data
        if self.heading:
            console.print(f"\n{self.heading}", highlight=False, markup=False)
        print_plan(self.plan(prepared), console)
        print_audit(data, console)
        return prepared

    def plan(self, prepared: Prepared) -> Lines:
        settings, data = prepared.settings, prepared.data
        config = self.before.output_config(prepared.config) if self.before else prepared.config
        plan = make_plan(settings, config, data.stats, autocast=settings.autocast, longest=data.longest)
        lines = plan_lines(plan)
        if data.replay:
            after = [name for name, _ in lines].index("data") + 1
            lines[after:after] = data.replay.lines
        return lines

    # The training

    def run(self, prepared: Prepared, console: Console, *, command: str, progress: Progress) -> None:
        settings, folder = prepared.settings, self.folder
        if prepared.data.replay and prepared.data.replay.replies:
            with progress.at("while generating replay"):
                prepared = self._generate_replay(prepared, console)
        with progress.at("while loading"):
            trainer, tokenizer = self._load(prepared, console)
            progress.changed = True
        measured = RunProbes(
            trainer, tokenizer, prepared.probes, prepared.data.held_out_examples, settings, folder, console
        )

        # before the training; a model that is to be sharded can only run once the training has wrapped it
        with progress.at("while probing before training"):
            if is_sharded(trainer):
                trainer.add_callback(ProbeOnceSharded(partial(measured.measure, "before")))
            else:
                measured.measure("before")
        self._train(trainer, prepared, measured, console, progress)

        # the result, complete on the disk before it is measured
        with progress.at("after training"):
            if prepared.recovery:
                prepared.recovery.note_in(trainer.model.config)
            save_result(trainer, tokenizer, folder, settings)
            after = measured.measure("after")
            if trainer.accelerator.is_main_process:
                folder.note_trained(about_run(settings, self.method(settings), command))
                self._finish(folder.load_scores("before") or [], after, console)
            wait_for_everyone()

    def _generate_replay(self, prepared: Prepared, console: Console) -> Prepared:
        """Let the model generate its replay; returns the stage with all rows."""
        with refused_together():
            if is_main_process():
                generate_replay(prepared.settings, prepared.tokenizer, prepared.data, console)
        data = build_data(prepared.settings, prepared.tokenizer)
        check_vocabulary(data, prepared.tokenizer, prepared.config)
        return replace(prepared, data=data)

    def complete(self, console: Console) -> None:
        """See `Stage.complete`: an earlier start was killed after the training, or files were deleted since."""
        if is_main_process():
            before, after = (self.folder.load_scores(when) or [] for when in ("before", "after"))
            self._finish(before, after, console)

    def _load(self, prepared: Prepared, console: Console) -> tuple[EAFTTrainer, PreTrainedTokenizerBase]:
        """The trainer with its model, and the tokenizer; the folder is then the run's."""
        settings, folder, tokenizer, curve = prepared.settings, self.folder, prepared.tokenizer, None
        if self.heading:
            console.print(f"\n{self.heading}", highlight=False, markup=False)
            # the same new weights, whether or not this process has trained an earlier stage
            set_seed(settings.train.seed)
            model = settings.model
            tokenizer = load_tokenizer(
                model.reference, revision=model.revision, trust_remote_code=model.trust_remote_code
            )
        if prepared.recovery and is_main_process():
            curve = prepared.recovery.begin(console)
        trainer = build_trainer(settings, prepared.data, tokenizer, folder.checkpoints)
        if trainer.accelerator.is_main_process:
            for later in self.later:
                later.discard()
            found = fingerprints(
                prepared.data,
                prepared.probes,
                prepared.recovery.rows if prepared.recovery else None,
                prepared.tokenizer,
                settings.model,
            )
            folder.begin(dump_recipe(self.record, folder=folder.path), versions(), prepared.data.stats, found)
            _print_notes(folder.pop_notes(), console)
            if curve:
                folder.write(RECOVERY_FILE, curve.to_json())
        wait_for_everyone()
        return trainer, tokenizer

    def _train(
        self, trainer: EAFTTrainer, prepared: Prepared, measured: RunProbes, console: Console, progress: Progress
    ) -> None:
        """Train from the start or from the folder's last checkpoint.

        A checkpoint after which nothing is left to train is only loaded: the Trainer would train one step more.
        """
        folder = self.folder

        # where to resume
        checkpoint, passed_over = agreed_checkpoint(trainer, folder)
        recovery = prepared.recovery.callback() if prepared.recovery else None
        level = prepared.settings.train.stop_at
        at_loss = None if level is None else StopAtLoss(level)
        if checkpoint:
            measured.check_not_lost()
            state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
            step = state["global_step"]
            rows = len(cast(Sized, trainer.train_dataset))
            steps = steps_of_rows(prepared.settings, rows, Degrees.present().ranks)
            console.print(f"resuming from {checkpoint.name} of {steps}", highlight=False)
            stopped = (recovery and recovery.curve.stopped_after(step)) or (
                at_loss and at_loss.stopped_at(step, state["log_history"])
            )
            if step >= steps or stopped:
                load_only(trainer, checkpoint)
                return
            _print_notes(lost_lines(folder.path, state), console)
            if steps != state["max_steps"]:
                trainer.add_callback(PresentSchedule())

        # the seed decides the order of the rows, also of a resumed run, which has not probed before
        set_seed(trainer.args.seed)
        _add_callbacks(trainer, prepared, measured, folder, recovery, passed_over)
        if at_loss:
            trainer.add_callback(at_loss)
        stop = SaveAndStop(prepared.settings.train.save_every_minutes)
        # before the others, which log and seal what it saves
        trainer.callback_handler.callbacks.insert(0, stop)
        display = use_progress_display(trainer)
        with progress.at("while training"):
            try:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
                if stop.received:
                    # a launcher ends the others when one has ended, and the main process completes the checkpoint
                    wait_for_everyone()
                    raise Terminated if stop.received == signal.SIGTERM else KeyboardInterrupt
            except KeyboardInterrupt:
                progress.phase = f"at step {trainer.state.global_step} of {trainer.state.max_steps}"
                raise
            finally:
                stop.close()
                display.close()

    # The end

    def _finish(self, before: list[Score], after: list[Score], console: Console) -> None:
        is_adapter = self.lora is not None
        card = Card(
            base_model=self._base(is_adapter=is_adapter),
            is_adapter=is_adapter,
            datasets=[source.path for source in self.data.train],
            title=f"{self.folder.path.resolve().parent.name}: {self.name}" if self.heading else None,
            tags=self.card_tags(),
            sections=self.card_sections(),
            learns=self.learns,
        )
        merge, private = self.merge and is_adapter, self.record.output.private
        finish(self.folder, card, before, after, console, merge=merge, private=private, show_result=self.show_result)

    def _base(self, *, is_adapter: bool) -> str | None:
        """The model that the result is based on; None for one that the recipe itself pretrained."""
        if is_adapter:
            # adapters fit only the model they were trained on, even if that is an earlier stage
            return self.model.reference
        return None if self.record.pretrain else self.record.model.reference


def _add_callbacks(
    trainer: EAFTTrainer,
    prepared: Prepared,
    measured: RunProbes,
    folder: RunFolder,
    recovery: RecoveryCallback | None,
    passed_over: tuple[int, ...],
) -> None:
    """Add the callbacks in the order in which they must run."""
    if recovery:
        # before those that show or store its measurements
        trainer.add_callback(recovery)
    if during := measured.during():
        # before the trackers too, which the trainer has already
        trainer.callback_handler.callbacks.insert(0, during)
    trainer.add_callback(MetricsFileCallback(folder.path / "metrics.jsonl"))
    trainer.add_callback(BoundedHistory())
    trainer.add_callback(LandscapeFileCallback(folder.path / "landscape.jsonl", trainer.pop_landscape))
    # after those that write files that belong to a checkpoint
    trainer.add_callback(SealCheckpoints(folder.sealed, prepared.settings.train.keep_checkpoints, passed_over))


def _print_notes(notes: list[str], console: Console) -> None:
    for note in notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
