"""U6: the pipeline of recipes/pipelines/full.yaml without one of its stages, and in other orders.

The pretrained miniature is one for all seeds; a seed changes the order of the rows of every later stage.
"""

from __future__ import annotations

import io
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from eaftdrope.compare.ablations import plan_ablations, run_ablations
from eaftdrope.data import Source, encode, iter_examples
from eaftdrope.evaluate.likelihood import TokenRow
from eaftdrope.evaluate.probes.held_out_loss import HeldOutLossProbe
from eaftdrope.evaluate.probes.long_loss import LongLossProbe
from eaftdrope.evaluate.texts import shipped_text
from eaftdrope.models import load_model, load_tokenizer
from eaftdrope.models.loading import ttt_config_file
from eaftdrope.recipe import Recipe, load_recipe
from eaftdrope.report.system import ABLATIONS
from eaftdrope.ttt import load_ttt

from .lab import SEEDS, Comparison, Lab, Piece, Reading

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "pipelines" / "full.yaml"
WHOLE = "whole"
ORDERS = ("eaft-before-drope", "ttt-before-eaft")
_QUICK = ("without-ttt", "ttt-before-eaft")
LENGTH, MULTIPLES, PASSAGES = 256, (1, 4), 32
MEDICAL = "medical answers"
NOVEL = {multiple: f"a novel, {multiple} x {LENGTH} tokens" for multiple in MULTIPLES}
LONGER = "a novel, longer minus shorter"
# what each stage is for
OWN = {
    "without-drope": NOVEL[4],
    "without-recalibrate": NOVEL[1],
    "without-eaft": MEDICAL,
    "without-ttt": NOVEL[4],
}
_SHORT = ("pretrain.tokens=20000", "recalibrate.tokens=5000", "train.epochs=null", "train.steps=2", "ttt.train.steps=2")
_NO_PROBES = json.dumps({"target": [], "general": []})


def lab(quick: bool) -> Lab:
    seeds, passages, arms = (SEEDS[:2], 4, _QUICK) if quick else (SEEDS, PASSAGES, (*OWN, *ORDERS))
    settings = {"recipe": f"recipes/pipelines/{RECIPE.name}", "short": quick, "passages": passages}
    pieces = [
        Piece(arm, seed, settings, partial(_measure, arm, seed, quick, passages))
        for seed in seeds
        for arm in (WHOLE, *arms)
    ]
    compared = [
        Comparison(f"{arm}: {name}", (arm, name), (WHOLE, name), 0.01)
        for arm in arms
        for name in ([OWN[arm]] if arm in OWN else (MEDICAL, *NOVEL.values(), LONGER))
    ]
    return Lab(
        "u6",
        "U6: the pipeline without a stage, and in other orders (minus the whole)",
        "Miniature of recipes/pipelines/full.yaml (a Llama of a million parameters, 3 million tokens).",
        "nats per token",
        f"a novel at {LENGTH} tokens, the trained length, and at {MULTIPLES[-1]} times that",
        pieces,
        compared,
        {},
    )


def recipe_of(seed: int, folder: Path, quick: bool) -> Recipe:
    """The pipeline with the seed in every stage after pretrain, and without its probes: the last model is measured here."""
    seeds = [f"{section}train.seed={seed}" for section in ("recalibrate.", "", "ttt.")]
    probes = [f"{section}probes={_NO_PROBES}" for section in ("pretrain.", "recalibrate.", "", "ttt.")]
    return load_recipe(RECIPE, [*(_SHORT if quick else ()), *seeds, *probes, f"output.dir={folder}"])


def _measure(arm: str, seed: int, quick: bool, passages: int, weights: Path) -> dict[str, Reading]:
    folder, first = (weights / f"pipeline-{number}" for number in (seed, SEEDS[0]))
    if folder != first and not (folder / "pretrain").exists():
        shutil.copytree(first / "pretrain", folder / "pretrain")
    recipe = recipe_of(seed, folder, quick)
    wanted = [one for one in plan_ablations(recipe, orders=True) if one.name == arm]
    run_ablations(recipe, wanted, Console(file=io.StringIO()), command="python -m benchmarks.interactions u6 run")
    stages = wanted[0].stages if wanted else recipe.stages
    assert stages
    return _readings((folder / ABLATIONS / arm if wanted else folder) / stages[-1], passages)


def _readings(folder: Path, passages: int) -> dict[str, Reading]:
    """Losses of the last model of a pipeline, which reads with TTT if it has that stage."""
    reference = str(folder)
    tokenizer: Any = load_tokenizer(reference)
    model = load_model(reference) if ttt_config_file(reference) is None else load_ttt(reference)
    model.eval()
    probe = LongLossProbe([shipped_text()], LENGTH, MULTIPLES, passages)
    by_length = [_means(score.units) for score in probe.run(model, tokenizer)]
    examples = iter_examples(Source("package:medquad", split="test"))
    rows = [encode(example, tokenizer, max_length=LENGTH) for example in examples]
    (medical,) = HeldOutLossProbe([TokenRow(row.input_ids, row.labels) for row in rows]).run(model, tokenizer)
    return {
        MEDICAL: Reading(_means(medical.units)),
        **{name: Reading(values) for name, values in zip(NOVEL.values(), by_length, strict=True)},
        LONGER: Reading(list(np.subtract(by_length[-1], by_length[0]))),
        "a novel": Reading(list(np.mean(by_length, 0)), list(np.mean(by_length, 1))),
    }


def _means(units: tuple[tuple[float, float], ...]) -> list[float]:
    return [total / weight for total, weight in units if weight]
