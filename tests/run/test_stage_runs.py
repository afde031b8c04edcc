"""Whole runs in stages on a tiny random model: what each leaves, that none runs twice, and that killed ones end the same."""

import json
import math
import re
import shutil
import signal

import pytest

from tests.tiny_run import STAGE_MOMENTS, hashes, make_staged_project, metrics, train, train_in_ranks


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    make_staged_project(folder)
    return folder


@pytest.fixture
def start(project, tmp_path):
    """start(*overrides, moment=None): the recipe's run in tmp_path/run."""
    return lambda *overrides, **how: train(project / "staged.yaml", f"output.dir={tmp_path / 'run'}", *overrides, **how)


@pytest.fixture(scope="module")
def undisturbed(project, tmp_path_factory):
    """A finished run that nothing disturbed, and what was on the screen; no test may change it."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    ended = train(project / "staged.yaml", f"output.dir={run}", report=True)
    assert ended.code == 0, ended.out
    return run, ended.out


def results(run):
    """Hashes of all that the stages leave, checkpoints and the records with paths and times apart; logs without times. The
    page and its figures are drawn after a stage is finished, and a kill in between leaves none."""
    left_out = ("README.md", "recipe.yaml", "run.json", "manifest.json", "report.html", "system.json")
    found = {
        name: value
        for name, value in hashes(run).items()
        if not {"checkpoints", "figures"} & set(name.split("/"))
        and not name.endswith(left_out)
        and not name.endswith("adapter_config.json")
    }
    for stage in ("recalibrate", "eaft"):
        found[f"{stage}/metrics.jsonl"] = metrics(run / stage)
    return found


def stages_run(out):
    """The stages that were run, with the checkpoint that they went on from."""
    found = []
    for line in out.splitlines():
        if match := re.fullmatch(r"stage \d of \d: (\w+)", line):
            found.append(match[1])
        elif match := re.match(r"resuming from checkpoint-(\d+)", line):
            found[-1] += f" from {match[1]}"
    # each heading stands above the plan first
    return found[len(set(re.findall(r"^stage \d of \d: (\w+)$", out, re.MULTILINE))) :]


# ---- what the stages leave ----


def test_what_the_stages_leave(undisturbed):
    run, out = undisturbed
    assert {path.name for path in run.iterdir()} == {"drope", "recalibrate", "eaft", "report.html", "system.json"}
    records = {"README.md", "recipe.yaml", "run.json"}
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    weights = {"config.json", "model.safetensors"}
    trained = {"metrics.jsonl", "landscape.jsonl", "checkpoints", "report.html", "figures"}
    files = {stage: {path.name for path in (run / stage).iterdir()} for stage in ("drope", "recalibrate", "eaft")}
    assert files["drope"] == records | tokenizer | weights | {"drope_original"}
    assert files["recalibrate"] == records | tokenizer | weights | trained | {"recovery.json", "recovery.png"}
    assert files["eaft"] == records | tokenizer | trained | {"adapter_config.json", "adapter_model.safetensors"}
    assert stages_run(out) == ["drope", "recalibrate", "eaft"]
    assert [json.loads((run / stage / "run.json").read_text())["status"] for stage in files] == ["finished"] * 3
    base = json.loads((run / "eaft" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(run / "recalibrate")


def test_the_recalibrated_model_has_no_rotary_embedding_in_either_transformers(undisturbed):
    """transformers 5 saves its own keys alone; those of transformers 4 are put back."""
    import torch
    from transformers import AutoModelForCausalLM

    run, _ = undisturbed
    config = json.loads((run / "recalibrate" / "config.json").read_text())
    assert config["rope_scaling"]["factor"] == config["rope_parameters"]["factor"] == 1e30
    assert (config["max_position_embeddings"], config["drope"]["trained_length"]) == (1024, 512)
    assert config["drope"]["recalibrated"]["tokens"] == 1024
    model = AutoModelForCausalLM.from_pretrained(run / "recalibrate").eval()
    ids = torch.arange(4, 24)[None]
    positions = torch.arange(20)[None]
    with torch.no_grad():
        near, far = (model(ids, position_ids=positions + shift).logits for shift in (0, 100_000))
    assert torch.equal(near, far)


def test_the_merged_model_has_none_either(undisturbed, tmp_path):
    from eaftdrope.checkpoints.merge import merge_adapter

    merge_adapter(undisturbed[0] / "eaft", tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["rope_scaling"]["factor"] == config["rope_parameters"]["factor"] == 1e30
    assert config["drope"]["recalibrated"]["tokens"] == 1024


def test_the_cards(undisturbed):
    run, _ = undisturbed
    card = (run / "recalibrate" / "README.md").read_text()
    assert "- drope\n" in card and "- eaft\n" not in card
    assert "# run: recalibrate\n" in card
    assert "trained with plain cross-entropy on text in blocks of 64 tokens (documents joined)" in card
    assert "## Recovery" in card and "| after 1,024 tokens |" in card
    assert "## Engines" in card and "| llama.cpp |" in card
    assert "- eaft\n" in (run / "eaft" / "README.md").read_text()


def test_a_saved_recipe_is_the_recipe_up_to_its_stage(undisturbed):
    from eaftdrope.recipe import load_recipe

    run, _ = undisturbed
    for stages in (["drope"], ["drope", "recalibrate"], ["drope", "recalibrate", "eaft"]):
        folder = run / stages[-1]
        recipe = load_recipe(folder / "recipe.yaml")
        assert recipe.stages == stages
        assert (
            recipe.model_dump(mode="json", exclude={"output", "serve"})
            == json.loads((folder / "run.json").read_text())["recipe"]
        )
        text = (folder / "recipe.yaml").read_text()
        assert str(run.parent) not in text.replace(f"dir: {run}", "")


# ---- recovery ----


def test_recovery_is_what_a_plain_loop_measures(undisturbed, project):
    """The original, the dropped model and the recalibrated one, each in a loop over the held-out blocks."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, out = undisturbed
    recovery = json.loads((run / "recalibrate" / "recovery.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(project / "model")
    documents = [json.loads(line)["text"] for line in (project / "held_out_text.jsonl").read_text().splitlines()]
    ids = [token for text in documents for token in [*tokenizer(text).input_ids, tokenizer.eos_token_id]]
    blocks = [ids[start : start + 64] for start in range(0, len(ids) - 63, 64)]
    blocks = [blocks[i * len(blocks) // 4] for i in range(4)]
    assert recovery["measured_tokens"] == 63 * len(blocks)

    def perplexity(folder):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            losses = [
                torch.nn.functional.cross_entropy(model(torch.tensor([block])).logits[0, :-1], torch.tensor(block[1:]))
                for block in blocks
            ]
        return math.exp(torch.stack(losses).double().mean())

    original, dropped, recalibrated = map(perplexity, (project / "model", run / "drope", run / "recalibrate"))
    points = recovery["points"]
    assert [(point["step"], point["tokens"]) for point in points] == [(0, 0), (2, 512), (4, 1024)]
    assert recovery["original"]["perplexity"] == pytest.approx(original, rel=1e-5)
    assert points[0]["perplexity"] == pytest.approx(dropped, rel=1e-5)
    assert points[-1]["perplexity"] == pytest.approx(recalibrated, rel=1e-5)
    assert [point["recovery"] for point in points] == pytest.approx([original / p["perplexity"] for p in points])
    # in the log of the steps at which it was measured, and on the screen
    logged = {row["step"]: row["recovery"] for row in metrics(run / "recalibrate") if "recovery" in row}
    assert logged == {point["step"]: point["recovery"] for point in points[1:]}
    assert f"recovery {points[1]['recovery']:.2f}  " in out
    assert f"│ original │        │ {original:>10.2f} │" in out


def test_the_training_ends_when_enough_is_recovered(project, tmp_path):
    """The random model recovers more than all of it by step 2; what is killed after that does not train on."""
    stop = ("recalibrate.recovery.stop_at=0.9", "recalibrate.recovery.every=1")
    common = (project / "short.yaml", f"output.dir={tmp_path / 'run'}", *stop)
    ended = train(*common, moment="after the recalibration's training")
    assert ended.code == -signal.SIGKILL
    assert "stopped at step 1/4" in ended.out
    ended = train(*common)
    assert ended.code == 0, ended.out
    assert "resuming from checkpoint-1 of 4" in ended.out
    assert "step 2/4" not in ended.out
    run = tmp_path / "run" / "recalibrate"
    recovery = json.loads((run / "recovery.json").read_text())
    assert (recovery["stop_at"], [point["step"] for point in recovery["points"]]) == (0.9, [0, 1])
    assert [row["step"] for row in metrics(run)] == [1]


# ---- killed and started again ----

RARER = {"while the original is measured", "after the conversion", "after the recalibration's training"}


@pytest.mark.parametrize(
    "moment", [pytest.param(name, marks=[pytest.mark.kills] if name in RARER else []) for name in STAGE_MOMENTS]
)
def test_a_killed_run_goes_on_and_ends_the_same(start, undisturbed, tmp_path, moment):
    """Same losses, bit-equal weights, the same recovery curve; finished stages are not run again."""
    assert start(moment=moment).code == -signal.SIGKILL
    run = tmp_path / "run"
    before = hashes(run)
    ended = start()
    assert ended.code == 0, ended.out
    expected = STAGE_MOMENTS[moment][0]
    assert stages_run(ended.out) == expected
    assert results(run) == results(undisturbed[0])
    after = hashes(run)
    for stage in {"drope", "recalibrate", "eaft"} - {stage.split()[0] for stage in expected}:
        kept = {name for name in before if name.startswith(f"{stage}/")}
        assert kept and all(after[name] == before[name] for name in kept)
        # a long path begins a line of its own
        assert f"{stage}, finished in {run / stage}" in " ".join(ended.out.split())
    # the original was measured by the first start, if that came to it
    assert ("measuring the original model" in ended.out) == ("recalibrate" in expected)


def test_interrupted(start):
    ended = start(moment="in step 4 of the recalibration", signal_number=signal.SIGINT)
    assert (ended.code, ended.out.splitlines()[-1]) == (
        130,
        "Interrupted at step 4 of 4 of the stage recalibrate. The same command resumes from checkpoint-4.",
    )


# ---- what is left alone, and what begins anew ----


def test_a_finished_run_is_left_alone(project, undisturbed):
    run, _ = undisturbed
    before = hashes(run)
    for option in ((), ("--dry-run",)):
        ended = train(project / "staged.yaml", f"output.dir={run}", *option)
        assert ended.code == 2
        assert ended.out.startswith(f"{run} holds a finished run. Nothing was changed: ")
    assert hashes(run) == before


def test_a_run_killed_before_its_page_gets_it(project, undisturbed, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(undisturbed[0], run)
    before = results(run)
    for name in ("report.html", "system.json"):
        (run / name).unlink()
    ended = train(project / "staged.yaml", f"output.dir={run}", report=True)
    assert ended.code == 0 and stages_run(ended.out) == [], ended.out
    assert json.loads((run / "system.json").read_text())["stages"] == ["drope", "recalibrate", "eaft"]
    assert (run / "report.html").is_file() and results(run) == before


def test_a_changed_stage_is_refused_and_a_new_one_begins(project, undisturbed, tmp_path):
    """The sections of a finished stage are compared; those of a stage that has not begun may change."""
    run = tmp_path / "run"
    shutil.copytree(undisturbed[0], run)
    ended = train(project / "staged.yaml", f"output.dir={run}", "drope.max_length=2048")
    assert ended.code == 2
    assert (
        f"{run / 'drope'} holds a finished run of another recipe (different: drope.max_length: 1024 then, 2048 now)."
        in ended.out
    )
    ended = train(project / "staged.yaml", f"output.dir={run}", "train.steps=2")
    assert (
        f"{run / 'eaft'} holds a finished run of another recipe (different: train.steps: 4 then, 2 now)." in ended.out
    )
    shutil.rmtree(run / "eaft")
    ended = train(project / "staged.yaml", f"output.dir={run}", "train.steps=2")
    assert ended.code == 0, ended.out
    assert stages_run(ended.out) == ["eaft"]
    # without the stage before it, a result has no beginning
    shutil.rmtree(run / "recalibrate")
    ended = train(project / "staged.yaml", f"output.dir={run}", "train.steps=2")
    assert ended.code == 2
    assert ended.out.startswith(
        f"{run / 'eaft'} holds a run on the result of the stage recalibrate, which is not finished in {run / 'recalibrate'}."
    )


def test_overwrite_begins_every_stage_anew(project, undisturbed, tmp_path):
    """And deletes nothing for a recipe that cannot begin."""
    run = tmp_path / "run"
    shutil.copytree(undisturbed[0], run)
    before = hashes(run)
    broken = ("data.train=nowhere/else", "--overwrite")
    ended = train(project / "staged.yaml", f"output.dir={run}", *broken)
    assert ended.code == 2
    assert hashes(run) == before
    ended = train(
        project / "staged.yaml",
        f"output.dir={run}",
        "--overwrite",
        "drope.max_length=2048",
        moment="after the conversion",
    )
    assert ended.code == -signal.SIGKILL
    # the later stages went with the first: nothing of the old run is taken for the new one's
    assert json.loads((run / "drope" / "config.json").read_text())["max_position_embeddings"] == 2048
    assert not any((run / stage / "run.json").exists() for stage in ("recalibrate", "eaft"))


def test_dry_run_shows_every_stage_and_writes_nothing(start, tmp_path):
    ended = start("--dry-run")
    assert ended.code == 0, ended.out
    assert list(tmp_path.iterdir()) == []
    assert re.findall(r"^stage .*$", ended.out, re.MULTILINE) == [
        "stage 1 of 3: drope",
        "stage 2 of 3: recalibrate",
        "stage 3 of 3: eaft",
    ]
    plans = ended.out.split("stage ")
    assert "1,024 tokens announced, 512 before" in plans[1]
    assert "steps         4, 1,024 tokens" in plans[2]
    assert f"writes        {tmp_path / 'run' / 'recalibrate'}/" in plans[2]
    assert "LoRA r 4, alpha 8" in plans[3]


def test_one_eaft_stage_is_the_run_of_a_recipe_without_stages(project, tmp_path):
    """Bit-equal weights and losses; only the folder is another."""
    plain, staged = tmp_path / "plain", tmp_path / "staged"
    common = (
        project / "recipe.yaml",
        "lora=null",
        "train.learning_rate=0.001",
        "probes.target=[]",
        "probes.general=[]",
    )
    assert train(*common, f"output.dir={plain}").code == 0
    assert train(*common, f"output.dir={staged}", "stages=[eaft]").code == 0
    assert metrics(plain) == metrics(staged / "eaft")
    assert hashes(plain)["model.safetensors"] == hashes(staged)["eaft/model.safetensors"]
    ended = train(*common, f"output.dir={plain}", "stages=[eaft]")
    assert ended.code == 2
    assert ended.out.startswith(f"{plain} holds a run of a recipe without stages.")


# ---- several processes ----


@pytest.mark.slow
def test_two_processes(project, tmp_path):
    """One conversion, one curve, and the losses and recovery of one process with the whole batch."""
    run, alone = tmp_path / "run", tmp_path / "alone"
    half = ("recalibrate.train.batch_size=2", "train.batch_size=2", "lora.dropout=0")
    ranks = train_in_ranks(project / "staged.yaml", f"output.dir={run}", *half)
    assert [rank.code for rank in ranks] == [0, 0], ranks
    out = ranks[0].out
    assert stages_run(out) == ["drope", "recalibrate", "eaft"]
    assert out.count("measuring the original model") == 1
    assert train(project / "staged.yaml", f"output.dir={alone}", "lora.dropout=0").code == 0
    for stage in ("recalibrate", "eaft"):
        for row, other in zip(metrics(run / stage), metrics(alone / stage), strict=True):
            assert row["loss"] == pytest.approx(other["loss"], abs=1e-4)
    curves = [json.loads((folder / "recalibrate" / "recovery.json").read_text()) for folder in (run, alone)]
    points = [[(point["step"], point["tokens"]) for point in curve["points"]] for curve in curves]
    assert points[0] == points[1]
    recoveries = [[point["recovery"] for point in curve["points"]] for curve in curves]
    assert recoveries[0] == pytest.approx(recoveries[1], rel=1e-3)


_LATE = """
import os, sys, time
from pathlib import Path
from rich.console import Console
from eaftdrope.recipe import load_recipe
from eaftdrope.run import train as run
from tests.forked import end_together

prepare, folder = run._prepare, Path(sys.argv[2])

def prepare_late(stages, console):
    prepared = prepare(stages, console)
    # the other is ready to convert long before
    until = time.monotonic() + 10
    while os.environ["RANK"] == "1" and not (folder / "drope" / "run.json").exists() and time.monotonic() < until:
        time.sleep(0.1)
    return prepared

run._prepare = prepare_late
run.run_recipe(load_recipe(Path(sys.argv[1]), []), Console(quiet=True), command="")
end_together()
"""


@pytest.mark.slow
def test_a_process_that_is_late_meets_the_one_that_converts(project, tmp_path):
    """It has prepared all it needs, and looks up again when the other could have finished the stage."""
    from tests.trainer.processes import run_two

    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(f"model: {project / 'model'}\nstages: [drope]\noutput: {{dir: {run}}}\n")
    run_two(_LATE, recipe, run)
    assert json.loads((run / "drope" / "run.json").read_text())["status"] == "finished"
