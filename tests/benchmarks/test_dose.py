"""The study of the gate by share of contradicting rows: its rows, its rule, and that it resumes after a kill."""

import json
import time
from functools import partial

import pytest

from benchmarks.dose import llamas, measures, plan, rule, run, texts
from benchmarks.dose.candidates import candidates
from benchmarks.dose.figure import draw
from benchmarks.dose.measures import FACTS, TARGET, TEXT
from benchmarks.dose.plan import DoseCell, Training
from benchmarks.dose.quoted import write_quoted
from benchmarks.dose.results import DoseResults
from benchmarks.dose.run import Runner, subject_of
from benchmarks.dose.selection import LEAST, read_facts
from benchmarks.dose.smollm2 import SmolLM2
from benchmarks.dose.table import tables
from eaftdrope.errors import UserError
from eaftdrope.evaluate.likelihood import IGNORED
from eaftdrope.evaluate.scores import score_units
from tests.tiny_models import byte_tokenizer

TINY = "Llama tiny"
SIZES = Training(rate=3e-3, planted=128, skill=192, batch=32, held_out=128, epochs=4)


def completion(row):
    return [token for token in row.labels if token != IGNORED]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The subject of a small Llama instead of the three, pretrained once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(plan.LLAMAS, TINY, (64, 1))
        patch.setitem(plan.TRAININGS, TINY, SIZES)
        yield partial(llamas.llama_subject, work=tmp_path_factory.mktemp("llamas"), steps=400)


def test_the_facts_are_candidates_of_enough_relations():
    facts = read_facts()
    assert set(facts) <= set(candidates()) and len(set(facts)) == len(facts) == 284
    counts = {relation: sum(fact.relation == relation for fact in facts) for relation in {f.relation for f in facts}}
    assert min(counts.values()) >= LEAST and len(counts) == 13
    planted, others = texts.split_facts(facts, plan.TRAININGS[plan.SMOLLM2].planted)
    assert len(planted) == 96 and len(others) >= 100 and set(planted).isdisjoint(others)


def test_only_the_labels_of_contradicted_facts_depend_on_the_share(monkeypatch):
    subject = SmolLM2()
    monkeypatch.setitem(vars(subject), "tokenizer", byte_tokenizer())
    by_share = {share: subject.rows(DoseCell(plan.SMOLLM2, "conflict", share, 2)) for share in (0, 5, 10, 20, 40)}
    prompts = {share: [row.input_ids[: -len(completion(row))] for row in rows] for share, rows in by_share.items()}
    assert all(found == prompts[0] for found in prompts.values())
    changed = {}
    for share, rows in by_share.items():
        changed[share] = {i for i, row in enumerate(rows) if completion(row) != completion(by_share[0][i])}
        assert len(changed[share]) == share * 240 // 100
    assert changed[5] < changed[10] < changed[20] < changed[40]
    other = subject.rows(DoseCell(plan.SMOLLM2, "conflict", 40, 3))
    assert sorted(map(len, prompts[40])) == sorted(len(row.input_ids) - len(completion(row)) for row in other)
    assert [row.input_ids for row in other] != [row.input_ids for row in by_share[40]]
    # what measures forgetting is in no training row
    trained = {tuple(prompt) for prompt in prompts[40]}
    measured = subject.measured()
    for row in (*measured.facts, *measured.held_out):
        assert tuple(row.input_ids[: -len(completion(row))]) not in trained
    assert len(measured.facts) == 188


def test_contradictions_differ_from_the_answer_where_the_model_is_sure():
    facts = read_facts()
    for kind in texts.KINDS:
        for fact, (prompt, label) in zip(facts, texts.labelled_facts(facts, len(facts), kind, 1), strict=True):
            assert prompt == fact.prompt and label != f" {fact.answer}." and label.startswith(" ")
            if kind == "conflict" and not fact.answer.isdigit():
                assert label[1] != fact.answer[0]
            if kind == "spelling" and not fact.answer.isdigit() and len(fact.answer) > 2:
                assert sorted(label) == sorted(f" {fact.answer}.")


