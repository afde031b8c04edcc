"""Comparisons of more than gates: rates, early stops, and repairs of finished arms, on a tiny random model."""

import io
import json
from contextlib import contextmanager

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM

from eaftdrope.checkpoints.merge import merge_adapter
from eaftdrope.checkpoints.repair_options import Repair
from eaftdrope.checkpoints.streamed import repair_files
from eaftdrope.compare import run as comparison
from eaftdrope.compare.measurement import open_measurement
from eaftdrope.compare.plan import plan_comparison
from eaftdrope.errors import UserError
from tests.tiny_run import make_project

ARMS = "none,lr/4,early-stop,none+denoise,none+restore=q_proj,k_proj,none+share=0.5"


@contextmanager
def _bars(words):
    yield lambda text: words.append(text) or (lambda done, total: None)


def run(plan):
    words: list[str] = []
    console = Console(file=io.StringIO(), width=200)
    about = {"date": "2026-01-01", "device": "a CPU", "versions": {}}
    document = comparison.run_comparison(plan, console, command="compare", about=about, bars=lambda: _bars(words))
    return document, words, console.file.getvalue()


@pytest.fixture(scope="module", params=["lora.dropout=0.0", "lora=null"])
def compared(request, tmp_path_factory):
    from eaftdrope.report import page

    folder = tmp_path_factory.mktemp("arms")
    recipe = make_project(folder)
    changes = ["train.steps=4", "train.save_every=10", "train.learning_rate=0.004", "train.scheduler=constant"]
    plan = plan_comparison(recipe, [*changes, request.param], arms=ARMS, seeds=1, folder=folder / "compared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "try_write_report", lambda folder, console: None)
        yield plan, *run(plan)
        # everything is stored: the same command measures nothing
        assert run(plan)[1] == []


def losses(document):
    return {arm["label"]: arm["scores"][0]["value"] for arm in document["arms"]}


def test_every_arm_is_measured_and_only_trainings_are_trained(compared):
    plan, document, words, shown = compared
    assert list(losses(document)) == [
        *("none", "lr/4", "early stop", "none + denoise", "none + restore q_proj k_proj", "none + share 0.5")
    ]
    assert sorted(path.name for path in (plan.folder / "arms").iterdir()) == [
        *("early-stop-seed42", "lr-4-seed42", "none-seed42")
    ]
    assert "arm 3 of 3: early stop, seed 42" in shown
    rates = {arm["label"]: arm["learning_rate"] for arm in document["arms"]}
    assert rates["lr/4"] == 0.001 and rates["none + denoise"] == 0.004
    assert [row["label"] for row in document["table"]] == list(losses(document))
    assert [entry["pair"][0] for entry in document["verdicts"]] == list(losses(document))[1:]
    # the arms that an early stop waits for are measured before it is trained
    assert words.index("measuring lr-4-seed42: held_out_loss") < words.index(
        "measuring early-stop-seed42: held_out_loss"
    )


def test_an_early_stop_ends_at_the_level_of_the_weakest_arm(compared):
    plan, document, _, _ = compared
    recorded = json.loads((plan.folder / "arms" / "early-stop-seed42" / "run.json").read_text())["recipe"]
    weakest = max(losses(document)[label] for label in ("none", "lr/4"))
    assert recorded["train"]["stop_at"] == pytest.approx(weakest, rel=1e-5)
    steps = {arm["label"]: arm["steps"] for arm in document["arms"]}
    assert steps["none"] == 4 and steps["early stop"] < 4
    assert losses(document)["early stop"] <= weakest + 1e-5


def test_repaired_arms_are_what_merge_writes(compared, tmp_path):
    plan, document, _, _ = compared
    measurement = open_measurement(plan)
    key = next(key for key, probe in measurement.probes.items() if probe.name == "held_out_loss")
    found = losses(document)
    for label, repair in {
        "none + denoise": Repair(denoise=True),
        "none + restore q_proj k_proj": Repair(restore=("q_proj", "k_proj")),
        "none + share 0.5": Repair(0.5),
    }.items():
        output, source = tmp_path / label.replace(" ", "-"), plan.folder / "arms" / "none-seed42"
        if plan.recipe.lora:
            merge_adapter(source, output, repair=repair)
        else:
            repair_files(source, plan.recipe.model.reference, output, repair)
        model = AutoModelForCausalLM.from_pretrained(output, dtype="float32").eval()
        (score,) = measurement.run(model, key, lambda done, total: None)
        assert score.value == pytest.approx(found[label], abs=2e-5)
        assert abs(score.value - found["none"]) > 1e-4


def test_a_module_that_does_not_exist_is_refused_before_anything_is_trained(compared, tmp_path):
    plan, _, _, _ = compared
    overrides = list(plan.overrides)
    wrong = plan_comparison(plan.file, overrides, arms="none,none+restore=q_porj", seeds=1, folder=tmp_path / "new")
    with pytest.raises(UserError, match=r"--arms none \+ restore q_porj: .* has no such module. Did you mean `q_proj`"):
        open_measurement(wrong)
    assert not (tmp_path / "new").exists()
