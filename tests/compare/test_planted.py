"""A planted forgetting problem: the comparison and its verdict rank gates, anchors and replay as constructed."""

import io
from contextlib import contextmanager

import pytest
from rich.console import Console

from eaftdrope.compare.plan import plan_comparison
from eaftdrope.compare.run import run_comparison
from tests.compare.planted import make_planted

MASK = "conflict-mask quantile=0.25"


def compared(folder, *overrides, **options):
    """The document of a comparison on the planted problem."""
    from eaftdrope.report import page

    @contextmanager
    def bars():
        yield lambda words: lambda done, total: None

    plan = plan_comparison(make_planted(folder), list(overrides), folder=folder / "compared", **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EAFTDROPE_CACHE", str(folder / "cache"))
        # a page of each of the twelve arms would take longer than their training
        patch.setattr(page, "try_write_report", lambda folder, console: None)
        console = Console(file=io.StringIO())
        about = {"date": "2026-01-01", "device": "a CPU", "versions": {}}
        return run_comparison(plan, console, command="compare", about=about, bars=bars)


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    return compared(
        tmp_path_factory.mktemp("planted"),
        arms="none,eaft,conflict-mask:quantile=0.25,constant",
        seeds=3,
        match=True,
    )


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


@pytest.mark.end_to_end
def test_replay_keeps_the_old_skill_and_half_the_way_back_regains_it(tmp_path):
    replay = "data.replay={prompts: prompts.jsonl, max_tokens: 1}"
    document = compared(tmp_path, replay, arms="none,replay=0.3,none+share=0.5", seeds=1)
    old, target = (by_seed(document, metric) for metric in ("multiple choice", "held-out loss"))
    (base,) = (score["value"] for score in document["base"] if score["metric"] == "held-out loss")
    assert old["none"][0] < 0.75 and min(old["replay 0.3"][0], old["none + share 0.5"][0]) > old["none"][0] + 0.15
    # replay has learned nearly as much as plain fine-tuning, and half the way is half of the change, not of the gain
    assert target["none"][0] < target["replay 0.3"][0] < target["none + share 0.5"][0] < base
    assert base - target["replay 0.3"][0] > 0.9 * (base - target["none"][0])
    words = {
        tuple(entry["pair"]): {outcome["metric"]: outcome["word"] for outcome in entry["outcomes"]}
        for entry in document["verdicts"]
    }
    assert words[("replay 0.3", "none")]["multiple choice"] == "better"
    assert words[("none + share 0.5", "none")]["multiple choice"] == "better"
    repaired = next(arm for arm in document["arms"] if arm["label"] == "none + share 0.5")
    assert repaired["folder"] == "arms/none-seed42" and repaired["repair"]["share"] == 0.5


@pytest.mark.end_to_end
def test_an_anchor_keeps_the_old_skill_unless_it_leaves_the_label_out(tmp_path):
    document = compared(tmp_path, arms="none,sft-kl,asft,mask-target", seeds=1)
    old, target = (by_seed(document, metric) for metric in ("multiple choice", "held-out loss"))
    (base,) = (score["value"] for score in document["base"] if score["metric"] == "held-out loss")
    assert old["none"][0] < 0.75 and min(old["sft-kl 0.5"][0], old["asft 0.1"][0]) > old["none"][0] + 0.15
    assert abs(old["mask-target 0.1"][0] - old["none"][0]) < 0.1
    # an anchor costs some of the gain, but the new skill is learned under each
    assert target["none"][0] < target["sft-kl 0.5"][0]
    assert all(base - losses[0] > 0.8 * (base - target["none"][0]) for losses in target.values())
    words = {
        tuple(entry["pair"]): {outcome["metric"]: outcome["word"] for outcome in entry["outcomes"]}
        for entry in document["verdicts"]
    }
    assert words[("sft-kl 0.5", "none")]["multiple choice"] == "better"
    assert words[("asft 0.1", "none")]["multiple choice"] == "better"
    assert words[("mask-target 0.1", "none")]["multiple choice"] == "no difference beyond the spread"
