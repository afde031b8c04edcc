"""Whole runs with probes during training, with a base model to agree with, and with samples."""

import json
import signal
from types import SimpleNamespace

import pytest
import torch
import yaml
from rich.console import Console

from eaftdrope.run.probing import RunProbes, as_base
from tests.tiny_models import save_model
from tests.tiny_run import hashes, make_project, metrics, train

GENERAL = [{"agreement": {"limit": 6, "max_new_tokens": 4}}, {"multiple_choice": {"limit": 4}}]
OPTIONS = (f"probes.general={yaml.safe_dump(GENERAL, default_flow_style=True).strip()}", "probes.during_limit=2")
CAPTURE = "agreement.safetensors"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    make_project(folder)
    return folder


@pytest.fixture(scope="module")
def measured(project):
    """A run that measured every second step, killed in step 4 and gone on with: (folder, first, second start)."""
    run = project / "measured"
    arguments = (project / "recipe.yaml", f"output.dir={run}", *OPTIONS, "probes.every=2")
    killed = train(*arguments, moment="in step 4, after a checkpoint")
    assert killed.code == -signal.SIGKILL and (run / CAPTURE).is_file()
    ended = train(*arguments)
    assert ended.code == 0, ended.out
    return run, killed.out, ended.out


def read(run, name):
    return json.loads((run / name).read_text())


