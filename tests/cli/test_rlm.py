"""`eaftdrope rlm`: ask with scripted models, replay, rows, bench; refusals."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from eaftdrope.cli import main
from eaftdrope.cli.rlm_context import read_context
from eaftdrope.errors import UserError
from eaftdrope.evaluate.rlm import chat_models
from eaftdrope.rlm.journal import Journal
from eaftdrope.rlm.models import ScriptedModel
from tests.tiny_models import save_model

FULL = Path("/dev/full")
LOOK = "First I look.\n```repl\nprint(len(context))\n```"
ASK = '```repl\nparts = llm_query_batched(["is it " + c for c in "abcdef"])\nprint(parts[0])\n```'
END = "```repl\nanswer['content'] = 'it is \\x1b[31mred'\nanswer['ready'] = True\n```"


def run(*arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return stop.value.code or 0, output.out, output.err


@pytest.fixture
def scripted(monkeypatch):
    """Opens scripted models instead of real ones; holds the root's replies."""
    state = {"replies": [LOOK, ASK, END]}

    def open_models(reference, sub_reference, **options):
        state["opened"] = (reference, sub_reference, options)
        state["root"] = ScriptedModel(state["replies"], name=reference)
        state["sub"] = ScriptedModel(lambda messages: messages[-1]["content"].upper(), name=str(sub_reference))
        return state["root"], state["sub"]

    monkeypatch.setattr(chat_models, "open_models", open_models)
    return state


@pytest.fixture
def asked(tmp_path, scripted, capsys):
    text, journal = tmp_path / "text.txt", tmp_path / "run.jsonl"
    text.write_text("a line\n" * 300)

    def ask(*more):
        return run("rlm", "ask", text, "What is it?", "--model", "big", "--journal", journal, *more, capsys=capsys)

    return ask, journal


