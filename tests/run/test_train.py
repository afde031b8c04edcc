"""Whole runs on a tiny random model: what they leave, and that killed ones end as undisturbed ones do."""

import json
import re
import signal
import subprocess
import sys

import pytest

from tests.tiny_run import MOMENTS, make_project, metrics, no_report, results, train

FULL = ("lora=null", "train.learning_rate=0.001")
RESULT = {"README.md", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
RECORDS = {"recipe.yaml", "run.json", "metrics.jsonl", "landscape.jsonl", "checkpoints", "report.html", "figures"}
PROBED = {"probes_before.json", "probes_after.json", "samples.json"}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Folder with a model, rows and recipe.yaml, whose run goes to run/; not written to."""
    folder = tmp_path_factory.mktemp("project")
    make_project(folder)
    return folder


@pytest.fixture
def start(project, tmp_path):
    """start(*overrides, moment=None): the recipe's run in tmp_path/run."""
    return lambda *overrides, **how: train(project / "recipe.yaml", f"output.dir={tmp_path / 'run'}", *overrides, **how)


def files(run):
    return {path.name for path in run.iterdir()}


def scores(run, when):
    return json.loads((run / f"probes_{when}.json").read_text())


# ---- what a run leaves ----

ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
WEIGHTS = {"config.json", "model.safetensors"}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), RESULT | RECORDS | PROBED | ADAPTER),
        (FULL, RESULT | RECORDS | PROBED | WEIGHTS),
        (("output.merge=true", "train.gradient_checkpointing=true"), RESULT | RECORDS | PROBED | ADAPTER | {"merged"}),
        (("data.held_out=0.25", "train.eval_every=3", "train.precision=bfloat16"), RESULT | RECORDS | PROBED | ADAPTER),
        (("probes.target=[]", "probes.general=[]", "data.held_out=null"), RESULT | RECORDS | ADAPTER),
        ((*FULL, "model.dtype=bfloat16", "train.epochs=1", "train.steps=null"), RESULT | RECORDS | PROBED | WEIGHTS),
        ((*FULL, "loss.tail=sparse", "loss.gate_threshold=0.01"), RESULT | RECORDS | PROBED | WEIGHTS),
        ((*FULL, "loss.recompute=true", "loss.backend=torch"), RESULT | RECORDS | PROBED | WEIGHTS),
    ],
    ids=["lora", "full", "merged", "share-bfloat16", "no-probes", "bfloat16-weights", "sparse", "recompute"],
)
def test_what_a_run_leaves(request, start, tmp_path, overrides, expected):
    from eaftdrope.recipe import load_recipe

    # a page for each kind of page: with and without probes, with losses on held-out rows
    report = request.node.callspec.id in ("lora", "share-bfloat16", "no-probes")
    ended = start(*overrides, report=report)
    run = tmp_path / "run"
    assert ended.code == 0, ended.out
    assert files(run) == expected - ({"figures"} if not report else set())
    assert files(run / "checkpoints") == {"README.md", "checkpoint-2", "checkpoint-4", "checkpoint-6"}
    state = json.loads((run / "run.json").read_text())
    assert (state["status"], state["processes"]) == ("finished", 1)
    rows = metrics(run)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "eval_loss" in row] == ([3, 6] if "train.eval_every=3" in overrides else [])
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0]
    # the resolved recipe is the run's, from where it lies
    again = load_recipe(run / "recipe.yaml")
    assert again.model_dump(mode="json", exclude={"output", "serve"}) == state["recipe"]
    assert str(tmp_path) not in (run / "recipe.yaml").read_text().replace(f"dir: {run}", "")
    card = (run / "README.md").read_text()
    weights = "bfloat16" if "model.dtype=bfloat16" in overrides else "float32"
    autocast = ", bfloat16 autocast" if "train.precision=bfloat16" in overrides else ""
    assert re.search(rf"^- Hardware: .+, {weights} weights{autocast}", card, re.MULTILINE)
    if "probes_after.json" in expected:
        before, after = (
            next(s for s in scores(run, when) if s["probe"] == "held_out_loss") for when in ("before", "after")
        )
        assert after["value"] < before["value"]
        assert f"| {before['value']:.3f} | {after['value']:.3f} |" in card
        assert "Before and after" in ended.out
        assert f"{before['value']:.3f}" in ended.out
        assert f"{after['value']:.3f}" in ended.out
    else:
        assert "Before and after" not in ended.out
    assert ended.out.rstrip().endswith(f"the result is in {run}")


def test_nothing_but_the_run_on_the_screen(start, monkeypatch):
    """Warnings and bars of the libraries stay away from a log."""
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY", raising=False)
    ended = start("train.gradient_checkpointing=true", "output.merge=true")
    assert ended.code == 0
    for noise in ("Warning", "deprecated", "Loading weights", "Writing model", "mtime", "it/s", "[transformers]"):
        assert noise not in ended.out
    first = ended.out.split()[0]
    assert first == "model"


# ---- loading it without eaftdrope ----

