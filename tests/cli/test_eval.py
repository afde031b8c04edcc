"""`eaftdrope eval` on tiny models: scores, changes, the cache, refusals; lm-eval itself is stood in for."""

import importlib.util
import json
import shutil
import signal
import sys
from types import ModuleType, SimpleNamespace
from xml.etree import ElementTree

import pytest

from eaftdrope.cli import main
from eaftdrope.evaluate.scores import change_stderr
from eaftdrope.evaluate.suites import subject
from eaftdrope.report.words import score_of
from tests import forked
from tests.evaluate.test_score_cache import adapter_of
from tests.tiny_models import TEMPLATE
from tests.tiny_run import make_project

SMALL = ["--suite", "general:perplexity,general:multiple_choice", "--limit", "6", "--device", "cpu"]


def run(*arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return stop.value.code or 0, output.out, output.err


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """model/, other/ with weights of its own, rows and recipe.yaml, and a short text."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("project")
    make_project(folder)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    torch.manual_seed(1)
    for weight in model.parameters():
        weight.data += 0.02 * torch.randn_like(weight)
    model.save_pretrained(folder / "other")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (folder / "model" / file).exists():
            shutil.copy(folder / "model" / file, folder / "other" / file)
    return folder


@pytest.fixture
def eval_in(project, tmp_path, capsys, monkeypatch):
    """`eval_in(model, ..., name="out[/red]")` -> (exit code, stdout, stderr, eval.json or None); its cache begins empty."""
    monkeypatch.setenv("EAFTDROPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(project)

    def start(*arguments, name="out[/red]", text=True):
        given = ["--data", "perplexity=text.txt"] if text else []
        code, out, err = run("eval", *arguments, *given, "--output", tmp_path / name, capsys=capsys)
        file = tmp_path / name / "eval.json"
        return code, out, err, json.loads(file.read_text()) if file.is_file() else None

    return start


def values(document, model=0):
    return {score["metric"]: score["value"] for score in document["models"][model]["scores"]}


def test_one_model(eval_in, tmp_path, monkeypatch):
    code, out, err, document = eval_in("model", *SMALL)
    assert code == 0, err
    assert document["kind"] == "eval" and document["status"] == "finished" and document["suites"] == ["general"]
    assert document["settings"]["data"] == {"perplexity": "text.txt", "multiple_choice": "shipped"}
    assert document["command"].startswith("eaftdrope ") and {"date", "device", "versions"} <= document["about"].keys()
    scores = [score_of(row) for row in document["models"][0]["scores"]]
    assert [(s.metric, s.n) for s in scores[1:]] == [("multiple choice", 6), ("multiple choice, plain", 6)]
    assert all(score.stderr for score in scores) and f"{scores[0].value:.2f} ± {scores[0].stderr:.2f}" in out
    assert "model, general: perplexity" in out and (tmp_path / "out[/red]" / "report.html").is_file()
    assert f"written: {tmp_path / 'out[/red]' / 'eval.json'}" in out.replace("\n", "")

    # again: nothing is loaded, the numbers are the same
    monkeypatch.setattr(subject, "load_model", None)
    code, out, err, again = eval_in("model", *SMALL)
    assert code == 0, err
    assert again["models"] == document["models"] and "2 of 2 came from the cache (--fresh ignores it)" in out


def test_fresh_measures_again(eval_in, monkeypatch):
    assert eval_in("model", *SMALL)[0] == 0
    monkeypatch.setattr(subject, "load_model", None)
    with pytest.raises(TypeError):
        eval_in("model", *SMALL, "--fresh")


def test_several_models_and_their_changes(eval_in, project):
    suite = ["--suite", "general:perplexity,general:agreement", "--limit", "3", "--device", "cpu"]
    code, out, err, document = eval_in("model", "other", *suite)
    assert code == 0, err
    base, other = ([score_of(row) for row in model["scores"]] for model in document["models"])
    assert [score.metric for score in base] == [
        "perplexity",
        "KL from the base model",
        "top-1 agreement with the base model",
    ]
    # with itself a model agrees
    assert (base[1].value, base[2].value) == (0.0, 1.0)
    assert other[1].value > 0.001 and other[2].value < 1.0
    change = f"{other[0].value - base[0].value:+.2f} ± {change_stderr(base[0], other[0]):.2f}"
    assert change in out and "change" in out and "worse" in out
    # the base, named by itself, is the same capture: nothing is asked again
    code, out, err, alone = eval_in("other", *suite, "--base", "model", name="alone")
    assert code == 0, err
    assert "2 of 2 came from the cache" in out and "the base model's answers" not in out
    assert alone["models"][0]["scores"] == document["models"][1]["scores"]


def test_agreement_without_a_base_or_with_another_tokenizer(eval_in, project, tmp_path):
    code, out, _, document = eval_in("model", "--suite", "general:perplexity,general:agreement", "--device", "cpu")
    assert code == 0 and list(values(document)) == ["perplexity"]
    assert "note: agreement is left out: it compares with a base model, which --base sets." in out
    code, _, err, _ = eval_in("model", "--suite", "general:agreement", text=False, name="none")
    assert code == 2 and "model: nothing is left to measure. agreement is left out" in err
    stranger = shutil.copytree(project / "model", tmp_path / "stranger")
    (stranger / "chat_template.jinja").write_text(TEMPLATE.replace("<|im_start|>", "<|end|>"))
    code, out, _, document = eval_in(
        stranger, "--suite", "general:perplexity,general:agreement", "--base", "model", name="strange"
    )
    assert code == 0 and list(values(document)) == ["perplexity"]
    assert (
        "agreement is left out: its tokenizer or chat template renders the prompts differently from that of model"
        in out
    )


def test_an_adapter_beside_its_base(eval_in, project, tmp_path):
    adapter = adapter_of(project / "model", tmp_path / "adapter")
    code, _, err, document = eval_in("model", adapter, *SMALL)
    assert code == 0, err
    assert values(document, 0)["perplexity"] != values(document, 1)["perplexity"]


def test_a_recipes_own_probes(eval_in, project, tmp_path):
    code, _, err, document = eval_in("other", "--probes", "recipe.yaml", "--device", "cpu", text=False)
    assert code == 0, err
    assert document["suites"] == ["recipe"]
    assert list(values(document)) == ["held-out loss", "perplexity", "multiple choice", "multiple choice, plain"]
    # with a suite beside it, names tell whose is whose
    code, _, err, document = eval_in("other", "--probes", "recipe.yaml", *SMALL, name="both")
    assert code == 0, err
    assert {"perplexity", "perplexity (recipe)", "held-out loss (recipe)"} <= values(document).keys()
    (tmp_path / "convert.yaml").write_text("stages: [drope]\n")
    code, _, err, _ = eval_in("other", "--probes", tmp_path / "convert.yaml", name="convert")
    assert code == 2 and "convert.yaml: it has no data section, and so no probes of its own." in err
    code, _, err, _ = eval_in("other", "--probes", "gone.yaml", name="gone")
    assert code == 2 and "no recipe at gone.yaml." in err


def test_fail_if_worse(eval_in, project, tmp_path, monkeypatch):
    """Exit codes 0 for equal weights under another path, 1 for a clearly worse metric, and what is allowed."""
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    copy = shutil.copytree(project / "model", tmp_path / "copy")
    # the option without a value may stand anywhere, also before a model
    code, out, err, document = eval_in("--fail-if-worse", "model", copy, *SMALL, name="equal")
    assert code == 0, err
    assert "3 metrics checked: 0 clearly worse" in out and [m["name"] for m in document["models"]] == ["model", "copy"]
    assert values(document, 0) == values(document, 1)
    assert document["command"].split()[1:4] == ["eval", "--fail-if-worse", "model"]

    code, out, err, document = eval_in("model", "other", *SMALL, "--fail-if-worse", name="worse")
    assert code == 1, err
    change = values(document, 1)["perplexity"] - values(document, 0)["perplexity"]
    assert f"  worse: perplexity of other: +{change:.2f} from model (margin " in out
    assert "not enough evidence: multiple choice of other" in out and "items)" in out
    assert (tmp_path / "worse" / "report.html").is_file()

    allowed = f"perplexity:{2 * change:.1f}"
    code, out, err, _ = eval_in("model", "other", *SMALL, "--fail-if-worse", allowed, name="allowed")
    assert code == 0, err
    assert "1 metrics checked: 0 clearly worse" in out
    # both: every metric, and more for one of them
    code, out, err, _ = eval_in(
        "model",
        "other",
        *SMALL,
        "--fail-if-worse",
        "--fail-if-worse",
        allowed,
        "--fail-if-worse=multiple_choice:2",
        name="all",
    )
    assert code == 0, err
    assert "3 metrics checked: 0 clearly worse" in out


def test_errors_of_fail_if_worse(eval_in):
    code, _, err, _ = eval_in("model", *SMALL, "--fail-if-worse", "--junit", "gone/x.xml")
    assert code == 2 and err.startswith("3 problems:\n- --fail-if-worse: there is nothing to compare.")
    assert "- --junit gone/x.xml: there is no folder gone." in err
    code, _, err, _ = eval_in("model", "other", *SMALL, "--fail-if-worse", "perplexty:1")
    assert code == 2 and "--fail-if-worse perplexty: no such metric was measured. Did you mean `perplexity`?" in err
    code, _, err, _ = eval_in("model", "other", *SMALL, "--fail-if-worse=perplexity", name="form")
    assert code == 2 and "--fail-if-worse perplexity: expected METRIC:MARGIN" in err


def test_verdicts_for_continuous_integration(eval_in, tmp_path, monkeypatch):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    junit = tmp_path / "junit.xml"
    code, out, err, _ = eval_in("model", "other", *SMALL, "--junit", junit)
    # without --fail-if-worse nothing fails
    assert code == 0, err
    assert "metrics checked" not in out
    assert "\n::error title=perplexity of other::worse: perplexity of other: +" in out
    root = ElementTree.parse(junit).getroot()
    assert (root.get("tests"), root.get("failures")) == ("3", "1")
    assert root.find(".//failure").get("message").startswith("worse: perplexity of other")
    names = {file.parent.name for file in (tmp_path / "out[/red]" / "lm_eval").rglob("results_*.json")}
    assert names == {"model", "other"} and len(list((tmp_path / "out[/red]" / "inspect_ai").iterdir())) == 4


@pytest.mark.slow
def test_a_killed_evaluation_goes_on(eval_in, project, tmp_path):
    script = (
        "import os, signal, sys\n"
        "from eaftdrope.cli import main\n"
        "from eaftdrope.evaluate.probes.multiple_choice import MultipleChoiceProbe\n"
        "def dying(*arguments, **options):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "MultipleChoiceProbe.run = dying\n"
        "main(sys.argv[1:])\n"
    )
    command = ["eval", "model", *SMALL, "--data", "perplexity=text.txt", "--output", str(tmp_path / "out[/red]")]
    done = forked.run_source(script, *command)
    assert done.code == -signal.SIGKILL, done.err
    left = json.loads((tmp_path / "out[/red]" / "eval.json").read_text())
    assert left["status"] == "running" and list(values(left)) == ["perplexity"]
    code, out, err, document = eval_in("model", *SMALL)
    assert code == 0, err
    assert "1 of 2 came from the cache" in out and document["status"] == "finished" and len(values(document)) == 3


def test_a_dry_run_and_other_settings(eval_in, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(subject, "load_model", None)
        code, out, err, document = eval_in(
            "model", "--suite", "general,math", "--data", "gsm8k=rows.jsonl", "--dry-run"
        )
    assert code == 0, err
    assert document is None and not (tmp_path / "out[").exists()
    assert "instructions" in out and "rows.jsonl" in out and "shipped" in out
    assert eval_in("model", *SMALL)[0] == 0
    code, _, err, _ = eval_in("model", *SMALL, "--limit", "5")
    assert code == 2 and "holds an evaluation with other settings (different: limit). Nothing was changed" in err
    code, _, err, document = eval_in("model", *SMALL, "--limit", "5", "--overwrite")
    assert code == 0, err
    assert document["models"][0]["scores"][1]["n"] == 5


def test_everything_that_is_wrong_is_told_at_once(eval_in, tmp_path):
    code, _, err, document = eval_in(
        "gone",
        "model",
        "model",
        "--suite",
        "medical:medqa,math",
        "--dtype",
        "int8",
        "--include-path",
        "gone",
        text=False,
    )
    assert (code, document) == (2, None)
    assert err.startswith("4 problems:\n") and "- a model is given twice" in err
    assert "--dtype int8: not one of float32, bfloat16, auto." in err and "model 'gone' is neither" in err
    assert "- --include-path gone: no such folder." in err
    code, _, err, _ = eval_in("model", "--suite", "medical:medqa,math", text=False)
    assert code == 2 and err.startswith("2 problems:\n- medical:medqa cannot be measured: ")
    assert "- math:gsm8k cannot be measured: " in err and "--data gsm8k=FILE" in err


RESULT = {
    "results": {
        "mine": {"alias": "mine", "acc,none": 0.5, "acc_stderr,none": 0.2, "f,strict": 0.25, "f_stderr,strict": "N/A"}
    },
    "group_subtasks": {},
    "higher_is_better": {"mine": {"acc": True, "f": False}},
    "n-samples": {"mine": {"original": 9, "effective": 4}},
    "samples": {
        "mine": [
            {"doc_id": i, "filter": name, "acc": float(i % 2), "f": 7.0}
            for i in range(4)
            for name in ("none", "strict")
        ]
    },
}


@pytest.fixture
def lm_eval(monkeypatch):
    """What lm-eval was asked; it knows one task, and answers with RESULT."""
    calls = []

    class TaskManager:
        all_tasks = ("mine", "mmlu")

        def __init__(self, **options):
            calls.append(("manager", options))

        def load(self, names):
            if names == ["mmlu"]:
                raise ConnectionError("no route\nto the hub")
            task = SimpleNamespace(dump_config=lambda: {"doc_to_text": "?"}, dataset={"test": [{"a": 1}]})
            return {"tasks": {"mine": task}}

    def simple_evaluate(**options):
        calls.append(("evaluate", options))
        return RESULT

    modules = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.tasks", "eaftdrope.evaluate.one_bos")}
    modules["lm_eval"].simple_evaluate = simple_evaluate
    modules["lm_eval.tasks"].TaskManager = TaskManager
    modules["eaftdrope.evaluate.one_bos"].OneBos = lambda **options: options
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    from eaftdrope.evaluate import lm_eval as harness

    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: "there")
    monkeypatch.setattr(harness, "requires", lambda name: ["sacrebleu>=1.5.0"])
    return calls


def test_tasks_of_lm_eval(eval_in, lm_eval, project):
    suite = ["--suite", "general:perplexity,lm-eval:mine", "--limit", "4", "--device", "cpu", "--batch-tokens", "1024"]
    code, out, err, document = eval_in("model", "other", *suite, "--include-path", project, "--chat")
    assert code == 0, err
    assert document["suites"] == ["general", "lm-eval"]
    acc, f = (score_of(row) for row in document["models"][0]["scores"][1:])
    assert (acc.metric, acc.value, acc.stderr, acc.n, acc.kind, acc.better) == (
        "mine: acc",
        0.5,
        0.2,
        4,
        "share",
        "higher",
    )
    assert acc.units == ((0.0, 1.0), (1.0, 1.0), (0.0, 1.0), (1.0, 1.0))
    # no mean of its rows, and no error
    assert (f.metric, f.value, f.stderr, f.n, f.kind, f.better, f.units) == (
        "mine: f (strict)",
        0.25,
        None,
        4,
        "mean",
        "lower",
        (),
    )
    assert "mine: acc ↑" in out and "50.0 % ± 20.0 %" in out
    (_, manager), (_, asked), _ = lm_eval
    assert manager == {"include_path": str(project), "include_defaults": False}
    assert (asked["tasks"], asked["limit"], asked["apply_chat_template"]) == (["mine"], 4, True)
    assert asked["model"]["batch_size"] == 4 and asked["model"]["pretrained"].config.model_type == "llama"
    # kept, like our own; not under other options
    lm_eval.clear()
    code, out, _, _ = eval_in("model", "other", *suite, "--include-path", project, "--chat")
    assert code == 0 and [name for name, _ in lm_eval] == ["manager"] and "4 of 4 came from the cache" in out
    code, _, _, _ = eval_in("model", *suite, "--include-path", project, name="plain")
    assert code == 0 and [name for name, _ in lm_eval][-1] == "evaluate"


def test_tasks_that_cannot_be_had(eval_in, lm_eval):
    code, _, err, _ = eval_in("model", "--suite", "lm-eval:mnie", text=False)
    assert (
        code == 2
        and "lm-eval has no task 'mnie'. Did you mean mine? For your own tasks, pass --include-path FOLDER" in err
    )
    code, _, err, _ = eval_in("model", "--suite", "lm-eval:mmlu", text=False)
    assert code == 2 and "lm-eval cannot measure mmlu: no route to the hub It downloads a task's data" in err


def test_chat_without_a_template(eval_in, lm_eval, project, tmp_path):
    plain = shutil.copytree(project / "model", tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    code, _, err, _ = eval_in(plain, "--suite", "lm-eval:mine", "--chat", text=False)
    assert (code, err) == (
        2,
        f"--chat: {plain} has no chat template. Leave --chat out, or choose a model that has one.\n",
    )


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_lm_eval_is_not_installed(eval_in):
    code, _, err, _ = eval_in("model", "--suite", "lm-eval:mmlu,ifeval", text=False)
    assert code == 2
    absent = "lm-eval:mmlu,ifeval is measured by lm-eval, which is not installed."
    assert err == f"{absent} Run `pip install 'eaftdrope[eval]'`, or leave it out.\n"
