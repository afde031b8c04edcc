"""The pages are complete, self-contained and safe, and show the numbers of their documents."""

import json
import shutil

import pytest
from rich.console import Console

from eaftdrope.errors import UserError
from eaftdrope.report.page import try_write_report, write_report, write_side_by_side
from eaftdrope.report.render import MAX_BYTES
from tests.report.planted import (
    ARABIC,
    EMOJI,
    FOLDERS,
    LONG,
    NASTY,
    compare_folder,
    eval_folder,
    inspect_folder,
    metrics,
    run_folder,
    write_lines,
)
from tests.report.planted_rlm import RLM_FOLDERS
from tests.report.reading import Read

KINDS = [*FOLDERS, *RLM_FOLDERS, "side by side"]


@pytest.fixture(scope="session")
def pages(reports):
    return {name: Read(path.read_text(encoding="utf-8")) for name, path in reports.items()}


# ---- every page ----


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_is_complete(pages, kind):
    page = pages[kind]
    assert page.problems == []
    assert len(set(page.ids)) == len(page.ids), "a duplicate id"
    assert page.tags.count("main") == page.tags.count("h1") == 1
    assert page.tags.count("figure") == page.tags.count("svg") == page.tags.count("figcaption")
    # every figure has a description
    assert len(page.labels) >= page.tags.count("figure")
    assert page.tags.count("caption") == page.tags.count("table") > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_is_self_contained(pages, reports, kind):
    page = pages[kind]
    outside = [one for one in page.references if not one.startswith(("#", "data:image/png;base64,"))]
    assert outside == []
    assert not {"script", "link", "iframe", "object", "img"} & set(page.tags)
    assert "http" not in reports[kind].read_text(encoding="utf-8").replace("http-equiv", "")
    assert {one for one in page.references if one.startswith("#")} <= {f"#{one}" for one in page.ids}


def test_the_parser_finds_faults():
    page = Read('<p><b>a</p><img src="http://x" onerror="y"><style>@import "z"; p {background: url(w)}</style>')
    assert page.problems and page.handlers == ["onerror"]
    assert page.references == ["http://x", '@import "z"', "url(w"]


@pytest.mark.parametrize("kind", KINDS)
def test_user_text_is_escaped(pages, reports, kind):
    page = pages[kind]
    assert page.handlers == [] and "alert" not in " ".join(page.tags)
    if kind != "side by side":
        assert NASTY in page.text
        assert "<script" not in reports[kind].read_text(encoding="utf-8")


def test_invalid_utf8_and_control_characters(pages):
    samples = pages["run"].sections["samples"]
    assert "5␀?" in samples and "What is 2 + 2?\nThink." in samples
    assert ARABIC in samples and EMOJI in samples and LONG in samples


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_is_small_and_has_its_figures(pages, reports, kind):
    assert reports[kind].stat().st_size < 400_000
    figures = reports[kind].parent / "figures"
    if kind in ("eval", "rlm run"):
        assert not figures.exists()
        return
    drawn = {path.stem for path in figures.glob("*.svg")}
    assert drawn == {path.stem for path in figures.glob("*.png")}
    assert len(drawn) >= pages[kind].tags.count("figure") > 0


@pytest.mark.parametrize("kind", ["run", "probe"])
def test_rendering_again_gives_the_same_bytes(reports, kind, tmp_path):
    again = tmp_path / kind
    shutil.copytree(reports[kind].parent, again)
    (again / "report.html").unlink()
    before = {path.name: path.read_bytes() for path in (again / "figures").iterdir() if "side_by_side" not in path.name}
    shutil.rmtree(again / "figures")
    assert write_report(again).read_bytes() == reports[kind].read_bytes()
    assert {path.name: path.read_bytes() for path in (again / "figures").iterdir()} == before


# ---- a run ----


def test_a_run_begins_with_what_changed(pages):
    page = pages["run"]
    assert list(page.sections)[1:] == ["outcome", "curves", "landscape", "samples", "run", "probes"]
    sentence = (
        "On the target, held-out loss got better, exact calls gave not enough evidence; in general, perplexity got "
        "worse."
    )
    assert sentence in page.sections[""]
    assert ["Target: what was trained"] in page.rows
    assert ["held-out loss ↓", "2.195 ± 0.018", "1.795 ± 0.018", "-0.400", "better"] in page.rows
    undecided = "not enough evidence (needs 1,300 items)"
    calls = ["exact calls ↑", "33.3 % (4/12) ± 12.1 %", "33.3 % (4/12) ± 12.1 %", "+0.0 % ± 10.1 %", undecided]
    assert calls in page.rows
    assert ["perplexity ↓", "23.34 ± 0.56", "24.29 ± 0.58", "+0.95 ± 0.02", "worse"] in page.rows