def test_what_is_measured_on_the_way(measured):
    run, first, second = measured
    lines = [json.loads(line) for line in (run / "probes_during.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 4, 6]
    assert [[score["n"] for score in line["scores"]] for line in lines] == [[2, 2, 2, 2, 2]] * 4
    assert all("units" not in score for line in lines for score in line["scores"])
    names = ["held-out loss", "KL from the base model", "top-1 agreement with the base model"]
    names += ["multiple choice", "multiple choice, plain"]
    assert [score["metric"] for score in lines[0]["scores"]] == names
    logged = {row["step"]: row for row in metrics(run) if "probe/held-out loss" in row}
    assert sorted(logged) == [2, 4, 6]
    for line in lines[1:]:
        assert {f"probe/{s['metric']}": s["value"] for s in line["scores"]}.items() <= logged[line["step"]].items()
    loss, kl = ([line["scores"][index]["value"] for line in lines] for index in (0, 1))
    assert loss[-1] < loss[0] and 0 <= kl[0] < 1e-6 < kl[1]
    assert "probes at step 2: held-out loss " in first and "probes at step 4: held-out loss " in second


def test_agreement_before_and_after(measured):
    run, first, second = measured
    before, after = (
        {score["metric"]: score for score in read(run, f"probes_{when}.json") if score["probe"] == "agreement"}
        for when in ("before", "after")
    )
    assert [score["value"] for score in before.values()] == [0.0, 1.0]
    kl, same = after.values()
    assert kl["value"] > 0.01 and 0 < same["value"] < 1 and kl["n"] == 6
    assert [weight for _, weight in kl["units"]] == [weight for _, weight in before["KL from the base model"]["units"]]
    # asked once, and not kept for longer than it is needed
    assert "probing before: agreement" in first and "probing before" not in second
    assert not (run / CAPTURE).exists()


def test_samples(measured):
    run, *_ = measured
    samples = read(run, "samples.json")
    # 4 of the 6 held-out rows
    assert [sample["prompt"] for sample in samples] == [f"What is {n} plus {n}?" for n in (40, 41, 43, 44)]
    assert samples[0]["reference"] == "It is 80. Yes."
    assert all(isinstance(sample[when], str) for sample in samples for when in ("before", "after"))
    assert [sample["before"] for sample in samples] != [sample["after"] for sample in samples]


def test_training_is_the_same_whether_or_not_it_is_measured(measured, project):
    """Weights and losses to the bit, dropout included."""
    run, *_ = measured
    plain = project / "plain"
    ended = train(project / "recipe.yaml", f"output.dir={plain}", *OPTIONS)
    assert ended.code == 0, ended.out
    assert not (plain / "probes_during.jsonl").exists()
    assert hashes(plain)["adapter_model.safetensors"] == hashes(run)["adapter_model.safetensors"]
    without = [{k: v for k, v in row.items() if not k.startswith("probe/")} for row in metrics(run)]
    assert without == metrics(plain)
    for name in ("probes_before.json", "probes_after.json", "samples.json"):
        assert hashes(plain)[name] == hashes(run)[name]


def test_trackers_see_the_probes(project, tmp_path, monkeypatch):
    from rich.console import Console
    from transformers import TrainerCallback, trainer

    from eaftdrope.recipe import load_recipe
    from eaftdrope.run.train import run_recipe

    seen = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append((state.global_step, logs.get("probe/held-out loss")))

    monkeypatch.setattr(trainer, "get_reporting_integration_callbacks", lambda report_to: [Tracker])
    overrides = [f"output.dir={tmp_path / 'run'}", "train.steps=2", "probes.general=[]", "probes.every=1"]
    recipe = load_recipe(project / "recipe.yaml", [*overrides, "data.held_out=0.2"])
    run_recipe(recipe, Console(quiet=True), command="test")
    lines = [json.loads(line) for line in (tmp_path / "run" / "probes_during.jsonl").read_text().splitlines()]
    values = [(line["step"], line["scores"][0]["value"]) for line in lines]
    assert [entry for entry in seen if entry[1] is not None] == values[1:]
    assert [step for step, _ in values] == [0, 1, 2]
    # a share of the training rows is sampled too
    assert len(read(tmp_path / "run", "samples.json")) == 4


def test_general_prompts_are_sampled_where_nothing_is_held_out(project, tmp_path):
    run = tmp_path / "run"
    probes = "probes.general=[{multiple_choice: {limit: 2}}]"
    ended = train(
        project / "recipe.yaml", f"output.dir={run}", "train.steps=1", "data.held_out=null", "probes.target=[]", probes
    )
    assert ended.code == 0, ended.out
    samples = read(run, "samples.json")
    assert samples[0]["prompt"] == "What is the capital of Portugal?" and len(samples) == 4
    assert [sample["reference"] for sample in samples] == [None] * 4


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_model_that_gives_no_number_before_its_training_stops_the_run(tmp_path, monkeypatch, when):
    """Nothing is saved, so the same command measures again. After the training the table says so instead."""
    from eaftdrope import UserError
    from eaftdrope.evaluate import Score

    saved = []
    scores = [Score("perplexity", "general", "perplexity", float("nan"), None, 2, "lower", "exp")]
    monkeypatch.setattr(RunProbes, "_scores", lambda *arguments: [scores])
    monkeypatch.setattr(RunProbes, "_take_samples", lambda *arguments: None)
    accelerator = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None)
    trainer = SimpleNamespace(
        accelerator=accelerator, model=torch.nn.Linear(1, 1), is_fsdp_enabled=False, is_deepspeed_enabled=False
    )
    settings = SimpleNamespace(model=SimpleNamespace(reference="some/model"))
    folder = SimpleNamespace(path=tmp_path, load_scores=lambda when: None, save_scores=lambda *both: saved.append(both))
    probes = RunProbes(trainer, None, ["one"], [], settings, folder, Console())
    if when == "after":
        assert probes.measure(when) == scores and saved == [("after", scores)]
        return
    with pytest.raises(UserError, match="perplexity of some/model is NaN or infinite before any training"):
        probes.measure(when)
    assert saved == []


def test_new_adapters_take_no_part_in_what_is_measured_before(tmp_path):
    """They add zero: the scores are those of the model with them, and they are trained as before."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "model"))
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(unwrap_model=lambda _: model),
        model=model,
        is_fsdp_enabled=False,
        is_deepspeed_enabled=False,
    )
    ids, calls = torch.arange(4, 20)[None], []
    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_hook(lambda *_: calls.append(1))
    trained = {name: weight.requires_grad for name, weight in model.named_parameters()}
    with torch.no_grad():
        expected = model(ids).logits
        used = len(calls)
        with as_base(trainer, "before"):
            assert model(ids).logits.equal(expected) and len(calls) == used > 0
        with as_base(trainer, "after"):
            model(ids)
        assert len(calls) == 2 * used
    assert {name: weight.requires_grad for name, weight in model.named_parameters()} == trained
    trainer.is_fsdp_enabled = True
    with as_base(trainer, "before"), torch.no_grad():
        model(ids)
    assert len(calls) == 3 * used
