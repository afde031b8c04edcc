"""The probes of a run: before and after its training, a cheap part of them while it goes on.

probes_before.json, probes_after.json   scores with their units
probes_during.jsonl                     scores every `probes.every` steps
agreement.safetensors                   what the base model says, until the run is finished
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from .checkpoints import unreadable
from .machine import uses_bfloat16
from .samples import take_samples

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from eaftdrope.evaluate import Probe, Score
    from eaftdrope.trainer import EAFTTrainer
    from eaftdrope.trainer.callbacks.probes import ProbesCallback

    from .folder import RunFolder
    from .prepare import Prepared

CAPTURE_FILE = "agreement.safetensors"


def probe_run(
    when: str,
    trainer: EAFTTrainer,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Prepared,
    folder: RunFolder,
    console: Console,
) -> list[Score]:
    """Scores of "before" or "after", and samples of answers, by the main process; those of before from the folder if a
    former start measured them. Without probes nothing is measured, and nothing sampled.

    A model that is sharded over processes is measured by all of them, in step; the main process keeps the result."""
    from eaftdrope.evaluate.probes.agreement import AgreementProbe
    from eaftdrope.evaluate.scores import refuse_not_a_number

    if not prepared.probes:
        return []
    keeps = trainer.accelerator.is_main_process
    compared = [probe for probe in prepared.probes if isinstance(probe, AgreementProbe)]
    capture, is_base = folder.path / CAPTURE_FILE, when == "before"
    scores = folder.load_scores(when) if is_base else None
    if is_base and compared and (not capture.is_file() or unreadable(capture)):
        # without it nothing can be compared later
        scores = None
        if keeps:
            capture.unlink(missing_ok=True)
    _compare_with(capture, prepared.probes)
    if keeps or is_sharded(trainer):
        if scores is None:
            if is_base and keeps and (folder.path / "probes_before.json").exists():
                console.print("what was measured before training is damaged: measured again", highlight=False)
            with _own_file(capture, keeps) as file:
                scores = _measure(when, trainer, tokenizer, prepared, file if is_base else None, console)
            if is_base:
                refuse_not_a_number(scores, prepared.recipe.model.reference)
            if keeps:
                folder.save_scores(when, scores)
        model = trainer.accelerator.unwrap_model(trainer.model)
        with _as_trained(trainer, prepared), _as_base(trainer, when), _progress(console, when) as progress:
            take_samples(when, model, tokenizer, prepared, folder, progress, keeps=keeps)
    # on every process, whoever measured: others may see the file before they come here
    trainer.accelerator.wait_for_everyone()
    return scores or []


def is_sharded(trainer: EAFTTrainer) -> bool:
    """Whether each process holds but a part of the model, from the beginning of its training on."""
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


@contextmanager
def _own_file(file: Path, keeps: bool) -> Iterator[Path]:
    """`file` for the process that keeps it, one that is thrown away for another."""
    if keeps:
        yield file
    else:
        with TemporaryDirectory() as place:
            yield Path(place) / file.name


def during_callback(
    trainer: EAFTTrainer, tokenizer: PreTrainedTokenizerBase, prepared: Prepared, folder: RunFolder
) -> ProbesCallback | None:
    """The callback of `probes.every`; None where the recipe has none, or no probe that is cheap enough."""
    from eaftdrope.evaluate import run_probes
    from eaftdrope.evaluate.probes.build import cheap_probes
    from eaftdrope.trainer.callbacks.probes import ProbesCallback

    settings = prepared.recipe.probes
    probes = cheap_probes(prepared.probes, settings.during_limit) if settings.every else []
    if not probes:
        return None
    _compare_with(folder.path / CAPTURE_FILE, probes)

    def measure(model: nn.Module) -> list[dict]:
        with _as_trained(trainer, prepared):
            scores = run_probes(model, tokenizer, probes, batch_tokens=settings.batch_tokens)
        return [{key: value for key, value in asdict(score).items() if key != "units"} for score in scores]

    return ProbesCallback(folder.path / "probes_during.jsonl", measure, settings.every)


def _compare_with(capture: Path, probes: list[Probe]) -> None:
    """Tells the probes that need it where to find what the base model says, now or by the time they run."""
    from eaftdrope.evaluate.probes.agreement import AgreementProbe

    for probe in probes:
        if isinstance(probe, AgreementProbe):
            probe.captured = capture


def _measure(when, trainer, tokenizer, prepared: Prepared, capture: Path | None, console: Console) -> list[Score]:
    from eaftdrope.evaluate import run_probes

    with _progress(console, when) as progress, _as_trained(trainer, prepared), _as_base(trainer, when):
        return run_probes(
            trainer.accelerator.unwrap_model(trainer.model),
            tokenizer,
            prepared.probes,
            batch_tokens=prepared.recipe.probes.batch_tokens,
            progress=progress,
            capture=capture,
        )


def _as_trained(trainer: EAFTTrainer, prepared: Prepared):
    """The arithmetic of the training."""
    import torch

    device = trainer.accelerator.device.type
    return torch.autocast(device, torch.bfloat16, enabled=uses_bfloat16(prepared.recipe))


def _as_base(trainer: EAFTTrainer, when: str):
    """Before training new adapters add zero: the model without them measures the same, a quarter faster. (A sharded one keeps
    them: peft would change which parameters are trained, which a wrapped model has fixed.)"""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if when == "before" and hasattr(model, "disable_adapter") and not is_sharded(trainer):
        return model.disable_adapter()
    return nullcontext()


@contextmanager
def _progress(console: Console, when: str) -> Iterator:
    """A bar a probe in a terminal, one line a probe elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:28}"), BarColumn(28), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, int] = {}

        def progress(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(f"probing {when}: {name}", total=total)
                if not console.is_terminal:
                    console.print(f"probing {when}: {name} ({total})", highlight=False)
            bars.update(tasks[name], completed=done)

        yield progress
