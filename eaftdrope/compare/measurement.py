"""Measurement, apart from training: the base model and each arm are loaded in turn and measured probe by probe."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from eaftdrope.checkpoints.adapters import attach
from eaftdrope.checkpoints.repair import changed_tensors, repair_adapter, repair_model
from eaftdrope.checkpoints.repair_options import check_restored
from eaftdrope.errors import UserError
from eaftdrope.evaluate import run_probes
from eaftdrope.evaluate.probes.agreement import AgreementProbe
from eaftdrope.models import load_config, load_tokenizer, refuse_ttt
from eaftdrope.run.build import add_stop_tokens, build_model, build_run_probes, check_backend
from eaftdrope.run.data import RunData, build_data, check_vocabulary
from eaftdrope.run.machine import training_device, uses_bfloat16
from eaftdrope.run.plan import meta_model
from eaftdrope.run.settings import eaft_settings

from .plan import Arm, ComparisonPlan
from .stored_scores import StoredScores, probe_key
from .training import is_trained, stamp

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from eaftdrope.evaluate import Probe, Score

BASE = "base"
Progress = Callable[[int, int], None]
StartProgress = Callable[[str], Progress]


@dataclass(frozen=True)
class Measurement:
    """Everything that measuring needs besides the models: tokenizer, rows, and the probes by key."""

    plan: ComparisonPlan
    tokenizer: PreTrainedTokenizerBase
    config: PretrainedConfig
    data: RunData
    probes: dict[str, Probe]

    @property
    def device(self) -> str:
        """The kind of the training device."""
        return training_device().kind

    def scores(self, arm: Arm | None) -> StoredScores:
        """Return the stored scores of an arm, or of the base model (None)."""
        folder = self.plan.folder / "scores"
        if arm is None:
            return StoredScores(folder / f"{BASE}.json", json.dumps(self.plan.recipe.model.model_dump()))
        words = [stamp(self.plan.path(arm)), *arm.spec.repair.options]
        return StoredScores(folder / f"{arm.name}.json", " ".join(words))

    def known(self, arm: Arm | None) -> list[Score]:
        """Return the scores measured so far, in the order of the probes."""
        kept = self.scores(arm)
        return [score for key in self.probes for score in kept.get(key) or []]

    def held_out_loss(self, arm: Arm) -> float | None:
        """Return the held-out loss of an arm; None if it is not finished or was not measured."""
        if not is_trained(self.plan, arm, self.held_out_loss):
            return None
        key = next(key for key, probe in self.probes.items() if probe.name == "held_out_loss")
        scores = self.scores(arm).get(key)
        return scores[0].value if scores else None

    def load(self, arm: Arm | None, *, dtype: str | None = None) -> PreTrainedModel | PeftModel:
        """Load the base model (None) or that of an arm, repaired if the arm is a repair, in evaluation mode on the device.

        Args:
            dtype: of the weights; the recipe's by default.
        """
        recipe = self.plan.recipe
        changes = {"dtype": dtype} if dtype else {}
        if arm is not None and not recipe.lora:
            changes |= {"reference": str(self.plan.path(arm)), "revision": None}
        model = build_model(recipe.model.model_copy(update=changes))
        add_stop_tokens(model, self.tokenizer, self.data.report.stop_tokens)
        if arm is not None and recipe.lora:
            model = attach(model, self.plan.path(arm))
        if arm is not None and arm.spec.repair:
            self._repair(model, arm, dtype)
        # quantised weights are on the device already
        return (model if recipe.model.quantization != "none" else model.to(self.device)).eval()

    def _repair(self, model: PreTrainedModel | PeftModel, arm: Arm, dtype: str | None) -> None:
        """Repair a model in place, as `eaftdrope merge` does."""
        if self.plan.recipe.lora:
            repair_adapter(model, arm.spec.repair)
        else:
            repair_model(model, self.load(None, dtype=dtype), arm.spec.repair)

    def run(self, model: PreTrainedModel, key: str, progress: Progress, *, is_base: bool = False) -> list[Score]:
        """Run one probe in the arithmetic of training and return its scores."""
        probe, size = self.probes[key], self.plan.recipe.probes.batch_tokens
        with torch.autocast(self.device, torch.bfloat16, enabled=uses_bfloat16(self.plan.recipe.train.precision)):
            if isinstance(probe, AgreementProbe):
                probe.captured = self.capture_file(key)
                if is_base:
                    return probe.capture(model, self.tokenizer, probe.captured, batch_tokens=size, progress=progress)

            def report(name: str, done: int, total: int) -> None:
                progress(done, total)

            return run_probes(model, self.tokenizer, [probe], batch_tokens=size, progress=report)

    def capture_file(self, key: str) -> Path:
        """Return the file with the base model's predictions, for a probe that compares with them."""
        return self.plan.folder / "scores" / f"{key}.safetensors"

    def left(self, arm: Arm | None) -> list[str]:
        """Return the keys of the probes that have not been run."""
        kept = self.scores(arm)
        return [
            key
            for key, probe in self.probes.items()
            if kept.get(key) is None
            or (arm is None and isinstance(probe, AgreementProbe) and not self.capture_file(key).is_file())
        ]


def open_measurement(plan: ComparisonPlan) -> Measurement:
    """Load tokenizer, rows and probes, but no weights.

    Raises:
        UserError: any problem of the arms or probes that can be found without weights.
    """
    recipe = plan.recipe
    check_backend(recipe.model, recipe.loss, recipe.train.precision)
    refuse_ttt(recipe.model.reference, revision=recipe.model.revision)
    how = {"revision": recipe.model.revision, "trust_remote_code": recipe.model.trust_remote_code}
    tokenizer = load_tokenizer(recipe.model.reference, **how)
    config = load_config(recipe.model.reference, **how)
    _check_repairs(plan, config)
    data = build_data(eaft_settings(recipe), tokenizer)
    check_vocabulary(data, tokenizer, config)
    probes = build_run_probes(recipe.probes, data, length=recipe.data.max_length)
    return Measurement(
        plan,
        tokenizer,
        config,
        data,
        {probe_key(probe): probe for probe in probes},
    )


def _check_repairs(plan: ComparisonPlan, config: PretrainedConfig) -> None:
    """Check that the modules to restore exist, or are trained by the adapters, before anything is trained."""
    repairs = {arm.label: arm.spec.repair for arm in plan.arms if arm.spec.repair.restore}
    if repairs:
        recipe = plan.recipe
        names = changed_tensors(meta_model(recipe.model, recipe.lora, config))
        for label, repair in repairs.items():
            try:
                check_restored(repair, names, "the adapter" if recipe.lora else "the model")
            except UserError as error:
                raise UserError(f"--arms {label}: {error}") from None


def measure(measurement: Measurement, started: StartProgress, changed: Callable[[], object]) -> None:
    """Run every probe that has no stored scores on the base model and then on each finished arm.

    Args:
        started: called with a description before each probe; returns a function that is called with (done, total).
        changed: called after each probe, when its scores are stored.
    """
    for arm in (None, *measurement.plan.arms):
        if arm is not None and not is_trained(measurement.plan, arm, measurement.held_out_loss):
            # it ends early, at a loss that is being measured
            continue
        if not (left := measurement.left(arm)):
            continue
        name = BASE if arm is None else arm.name
        kept, model = measurement.scores(arm), measurement.load(arm)
        for key in left:
            progress = started(f"measuring {name}: {measurement.probes[key].name}")
            kept.put(key, measurement.run(model, key, progress, is_base=arm is None))
            changed()
        # before the next model is loaded: memory may not hold two
        del model
        gc.collect()
