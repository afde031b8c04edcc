"""A whole run: workers, their failures, the files they write, and the command line."""

import csv
import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks.command import ROOT, as_typed, run_typer
from benchmarks.loss import runner, worker
from benchmarks.loss.__main__ import loss
from benchmarks.loss.cases import Case
from benchmarks.loss.figure import draw
from benchmarks.loss.methods import Method
from benchmarks.loss.report import _about
from benchmarks.loss.results import COLUMNS, MEASURED, make_row, write
from benchmarks.loss.runner import MeasurementSettings, resolve_device, worker_environment
from eaftdrope.errors import UserError
from eaftdrope.loss.backends import VARIABLE

CASE = Case("tiny", "tiny", 32, 16, 256, "float32")
SETTINGS = MeasurementSettings(device="cpu", threads=1, repeat=2, seconds=60)
RUN = {"device": "cpu", "threads": 1, "isa": None}
METHOD = {"method": "eaftdrope-torch", "family": "ours", "gate": "eaft", "computes": "top-20 gate"}


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """The output of `python -m benchmarks.loss` for two methods, one of which cannot run on a CPU."""
    folder = tmp_path_factory.mktemp("bench") / "results"
    options = ["--shape", "16x256", "--rows", "32", "--dtype", "float32", "--logits", "random", "--trains", "all"]
    options += ["--methods", "full-logits-ce,liger", "--repeat", "2", "--device", "cpu"]
    with pytest.raises(SystemExit) as stop:
        run_typer(loss, [*options, "--isa", "AVX2", "--output", str(folder)])
    assert not stop.value.code
    return folder


@pytest.mark.end_to_end
def test_the_json_says_who_where_when_and_what(output):
    document = json.loads((output / "loss.json").read_text())
    assert document["schema"] == 1
    assert document["columns"] == COLUMNS
    where = document["environment"]
    assert where["onednn_max_cpu_isa"] == document["settings"]["isa"] == "AVX2"
    assert where["versions"]["torch"] == torch.__version__
    assert where["processor"] and where["cores"] >= 1 and isinstance(where["processor_features"], list)
    assert where["date"].endswith("+00:00")
    assert (document["settings"]["threads"], document["settings"]["repeat"]) == (1, 2)

    measured, skipped = document["results"]
    assert list(measured) == list(skipped) == list(COLUMNS)
    assert (measured["shape"], measured["rows"], measured["hidden_size"], measured["vocabulary"]) == (
        "16x256",
        32,
        16,
        256,
    )
    assert (measured["device"], measured["threads"], measured["isa"]) == ("cpu", 1, "AVX2")
    assert (measured["status"], measured["reason"], measured["pairs"], measured["clock"]) == ("ok", None, 2, "cpu")
    assert measured["ratio_low"] <= measured["ratio"] <= measured["ratio_high"]
    assert measured["cpu_seconds"] > 0 < measured["floor_gflops"]
    assert measured["gradient_bytes"] == 4 * 16 * (32 + 256)
    assert max(measured[name] for name in ("loss_error", "hidden_error", "weight_error")) < 1e-5
    assert (skipped["status"], skipped["reason"]) == ("skipped", "its kernel is Triton, which needs a GPU")
    assert all(skipped[name] is None for name in MEASURED)


@pytest.mark.end_to_end
def test_the_csv_has_the_same_rows(output):
    with (output / "loss.csv").open() as file:
        rows = list(csv.DictReader(file))
    expected = json.loads((output / "loss.json").read_text())["results"]
    assert [{key: "" if value is None else str(value) for key, value in row.items()} for row in expected] == rows
    assert not list(output.glob("*.partial"))


@pytest.mark.end_to_end
def test_there_is_a_figure(output):
    assert sorted(path.name for path in output.iterdir()) == [
        "loss.csv",
        "loss.json",
        "loss_shapes_float32.png",
        "loss_shapes_float32.svg",
    ]
    svg = (output / "loss_shapes_float32.svg").read_text()
    assert (output / "loss_shapes_float32.png").stat().st_size > 10_000
    assert "full-logits-ce" in svg and "Could not be measured here: liger" in svg


# A method that fails is a row


def measured(**changes):
    values = dict.fromkeys(MEASURED, 1.0) | {"status": "ok", "clock": "cpu", "pairs": 1, "backend": None}
    return make_row(CASE, RUN, METHOD, values | changes)


def test_a_row_has_every_column_and_no_other():
    row = measured(ratio=1.23456789)
    assert list(row) == list(COLUMNS)
    assert row["ratio"] == 1.23457
    with pytest.raises(AssertionError, match="speed"):
        make_row(CASE, RUN, METHOD, {"status": "ok", "speed": 1})
    with pytest.raises(AssertionError, match="fine"):
        make_row(CASE, RUN, METHOD, {"status": "fine"})