@pytest.mark.parametrize(
    "command", [["--help"], ["rlm", "--help"], ["rlm", "ask", "--help"], ["rlm", "replay", "none"]]
)
def test_help_loads_neither_torch_nor_a_sandbox(command):
    code = (
        "import sys\nfrom eaftdrope.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n"
        "    print(end.code or 0, sorted({'torch', 'transformers', 'pydantic_monty'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == f"{2 if command[-1] == 'none' else 0} []"


def test_ask_prints_turns_calls_and_the_answer(asked, scripted):
    ask, journal = asked
    code, text, err = ask("--sub-model", "small", "--sub-calls", "20")
    assert code == 0, err
    assert scripted["opened"][:2] == ("big", "small")
    for part in (
        "a str of 2,100 characters; What is it?",
        "root, reply 1",
        "print(len(context))",
        "2100",
        "is it a -> IS IT A",
        "... more sub-calls",
        "3 turns, 6 sub-calls",
        f"journal: {journal}",
    ):
        assert part in text
    assert text.index("reply 1") < text.index("2100") < text.index("reply 2") < text.index("IS IT A")
    assert "is it f ->" not in text
    # nothing that a model writes controls the terminal
    assert "it is \\x1b[31mred" in text and "\x1b" not in text


def test_json_is_the_only_output(asked):
    ask, journal = asked
    code, text, _ = ask("--json")
    found = json.loads(text)
    assert (code, found["answer"], found["finished"]) == (0, "it is \x1b[31mred", True)
    assert (found["turns"], found["usage"]["sub_calls"], found["journal"]) == (3, 6, str(journal))


def test_a_killed_run_resumes(asked, scripted):
    ask, _ = asked
    scripted["replies"] = [LOOK]
    with pytest.raises(ValueError, match="asked once more"):
        ask()
    scripted["replies"] = [ASK, END]
    code, text, _ = ask()
    assert code == 0 and "resuming" in text and len(scripted["root"].seen) == 2
    # another query is another run
    code, _, err = ask("--sub-calls", "7")
    assert code == 2 and "is the journal of another run (different: limits)" in err


def test_a_run_that_has_ended_is_answered_from_its_journal(asked, scripted):
    ask, journal = asked
    _, first, _ = ask()
    scripted["replies"] = []
    code, text, _ = ask()
    assert code == 0 and "ended before: no model is called" in text and "resuming" not in text
    assert "it is \\x1b[31mred" in text and f"report: {journal.with_suffix('.html')}" in first


@pytest.mark.parametrize("pattern", [".", "**/*"])
@pytest.mark.parametrize("journal", [[], ["--journal", "docs/mine.jsonl"]])
def test_a_folder_that_holds_the_journal_is_the_same_context_again(
    tmp_path, scripted, capsys, monkeypatch, journal, pattern
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text("A")
    command = ["rlm", "ask", pattern, "Why?", "--model", "big", *journal]
    assert run(*command, capsys=capsys)[0] == 0
    scripted["replies"] = []
    code, text, _ = run(*command, capsys=capsys)
    assert code == 0 and "a list of 1 strings" in text and "ended before: no model is called" in text


def test_ctrl_c_names_the_journal(asked, scripted):
    def stop(messages):
        raise KeyboardInterrupt

    ask, journal = asked
    scripted["replies"] = stop
    code, _, err = ask("--json")
    assert code == 130 and f"The same command resumes from {journal}.\nInterrupted." in err
    scripted["replies"] = [LOOK, ASK, END]
    assert ask("--json")[0] == 0


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here, so the disk is never full")
def test_a_full_disk_is_reported_and_the_run_resumes(asked, monkeypatch):
    ask, journal = asked
    writes = iter(range(100))
    write = Journal._put

    def full(self, file, line):
        if next(writes) == 4:
            file.write(line[:20])
            file.flush()
            file = FULL.open("a")
        write(self, file, line)

    monkeypatch.setattr(Journal, "_put", full)
    code, text, err = ask("--json")
    assert (code, text) == (2, "") and f"{journal} cannot be written (No space left on device)" in err
    assert "Free some space, and run again: it resumes." in err
    monkeypatch.setattr(Journal, "_put", write)
    code, text, _ = ask("--json")
    assert code == 0 and json.loads(text)["usage"]["replayed"] > 0


@pytest.mark.skipif(not FULL.exists(), reason="no /proc here")
def test_a_place_where_no_file_can_be_made(asked):
    ask, _ = asked
    code, _, err = ask("--journal", "/proc/run.jsonl")
    assert code == 2 and "/proc/run.jsonl cannot be locked: no file can be made beside it" in err


def test_a_narrow_terminal_holds_the_budget_in_one_line(asked):
    from eaftdrope.cli.trajectory import TrajectoryView
    from eaftdrope.rlm.journal import read_journal

    ask, journal = asked
    ask()
    view = TrajectoryView(Console(file=io.StringIO(), width=40))
    for event in read_journal(journal):
        view.show(event)
    assert view.left().startswith("turn 3 · left: 194 sub-calls, 1,999,") and len(view.left()) <= 60


def test_a_limit_ends_the_run(asked):
    ask, _ = asked
    code, text, _ = ask("--sub-calls", "5")
    assert code == 1 and text.count("sub_calls: 0 + 6 would pass 5") == 1
    assert "no answer. A higher --sub-calls starts another run." in text


def test_replay(asked, capsys):
    ask, journal = asked
    ask()
    before = journal.read_bytes()
    code, text, _ = run("rlm", "replay", journal, "--calls", capsys=capsys)
    assert code == 0 and journal.read_bytes() == before
    assert text.index("print(len(context))") < text.index("2100") < text.index("is it f -> IS IT F")
    assert "turns: 3, sub-calls: 6, tokens: " in text and "\x1b" not in text
    # a run that was killed
    journal.write_bytes(b"".join(before.splitlines(keepends=True)[:5]))
    assert "the run has not ended" in run("rlm", "replay", journal, capsys=capsys)[1]


@pytest.mark.parametrize(("key", "seen"), [("", 3), (EOFError(), 1)])
def test_replay_waits_between_replies(asked, capsys, monkeypatch, key, seen):
    ask, journal = asked
    ask()
    shown, waits = io.StringIO(), []

    def wait(self, prompt):
        waits.append(prompt)
        if key:
            raise key
        return ""

    monkeypatch.setattr("eaftdrope.cli.terminal.make_console", lambda: Console(file=shown, force_terminal=True))
    monkeypatch.setattr(Console, "input", wait)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    assert run("rlm", "replay", journal, capsys=capsys)[0] == 0
    assert shown.getvalue().count("reply") == seen and len(waits) == max(1, seen - 1)
    assert "turn 1 · left: 200 sub-calls, " in waits[0] and "Ctrl-D: end" in waits[0]


def test_routes(asked, scripted, tmp_path, capsys):
    ask, journal = asked
    scripted["replies"] = ["It is short."]
    code, text, _ = ask("--route", "auto", "--json")
    assert (code, json.loads(text)["answer"]) == (0, "It is short.") and not journal.exists()
    found = json.loads(text)
    assert found.keys() == {"route", "answer", "finished", "stopped", "turns", "usage", "journal"}
    assert found["usage"].keys() == {"tokens", "sub_calls", "seconds", "replayed"}
    scripted["replies"] = ["It is short.", "It is cut."]
    text = run("rlm", "ask", tmp_path / "text.txt", "What is it?", "--model", "big", "--route", "plain", capsys=capsys)[
        1
    ]
    assert "one plain call, " in text and "cut out" not in text
    assert scripted["root"].seen[0][0]["content"].startswith("a line\na line")
    code, _, err = ask("--route", "fast")
    assert code == 2 and "--route fast: not one of rlm, plain, auto" in err


def test_contexts(tmp_path):
    (tmp_path / "a.txt").write_text("A")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.txt").write_text("C")
    (tmp_path / "b" / ".hidden").write_text("no")
    assert read_context([str(tmp_path / "a.txt")]) == "A"
    assert read_context([str(tmp_path)]) == ["A", "C"]
    assert read_context([str(tmp_path / "**" / "*.txt")]) == ["A", "C"]
    assert read_context([str(tmp_path / "b"), str(tmp_path / "a.txt")]) == ["C", "A"]
    # a folder with one file is a list of documents
    assert read_context([str(tmp_path / "b")]) == ["C"]
    with pytest.raises(UserError, match=r"none\*: no such file, and no file matches"):
        read_context([str(tmp_path / "none*")])
    (tmp_path / "b" / "x.bin").write_bytes(b"\xff\xfe")
    (tmp_path / "b" / "y.pdf").write_bytes(b"%PDF-1.4\n\xe2\xe3")
    with pytest.raises(UserError) as refused:
        read_context([str(tmp_path)])
    # every problem at once
    assert "2 problems" in str(refused.value)
    assert "x.bin is not text in UTF-8 (byte 0xFF at position 0). Convert it, or leave it out." in str(refused.value)
    assert "y.pdf is a PDF. Extract its text first" in str(refused.value)
    for number in range(30):
        (tmp_path / "b" / f"z{number}.bin").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"and 22 more files"):
        read_context([str(tmp_path)])
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match=r"no text, only empty files"):
        read_context([str(tmp_path / "empty.txt")])