def test_a_run_shows_its_probes_with_intervals(pages):
    assert ["held-out loss ↓", "held_out_loss", "after", "1.795 ± 0.018", "1.759 to 1.831", "40"] in pages["run"].rows
    assert ["exact calls ↑", "function_calls", "before", "33.3 % ± 12.1 %", "9.6 % to 57.1 %", "12"] in pages[
        "run"
    ].rows


def test_a_run_shows_its_provenance(pages):
    text = pages["run"].sections["run"]
    for expected in (
        f"eaftdrope train {NASTY}", "2026-01-02 03:04 UTC", "a CPU <2 cores>", "42", "full fine-tune, gate",
        "24 rows, 1,271 tokens, 355 of them trained", "12 in 1.5 minutes", "eaftdrope 0.1.0, torch 2.13.0",
        f"model: {NASTY}",
    ):  # fmt: skip
        assert expected in text


def test_the_landscape_of_a_run_is_its_first_and_last(pages):
    labels = [label for label in pages["run"].labels if label.startswith("Tokens by")]
    assert [
        "steps 1 to 6: 4,000 tokens, 400 of them" in labels[0],
        "steps 7 to 12: 4,000 tokens, 100 of them" in labels[1],
    ]
    assert len(labels) == 2


def test_a_run_that_is_not_finished(tmp_path):
    folder = run_folder(tmp_path / "run", nasty="m")
    state = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**state, "status": "running", "about": {}}))
    for name in ("probes_after.json", "probes_during.jsonl", "landscape.jsonl", "samples.json"):
        (folder / name).unlink()
    # a line that is half written
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text("\n".join(text.splitlines()[:4]) + '\n{"step": 5, "lo')
    page = Read(write_report(folder).read_text(encoding="utf-8"))
    assert "This run is not finished: the page shows what has been measured so far." in page.text
    assert ["perplexity ↓", "23.34 ± 0.56", "–", "–", "not measured on both sides"] in page.rows


def test_a_run_without_probes(tmp_path):
    folder = run_folder(tmp_path / "run", nasty="m")
    for path in [*folder.glob("probes_*"), folder / "metrics.jsonl", folder / "landscape.jsonl"]:
        path.unlink()
    page = Read(write_report(folder).read_text(encoding="utf-8"))
    assert "Nothing was measured: the recipe has no probes." in page.text
    assert list(page.sections)[1:] == ["samples", "run"]


def test_a_run_whose_data_were_inspected(tmp_path):
    folder = run_folder(tmp_path / "run", nasty="m")
    (folder / "landscape.jsonl").unlink()
    inspect_folder(folder, nasty="m")
    page = Read(write_report(folder).read_text(encoding="utf-8"))
    assert page.sections["outcome"] and "Bergen" in page.sections["conflicts"]


def test_a_recalibration_shows_its_recovery(tmp_path):
    folder = run_folder(tmp_path / "run", nasty="m")
    points = [{"step": i, "tokens": 64 * i, "nll": 3 - 0.2 * i} for i in range(4)]
    curve = {"original": {"nll": 2.0}, "measured_tokens": 256, "stop_at": None, "points": points}
    (folder / "recovery.json").write_text(json.dumps(curve))
    page = Read(write_report(folder).read_text(encoding="utf-8"))
    assert "11.02 at the end; the original model with its rotary embedding has 7.39" in page.sections["recovery"]


def test_test_time_training_shows_its_loss_by_position(tmp_path):
    folder = run_folder(tmp_path / "run", nasty="m")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for index, line in enumerate(lines):
        line |= {"position/nll_128_256": 3.0 - 0.1 * index, "position/nll_0_128": 4.0}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Read(write_report(folder).read_text(encoding="utf-8"))
    part = len(lines) // 4
    first = sum(3.0 - 0.1 * index for index in range(part)) / part
    last = sum(3.0 - 0.1 * index for index in range(len(lines) - part, len(lines))) / part
    text = " ".join(page.sections["positions"].split())
    assert "0 to 127 4.000 4.000" in text
    assert f"128 to 255 {first:.3f} {last:.3f}" in text
    assert "loss_by_position" in str(sorted(path.name for path in (folder / "figures").iterdir()))
    assert "positions" not in Read(write_report(run_folder(tmp_path / "other", nasty="m")).read_text()).sections


# ---- the others ----


