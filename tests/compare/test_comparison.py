"""A whole comparison on a tiny random model: killed between its arms, resumed, matched, and read again."""

import io
import json
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM

from eaftdrope.cli import main
from eaftdrope.compare import run as comparison
from eaftdrope.compare.measurement import open_measurement
from eaftdrope.compare.plan import plan_comparison
from eaftdrope.compare.table import sentences
from eaftdrope.compare.training import is_trained, mean_gate
from eaftdrope.errors import UserError
from eaftdrope.evaluate import run_probes, scores_from_json
from eaftdrope.recipe import load_recipe
from tests.tiny_run import make_project

SHORT = ["train.steps=2", "train.save_every=10"]
ARMS = ["none-seed42", "eaft-seed42", "constant-seed42"]


class Recorded:
    """Runs comparisons in this process, and records what each start trained and measured."""

    def __init__(self, folder):
        self.recipe, self.folder = make_project(folder), folder / "compared"
        self.trained, self.measured = [], []

    def plan(self, *overrides, match=False, arms="none,eaft,constant"):
        options = {"arms": arms, "seeds": 1, "folder": self.folder, "match": match}
        return plan_comparison(self.recipe, [*SHORT, *overrides], **options)

    def start(self, plan):
        self.trained, self.measured = [], []

        @contextmanager
        def bars():
            yield lambda words: self.measured.append(words) or (lambda done, total: None)

        console = Console(file=io.StringIO(), width=140)
        about = {"date": "2026-01-01", "device": "a CPU", "versions": {}}
        document = comparison.run_comparison(plan, console, command="compare", about=about, bars=bars)
        return document, console.file.getvalue()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A comparison that was killed before its third arm and resumed; its first arm is from `eaftdrope train`."""
    import eaftdrope.compare.training as runs

    made = Recorded(tmp_path_factory.mktemp("comparison"))
    original = runs.run_recipe
    with pytest.MonkeyPatch.context() as patch:
        by_hand = load_recipe(made.recipe, [*SHORT, "loss.gate=none", f"output.dir={made.folder}/arms/none-seed42"])
        original(by_hand, Console(file=io.StringIO()), command="eaftdrope train")

        def counted(recipe, *args, **kwargs):
            if len(made.trained) == 1 and not made.killed:
                raise KeyboardInterrupt
            made.trained.append(recipe.output.dir.rsplit("/", 1)[-1])
            return original(recipe, *args, **kwargs)

        made.killed = False
        patch.setattr(runs, "run_recipe", counted)
        with pytest.raises(KeyboardInterrupt):
            made.start(made.plan())
        made.first = list(made.trained)
        made.killed = True
        made.document, made.output = made.start(made.plan())
        yield made


def test_only_what_is_missing_is_trained_and_everything_is_measured_once(recorded):
    assert recorded.first == ["eaft-seed42"] and recorded.trained == ["constant-seed42"]
    assert [words.removeprefix("measuring ") for words in recorded.measured] == [
        f"{name}: {probe}" for name in ("base", *ARMS) for probe in ("held_out_loss", "perplexity", "multiple_choice")
    ]
    document, _ = recorded.start(recorded.plan())
    assert recorded.trained == recorded.measured == []
    assert document == recorded.document


def test_compare_json(recorded):
    document = json.loads((recorded.folder / "compare.json").read_text())
    assert document["kind"] == "compare" and document["status"] == "finished"
    assert (document["target"], document["general"]) == ("held-out loss", "perplexity")
    assert [(arm["label"], arm["seed"], arm["steps"], arm["learning_rate"]) for arm in document["arms"]] == [
        (label, 42, 2, 0.01) for label in ("none", "eaft", "constant")
    ]
    assert [arm["folder"] for arm in document["arms"]] == [f"arms/{name}" for name in ARMS]
    assert [row["label"] for row in document["table"]] == ["none", "eaft", "constant"]
    values = {score["metric"]: score["value"] for score in document["arms"][1]["scores"]}
    row = document["table"][1]
    assert row["target"] == {"mean": values["held-out loss"], "sd": None}
    assert row["general"]["mean"] == values["perplexity"] and row["n"] == 1
    assert row["multiple choice"]["mean"] == values["multiple choice"]
    assert [entry["pair"] for entry in document["verdicts"]] == [
        ["eaft", "none"],
        ["constant", "none"],
        ["eaft", "constant"],
    ]
    assert document["verdict"] in recorded.output and "one seed" in document["verdict"]
    table = (recorded.folder / "compare.md").read_text()
    assert table.splitlines()[0].startswith("|  | seeds | mean gate | held-out loss ↓ | perplexity ↓ |")
    assert (recorded.folder / "compare.csv").read_text().splitlines()[0] == "label,group,metric,better,n,mean,sd"
    assert (recorded.folder / "report.html").is_file(), recorded.output


def test_the_scores_are_those_of_the_saved_models(recorded):
    from eaftdrope.compare.measurement import open_measurement
    from eaftdrope.models import load_model

    plan = recorded.plan()
    measurement = open_measurement(plan)
    base = load_model(plan.recipe.model.reference).eval()
    probes = list(measurement.probes.values())
    known = scores_from_json(json.dumps(recorded.document["base"]))
    assert run_probes(base, measurement.tokenizer, probes, batch_tokens=2048) == known
    from peft import PeftModel

    model = PeftModel.from_pretrained(base, str(recorded.folder / "arms" / ARMS[1])).eval()
    known = scores_from_json(json.dumps(recorded.document["arms"][1]["scores"]))
    assert run_probes(model, measurement.tokenizer, probes, batch_tokens=2048) == known


def test_the_weight_of_the_constant_is_the_mean_gate_of_eaft(recorded):
    """Recomputed from the log of the eaft arm: the mean over tokens, not over steps."""
    eaft, constant = (recorded.folder / "arms" / name for name in ARMS[1:])
    rows = [json.loads(line) for line in (eaft / "metrics.jsonl").read_text().splitlines()]
    logged = [(row["eaft/gate_mean"], row["eaft/trained_tokens"]) for row in rows if "eaft/gate_mean" in row]
    (first, before), (second, after) = logged
    assert before != after - before
    mean = (first * before + second * (after - before)) / after
    assert mean_gate(eaft) == pytest.approx(mean, rel=1e-12)
    weight = json.loads((constant / "run.json").read_text())["recipe"]["loss"]["weight"]
    assert weight == float(f"{mean:.4g}")
    assert mean_gate(constant) == pytest.approx(weight, rel=1e-6)


def test_finished_arms_are_not_trained_again(recorded):
    """A record of a version without some keys is read with their defaults; a change of the training is an error."""
    plan = recorded.plan()
    file = recorded.folder / "arms" / ARMS[0] / "run.json"
    text = file.read_text()
    run = json.loads(text)
    del run["recipe"]["data"]["seed"], run["recipe"]["train"]["decay_ratio"], run["recipe"]["data"]["train"][0]["name"]
    try:
        file.write_text(json.dumps(run))
        assert is_trained(plan, plan.arms[0])
    finally:
        file.write_text(text)
    with pytest.raises(
        UserError,
        match=r"none-seed42 contains a finished run .* \(different: train.learning_rate: 0.01 then, 0.02 now\)",
    ):
        recorded.start(recorded.plan("train.learning_rate=0.02"))
    assert recorded.trained == []


def test_matching_trains_nothing_and_brings_the_arms_together(recorded):
    document, _ = recorded.start(recorded.plan(match=True))
    assert recorded.trained == [] and any("matching" in words for words in recorded.measured)
    (level,) = document["matched"]["levels"]
    final = {arm["label"]: arm["scores"][0]["value"] for arm in document["arms"]}
    assert level["level"] == max(final.values()) and level["base"] == document["base"][0]["value"]
    assert level["tolerance"] <= 0.01 * (level["base"] - level["level"])
    assert {arm["label"] for arm in document["matched"]["arms"]} == {"none", "eaft", "constant"}
    for arm in document["matched"]["arms"]:
        assert 0 < arm["share"] <= 1
        assert abs(arm["scores"][0]["value"] - level["level"]) <= level["tolerance"]
        assert [score["metric"] for score in arm["scores"]][:2] == ["held-out loss", "perplexity"]
    assert "at equal target loss" in document["verdict"]
    again, _ = recorded.start(recorded.plan(match=True))
    assert recorded.measured == [] and again == document


def test_the_command_it_names_saves_the_model_that_was_compared(recorded, tmp_path):
    document, shown = recorded.start(recorded.plan(match=True))
    (command,) = re.findall(r"as compared at equal target loss: eaftdrope (merge .+)", shown)
    with pytest.raises(SystemExit) as ended:
        main(command.replace("OUTPUT", str(tmp_path / "saved")).split())
    assert ended.value.code == 0
    measurement = open_measurement(recorded.plan(match=True))
    key = next(key for key, probe in measurement.probes.items() if probe.name == "held_out_loss")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="float32").eval()
    (loss,) = measurement.run(saved, key, lambda done, total: None)
    assert loss.value == pytest.approx(document["matched"]["arms"][0]["loss"], abs=1e-4)


def test_the_command_names_the_base_model_where_it_lies(recorded):
    """Relative to the working directory, not to the comparison's folder as in the recipe of its document."""
    plan = recorded.plan("lora=null", match=True)
    document = {
        "verdict": "",
        "verdicts": [],
        "arms": [{"label": "none", "seed": 42, "folder": "arms/none-seed42"}],
        "matched": {"left_out": [], "arms": [{"label": "none", "seed": 42, "share": 0.25, "monotone": True}]},
    }
    words = sentences(document, plan)[-1].split("at equal target loss: ")[1].split()
    assert words[:4] == ["eaftdrope", "merge", str(plan.folder / "arms/none-seed42"), "OUTPUT"]
    assert words[4:7] == ["--share", "0.25", "--base"] and (Path(words[7]) / "config.json").is_file()


def test_a_dry_run_writes_nothing(recorded, tmp_path):
    console = Console(file=io.StringIO(), width=140)
    plan = plan_comparison(recorded.recipe, SHORT, arms="none,eaft,constant", seeds=2, folder=tmp_path / "new")
    comparison.print_comparison_plan(plan, console)
    shown = console.file.getvalue()
    assert shown.count("to train, after eaft") == 2 and "6 arms of 2 steps" in shown and "at least" in shown
    assert not (tmp_path / "new").exists()
    console = Console(file=io.StringIO(), width=140)
    comparison.print_comparison_plan(recorded.plan(), console)
    assert "3 trained, 0 to train" in console.file.getvalue()
