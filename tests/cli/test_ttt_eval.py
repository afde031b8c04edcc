"""`eaftdrope ttt eval` on tiny models: every arm, what is refused, and resuming."""

import json

import pytest
import torch

from eaftdrope.cli import main
from eaftdrope.evaluate.ttt import run as run_module
from eaftdrope.evaluate.ttt.options import QUICK
from eaftdrope.evaluate.ttt.results import of_document
from eaftdrope.ttt import TTTConfig, apply_ttt
from tests.tiny_models import byte_tokenizer, save_model

SMALL = ["--length", "160", "--passages", "3", "--fit-passages", "1", "--lr", "0.1,0.5", "--device", "cpu"]
OWN = ["--window", "48", "--chunk", "16", "--sink", "2"]
CONFIG = TTTConfig(window=48, sink=2, chunk=16, fast_blocks=1, lr=0.5)


def run(*arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["ttt", "eval", *map(str, arguments)])
    output = capsys.readouterr()
    return stop.value.code or 0, output.out, output.err


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny Llama, another as its control, a third with TTT, and a text of three documents of some 450 bytes."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "plain")
    for name, seed in (("control", 1), ("trained", 2)):
        model = AutoModelForCausalLM.from_pretrained(save_model(folder / name))
        torch.manual_seed(seed)
        with torch.no_grad():
            for value in model.parameters():
                value.add_(0.01 * torch.randn_like(value))
        if name == "trained":
            model = apply_ttt(model, CONFIG)
            with torch.no_grad():
                model.ttt.primes[0].down.normal_(0, 0.05)
        model.save_pretrained(folder / name)
    rows = ["".join(f"Row {d}{i} says that {i} and {d} make {i + d}. " for i in range(15)) for d in range(3)]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    return folder


@pytest.fixture
def undrawn(monkeypatch):
    """Drawing the report takes longer than most of these measurements."""
    monkeypatch.setattr("eaftdrope.cli.terminal.show_report", lambda folder, console: None)


def document(folder):
    return json.loads((folder / "ttt.json").read_text())


def cells(folder):
    return [{k: v for k, v in cell.items() if k != "seconds"} for cell in document(folder)["cells"]]


