"""`eaftdrope context` and `eaftdrope drope temperature` on tiny models: results, refusals, going on after a kill."""

import csv
import json
import signal
from importlib.util import find_spec

import pytest

from eaftdrope.cli import main
from eaftdrope.drope import convert
from eaftdrope.evaluate.long_context import run as run_module
from tests import forked
from tests.tiny_models import save_model

# Prompts of one token a byte: the longest question and its needles take some 750.
SMALL = ["--lengths", "900,1800", "--trained-length", "900", "--trials", "2", "--depths", "2", "--windows", "2"]
SMALL += ["--attention-trials", "1", "--device", "cpu"]
FIGURES = (
    "needles_by_depth",
    "needles_by_length",
    "perplexity_by_length",
    "perplexity_by_position",
    "attention_by_length",
)


def run(*arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return stop.value.code or 0, output.out, output.err


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny Llama and its conversion; a text of some 6,000 bytes."""
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "plain")
    convert(folder / "plain", folder / "converted", max_length=4096)
    text = "".join(f"Sentence {i} says that {i} and {i} make {2 * i}. " for i in range(140))
    (folder / "text.txt").write_text(text)
    return folder


def document(folder):
    return json.loads((folder / "probe.json").read_text())


def cells(folder):
    return [{k: v for k, v in cell.items() if k != "seconds"} for cell in document(folder)["cells"]]


def test_two_models_with_baselines(models, tmp_path, capsys, monkeypatch):
    out, probes, arms = tmp_path / "probe", ("perplexity", "niah", "attention"), ("as is", "yarn", "crop")
    command = [
        "context",
        models / "converted",
        models / "plain",
        *SMALL,
        "--text",
        models / "text.txt",
        "--output",
        out,
    ]
    command += ["--baselines", "rope,yarn,crop", "--probes", ",".join(probes)]
    code, text, err = run(*command, capsys=capsys)
    assert code == 0, err
    found = document(out)
    # three probes of four and three arms, but no attention of a crop
    assert len(found["cells"]) == 2 * (4 * 3 - 1) + 2 * (3 * 3 - 1)
    assert "note: plain: the baseline rope is this model as it is (as is), measured once." in text
    results = {(c["model"], c["arm"], c["probe"], c["length"]): c["result"] for c in found["cells"]}
    # the weights are the same, so the original rope of the conversion is the plain model
    for probe in probes:
        for length in (900, 1800):
            assert results["converted", "rope", probe, length] == results["plain", "as is", probe, length]
    # at the trained length nothing is stretched and nothing cropped; beyond it everything differs
    sums = {key: json.dumps(result["sums"]) for key, result in results.items() if key[2] == "perplexity"}
    assert len({sums["plain", arm, "perplexity", 900] for arm in arms}) == 1
    beyond = {sums["plain", arm, "perplexity", 1800] for arm in arms}
    assert len({*beyond, sums["converted", "as is", "perplexity", 1800]}) == 4

    rows = list(csv.DictReader((out / "probe.csv").open()))
    depths = {row["at"] for row in rows if row["probe"] == "niah"}
    assert depths == {"", "0.000", "1.000"}
    assert sorted(path.name for path in (out / "figures").glob("*.png")) == sorted(
        f"probe_{name}.png" for name in FIGURES
    )
    assert all(probe in text for probe in probes) and "1,800 (2x)" in text

    # done: the same command shows the results again, and loads nothing
    monkeypatch.setattr(run_module, "load_model", None)
    before = document(out)
    code, again, err = run(*command, capsys=capsys)
    assert code == 0, err
    assert document(out) == before and "1,800 (2x)" in again


def test_a_killed_probe_goes_on(models, tmp_path, capsys, monkeypatch):
    probes = ["--probes", "perplexity,niah,passkey", "--text", models / "text.txt"]
    command = ["context", models / "plain", *SMALL, *probes, "--output"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    script = (
        "import os, signal, sys\n"
        "from eaftdrope.cli import main\n"
        "from eaftdrope.evaluate.long_context import run\n"
        "measure, calls = run.measure, []\n"
        "def dying(*arguments):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 4:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return measure(*arguments)\n"
        "run.measure = dying\n"
        "main(sys.argv[1:])\n"
    )
    done = forked.run_source(script, *command, killed)
    assert done.code == -signal.SIGKILL, done.err
    assert len(cells(killed)) == 3 and not (killed / "probe.csv").exists()
    measured, measure = [], run_module.measure

    def counting(model, planned, cell, *rest):
        measured.append((cell.probe, cell.length))
        return measure(model, planned, cell, *rest)

    monkeypatch.setattr(run_module, "measure", counting)
    code, text, err = run(*command, killed, capsys=capsys)
    assert code == 0, err
    assert "resuming: 3 of 6 cells are already measured" in text
    assert measured == [("perplexity", 1800), ("niah", 1800), ("passkey", 1800)]
    assert run(*command, whole, capsys=capsys)[0] == 0
    assert cells(killed) == cells(whole) and (killed / "probe.csv").read_text() == (whole / "probe.csv").read_text()

    # other settings are another probe
    code, _, err = run(*command, killed, "--trials", "3", "--seed", "1", capsys=capsys)
    assert (
        code == 2
        and "holds a context measurement with other settings (different: trials, seed). Nothing was changed" in err
    )
    code, _, err = run(*command, killed, "--lengths", "900", capsys=capsys)
    assert code == 2 and "(different: models.plain.lengths)" in err
    assert cells(killed) == cells(whole)
    (killed / "mine.png").write_text("")
    code, _, err = run(*command, killed, "--lengths", "900", "--probes", "niah", "--overwrite", capsys=capsys)
    assert code == 0, err
    assert [cell["probe"] for cell in cells(killed)] == ["niah"] and (killed / "mine.png").exists()
    assert not (killed / "figures" / "probe_perplexity_by_length.png").exists()
    assert "perplexity" not in (killed / "report.html").read_text(encoding="utf-8")


def test_a_changed_checkpoint_is_another_probe(models, tmp_path, capsys):
    save_model(tmp_path / "model")
    command = ["context", tmp_path / "model", *SMALL, "--probes", "niah", "--output", tmp_path / "out"]
    assert run(*command, capsys=capsys)[0] == 0
    save_model(tmp_path / "model", tied=False)
    code, _, err = run(*command, capsys=capsys)
    assert code == 2 and "(different: models.model.checkpoint)" in err


def test_dry_run(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_module, "load_model", None)
    command = ["context", models / "plain", *SMALL, "--text", models / "text.txt", "--baselines", "crop"]
    code, text, err = run(*command, "--output", tmp_path / "out", "--dry-run", capsys=capsys)
    assert code == 0, err
    assert not (tmp_path / "out").exists()
    # at 900: 2 windows + 5 kinds x 2 trials, twice, and one attention; at 1,800 the crop sees 900 of the needles' tokens
    short = 2 * (2 + 10) * 900 + 900
    longer = (2 + 10) * 1800 + 1800 + 2 * (2 * 1800 - 900) + 10 * 900
    assert f"{short:,}" in text and f"{longer:,}" in text and f"{short + longer:,}" in text


def test_what_the_text_cannot_give_is_said(models, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"Row {i}. " * 60}) + "\n" for i in range(4)))
    command = ["context", models / "plain", *SMALL, "--probes", "perplexity,niah", "--lengths", "450,900,4000"]
    command += ["--text", tmp_path / "rows.jsonl", "--output", tmp_path / "out"]
    code, text, err = run(*command, capsys=capsys)
    assert code == 0, err
    assert "the text has 1,686 tokens, so the hay of 4,000 tokens repeats it" in text
    assert "no perplexity at 4,000: the text has 1,686 tokens, and a repeated text would measure copying" in text
    assert "no document has 450, 900 tokens: windows cross documents there" in text
    assert document(tmp_path / "out")["notes"]
    assert [(c["probe"], c["length"]) for c in cells(tmp_path / "out")] == [
        ("perplexity", 450), ("niah", 450), ("perplexity", 900), ("niah", 900), ("niah", 4000)
    ]  # fmt: skip


def test_all_mistakes_at_once(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_module, "load_model", None)
    config = json.loads((models / "converted" / "config.json").read_text())
    del config["drope"]
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text(json.dumps(config))
    arguments = [
        "./nowhere",
        tmp_path / "bare",
        "--lengths",
        "2k",
        "--probes",
        "nia,passkey",
        "--baselines",
        "yarm,crop",
    ]
    arguments += [
        "--suite",
        "rular,longbench",
        "--text",
        tmp_path / "no.txt",
        "--device",
        "cuda:77",
        "--dtype",
        "float8",
    ]
    code, _, err = run("context", *arguments, capsys=capsys)
    lines = err.splitlines()
    assert code == 2
    suites = [] if find_spec("lm_eval") else ["--suite longbench is measured by lm-eval, which is not installed."]
    expected = [
        "--device cuda:77: not present on this machine",
        "--dtype float8: not one of float32, bfloat16, auto.",
        "--probes: 'nia' is not one of perplexity, niah, multi-query, multi-key, multi-value, passkey, attention. Did you "
        "mean niah?",
        "--baselines: 'yarm' is not one of rope, pi, ntk, yarn, crop. Did you mean yarn?",
        "--suite: 'rular' is not one of ruler, longbench. Did you mean ruler?",
        "model './nowhere': no such file or folder.",
        "--lengths: '2k' is not a length. Write tokens (4096) or a multiple",
        *suites,
        f"--text {tmp_path / 'no.txt'}: no such file.",
        f"--baselines on {tmp_path / 'bare'}: it has no rotary embedding, and its config.json does not record",
    ]
    assert lines[0] == f"{len(expected)} problems:"
    for line, start in zip(lines[1:], expected, strict=True):
        assert line.startswith(f"- {start}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{plain}", "{plain}"], "a model is given twice. Pass each once"),
        (["{plain}", "--probes", ","], "--probes is empty. Pass some of perplexity, niah"),
        (["{plain}", "--device", "abacus"], "--device abacus: unknown device."),
        (["{plain}", "--lengths", "64", "--probes", "niah"], "64 tokens are too few for the probe niah: question"),
        (["{plain}", "--lengths", "64", "--probes", "attention"], "64 tokens are too few for the probe niah"),
        (
            ["{plain}", "--lengths", "4x", "--baselines", "crop", "--trained-length", "300"],
            "300 tokens are too few for the probe niah",
        ),
        (["{plain}", "--text", "{empty}"], "the file is empty. Use a file with some pages of text."),
        (["{plain}", "--text", "{binary}"], "not UTF-8 text"),
        (["{plain}", "--text", "{rows}"], "rows.jsonl:2: no `text`. --text reads JSONL rows with a `text` field."),
        (["{plain}", "--output", "{strangers}"], "is not empty and does not contain probe.json. Nothing was changed"),
        (["{plain}", "--output", "{strangers}", "--overwrite"], "is not empty and does not contain probe.json."),
        (["{plain}", "--output", "{empty}/out"], "is a file. Choose another folder with --output"),
        (["{plain}", "--output", "{damaged}"], "cannot be read as results of this version."),
        (
            ["{yarn}", "--baselines", "pi"],
            "pi stretches a plain rotary embedding, and this one is already of type 'yarn'",
        ),
    ],
)
def test_refusals(models, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(run_module, "load_model", None)
    places = {name: tmp_path / name for name in ("empty", "binary", "strangers", "damaged", "yarn")}
    places |= {"plain": models / "plain", "rows": tmp_path / "rows.jsonl"}
    places["empty"].write_text(" \n")
    places["binary"].write_bytes(b"\xff\xfe\x00\x81")
    places["rows"].write_text('{"text": "a"}\n{"words": "b"}\n')
    for name, file in (("strangers", "thesis.tex"), ("damaged", "probe.json")):
        places[name].mkdir()
        (places[name] / file).write_text('{"schema":')
    places["yarn"].mkdir()
    config = json.loads((models / "plain" / "config.json").read_text())
    config["rope_parameters"] |= {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256}
    (places["yarn"] / "config.json").write_text(json.dumps(config))
    shown = [argument.format(**places) for argument in arguments]
    if "--output" not in shown:
        shown += ["--output", str(tmp_path / "out")]
    if "--lengths" not in shown:
        shown += ["--lengths", "900"]
    code, _, err = run("context", *shown, capsys=capsys)
    assert code == 2 and message in err
    assert not (tmp_path / "out").exists() and [file.name for file in places["strangers"].iterdir()] == ["thesis.tex"]


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_suites_without_lm_eval(models, capsys):
    code, _, err = run("context", models / "plain", "--suite", "ruler", capsys=capsys)
    assert code == 2
    assert "--suite ruler is measured by lm-eval, which is not installed. Run `pip install 'lm-eval[hf,ruler]'`" in err


def test_ruler_has_its_own_lengths(models, capsys, monkeypatch):
    monkeypatch.setattr("eaftdrope.evaluate.long_context.plan._missing_suites", lambda suites: [])
    code, _, err = run("context", models / "plain", "--suite", "ruler", "--lengths", "4096,900", capsys=capsys)
    assert code == 2 and "--suite ruler: lm-eval has it at 4096, 8192" in err and "not at 900." in err


def test_out_of_memory_keeps_what_is_measured(models, tmp_path, capsys, monkeypatch):
    import torch

    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(run_module, "find_needles", full)
    command = ["context", models / "plain", *SMALL, "--probes", "perplexity,niah", "--lengths", "900"]
    command += ["--text", models / "text.txt", "--output", tmp_path / "out"]
    code, _, err = run(*command, capsys=capsys)
    assert code == 2 and "out of memory at 900 tokens (plain, as is, niah). Cells measured so far are kept" in err
    assert [cell["probe"] for cell in cells(tmp_path / "out")] == ["perplexity"]
    monkeypatch.undo()
    # a smaller batch is the same probe
    assert run(*command, "--batch-tokens", "1", capsys=capsys)[0] == 0


def temperature(models, *arguments, capsys):
    fixed = ["--text", models / "text.txt", "--windows", "4", "--device", "cpu"]
    return run("drope", "temperature", models / "converted", *fixed, *arguments, capsys=capsys)


def test_temperature(models, tmp_path, capsys):
    out = tmp_path / "fit"
    command = ["--length", "2x", "--lengths", "200,300", "--trained-length", "100", "--output", out]
    code, text, err = temperature(models, *command, capsys=capsys)
    assert code == 0, err
    found = json.loads((out / "temperature.json").read_text())
    assert [fit["length"] for fit in found["fits"]] == [200, 300]
    assert (found["trained_length"], found["target"], found["announced_length"]) == (100, 200, 4096)
    for fit in found["fits"]:
        tried = {point["beta"]: point["perplexity"] for point in fit["tried"]}
        assert fit["perplexity"] == min(tried.values()) == tried[fit["beta"]] and tried[1.0] == fit["perplexity_at_1"]
        assert fit["windows"] == 4 and fit["stderr"] is not None
        assert f"{fit['beta']:.3f}" in text
    assert "ln(length / 100)" in text and (out / "temperature.png").stat().st_size > 10_000
    target = found["fits"][0]
    shown = "To fold it in for 200 tokens" in text
    assert shown == (target["distinguishable"] and not target["at_edge"])
    assert (text.count("not distinguishable from 1") == 2) == ("leave the temperature out" in text)

    code, _, err = temperature(models, *command, capsys=capsys)
    assert code == 2 and "already holds a fit. Choose another folder with --output, or pass --overwrite." in err


def test_words_of_a_fit():
    from eaftdrope.cli.drope import _lines

    fit = {"length": 4096, "beta": 1.25, "stderr": 0.1, "distinguishable": True, "at_edge": False}
    found = {
        "fits": [fit],
        "slope": 0.36,
        "trained_length": 2048,
        "target": 4096,
        "announced_length": 2048,
        "model": "org/m",
    }
    assert _lines(found) == [
        "beta = 1 + 0.360 ln(length / 2,048)",
        "To fold it in for 4,096 tokens: eaftdrope convert org/m m-4096 --temperature 1.25 --max-length 4096",
    ]
    unclear = {**found, "slope": -0.01, "fits": [{**fit, "distinguishable": False, "stderr": None}]}
    slope, advice, one = _lines(unclear)
    assert slope == "beta = 1 - 0.010 ln(length / 2,048)"
    assert advice.startswith("At no length is beta better than 1 by more than two standard errors")
    assert one == "At 4,096 there was only one window, so the uncertainty of beta is unknown."
    assert "do not rely on it" in _lines({**found, "fits": [{**fit, "at_edge": True}]})[1]


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--length", "0.5x"], ["256 tokens are not beyond the trained 512, where beta is 1."]),
        (["--length", "2x,4x"], ["--length 2x,4x: only one length is folded in. Pass the others with --lengths."]),
        (["--length", "8000"], ["the text has 5,915 tokens, too few for a window of 8,000."]),
        (
            ["--length", "2k", "--text", "no.txt", "--dtype", "int3", "--device", "moon"],
            ["4 problems:", "'2k' is not a length", "no.txt: no such file", "--dtype int3", "--device moon"],
        ),
    ],
)
def test_temperature_refusals(models, tmp_path, capsys, monkeypatch, arguments, messages):
    monkeypatch.setattr("eaftdrope.evaluate.long_context.temperature.load_model", None)
    code, _, err = temperature(models, *arguments, "--output", tmp_path / "out", capsys=capsys)
    assert code == 2 and all(message in err for message in messages), err
    assert not (tmp_path / "out").exists()


def test_a_temperature_is_not_fitted_on_another(models, tmp_path, capsys):
    convert(models / "plain", tmp_path / "warm", max_length=4096, temperature=1.2)
    code, _, err = run("drope", "temperature", tmp_path / "warm", "--output", tmp_path / "out", capsys=capsys)
    assert code == 2 and "has a temperature of 1.2 folded in already" in err
