"""The pages of recursive language models: the turns of a run, many runs, a bench, the probe; hostile journals."""

import json

import pytest

from eaftdrope.errors import UserError
from eaftdrope.evaluate.scores import score_units, scores_to_json
from eaftdrope.report.page import write_report
from eaftdrope.report.sections.rlm_run import COLLAPSE_FROM, MAX_BYTES
from tests.report.planted import run_folder
from tests.report.planted_rlm import BREAKOUT, NASTY, bench_folder, journal, many_calls, runs_folder
from tests.report.reading import Read


def read(path):
    return Read(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return journal(tmp_path_factory.mktemp("run") / "run.jsonl")


@pytest.fixture(scope="module")
def page(run):
    path = write_report(run)
    assert path == run.with_suffix(".html")
    return read(path)


def test_a_run_begins_with_its_answer_and_its_cost(page):
    assert list(page.sections)[1:] == ["answer", "cost", "strategies", "turns", "run"]
    assert "Answered after 6 turns, 31 sub-calls, strategy: recursion." in page.sections[""]
    assert f"What is {NASTY} here?" in page.sections[""]
    rows = {row[0]: row[1:] for row in page.rows}
    assert rows["root"][0] == "7" and rows["sub-model"][0] == "31" and rows["all"][0] == "38"
    assert int(rows["all"][1].replace(",", "")) == sum(
        int(rows[name][1].replace(",", "")) for name in ("root", "sub-model")
    )
    assert "31 of 40 sub-calls" in page.sections["cost"]
    assert "as private as" in page.sections["run"] and "memory_mb 512" in page.sections["run"]


def test_strategies_have_the_distribution_of_their_sub_calls(page):
    rows = {row[0]: row[2:] for row in page.rows if len(row) == 6}
    assert rows["batch"] == rows["split"] == rows["recovery"] == ["1", "30", "30", "30"]
    assert rows["look"] == ["2", "1", "0", "1"] and rows["recursion"] == ["1", "1", "1", "1"]
    assert rows["error"] == rows["no code"] == rows["finish"] == ["1", "0", "0", "0"]
    assert "sub-call" not in rows and "search" not in rows


def test_turns_have_code_outputs_errors_and_their_calls(page):
    text = " ".join(page.sections["turns"].split())
    assert text.index("Turn 1") < text.index("print(len(context), context[:40])") < text.index("1789 0 </pre>")
    assert "NameError: name 'contxt' is not defined" in text
    assert "30 sub-calls: " in text and "29 </pre>" in text and "noted <b>29" in text
    assert "1 child with its own REPL (1 sub-call below)" in text
    assert "root/1, 1 turn: part of it → of the child" in text
    assert text.index("root/1, 1 turn") < text.index("a part: 0 </pre>") < text.index("Turn 6")


def test_a_hostile_journal_is_shown_and_does_nothing(page, run):
    html = run.with_suffix(".html").read_text(encoding="utf-8")
    assert page.problems == [] and page.handlers == [] and "script" not in page.tags
    assert html.count(BREAKOUT) == 0 and page.text.count(BREAKOUT) > 30
    # neither controls nor what reorders text is left
    assert not {"\x1b", "\x00", "\x85", "\u202e", "\u2066"} & set(html)
    assert "␛[31mred␀⟨U+0085⟩ ⟨U+202E⟩gnihton⟨U+2066⟩" in page.sections["turns"]


@pytest.mark.parametrize("calls", [2_000, COLLAPSE_FROM - 40, COLLAPSE_FROM])
def test_a_page_is_small_however_many_calls(tmp_path, calls, run):
    copy = tmp_path / "run.jsonl"
    copy.write_bytes(run.read_bytes())
    path = write_report(many_calls(copy, calls))
    found = read(path)
    assert path.stat().st_size <= MAX_BYTES and found.problems == []
    assert f"{calls + 30:,} sub-calls: " in found.text
    listed = found.tags.count("li")
    if calls == 2_000:
        assert listed > calls and "not shown" not in found.sections["turns"]
    if calls >= COLLAPSE_FROM:
        assert listed < 60 and f"{calls + 10:,} sub-calls not shown" in found.sections["turns"]


def test_calls_below_the_limit_are_all_listed(tmp_path):
    """Short texts: up to 10,000 calls the whole tree fits."""
    path = many_calls(journal(tmp_path / "run.jsonl"), 9_000)
    path.write_text(path.read_text().replace(BREAKOUT * 20, "is it?"))
    page = write_report(path)
    assert read(page).tags.count("li") > 9_000 and page.stat().st_size <= MAX_BYTES


def test_a_page_is_small_however_long_and_deep_the_run(tmp_path):
    """Turns, blocks, children within children, and texts that escape to five times their length."""
    run = tmp_path / "run.jsonl"
    quotes = "\"'<&" * 200
    begin = {"event": "begin", "version": 1, "query": quotes, "described": "a str", "limits": {}}
    events = [begin]
    reply = {"event": "call", "prompt": None, "tokens_in": 1, "tokens_out": 1, "seconds": 0.0, "model": "m", "key": "k"}
    places = ["/".join(["root", *["1"] * depth]) for depth in range(20)]
    places += [f"root/{number}" for number in range(2, 30)]
    for place in places:
        events.append({"event": "start", "place": place, "messages": [{"role": "user", "content": f"Query: {quotes}"}]})
        for _ in range(7):
            text = quotes + f"\n```repl\n{quotes}\n```" * 12
            events.append(reply | {"place": place, "text": text})
    run.write_text("".join(json.dumps(event) + "\n" for event in events))
    page = write_report(run)
    assert page.stat().st_size <= MAX_BYTES
    text = read(page).text
    assert "not shown" in text and "Not finished: killed, or still running" in text


def test_a_run_that_was_killed_or_stopped(tmp_path, run):
    lines = run.read_bytes().splitlines(keepends=True)
    killed = tmp_path / "killed.jsonl"
    killed.write_bytes(b"".join(lines[:2]))
    text = read(write_report(killed)).text
    assert "Not finished: killed, or still running, after 0 turns" in text and "The root has not replied yet." in text
    stopped = journal(tmp_path / "stopped.jsonl", replies=["I wait."] * 20)
    text = read(write_report(stopped)).text
    assert "Stopped by a limit (iterations: 20 replies without an answer), after 20 turns" in text


def test_a_page_is_not_written_over_its_journal(tmp_path):
    run = journal(tmp_path / "run.html")
    before = run.read_bytes()
    with pytest.raises(UserError, match="is the journal itself"):
        write_report(run)
    assert run.read_bytes() == before
    other = tmp_path / "notes.txt"
    other.write_text("a note")
    with pytest.raises(UserError, match="is not a journal of an RLM run"):
        write_report(other)
    assert not (tmp_path / "notes.html").exists()


def test_a_damaged_journal_is_an_error_of_the_file(tmp_path, run):
    damaged = tmp_path / "run.jsonl"
    damaged.write_text(run.read_text().replace('"tokens_in"', '"tokens"'))
    with pytest.raises(UserError, match="does not have the structure that eaftdrope writes"):
        write_report(damaged)


# ---- many runs ----


def test_a_folder_of_journals(reports):
    page = read(reports["rlm runs"])
    assert "3 runs, 2 of which answered." in page.sections[""]
    rows = {row[0]: row[1:] for row in page.rows}
    # killed before its first sub-call
    assert rows["killed"][1:5] == ["code only", "not ended", "3", "0"]
    assert rows["short"][1:5] == ["without reading", "answered", "1", "0"]
    assert rows["whole"][1:5] == ["recursion", "answered", "6", "31"]
    assert rows["recursion"][1:6] == ["1", "100.0 %", "31", "31", "31"]
    assert "rows" not in rows


def test_a_folder_without_results_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(
        UserError, match=r"contains no results of eaftdrope\. A report needs one of run\.json.*journals"
    ):
        write_report(tmp_path)


# ---- a bench ----


def test_a_bench(reports):
    page = read(reports["rlm bench"])
    assert list(page.sections)[1:] == ["outcome", "figures", "strategies", "run"]
    assert "The RLM's mean score is above that of a plain call at every measured length." in page.sections[""]
    scores = {(row[0], row[1]): row[2:] for row in page.rows if len(row) == 10}
    assert scores["needle", "4,000"][:2] == ["4", "1.00 · 100 (51–100)"]
    steps = {(row[0], row[1]): row[3:] for row in page.rows if len(row) == 7 and row[2] == "4"}
    assert steps["count", "4,000"] == ["0 (0–49)", "0 (0–49)", "100 (51–100)", "0 (0–49)"]
    strategies = {row[0]: row[2:5] for row in page.rows}
    assert strategies["code only"] == ["8", "100.0 %", "100.0 %"]
    assert strategies["without reading"] == ["8", "100.0 %", "12.5 %"]
    drawn = {path.stem for path in (reports["rlm bench"].parent / "figures").glob("*.svg")}
    assert drawn == {"rlm_accuracy_by_length", "rlm_steps", "rlm_cost_by_length"}


def test_a_bench_that_is_not_finished(tmp_path, reports):
    document = json.loads((reports["rlm bench"].parent / "rlm_bench.json").read_text())
    document["cells"] = [cell for cell in document["cells"] if cell["arm"] in ("plain", "guess")][:1]
    (tmp_path / "rlm_bench.json").write_text(json.dumps(document))
    text = read(write_report(tmp_path)).text
    assert "This measurement is not finished: 4 of 112 trials are measured." in text


# ---- the probe in a training run ----


def test_a_training_run_shows_how_far_its_root_came(tmp_path):
    folder = run_folder(tmp_path / "run", nasty="m")
    steps = ("wrote a block", "ran a block", "finished", "right")

    def scores(*hits):
        return [
            score_units(
                "rlm_tasks",
                "target",
                f"{task}: {step}",
                [(float(unit < hit), 1.0) for unit in range(50)],
                kind="share",
                better="higher",
            )
            for task in ("needle", "count")
            for step, hit in zip(steps, hits)
        ]

    (folder / "probes_before.json").write_text(scores_to_json(scores(5, 2, 0, 0)))
    (folder / "probes_after.json").write_text(scores_to_json(scores(50, 50, 49, 40)))
    page = read(write_report(folder))
    assert list(page.sections)[2] == "rlm-tasks"
    rows = [row for row in page.rows if row[0] in ("needle", "count", *steps)]
    assert rows[0] == ["needle"] and rows[1] == ["wrote a block", "10 (4–21)", "100 (93–100)"]
    assert rows[4] == ["right", "0 (0–7)", "80 (67–89)"] and rows[5] == ["count"]
    assert (folder / "figures" / "rlm_tasks.svg").is_file()
    (folder / "probes_after.json").unlink()
    assert ["right", "0 (0–7)", "–"] in read(write_report(folder)).rows


def test_the_planted_folders_are_made_again_alike(tmp_path):
    """What the tests above read does not depend on the run that made it."""
    assert write_report(runs_folder(tmp_path / "a")).read_bytes().replace(b"/a/", b"") == write_report(
        runs_folder(tmp_path / "b" / "a")
    ).read_bytes().replace(b"/a/", b"")
    assert bench_folder(tmp_path / "bench").is_dir()