def raising(error):
    def loss(*_):
        raise error

    return Method("broken", "peer", "none", "nothing", loss)


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (ZeroDivisionError("first line\nsecond"), "failed", "ZeroDivisionError: first line"),
        (MemoryError("no more"), "out of memory", "MemoryError: no more"),
        (torch.OutOfMemoryError("CUDA out of memory."), "out of memory", "OutOfMemoryError: CUDA out of memory."),
        (RuntimeError("CUDA error: out of memory"), "out of memory", "RuntimeError: CUDA error"),
        (RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: 9"), "out of memory", "RuntimeError: "),
    ],
)
def test_what_a_worker_says_of_a_failure(error, status, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "methods", lambda: {"broken": raising(error)})
    job, result, inputs = tmp_path / "job.json", tmp_path / "result.json", tmp_path / "inputs.pt"
    worker.prepare(CASE, inputs=str(inputs), device="cpu", text=None)
    options = {"inputs": str(inputs), "device": "cpu", "threads": None, "repeat": 1, "seconds": 1}
    case = runner.as_json(CASE)
    job.write_text(json.dumps({"task": "measure", "case": case, "method": "broken", **options}))
    monkeypatch.setattr(sys, "argv", ["worker", str(job), str(result)])
    worker.main()
    found = json.loads(result.read_text())
    assert found["status"] == status
    assert found["reason"].startswith(reason)


def test_what_is_said_of_a_worker_that_died():
    assert runner._death(-9, "")["status"] == "out of memory"
    assert runner._death(-11, "a\nlast words\n\n") == {"status": "failed", "reason": "SIGSEGV: last words"}
    assert runner._death(3, "") == {"status": "failed", "reason": "exit code 3: no message"}


def test_a_failure_leaves_the_others_and_its_reason(monkeypatch):
    """One worker fails, one dies, one is unavailable; the case continues."""
    asked = []

    def work(settings, folder, case, job):
        task = job["task"]
        asked.append((task, job.get("method")))
        if task == "probe":
            answers = dict.fromkeys(job["names"]) | {"c": {"status": "skipped", "reason": "no GPU"}}
            return {"status": "ok", "answers": answers}
        if task == "prepare":
            return {"status": "ok"}
        return {"a": runner._death(-9, ""), "b": {"status": "ok", "ratio": 2.0}}[job["method"]]

    monkeypatch.setattr(runner, "_work", work)
    methods = [Method(name, "peer", "none", "nothing", lambda *_: None) for name in "abc"]
    finished = []
    rows = runner.run([CASE], methods, SETTINGS, lambda *_: None, lambda case, rows: finished.append((case, rows)))
    assert [(row["method"], row["status"]) for row in rows] == [("a", "out of memory"), ("b", "ok"), ("c", "skipped")]
    assert [row["reason"] for row in rows][2] == "no GPU" and rows[1]["ratio"] == 2
    assert finished == [(CASE, rows)]
    assert asked == [("probe", None), ("prepare", None), ("measure", "a"), ("measure", "b")]


def test_inputs_that_cannot_be_made_are_the_reason_of_every_method(monkeypatch):
    answers = {"probe": {"status": "ok", "answers": {"a": None}}, "prepare": {"status": "failed", "reason": "no text"}}
    monkeypatch.setattr(runner, "_work", lambda settings, folder, case, job: answers[job["task"]])
    method = Method("a", "peer", "none", "nothing", lambda *_: None)
    rows = runner.run([CASE], [method], SETTINGS, lambda *_: None, lambda *_: None)
    assert [(row["status"], row["reason"]) for row in rows] == [("failed", "no text")]


def test_a_figure_of_failures_and_of_more_cases(tmp_path):
    failed = {"status": "out of memory", "reason": "killed"}
    other = {**METHOD, "method": "trl", "family": "peer"}
    frozen = Case("tiny", "tiny", 32, 16, 256, "float32", trains="frozen-head")
    rows = [measured(ratio=2.5, ratio_low=2.0, ratio_high=3.0, extra_bytes=5 << 20), make_row(CASE, RUN, other, failed)]
    rows += [row | {"trains": "frozen-head"} for row in rows]
    paths = draw(rows, _about(SETTINGS, "eaftdrope bench loss"), tmp_path)
    assert [path.name for path in paths if path.suffix == ".svg"] == [
        "loss_shapes_float32.svg",
        "loss_cases_float32.svg",
    ]
    one, both = (path.read_text() for path in paths if path.suffix == ".svg")
    assert one.count("out of memory") == 2 and both.count("out of memory") == 4
    assert "2.50" in one and "tiny (frozen-head)" in both and str(frozen.products) == "2"
    assert draw([make_row(CASE, RUN, other, failed)], _about(SETTINGS, ""), tmp_path) == []