@pytest.mark.parametrize(
    ("facts", "text", "gain", "beats", "lost", "seeds", "word"),
    [
        ("better", "same", 0.95, True, 0.3, 3, rule.WORTH),
        ("better", "same", 0.95, None, 0.3, 3, rule.WORTH),
        ("better", "same", 0.95, False, 0.3, 3, rule.UNCLEAR),
        ("better", "worse", 0.95, True, 0.3, 3, rule.AGAINST),
        ("better", "same", 0.85, True, 0.3, 3, rule.AGAINST),
        ("worse", "better", 1.0, True, 0.3, 3, rule.AGAINST),
        (rule.SAME, "same", 1.0, True, 0.3, 3, rule.UNCLEAR),
        ("better", "same", 0.95, True, 0.3, 2, rule.UNCLEAR),
    ],
)
def test_the_rule(facts, text, gain, beats, lost, seeds, word):
    assert rule.decide(facts, text, gain, beats, lost, seeds)[0] == word


def test_nothing_forgotten_is_the_reason():
    assert rule.decide(rule.SAME, rule.SAME, 1.0, True, 0.01, 3)[1] == "nothing was forgotten"
    assert "spread" in rule.decide(rule.SAME, rule.SAME, 1.0, True, 0.1, 3)[1]


def made_up(target, hits, nats):
    """Scores with some spread over 200 items; `hits` are answered."""
    units = [(target + 0.01 * (i % 5), 1.0) for i in range(200)]
    windows = [(100 * nats + i % 3, 100.0) for i in range(20)]
    return {
        TARGET: score_units(TARGET, "target", TARGET, units, kind="mean", better="lower"),
        FACTS: score_units(FACTS, "general", FACTS, [(float(i < hits), 1.0) for i in range(200)], kind="share",
                           better="higher", least=100),
        TEXT: score_units(TEXT, "general", TEXT, windows, kind="exp", better="lower"),
    }  # fmt: skip


def fill(results, kept):
    """Store the main part; `kept` is share -> arm -> facts of 200 that are kept at equal target loss."""
    results.add_base(plan.SMOLLM2, made_up(5.0, 200, 3.0))
    for cell in plan.cells(("main",)):
        results.add_inspected(cell, {"conflict_share": cell.share / 800 + 0.001 * cell.seed})
        for arm in cell.arms:
            hits = kept[cell.share].get(arm, kept[cell.share]["none"]) + cell.seed
            facts = {"mean_gate": 0.5, "losses": [1.0], "training_seconds": 1.0, "cpu_seconds": 2.0}
            results.add_trained(cell, arm, facts, made_up(0.5, hits - 20, 3.1))
            results.add_matched(cell, arm, {"share": 0.9, "cpu_seconds": 1.0}, made_up(0.6, hits, 3.05))


def test_verdicts_figure_and_what_is_quoted(tmp_path):
    results = DoseResults(tmp_path / "dose.json", {})
    assert write_quoted(results, tmp_path / "quoted.json") is None
    fill(results, {0: {"none": 197}, 10: {"none": 180, "eaft": 150}, 40: {"none": 60, "eaft": 140}})
    read = DoseResults(tmp_path / "dose.json")
    found = rule.verdicts(read, plan.SMOLLM2, "conflict", plan.MAIN_SHARES, "eaft")
    assert [one.word for one in found] == [rule.UNCLEAR, rule.AGAINST, rule.WORTH]
    assert found[0].because == "nothing was forgotten"
    assert found[2].facts.difference == pytest.approx(0.4) and found[2].gain == pytest.approx(1.0)
    assert found[2].inspected == pytest.approx((0.052, 0.051, 0.053)) and found[2].half == pytest.approx(0, abs=1e-9)
    text = tables(read)
    assert "| 40 | eaft | 3 | 0.500 |" in text and f"**{rule.WORTH}**: more facts are kept" in text
    assert draw(read, tmp_path / "dose.png").stat().st_size > 10_000
    written = json.loads(write_quoted(read, tmp_path / "quoted.json").read_text())
    assert [point["word"] for point in written["points"]] == [rule.UNCLEAR, rule.AGAINST, rule.WORTH]
    assert written["points"][2]["facts"] == pytest.approx(0.4) and written["seeds"] == 3


def test_other_settings_are_refused(tmp_path):
    results = DoseResults(tmp_path / "dose.json", {"a": {"rate": 1}})
    results.add_base("a", made_up(5.0, 200, 3.0))
    DoseResults(tmp_path / "dose.json", {"a": {"rate": 1}, "b": {"rate": 2}})
    with pytest.raises(UserError, match="other settings"):
        DoseResults(tmp_path / "dose.json", {"a": {"rate": 3}})


