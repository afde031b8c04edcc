"""The probes of a run: before and after its training, and a cheap part of them during it.

probes_before.json, probes_after.json   scores with their units
probes_during.jsonl                     scores every `probes.every` steps
samples.json                            sample answers before and after
agreement.safetensors                   the base model's predictions, until the run is finished
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eaftdrope.data import Example
from eaftdrope.errors import UserError
from eaftdrope.evaluate import Probe, Score, run_probes
from eaftdrope.evaluate.probes.agreement import AgreementProbe
from eaftdrope.evaluate.probes.build import cheap_probes
from eaftdrope.evaluate.scores import refuse_not_a_number
from eaftdrope.processes import process_count, process_rank
from eaftdrope.trainer import EAFTTrainer
from eaftdrope.trainer.callbacks.probes import ProbesCallback

from .checkpoints import unreadable
from .folder import CAPTURE_FILE, RunFolder
from .launch import gather, wait_for_everyone
from .result import is_sharded
from .samples import SAMPLES_FILE, read_samples, take_samples
from .settings import TrainingSettings

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class RunProbes:
    """The probes of a run, measured on its trainer's model.

    Args:
        examples: held-out examples, for the samples.
    """

    trainer: EAFTTrainer
    tokenizer: PreTrainedTokenizerBase
    probes: list[Probe]
    examples: list[Example]
    settings: TrainingSettings
    folder: RunFolder
    console: Console

    def measure(self, when: str) -> list[Score]:
        """Scores and sample answers of "before" or "after".

        Those of before are read from the folder if an earlier start measured them. Without probes nothing is measured or
        sampled. The processes share the probes between them; a model that is sharded over processes is measured by all of
        them, in step. The main process samples, and keeps the result.
        """
        if not self.probes:
            return []
        keeps, shared = self.trainer.accelerator.is_main_process, is_sharded(self.trainer)
        is_base, capture = when == "before", self.folder.path / CAPTURE_FILE
        _compare_with(capture, self.probes)
        # one process decides: another may write the capture while this one looks for it
        scores = gather(self._stored(capture) if is_base and keeps else None)[0]
        if scores is None:
            mine = self.probes if shared else self.probes[process_rank() :: process_count()]
            with _own_file(capture, keeps or not shared) as file:
                found = gather(self._scores(when, mine, file if is_base else None))
            scores = _in_order(found[:1] if shared else found)
            if is_base:
                refuse_not_a_number(scores, self.settings.model.reference)
            if keeps:
                self.folder.save_scores(when, scores)
        if keeps or shared:
            self._take_samples(when, keeps)
        # others may see the file before they come here
        wait_for_everyone()
        return scores if keeps or shared else []

    def _stored(self, capture: Path) -> list[Score] | None:
        """The scores before training that an earlier start measured; None if it is to be done (again)."""
        scores = self.folder.load_scores("before")
        compared = any(isinstance(probe, AgreementProbe) for probe in self.probes)
        if compared and (not capture.is_file() or unreadable(capture)):
            # without the base model's predictions nothing can be compared later
            scores = None
            capture.unlink(missing_ok=True)
        if scores is None and (self.folder.path / "probes_before.json").exists():
            self.console.print("the scores before training are damaged: measured again", highlight=False)
        return scores

    def during(self) -> ProbesCallback | None:
        """The callback of `probes.every`; None if the recipe does not set it, or no probe is cheap enough."""
        section = self.settings.probes
        if section.every is None:
            return None
        probes: list[Probe] = [*cheap_probes(self.probes, section.during_limit)]
        if not probes:
            return None
        _compare_with(self.folder.path / CAPTURE_FILE, probes)

        def measure(model: nn.Module) -> list[dict]:
            with self._autocast():
                scores = run_probes(
                    cast(PreTrainedModel, model), self.tokenizer, probes, batch_tokens=section.batch_tokens
                )
            return [{key: value for key, value in asdict(score).items() if key != "units"} for score in scores]

        return ProbesCallback(self.folder.path / "probes_during.jsonl", measure, section.every)

    def check_not_lost(self) -> None:
        """Check a training that is to be resumed for the measurements that cannot be repeated.

        Raises:
            UserError: scores or samples of the base model are lost, and it is sharded: it was measured when the training
                began.
        """
        if not self.probes or not is_sharded(self.trainer):
            return
        measured = {
            "probes_before.json": self.folder.load_scores("before"),
            SAMPLES_FILE: read_samples(self.folder),
        }
        lost = [str(self.folder.path / name) for name, content in measured.items() if content is None]
        if lost:
            raise UserError(
                f"{' and '.join(lost)} is damaged or missing, and a sharded base model cannot be measured again "
                "once its training has begun. Put back a copy and run the same command again, or pass --overwrite to delete "
                "the run and start from scratch."
            )

    def _scores(self, when: str, probes: list[Probe], capture: Path | None) -> list[list[Score]]:
        """The scores of each of `probes`."""
        with _progress(self.console, when) as progress, self._autocast(), as_base(self.trainer, when):
            return [
                run_probes(
                    self._model,
                    self.tokenizer,
                    [probe],
                    batch_tokens=self.settings.probes.batch_tokens,
                    progress=progress,
                    capture=capture,
                )
                for probe in probes
            ]

    def _take_samples(self, when: str, keeps: bool) -> None:
        with self._autocast(), as_base(self.trainer, when), _progress(self.console, when) as progress:
            take_samples(
                when,
                self._model,
                self.tokenizer,
                self.examples,
                self.folder,
                progress,
                batch_tokens=self.settings.probes.batch_tokens,
                keeps=keeps,
            )

    @property
    def _model(self) -> PreTrainedModel:
        return cast(PreTrainedModel, self.trainer.accelerator.unwrap_model(self.trainer.model))

    def _autocast(self) -> torch.autocast:
        """The arithmetic of the training."""
        return torch.autocast(self.trainer.accelerator.device.type, torch.bfloat16, enabled=self.settings.autocast)


def as_base(trainer: EAFTTrainer, when: str) -> AbstractContextManager:
    """Leave new adapters out of what is measured before training: they add zero, and without them it is a quarter faster.

    A sharded model keeps them: peft would change which parameters are trained, which a wrapped model has fixed.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if when == "before" and hasattr(model, "disable_adapter") and not is_sharded(trainer):
        return cast("PeftModel", model).disable_adapter()
    return nullcontext()


def _in_order(found: list[list[list[Score]]]) -> list[Score]:
    """The scores of all probes in their order, from those of each process, which measured every n-th."""
    rounds = zip_longest(*found, fillvalue=[])
    return [score for probes in rounds for scores in probes for score in scores]


@contextmanager
def _own_file(file: Path, keeps: bool) -> Iterator[Path]:
    """`file` for the process that keeps it, a temporary one for the others."""
    if keeps:
        yield file
    else:
        with TemporaryDirectory() as place:
            yield Path(place) / file.name


def _compare_with(capture: Path, probes: list[Probe]) -> None:
    """Set the file of the base model's predictions in the probes that compare with them."""
    for probe in probes:
        if isinstance(probe, AgreementProbe):
            probe.captured = capture


@contextmanager
def _progress(console: Console, when: str) -> Iterator[Callable[[str, int, int], None]]:
    """One bar per probe in a terminal, one line per probe elsewhere."""
    columns = (TextColumn("{task.description:28}"), BarColumn(28), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def progress(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(f"probing {when}: {name}", total=total)
                if not console.is_terminal:
                    console.print(f"probing {when}: {name} ({total})", highlight=False)
            bars.update(tasks[name], completed=done)

        yield progress