def test_rows(asked, tmp_path, capsys):
    ask, journal = asked
    ask()
    out = tmp_path / "rows.jsonl"
    code, text, _ = run("rlm", "rows", journal, "--output", out, capsys=capsys)
    (row,) = map(json.loads, out.read_text().splitlines())
    assert (code, row["messages"][-1]["content"]) == (0, END) and f"written: {out}: 1 rows" in text
    code, _, err = run("rlm", "rows", journal, "--output", out, capsys=capsys)
    assert code == 2 and "exists" in err
    again = ["rlm", "rows", tmp_path, "--output", out, "--overwrite"]
    out.rename(tmp_path / "rows.old")
    assert run(*again, "--per", "turn", capsys=capsys)[0] == 0 and len(out.read_text().splitlines()) == 3
    out.unlink()
    scores = tmp_path / "scores.json"
    scores.write_text('{"run.jsonl": 0}')
    code, text, err = run(*again, "--scores", scores, capsys=capsys)
    assert code == 2 and "1 score 0" in text and "no row is left of 1 files" in err and not out.exists()


def test_bench(tmp_path, scripted, capsys, monkeypatch):
    from eaftdrope.evaluate.rlm import run as bench_run

    model = save_model(tmp_path / "model")
    monkeypatch.setattr(bench_run, "open_models", chat_models.open_models)
    scripted["replies"] = lambda messages: "FINAL(5)" if len(messages) > 1 else "5"
    command = ["rlm", "bench", "--model", model, "--tasks", "needle,count", "--lengths", "1k", "--trials", "3"]
    command += ["--output", tmp_path / "out", "--device", "cpu"]
    code, text, _ = run(*command, "--dry-run", capsys=capsys)
    assert code == 0 and "needle, 1,000 characters, map-reduce: 3 trials" in text
    assert "14 cells, 42 trials. Nothing was measured." in text and not (tmp_path / "out").exists()
    code, text, err = run(*command, capsys=capsys)
    assert code == 0, err
    for part in (
        "Scores",
        "1.00 · 100 (44–100)",
        "How far the root came",
        "Cost per trial",
        "The RLM's mean score is not above",
    ):
        assert part in text
    rows = re.findall(r"count\s+│\s+1,000 │ 3 │\s+0 \(0–56\) │\s+0 \(0–56\) │\s+100 \(44–100\) │\s+\d+ ", text)
    assert len(rows) == 1
    assert {cell["arm"] for cell in json.loads((tmp_path / "out" / "rlm_bench.json").read_text())["cells"]} == {
        *("rlm", "plain", "map-reduce", "summary", "bm25", "guess", "oracle")
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ask", "text.txt", "--model", "m"], "ask needs files and a query"),
        (["ask", "missing.txt", "Why?", "--model", "m"], "missing.txt: no such file"),
        (["ask", ".", " ", "--model", "m"], "the query, which comes last, is empty"),
        # before a model is loaded
        (
            ["ask", ".", "Why?", "--model", "m", "--sandbox", "bare"],
            "--sandbox bare: not one of monty, monty+bubblewrap",
        ),
        (
            ["ask", ".", "Why?", "--model", "m", "--route", "plain", "--journal", "run.jsonl"],
            "--route plain is one call, which has no journal",
        ),
        (["ask", ".", "Why?", "--model", "m", "--window", "9"], "--window is the context of served models"),
        (["bench", "--model", "m", "--window", "9"], "--window is the context of served models"),
        (
            ["ask", ".", "Why?", "--model", "m", "--endpoint", "http://localhost:1/v1", "--dtype", "float32"],
            "--dtype does not reach the server",
        ),
        (["replay", "missing.jsonl"], "missing.jsonl: no such file"),
        (["replay", "."], ". is a folder. Choose one of its journals."),
        (["rows", ".", "--output", "rows.jsonl"], ".: no journals, which end in .jsonl"),
        (["rows", "missing.jsonl", "--output", "rows.jsonl"], "missing.jsonl: no such file"),
        (["bench", "--model", "./none", "--tasks", "nedle"], "Did you mean needle?"),
    ],
)
def test_refusals(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, _, err = run("rlm", *arguments, capsys=capsys)
    assert code == 2 and message in err
    assert not list(tmp_path.iterdir())


def test_the_short_prompt(scripted, tmp_path, monkeypatch, capsys):
    """A root is asked with the prompt that it was trained with; the default journals of the two differ."""
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("some text")
    for option in ([], ["--short-prompt"]):
        assert run("rlm", "ask", text, "what?", "--model", "m", *option, capsys=capsys)[0] == 0
        system = scripted["root"].seen[0][0]["content"]
        assert ("rlm_query_batched" in system) is (option == [])
    assert len(list(tmp_path.glob("runs/rlm/*.jsonl"))) == 2


def test_expert(tmp_path, capsys):
    out, journals = tmp_path / "rows.jsonl", tmp_path / "journals"
    command = [
        "rlm",
        "expert",
        "--output",
        out,
        "--rows",
        2,
        "--chars",
        1_000,
        "--names",
        "test",
        "--journals",
        journals,
    ]
    code, text, _ = run(*command, capsys=capsys)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert (code, [row["id"] for row in rows]) == (0, ["needle-test-0", "count-test-1"]) and "2 rows" in text
    assert run("rlm", "replay", journals / "needle-test-0.jsonl", capsys=capsys)[0] == 0
    code, _, err = run(*command, capsys=capsys)
    assert code == 2 and "exists" in err
    code, _, err = run("rlm", "expert", "--output", tmp_path / "x.jsonl", "--names", "some", capsys=capsys)
    assert code == 2 and "not one of train, test" in err
