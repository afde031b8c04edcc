"""Measuring, apart from training: the base model and each arm's folder, loaded one after the other, probe by probe."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from eaftdrope.evaluate.probes.agreement import AgreementProbe
from eaftdrope.run.build import (
    RunData,
    build_data,
    build_model,
    build_run_probes,
    check_backend,
    check_vocabulary,
    stop_where_trained,
)
from eaftdrope.run.machine import training_device, uses_bfloat16

from .arms import Arm, Plan
from .store import Scores, probe_key
from .training import stamp

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from eaftdrope.evaluate import Probe, Score

BASE = "base"
Progress = Callable[[int, int], None]
Start = Callable[[str], Progress]


@dataclass(frozen=True)
class Bench:
    """What measuring needs beside the models: the recipe's rows and probes, each with its key."""

    plan: Plan
    tokenizer: PreTrainedTokenizerBase
    config: PretrainedConfig
    data: RunData
    probes: dict[str, Probe]

    @property
    def device(self) -> str:
        return training_device().kind

    def scores(self, arm: Arm | None) -> Scores:
        """What is known of an arm, or of the base model (None)."""
        folder = self.plan.folder / "scores"
        if arm is None:
            return Scores(folder / f"{BASE}.json", json.dumps(self.plan.recipe.model.model_dump()))
        return Scores(folder / f"{arm.name}.json", stamp(self.plan.path(arm)))

    def known(self, arm: Arm | None) -> list[Score]:
        """Scores in the order of the probes, as far as they are measured."""
        kept = self.scores(arm)
        return [score for key in self.probes for score in kept.get(key) or []]

    def load(self, arm: Arm | None, *, dtype: str | None = None) -> PreTrainedModel:
        """The base model, or an arm's, in evaluation mode on the device.

        Args:
            dtype: of the weights, instead of the recipe's.
        """
        recipe = self.plan.recipe
        if dtype:
            recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": dtype})})
        if arm is not None and not recipe.lora:
            own = {"reference": str(self.plan.path(arm)), "revision": None}
            recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update=own)})
        model = build_model(recipe)
        stop_where_trained(model, self.tokenizer, self.data.report.stop_tokens)
        if arm is not None and recipe.lora:
            from eaftdrope.checkpoints.adapters import attach

            model = attach(model, self.plan.path(arm))
        # quantised weights are where they belong
        return (model if recipe.model.quantization != "none" else model.to(self.device)).eval()

    def run(self, model: PreTrainedModel, key: str, progress: Progress, *, is_base: bool = False) -> list[Score]:
        """Scores of one probe, in the arithmetic of training."""
        import torch

        from eaftdrope.evaluate import run_probes

        probe, size = self.probes[key], self.plan.recipe.probes.batch_tokens
        with torch.autocast(self.device, torch.bfloat16, enabled=uses_bfloat16(self.plan.recipe)):
            if isinstance(probe, AgreementProbe):
                probe.captured = self.capture_file(key)
                if is_base:
                    return probe.capture(model, self.tokenizer, probe.captured, batch_tokens=size, progress=progress)

            def report(name: str, done: int, total: int) -> None:
                progress(done, total)

            return run_probes(model, self.tokenizer, [probe], batch_tokens=size, progress=report)

    def capture_file(self, key: str) -> Path:
        """What the base model said, for a probe that compares with it."""
        return self.plan.folder / "scores" / f"{key}.safetensors"

    def left(self, arm: Arm | None) -> list[str]:
        """Keys of the probes that are still to be run."""
        kept = self.scores(arm)
        return [
            key
            for key, probe in self.probes.items()
            if kept.get(key) is None
            or (arm is None and isinstance(probe, AgreementProbe) and not self.capture_file(key).is_file())
        ]


def open_bench(plan: Plan) -> Bench:
    """Tokenizer, rows and probes; no weights.

    Raises:
        UserError: whatever would stop the arms or the probes before weights are read.
    """
    from eaftdrope.models import load_config, load_tokenizer

    recipe = plan.recipe
    check_backend(recipe)
    how = {"revision": recipe.model.revision, "trust_remote_code": recipe.model.trust_remote_code}
    tokenizer = load_tokenizer(recipe.model.reference, **how)
    config = load_config(recipe.model.reference, **how)
    data = build_data(recipe, tokenizer)
    check_vocabulary(data, tokenizer, config)
    probes = build_run_probes(recipe, data)
    return Bench(
        plan,
        tokenizer,
        config,
        data,
        {probe_key(probe): probe for probe in probes},
    )


def measure(bench: Bench, started: Start, changed: Callable[[], None]) -> None:
    """Measures what is not known yet: the base model first.

    Args:
        started: called with words before a probe; what it returns is called with (done, total) in it.
        changed: called after each probe, when its scores are stored.
    """
    for arm in (None, *bench.plan.arms):
        if not (left := bench.left(arm)):
            continue
        name = BASE if arm is None else arm.name
        kept, model = bench.scores(arm), bench.load(arm)
        for key in left:
            progress = started(f"measuring {name}: {bench.probes[key].name}")
            kept.put(key, bench.run(model, key, progress, is_base=arm is None))
            changed()
        # before the next one is loaded: two may not fit
        del model
        gc.collect()