def test_an_inspection(pages):
    page = pages["inspect"]
    assert list(page.sections)[1:] == ["landscape", "conflicts", "rows", "where", "run"]
    assert "In 24 rows with 4,000 trained tokens, 10.0 % of the tokens are confident conflicts" in page.sections[""]
    assert ["mean gate", "0.410", "0.410"] in page.rows and ["confident conflicts", "10.0 %", "0.1 %"] in page.rows
    assert ["confident conflict", "10.0 %", "27.3 %", "6.1 %"] in page.rows
    assert ["from 2", "4,000", "0.410", "10.0 %", "2.345"] in page.rows
    row = next(row for row in page.rows if row[0] == "rows.jsonl:2")
    assert row[1:6] == ["conflicts", "10 of 40", "25.0 %", "4.200", "2"]
    assert row[6].startswith(LONG[:50]) and row[6].endswith(" …")
    assert "5 of 24 rows are shown; the full list is in rows.jsonl." in page.sections["rows"]
    assert ["␣a", "␣the", "7"] in page.rows and ["b", "c", "1"] not in page.rows
    assert "The worst 5 of 50 are shown; the worst 25 are in conflicts.jsonl." in page.sections["conflicts"]
    conflicts = page.sections["conflicts"]
    assert "label: ␣Oslo⏎" in conflicts and "the model: ␣Bergen" in conflicts and ARABIC in conflicts
    assert (
        "probability of the label 0.00034, of the model's token 0.97; entropy 0.12 nats; token 17 of rows.jsonl:1"
        in conflicts
    )


def test_a_comparison(pages):
    page = pages["compare"]
    assert list(page.sections)[1:] == ["outcome", "matched", "runs", "run"]
    assert "eaft keeps more of the general metric than none, by more than the spread." in page.sections[""]
    assert ["before training", "", "", "2.195 ± 0.018", "23.34 ± 0.56", "33.3 % ± 12.1 %"] in page.rows
    assert ["eaft", "3", "0.800", "1.685 ± 0.010", "24.56 ± 0.02", "33.3 %"] in page.rows
    assert ["none and eaft", f"eaft forgets less: {NASTY}"] in page.rows
    assert ["none", "0", "51 %", "1.895 ± 0.018", "24.05 ± 0.57", "33.3 % ± 12.1 %"] in page.rows
    assert f"Left out: dft, seed 0: gained nothing {NASTY}" in page.sections["matched"]
    assert [
        "eaft",
        "2",
        "0.0001",
        "0.800",
        "50",
        "1.675 ± 0.018",
        "24.58 ± 0.59",
        "33.3 % ± 12.1 %",
        "arms/eaft-2",
    ] in page.rows


def test_a_comparison_of_one_seed_that_is_not_finished(tmp_path):
    folder = compare_folder(tmp_path / "one", seeds=1)
    document = json.loads((folder / "compare.json").read_text())
    document |= {"status": "running", "matched": None, "verdicts": [], "verdict": ""}
    document["arms"][-1]["scores"] = []
    (folder / "compare.json").write_text(json.dumps(document))
    page = Read(write_report(folder).read_text(encoding="utf-8"))
    assert "This comparison is not finished; 3 runs so far." in page.text
    assert ["none", "1", "1.000", "1.595", "24.78", "33.3 %"] in page.rows
    document |= {"table": [], "target": None, "general": None}
    (folder / "compare.json").write_text(json.dumps(document))
    assert "Nothing has been measured yet." in Read(write_report(folder).read_text(encoding="utf-8")).text


def test_an_evaluation(pages):
    page = pages["eval"]
    sentence = (
        "On the target, held-out loss came out better, exact calls gave not enough evidence; in general, perplexity came out "
        "worse."
    )
    assert f"new {NASTY} compared with tiny: {sentence}" in page.sections[""]
    assert ["perplexity ↓", "+0.95 ± 0.02", "worse"] in page.rows
    assert ["held-out loss ↓", "2.195 ± 0.018", "1.795 ± 0.018"] in page.rows
    assert ["perplexity ↓", "perplexity", f"new {NASTY}", "24.29 ± 0.58", "23.16 to 25.42", "16"] in page.rows


def test_a_long_context(pages):
    page = pages["probe"]
    assert "plain finds 50 % of the needles at 2,048 tokens (2x)" in page.sections[""]
    assert ["as is", "1,024 (1x)", "20.09", "100 (51–100)"] in page.rows
    assert f"a note {NASTY}" in page.sections["run"]