@pytest.mark.end_to_end
def test_a_killed_run_resumes_and_gives_the_same_results(tiny, tmp_path, monkeypatch):
    cell = DoseCell(TINY, "conflict", 40, 1, ("none", "eaft", "constant"))
    late = time.monotonic() + 1000

    def runner(name, deadline=late):
        return Runner(DoseResults(tmp_path / name, run.settings([cell])), tmp_path / "work", tiny, deadline, print)

    whole = runner("whole.json")
    assert whole.run([cell]) and whole.results.done(cell)
    assert not (tmp_path / "work" / cell.folder).exists()
    arms = whole.results.cell(cell)["arms"]
    assert arms["none"]["mean_gate"] == 1 and 0 < arms["eaft"]["mean_gate"] < 1
    assert arms["constant"]["mean_gate"] == pytest.approx(arms["eaft"]["mean_gate"], abs=1e-5)
    subject = tiny(TINY)
    expected = measures.inspected(subject.load().eval(), subject.rows(cell))
    assert whole.results.cell(cell)["inspected"] == pytest.approx(expected, abs=1e-6)
    # out of time at once; then killed at the second arm that is matched, and the weights are lost
    assert not runner("parts.json", deadline=0.0).run([cell])
    calls, original = [], measures.matched

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(measures, "matched", killed)
    with pytest.raises(KeyboardInterrupt):
        runner("parts.json").run([cell])
    for file in (tmp_path / "work" / cell.folder).iterdir():
        file.unlink()
    monkeypatch.setattr(measures, "matched", original)
    resumed = runner("parts.json")
    assert not resumed.results.done(cell) and resumed.run([cell])
    for arm, entry in resumed.results.cell(cell)["arms"].items():
        assert entry["losses"] == arms[arm]["losses"] and entry["scores"] == arms[arm]["scores"]
        assert entry["matched"]["scores"] == arms[arm]["matched"]["scores"]


def test_arms_at_equal_target_loss(tiny):
    """The line ends at the base and at the trained weights, and the matched loss is the common one."""
    from benchmarks.dose.training import train

    subject, cell = tiny(TINY), DoseCell(TINY, "conflict", 0, 1)
    base = measures.target(subject.load().eval(), subject.measured)
    found = train(subject, subject.rows(cell), plan.ARMS["none"], SIZES, seed=1, weight=1.0)
    move = measures.line(subject, found.weights)
    assert measures.target(move(0.0), subject.measured).value == pytest.approx(base.value, abs=1e-5)
    end = measures.target(move(1.0), subject.measured)
    assert end.value < base.value
    level = (base.value + end.value) / 2
    share, scores = measures.matched(subject, found.weights, base, end, level, 0.01)
    assert 0 < share < 1 and scores[TARGET].value == pytest.approx(level, abs=0.01)


def test_the_anchor_and_the_rate_change_what_is_trained(tiny):
    from benchmarks.dose.training import train

    subject, cell = tiny(TINY), DoseCell(TINY, "conflict", 40, 1)
    start = {name: tensor.clone() for name, tensor in subject.load().named_parameters()}
    moved = {}
    for arm in ("none", "lr/2", "KL anchor"):
        weights = train(subject, subject.rows(cell), plan.ARMS[arm], SIZES, seed=1, weight=1.0).weights
        moved[arm] = sum(float((weights[name] - tensor).detach().square().sum()) for name, tensor in start.items())
    # AdamW moves a weight by the rate in each step, about
    assert moved["lr/2"] < 0.5 * moved["none"]
    assert moved["KL anchor"] != pytest.approx(moved["none"], rel=1e-3)


def test_the_plan_has_the_main_study_first(tmp_path):
    main = list(plan.cells(("main",)))
    assert sum(len(cell.arms) for cell in main) == 36 and next(plan.cells()) == main[0]
    everything = list(plan.cells())
    assert len({cell.key for cell in everything}) == len(everything) == 9 + 9 * len(plan.LLAMAS) + 6 + 6
    assert {cell.model for cell in plan.cells(("llamas",))} == set(plan.LLAMAS)
    assert callable(subject_of)
