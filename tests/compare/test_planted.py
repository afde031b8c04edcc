"""A planted forgetting problem: the comparison and its verdict rank the gates as the construction requires."""

import io
from contextlib import contextmanager

import pytest
from rich.console import Console

from eaftdrope.compare.plan import plan_comparison
from eaftdrope.compare.run import run_comparison
from tests.compare.planted import make_planted

MASK = "conflict-mask quantile=0.25"


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    from eaftdrope.report import page

    folder = tmp_path_factory.mktemp("planted")

    @contextmanager
    def bars():
        yield lambda words: lambda done, total: None

    plan = plan_comparison(
        make_planted(folder),
        [],
        gates="none,eaft,conflict-mask:quantile=0.25,constant",
        seeds=3,
        folder=folder / "compared",
        match=True,
    )
    with pytest.MonkeyPatch.context() as patch:
        # a page of each of the twelve arms would take longer than their training
        patch.setattr(page, "try_write_report", lambda folder, console: None)
        console = Console(file=io.StringIO())
        about = {"date": "2026-01-01", "device": "a CPU", "versions": {}}
        yield run_comparison(plan, console, command="compare", about=about, bars=bars)


def by_seed(document, metric, arms="arms"):
    """label -> values in the order of the seeds."""
    found = {}
    for arm in document["arms"] if arms == "arms" else document["matched"]["arms"]:
        (value,) = (score["value"] for score in arm["scores"] if score["metric"] == metric)
        found.setdefault(arm["label"], []).append(value)
    return found


@pytest.mark.end_to_end
def test_gates_that_drop_confident_conflicts_keep_the_old_skill_under_every_seed(document):
    old = by_seed(document, "multiple choice")
    assert next(s["value"] for s in document["base"] if s["metric"] == "multiple choice") == 1.0
    for none, constant, eaft, mask in zip(old["none"], old["constant"], old["eaft"], old[MASK], strict=True):
        # AdamW cancels the scale, so a constant is plain cross-entropy
        assert abs(constant - none) < 0.1
        assert none < 0.75
        assert min(eaft, mask) > max(none, constant) + 0.15


@pytest.mark.end_to_end
def test_they_also_do_at_equal_target_loss_and_the_verdict_agrees(document):
    old, target = (by_seed(document, metric, "matched") for metric in ("multiple choice", "held-out loss"))
    for label in ("eaft", MASK):
        assert all(ours > theirs + 0.1 for ours, theirs in zip(old[label], old["none"], strict=True))
    levels = [level["level"] for level in document["matched"]["levels"]]
    for label, losses in target.items():
        assert losses == pytest.approx(levels, abs=0.02), label
    words = {
        tuple(entry["pair"]): {outcome["metric"]: outcome["word"] for outcome in entry["matched"]}
        for entry in document["verdicts"]
    }
    assert words[("eaft", "none")]["multiple choice"] == words[(MASK, "none")]["multiple choice"] == "better"
    assert words[("eaft", "constant")]["multiple choice"] == "better"
    assert words[("constant", "none")]["multiple choice"] == "no difference beyond the spread"
    assert "eaft and conflict-mask quantile=0.25: less is forgotten" in document["verdict"]
    assert "weights every token by the mean gate, eaft: less is forgotten" in document["verdict"]