def test_time_training(pages):
    page = pages["ttt"]
    summary = (
        "TTT beyond the window, in nats per token: -0.050 ± 0.002 against window + sink, +0.050 ± 0.003 against full"
    )
    assert summary in page.sections[""] and "reads faster from about 2,000 tokens" in page.sections[""]
    assert ["TTT", "4.050", "3.600", "3.400", "3.467 ± 0.064"] in page.rows
    # by passage 50, 58, 42 and 50 thousandths more than full attention: their mean, and their deviation / sqrt(4)
    assert ["TTT", "-0.100 ± 0.003", "+0.050 ± 0.003", "+0.050 ± 0.003"] in page.rows
    assert ["TTT − window + sink", "-0.050 ± 0.002", "4 of 4"] in page.rows
    assert ["naive TTT", "3.310", "3.300", "3.400", "0.3"] in page.rows
    assert ["TTT", "2.30 ± 0.13", "3/4 (30–95 %)", "22.30 ± 0.13", "0/4 (0–49 %)"] in page.rows
    assert ["2,048", "160 / 80 / 160", "16.0 / 8.0 / 16.0", "18.4 / 1 / 3"] in page.rows
    assert ["perplexity ↓", "23.34", "23.57", "+0.23 ± 0.01", "worse"] in page.rows
    assert ["fine-tuned without TTT", f"no --control {NASTY}"] in page.rows
    assert "it does not recall it" in page.sections["outcome"] and "The first 128 tokens" in page.sections["outcome"]
    assert f"a note {NASTY}" in page.sections["run"]


def test_side_by_side(pages):
    page = pages["side by side"]
    sentence = (
        "On the target, held-out loss came out worse, exact calls gave not enough evidence; in general, perplexity came out "
        "better."
    )
    assert f"worse compared with run: {sentence}" in page.sections[""]
    assert ["held-out loss ↓", "2.195 ± 0.018", "1.795 ± 0.018", "2.095 ± 0.018"] in page.rows
    assert ["held-out loss ↓", "+0.300", "worse"] in page.rows


# ---- long lists ----


def test_long_lists_are_truncated_and_counted(tmp_path):
    folder = inspect_folder(tmp_path / "many", conflicts=900)
    path = write_report(folder)
    page = Read(path.read_text(encoding="utf-8"))
    assert path.stat().st_size < MAX_BYTES / 5
    assert "The worst 40 of 9,000 are shown; the worst 4,500 are in conflicts.jsonl." in page.sections["conflicts"]
    assert "40 of 900 rows are shown; the full list is in rows.jsonl." in page.sections["rows"]


def test_a_long_training_is_reduced_to_means(tmp_path):
    folder = run_folder(tmp_path / "long", nasty="m")
    write_lines(folder / "metrics.jsonl", metrics(20_000))
    samples = [{"prompt": LONG * 100, "reference": LONG * 100, "before": LONG * 100, "after": LONG * 100}] * 50
    (folder / "samples.json").write_text(json.dumps(samples))
    path = write_report(folder)
    assert path.stat().st_size < MAX_BYTES / 5
    page = Read(path.read_text(encoding="utf-8"))
    assert "12 of 50 prompts are shown; the full list is in samples.json." in page.sections["samples"]
    assert f"({len(LONG) * 100 - 1500:,} more characters in samples.json)" in page.sections["samples"]


# ---- errors ----


def test_folders_without_results(tmp_path):
    with pytest.raises(UserError, match=r"nothing does not exist\. A report needs one of run\.json, compare\.json"):
        write_report(tmp_path / "nothing")
    with pytest.raises(UserError, match="contains no results of eaftdrope"):
        write_report(tmp_path)
    (tmp_path / "eval.json").write_text("{")
    with pytest.raises(UserError, match=r"eval\.json is not a JSON document"):
        write_report(tmp_path)


def test_folders_that_cannot_be_compared_side_by_side(tmp_path):
    run, other = run_folder(tmp_path / "run", nasty="m"), eval_folder(tmp_path / "eval")
    with pytest.raises(UserError, match="does not contain a training run"):
        write_side_by_side([run, other])
    (run / "probes_after.json").unlink()
    with pytest.raises(UserError, match=r"has no probes_after\.json, so there is nothing to compare"):
        write_side_by_side([run, run])


def test_a_failed_report_does_not_invalidate_the_result(tmp_path, capsys):
    folder = eval_folder(tmp_path / "eval")
    try_write_report(folder, Console(width=1000))
    assert f"report: {folder / 'report.html'}" in capsys.readouterr().out
    (folder / "eval.json").write_text('{"models": 1}')
    try_write_report(folder, Console(width=1000))
    out = capsys.readouterr().out
    assert "the report could not be written: TypeError" in out
    assert f"The result in {folder} is complete." in out and f"Run `eaftdrope report {folder}` to try again" in out


def test_the_verb(tmp_path, capsys):
    from eaftdrope.cli import main

    folder = eval_folder(tmp_path / "eval")

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["report", *map(str, arguments)])
        return ended.value.code, capsys.readouterr()

    code, printed = run(folder)
    assert code == 0 and f"written: {folder / 'report.html'}" in printed.out
    code, printed = run(folder, "--output", tmp_path / "else" / "page.html")
    assert code == 0 and (tmp_path / "else" / "page.html").read_bytes() == (folder / "report.html").read_bytes()
    code, printed = run(tmp_path / "else")
    assert code == 2 and "contains no results of eaftdrope" in printed.err