_STOCK = """
import importlib.abc, sys, torch

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "eaftdrope":
            raise ImportError("eaftdrope is not installed here")

sys.meta_path.insert(0, Blocked())
try:
    import eaftdrope
except ImportError:
    pass
else:
    raise SystemExit("the finder does not block")

from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

for folder in sys.argv[1:]:
    live = torch.load(folder + "/../live.pt")
    loader = AutoPeftModelForCausalLM if "lora" in folder and "merged" not in folder else AutoModelForCausalLM
    model, tokenizer = loader.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "What is 3 plus 3?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert torch.equal(inputs["input_ids"], live["input_ids"]), folder
    with torch.no_grad():
        difference = (model(**inputs).logits - live["logits"]).abs().max().item()
        answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert difference <= 1e-5, (folder, difference)
    assert torch.equal(answer, live["answer"]), folder
    print(folder, "ok")
"""


def test_it_loads_and_generates_with_stock_libraries(project, tmp_path, monkeypatch):
    """Logits and greedy answers of the live model, in a process that can not import eaftdrope."""
    import torch
    from rich.console import Console

    from eaftdrope.recipe import load_recipe
    from eaftdrope.report import page
    from eaftdrope.run.stages import training
    from eaftdrope.run.train import run_recipe

    save_result = training.save_result

    def save_and_look(trainer, tokenizer, folder, settings):
        save_result(trainer, tokenizer, folder, settings)
        model = trainer.model.eval()
        messages = [{"role": "user", "content": "What is 3 plus 3?"}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            live = {
                "input_ids": inputs["input_ids"],
                "logits": model(**inputs).logits,
                "answer": model.generate(**inputs, max_new_tokens=8, do_sample=False),
            }
        torch.save(live, folder.path.parent / "live.pt")
        torch.save(live, folder.path / "live.pt")

    monkeypatch.setattr(training, "save_result", save_and_look)
    monkeypatch.setattr(page, "_write", no_report)
    console = Console(quiet=True)
    for name, overrides in {"lora": ["output.merge=true"], "full": list(FULL)}.items():
        where = f"output.dir={tmp_path / name / 'run'}"
        recipe = load_recipe(project / "recipe.yaml", [where, "train.steps=4", "probes.general=[]", *overrides])
        run_recipe(recipe, console, command="test")
    folders = [tmp_path / "lora" / "run", tmp_path / "lora" / "run" / "merged", tmp_path / "full" / "run"]
    done = subprocess.run(
        [sys.executable, "-c", _STOCK, *map(str, folders)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == [f"{folder} ok" for folder in folders]


# ---- killed and started again ----


@pytest.fixture(scope="module")
def undisturbed(project, tmp_path_factory):
    """The results of runs that nothing disturbed, by their overrides."""
    known = {}

    def run(*overrides, report):
        if (overrides, report) not in known:
            folder = tmp_path_factory.mktemp("undisturbed") / "run"
            ended = train(project / "recipe.yaml", f"output.dir={folder}", *overrides, report=report)
            assert ended.code == 0, ended.out
            known[overrides, report] = results(folder)
        return known[overrides, report]

    return run


# Each of these is near to another one.
RARER = {
    "after run.json",
    "in step 6, after two checkpoints",
    "in a checkpoint, before its weights",
    "in a checkpoint, before its random state",
    "after the result",
}


@pytest.mark.parametrize(
    ("moment", "step"),
    [
        pytest.param(moment, step, marks=[pytest.mark.kills] if moment in RARER else [])
        for moment, (step, _) in MOMENTS.items()
    ],
)
def test_a_killed_run_goes_on_and_ends_the_same(start, undisturbed, tmp_path, moment, step):
    """Same losses in metrics.jsonl, bit-equal weights, same scores."""
    overrides = ("output.merge=true",) if moment == "before the last word" else ()
    # its figures are of logs that two processes wrote; `make test-kills` draws them after every kill
    report = moment == "before the last word"
    assert start(*overrides, moment=moment, report=report).code == -signal.SIGKILL
    run = tmp_path / "run"
    if run.exists() and (run / "run.json").exists():
        status = json.loads((run / "run.json").read_text())["status"]
        assert status == ("trained" if moment == "before the last word" else "running")
    ended = start(*overrides, report=report)
    assert ended.code == 0, ended.out
    assert results(run) == undisturbed(*overrides, report=report)
    assert (f"resuming from checkpoint-{step} of 6" in ended.out) == (step > 0 and moment != "before the last word")
    # not one step more than needed
    assert [line.split()[1] for line in ended.out.splitlines() if line.startswith("step ")] == [
        f"{number}/6" for number in range(step + 1, 7)
    ]


@pytest.mark.kills
@pytest.mark.parametrize("overrides", [FULL, ("train.keep_checkpoints=1", "train.eval_every=2")], ids=["full", "lora"])
def test_killed_again_and_again(start, undisturbed, tmp_path, overrides):
    """One run, killed at moment after moment. Calls are counted in each process anew: the third one saves at steps 2 and
    4, the fourth at 4 and 6, and once the scores of before are known the first probe is the one after training."""
    for moment in (
        "while probing before",
        "in step 2, before a checkpoint",
        "in a checkpoint, before its optimizer",
        "while deleting old checkpoints",
        "after training",
        "while probing before",
        "before the last word",
    ):
        assert start(*overrides, moment=moment, report=True).code == -signal.SIGKILL, moment
    ended = start(*overrides, report=True)
    assert ended.code == 0, ended.out
    assert results(tmp_path / "run") == undisturbed(*overrides, report=True)