def test_every_arm_of_a_trained_model(models, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    command = [models / "trained", "--base", models / "plain", "--control", models / "control", *SMALL]
    command += ["--text", models / "rows.jsonl", "--probes", "loss", "--output", out]
    code, text, err = run(*command, capsys=capsys)
    assert code == 0, err
    found = of_document(document(out))
    arms = ["full", "window", "sink", "naive", "control", "control-naive", "ttt", "off"]
    assert list(found.losses) == arms and document(out)["absent"] == {}
    assert document(out)["settings"]["edges"] == [0, 48, 128, 160]
    # three documents of two passages each: the last is for the fit, three of the others are measured
    assert {len(losses.sums) for losses in found.losses.values()} == {3}
    assert {arm: sorted(fit.losses) for arm, fit in found.fits.items()} == {
        "naive": [0.1, 0.5], "control-naive": [0.1, 0.5]
    }  # fmt: skip
    # inside the window every attention is full; each arm is a measurement of its own beyond it
    inside = {arm: losses.mean(0, 48).value for arm, losses in found.losses.items()}
    assert inside["window"] == pytest.approx(inside["full"], abs=1e-5) == pytest.approx(inside["sink"], abs=1e-5)
    assert len({round(losses.mean(48).value, 5) for losses in found.losses.values()}) == len(arms)
    # what the tables show is what was measured
    for pair in (("ttt", "control"), ("naive", "sink"), ("ttt", "off")):
        first, second = (found.losses[arm] for arm in pair)
        difference = first.minus(second, 48)
        assert f"{difference.value:+.3f} ± {difference.stderr:.3f}" in text
    assert "fine-tuned without TTT" in text and "does not recall it" in text and "The first 16 tokens" in text
    assert "3 passages: a first look." in text and "the best of 2 on 1 passage at the end of the text" in text
    assert "is taken to have been trained on the same tokens; this is not verified" in text
    assert sorted(path.name for path in (out / "figures").glob("*.png")) == [
        "ttt_difference_to_full.png", "ttt_loss_by_position.png"
    ]  # fmt: skip

    # done: the same command shows the results again, and loads nothing
    monkeypatch.setattr("eaftdrope.evaluate.ttt.ttt_folder.TTTModels.load", None)
    before = document(out)
    code, again, err = run(*command, capsys=capsys)
    assert code == 0, err
    assert document(out) == before and "TTT off" in again


def test_the_other_probes_and_a_model_without_ttt(models, tmp_path, capsys, monkeypatch, undrawn):
    monkeypatch.setitem(QUICK, "questions", 4)
    monkeypatch.setitem(QUICK, "probe_tokens", 1024)
    out = tmp_path / "out"
    command = [models / "plain", *SMALL, "--window", "128", "--chunk", "32", "--length", "150", "--lr", "0.5"]
    command += ["--text", models / "rows.jsonl", "--arms", "full,naive", "--trials", "2", "--read", "400"]
    command += ["--positions", "64,256", "--quick", "--probes", "needle,latency,retention", "--output", out]
    code, text, err = run(*command, capsys=capsys)
    assert code == 0, err
    found = of_document(document(out))
    assert {key: len(answers) for key, answers in found.needles.items()} == dict.fromkeys(
        [("full", "inside"), ("full", "outside"), ("naive", "inside"), ("naive", "outside")], 2
    )
    assert list(found.costs) == [64, 256]
    assert all(set(costs) == {"full", "window", "ttt"} for costs in found.costs.values())
    fresh, read = found.retention["naive", "fresh"], found.retention["naive", "read"]
    assert fresh[0].value != read[0].value and document(out)["settings"]["read"] == 400
    assert not found.losses and not found.fits
    assert "Retention: naive TTT that has read 400 tokens" in text and f"{fresh[0].value:.2f}" in text
    assert "naive TTT has the rate 0.5 of --lr; no rate was fitted." in text
    assert "guessing: 11.5" in text and "0/2" in text


def test_an_interrupted_measurement_resumes(models, tmp_path, capsys, monkeypatch, undrawn):
    command = [models / "plain", *SMALL, *OWN, "--text", models / "rows.jsonl", "--probes", "loss"]
    command += ["--arms", "full,naive", "--output"]
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    measure, calls = run_module.measure, []

    def counting(reader, plan, cell, *rest):
        calls.append(cell)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return measure(reader, plan, cell, *rest)

    monkeypatch.setattr(run_module, "measure", counting)
    assert run(*command, stopped, capsys=capsys)[0] == 130
    assert [cell["probe"] for cell in cells(stopped)] == ["loss", "loss", "loss", "fit"]
    # a page can be drawn from what there is
    with pytest.raises(SystemExit):
        main(["report", str(stopped)])
    assert "is not finished" in (stopped / "report.html").read_text(encoding="utf-8")
    code, text, err = run(*command, stopped, capsys=capsys)
    assert code == 0, err
    assert "resuming: 4 of 8 cells are already measured" in text
    assert [(cell.probe, cell.at, cell.index) for cell in calls[5:]] == [
        ("fit", "0.5", 0), ("loss", "", 0), ("loss", "", 1), ("loss", "", 2)
    ]  # fmt: skip
    assert run(*command, whole, capsys=capsys)[0] == 0
    assert cells(stopped) == cells(whole)

    # other settings are another measurement
    code, _, err = run(*command, stopped, "--lr", "0.1,0.2", capsys=capsys)
    assert code == 2 and "holds an evaluation of TTT with other settings (different: rates). Nothing was changed" in err
    code, _, err = run(*command, stopped, "--lr", "0.2", "--overwrite", capsys=capsys)
    assert code == 0 and [cell["arm"] for cell in cells(stopped)] == ["full"] * 3 + ["naive"] * 3


def test_dry_run(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("eaftdrope.evaluate.ttt.ttt_folder.TTTModels.load", None)
    command = [models / "plain", *SMALL, *OWN, "--text", models / "rows.jsonl", "--probes", "loss"]
    code, text, err = run(*command, "--output", tmp_path / "out", "--dry-run", capsys=capsys)
    assert code == 0, err
    assert not (tmp_path / "out").exists()
    # three passages for each of four arms, and one at two rates for the fit
    assert f"{14 * 160:,}" in text


def test_the_rate_is_fitted_on_other_text(models, tmp_path, capsys, undrawn):
    command = [models / "plain", *SMALL, *OWN, "--text", models / "rows.jsonl", "--probes", "loss"]
    command += ["--output", tmp_path / "out"]
    code, _, err = run(*command, "--fit-text", models / "rows.jsonl", capsys=capsys)
    assert code == 2 and "of a passage for the fit of the inner rate is test text too" in err
    (tmp_path / "short.jsonl").write_text(json.dumps({"text": "One passage of test text, and no more. " * 5}) + "\n")
    command[command.index("--text") + 1] = tmp_path / "short.jsonl"
    code, text, err = run(*command, capsys=capsys)
    assert code == 0, err
    assert document(tmp_path / "out")["absent"]["naive"].startswith("no text to fit the inner rate on")
    assert "no text to fit the inner rate on beside the test text. Pass --fit-text, or a single rate" in text
    assert "the text has 1 passages of 160 tokens" not in text and "the text has 1 passage of 160 tokens" in text


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (
            ["./nowhere", "--arms", "ful", "--probes", "los,needle", "--lr", "fast", "--device", "cuda:77"],
            [
                "--device cuda:77: not present",
                "--lr fast: not numbers with commas between them.",
                "--arms: 'ful' is not one of full, window, sink, naive, control, control-naive, ttt, off. Did you mean full?",
                "--probes: 'los' is not one of loss, needle, latency, retention. Did you mean loss?",
                "MODEL: model './nowhere': no such file or folder.",
            ],
        ),
        (["{plain}", "--lr", "0"], ["--lr: every rate is above 0, such as 0.1,0.3,1."]),
        (["{plain}", "--probes", ","], ["--probes is empty. Pass some of loss, needle, latency, retention."]),
        (["{plain}", "--length", "48"], ["--length 48: nothing lies beyond a window of 48 tokens."]),
        (["{plain}", "--length", "4800"], ["no document of the text has 4,800 tokens (the longest: "]),
        (["{plain}", "--chunk", "64"], ["chunk=64 with window=48"]),
        (["{plain}", "--arms", "full,ttt"], ["--arms ttt: the model has no TTT of its own (no ttt_config.json)."]),
        (["{plain}", "--arms", "control"], ["--arms control: no --control, a checkpoint trained on the same tokens"]),
        (["{plain}", "--control", "{trained}"], ["it is a model with TTT. Pass one that was trained without it."]),
        (["{trained}"], ["--window, --sink, --chunk: ", "has settings of its own (ttt_config.json)."]),
        (["{plain}", "--text", "{plain}"], ["--text {plain}: no such file."]),
        (["{plain}", "--fit-text", "{plain}/no.txt"], ["--fit-text {plain}/no.txt: no such file."]),
    ],
)
def test_refusals(models, tmp_path, capsys, monkeypatch, arguments, messages):
    monkeypatch.setattr("eaftdrope.evaluate.ttt.ttt_folder.TTTModels.load", None)
    places = {"plain": models / "plain", "trained": models / "trained"}
    shown = [argument.format(**places) for argument in arguments]
    for option, value in (("--window", 48), ("--chunk", 16), ("--sink", 2), ("--length", 160), ("--device", "cpu")):
        shown += [] if option in shown else [option, value]
    for option, value in (("--text", models / "rows.jsonl"), ("--probes", "loss"), ("--output", tmp_path / "out")):
        shown += [] if option in shown else [option, value]
    code, _, err = run(*shown, capsys=capsys)
    assert code == 2
    for message in messages:
        assert message.format(**places) in err
    assert not (tmp_path / "out").exists()