def test_files_are_replaced_as_a_whole(tmp_path):
    write(tmp_path, [measured()], {"what": "first"})
    write(tmp_path, [measured(), measured()], {"what": "second"})
    document = json.loads((tmp_path / "loss.json").read_text())
    assert (document["what"], len(document["results"])) == ("second", 2)
    assert len((tmp_path / "loss.csv").read_text().splitlines()) == 3


def test_the_environment_of_a_worker(monkeypatch):
    monkeypatch.setenv(VARIABLE, "torch")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    found = worker_environment(MeasurementSettings("cpu", threads=3, repeat=1, seconds=1, isa="AVX512_CORE_BF16"))
    assert (found["OMP_NUM_THREADS"], found["ONEDNN_MAX_CPU_ISA"]) == ("3", "AVX512_CORE_BF16")
    # a method is what its name says, whatever the shell prefers
    assert VARIABLE not in found
    assert found["PATH"] == os.environ["PATH"]
    assert worker_environment(SETTINGS)["ONEDNN_MAX_CPU_ISA"] == "AVX2"


def test_devices():
    assert resolve_device("cpu") == "cpu"
    assert resolve_device("auto") == ("cuda:0" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UserError, match="--device mps: memory and time are measured on cpu and cuda"):
        resolve_device("mps")
    with pytest.raises(UserError, match="--device cuda:99: torch sees"):
        resolve_device("cuda:99")


# The command line


def run(*arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        run_typer(loss, arguments)
    output = capsys.readouterr()
    return stop.value.code or 0, output.out, output.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shape", "qwn"], "--shape qwn: no such shape. Did you mean `qwen`? Shapes: smollm2, qwen, llama3, gemma, "),
        (["--shape", "0x100"], "--shape 0x100: sizes must be at least 1."),
        (["--shape", ","], "--shape is empty."),
        (["--quick", "--dtype", ""], "--dtype is empty."),
        (
            ["--methods", "llamafactry"],
            "--methods llamafactry: unknown. Did you mean `llamafactory`? Known: eaftdrope-",
        ),
        (["--dtype", "bfloat61"], "--dtype bfloat61: unknown. Did you mean `bfloat16`? Known: bfloat16, float32."),
        (["--logits", "rael"], "--logits rael: unknown. Did you mean `real`?"),
        (["--trains", "frozen"], "--trains frozen: unknown. Did you mean `frozen-head`?"),
        (["--isa", "AVX512_BF16"], "--isa AVX512_BF16: unknown. Did you mean `AVX512_CORE_BF16`"),
        (["--text", "no/such.txt"], "--text no/such.txt: no such file."),
        (["--shape", "qwen", "--logits", "real"], "real logits exist for --shape smollm2 only."),
        (["--device", "cudaa"], "--device cudaa: "),
        (["--output", __file__], f"--output {__file__} is a file. Pass a folder."),
    ],
)
def test_a_wrong_option_is_text_and_2(options, message, capsys):
    code, out, err = run(*options, capsys=capsys)
    assert (code, out) == (2, "")
    assert err.startswith(message)


def test_quick_gives_way_to_what_is_said(capsys, monkeypatch):
    import benchmarks.loss.__main__ as report

    seen = []
    monkeypatch.setattr(report, "bench_loss", lambda cases, *_, **__: seen.append(cases))
    run("--quick", capsys=capsys)
    run("--quick", "--shape", "gemma", "--rows", "64", "--dtype", "float32", capsys=capsys)
    assert [str(case) for cases in seen for case in cases] == [
        "SmolLM2-135M 256 x 576 x 49152 bfloat16",
        "Gemma-3-270m 64 x 640 x 262144 float32",
    ]


def test_the_recorded_command_names_no_folder():
    arguments = ["--text", "of mine/my text.txt", "--shape", "576x49152", "--output", "runs/bench"]
    assert as_typed("benchmarks.loss", arguments) == (
        "python -m benchmarks.loss --text 'my text.txt' --shape 576x49152 --output bench"
    )


def test_a_worker_finds_the_benchmarks_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    assert worker_environment(SETTINGS)["PYTHONPATH"] == os.pathsep.join([str(ROOT), "elsewhere"])
    command = [sys.executable, "-m", "benchmarks.loss.worker"]
    done = subprocess.run(command, env=worker_environment(SETTINGS), capture_output=True, text=True)
    assert "No module named" not in done.stderr
