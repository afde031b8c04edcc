"""The probe of RLM roots: its four shares per task, with scripted roots and on a tiny model."""

import pytest

from eaftdrope.errors import UserError
from eaftdrope.evaluate import build_probes, run_probes
from eaftdrope.evaluate.probes import rlm_tasks
from eaftdrope.rlm.models import ScriptedModel
from eaftdrope.rlm.tasks import KINDS, make_task
from tests.evaluate.probe_options import probe_options
from tests.tiny_models import byte_tokenizer, tiny_llama


def build(**options):
    (probe,) = build_probes([("rlm_tasks", "target", probe_options("rlm_tasks", **options))])
    return probe


@pytest.fixture
def scripted(monkeypatch):
    """Replaces the model by a script; returns where to put it, and the system prompts it has seen."""
    state = {}

    def stand_in(model, tokenizer, *, name, batch_size):
        state["model"] = ScriptedModel(state["root"], name=name, window=100_000)
        return state["model"]

    monkeypatch.setattr(rlm_tasks, "HFModel", stand_in)
    return state


def shares(probe):
    scores = probe.run(None, byte_tokenizer())
    assert {(score.probe, score.group, score.kind, score.better) for score in scores} == {
        ("rlm_tasks", "target", "share", "higher")
    }
    return {score.metric: (score.value, score.n) for score in scores}


def test_four_shares_per_task(scripted):
    """A root that solves the tasks with an even seed, and writes code that fails for the others."""
    oracles = {}
    for kind in ("needle", "aggregate"):
        for seed in range(12):
            task = make_task(kind, seed, 900)
            first = task.context[:200]
            oracles[task.query, first] = task.oracle if seed % 2 == 0 else "```repl\nundefined\n```"
    assert len(oracles) == 24

    def root(messages):
        query, begins = messages[1]["content"].removeprefix("Query: ").split("\nIt begins: ")
        return oracles[query, eval(begins)]

    scripted["root"] = root
    found = shares(build(tasks=["needle", "aggregate"], limit=12, chars=900, iterations=2))
    assert found == {
        f"{kind}: {step}": (value, 12)
        for kind in ("needle", "aggregate")
        for step, value in (("wrote a block", 1.0), ("ran a block", 0.5), ("finished", 0.5), ("right", 0.5))
    }
    # two replies of those that fail
    assert len(scripted["model"].seen) == 2 * (6 + 2 * 6)


def test_options_reach_the_roots(scripted):
    scripted["root"] = lambda messages: "FINAL(unknown)"
    probe = build(tasks=["count"], limit=2, chars=5_000, phrasings="test", short_prompt=False)
    assert shares(probe) == {
        f"count, unseen phrasings: {step}": (value, 2)
        for step, value in (("wrote a block", 0.0), ("ran a block", 0.0), ("finished", 1.0), ("right", 0.0))
    }
    system, first = scripted["model"].seen[0]
    assert "rlm_query_batched" in system["content"]
    assert make_task("count", 0, 5_000, names="test", phrasings="test").query in first["content"]
    scripted["root"] = lambda messages: "FINAL(unknown)"
    shares(build(limit=1))
    assert "rlm_query_batched" not in scripted["model"].seen[0][0]["content"]


def test_progress_counts_the_trials_of_all_tasks(scripted):
    scripted["root"] = lambda messages: "FINAL(unknown)"
    ticks = []
    build(limit=30, chars=500).run(None, byte_tokenizer(), progress=lambda *tick: ticks.append(tick))
    assert ticks == [(25, 60), (30, 60), (55, 60), (60, 60)]


def test_a_tiny_model():
    """A random model writes no block; it is left in the mode it came in."""
    model = tiny_llama(vocab_size=260, max_position_embeddings=2_048, pad_token_id=0)
    model.train()
    scores = run_probes(
        model, byte_tokenizer(), [build(tasks=["needle"], limit=3, chars=500, iterations=1, max_new_tokens=4)]
    )
    assert [score.value for score in scores] == [0.0] * 4 and model.training


def test_a_tokenizer_without_a_chat_template():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="rlm_tasks needs a chat model"):
        build().run(None, tokenizer)


def test_the_section():
    from eaftdrope.recipe.load import section_at

    section = section_at(("probes", "target", "rlm_tasks"))
    assert set(section().tasks) <= set(KINDS)
    with pytest.raises(ValueError, match="'needle', 'count', 'aggregate', 'pairs', 'multi-hop' or 'code'"):
        section(tasks=["needles"])
    with pytest.raises(ValueError, match="at least 1 item"):
        section(tasks=[])