def test_out_of_memory_keeps_what_is_measured(models, tmp_path, capsys, monkeypatch):
    measure = run_module.measure

    def full(reader, plan, cell, *rest):
        if cell.arm == "sink":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measure(reader, plan, cell, *rest)

    monkeypatch.setattr(run_module, "measure", full)
    command = [models / "plain", *SMALL, *OWN, "--text", models / "rows.jsonl", "--probes", "loss"]
    code, _, err = run(*command, "--arms", "full,sink", "--output", tmp_path / "out", capsys=capsys)
    assert code == 2 and "out of memory (" in err and "sink). Cells measured so far are kept" in err
    assert {cell["arm"] for cell in cells(tmp_path / "out")} == {"full"}


def test_a_window_of_the_models_own(models, tmp_path, capsys, undrawn):
    """A checkpoint whose class has a window in every layer: full attention needs --base, and no arm has a sink."""
    from transformers import AutoModelForCausalLM

    from eaftdrope.ttt import sliding

    model = sliding(AutoModelForCausalLM.from_pretrained(models / "plain"), 48)
    apply_ttt(model, TTTConfig(window=None, chunk=16, fast_blocks=1, lr=0.5)).save_pretrained(tmp_path / "mistral")
    byte_tokenizer().save_pretrained(tmp_path / "mistral")
    command = [tmp_path / "mistral", *SMALL, "--lr", "0.5", "--text", models / "rows.jsonl", "--probes", "loss"]
    code, text, err = run(*command, "--output", tmp_path / "alone", capsys=capsys)
    assert code == 0, err
    assert document(tmp_path / "alone")["settings"]["arms"] == ["window", "naive", "ttt", "off"]
    assert "has a window of 48 tokens. Pass a --base without one." in text
    code, _, err = run(*command, "--base", models / "plain", "--output", tmp_path / "based", capsys=capsys)
    assert code == 0, err
    losses = of_document(document(tmp_path / "based")).losses
    assert list(losses) == ["full", "window", "sink", "naive", "ttt", "off"]
    # the same window, in the class of full attention and in the class with a window
    assert losses["window"].mean(48).value == pytest.approx(losses["off"].mean(48).value, abs=1e-5)
    assert losses["naive"].mean(48).value == pytest.approx(losses["ttt"].mean(48).value, abs=1e-4)
