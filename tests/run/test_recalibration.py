"""A recalibration's own settings: schedules, what the recovery is measured on, replay, documents apart."""

import json
import math
from types import SimpleNamespace

import pytest

from eaftdrope.errors import UserError
from eaftdrope.recipe import make_recipe
from eaftdrope.run.arguments import schedule_options
from eaftdrope.run.data import build_data
from eaftdrope.run.record import DataStats
from eaftdrope.run.stages.chain import open_stages
from tests.tiny_models import byte_tokenizer
from tests.tiny_run import make_staged_project, metrics, save_rows, save_text, train

CONFIG = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=512))


@pytest.fixture
def made(tmp_path, monkeypatch):
    """made(stages=..., **recalibrate): the settings of the stage, and the stage; text.jsonl is there."""
    save_text(tmp_path / "text.jsonl")
    monkeypatch.chdir(tmp_path)

    def make(stages=("drope", "recalibrate"), **section):
        section.setdefault("data", {"train": "text.jsonl", "max_length": 64})
        data = {"model": "org/model", "stages": list(stages), "recalibrate": section, "output": {"dir": "run"}}
        stage = open_stages(make_recipe(data))[-1]
        return stage.settings(CONFIG), stage

    return make


# ---- length and schedule ----


@pytest.mark.parametrize(("processes", "steps"), [("1", 8), ("3", 3)])
def test_steps_follow_from_the_tokens(made, monkeypatch, processes, steps):
    """1,900 tokens in steps of 256, the last one whole; processes share a step."""
    monkeypatch.setenv("WORLD_SIZE", processes)
    settings, _ = made(tokens=1900, train={"batch_size": 2, "accumulation": 2})
    assert settings.train.steps == steps


def test_a_block_is_as_long_as_the_trained_context(made):
    settings, _ = made(data={"train": "text.jsonl"}, share=0.5, pretraining_tokens=8192)
    assert (settings.max_length, settings.train.steps) == (512, 2)
    converted = SimpleNamespace(**vars(CONFIG), drope={"trained_length": 128})
    _, stage = made(data={"train": "text.jsonl"})
    assert stage.settings(converted).max_length == 128


def test_warm_up_level_decay(made):
    """transformers' own schedule with what it is told: up in 2 steps, level, down in the last 4 to a tenth."""
    import torch
    from transformers import get_scheduler

    schedule = {"scheduler": "warmup_stable_decay", "warmup_steps": 2, "decay_ratio": 0.4, "min_rate_ratio": 0.1}
    settings, _ = made(train={"steps": 10, **schedule})
    options = schedule_options(settings, DataStats(1, 1, 1))
    assert options == {"num_decay_steps": 4, "min_lr_ratio": 0.1}
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler("warmup_stable_decay", optimiser, 2, 10, options)
    rates = []
    for _ in range(10):
        optimiser.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    assert rates[1:6] == [1.0] * 5
    falling = [0.1 + 0.9 * (1 + math.cos(math.pi * n / 4)) / 2 for n in range(1, 5)]
    assert rates[6:] == pytest.approx(falling)
    assert schedule_options(made(tokens=2560)[0], DataStats(1, 1, 1)) is None
    by_tokens, _ = made(tokens=2560, train={"scheduler": "warmup_stable_decay"})
    assert schedule_options(by_tokens, DataStats(1, 1, 1)) == {"num_decay_steps": 2, "min_lr_ratio": 0.0}


# ---- data ----


def test_no_more_text_is_read_than_is_trained_on(made):
    settings, _ = made(tokens=512)
    data = build_data(settings, byte_tokenizer())
    assert 8 <= len(data.train) <= 12
    assert {len(block) for block in data.train["input_ids"]} == {64}
    everything, _ = made()
    assert len(build_data(everything, byte_tokenizer()).train) > 50


def test_held_out_text_is_not_trained_on(made):
    data = {"train": "text.jsonl", "held_out": 0.2, "max_length": 64}
    built = build_data(made(data=data)[0], byte_tokenizer())
    joined = byte_tokenizer().decode([token for block in built.train["input_ids"] for token in block])
    for block in built.held_out["input_ids"]:
        assert byte_tokenizer().decode(block[:40]) not in joined


def test_replay_of_conversations(made, tmp_path):
    """Chat rows among the text, twice each; only their answers are trained where the recipe says so."""
    save_rows(tmp_path / "rows.jsonl")
    mixture = ["text.jsonl", {"path": "rows.jsonl", "weight": 2}]
    shares = {}
    for train_on in ("all", "assistant"):
        settings, _ = made(data={"train": mixture, "max_length": 64, "train_on": train_on})
        shares[train_on] = build_data(settings, byte_tokenizer()).stats
    text_only = build_data(made()[0], byte_tokenizer()).stats
    rows = shares["all"].tokens - text_only.tokens
    assert rows > 2000
    assert shares["all"].trained_tokens == shares["all"].tokens == shares["assistant"].tokens
    untrained = shares["assistant"].tokens - shares["assistant"].trained_tokens
    # questions and the marks around them: about two thirds of these rows
    assert 0.5 * rows < untrained < rows


def test_too_little_text_names_the_key(made):
    from eaftdrope.errors import DataError

    settings, _ = made(data={"train": "text.jsonl", "max_length": 100_000})
    with pytest.raises(
        DataError, match=r"^recalibrate\.data\.train: the text has [\d,]+ tokens, not enough for one block"
    ):
        build_data(settings, byte_tokenizer())


# ---- recovery ----


def test_what_the_recovery_is_measured_on(made, tmp_path):
    """The recipe's files, else held-out blocks, else the text shipped here; whole blocks, spread over it."""
    tokenizer = byte_tokenizer()

    def rows(held_out=None, **recovery):
        section = {"data": {"train": "text.jsonl", "held_out": held_out, "max_length": 64}}
        settings, stage = made(**section, recovery={"max_tokens": 200, **recovery})
        return stage.recovery(settings, CONFIG, build_data(settings, tokenizer), tokenizer)

    (tmp_path / "own.txt").write_text("a" * 1000)
    own, held_out, shipped = rows(0.2, files=["own.txt"]), rows(0.2), rows()
    assert [len(row.input_ids) for row in (*own.rows, *held_out.rows, *shipped.rows)] == [64] * 9
    assert [probe.tokens for probe in (own, held_out, shipped)] == [189] * 3
    assert set(tokenizer.decode(own.rows[1].input_ids)) == {"a"}
    assert tokenizer.decode(shipped.rows[0].input_ids).startswith("CHAPTER I")


def test_which_model_was_the_original(made):
    dropped = SimpleNamespace(**vars(CONFIG), drope={"trained_length": 512})
    _, stage = made()
    assert stage.original(CONFIG).reference == "org/model"
    _, stage = made(stages=["recalibrate"])
    # a model that was never converted is trained on as it is
    assert stage.original(CONFIG).reference == "org/model"
    with pytest.raises(
        UserError, match=r"^org/model has no rotary embedding, .* Set recalibrate\.recovery\.original to that model\.$"
    ):
        stage.original(dropped)
    _, stage = made(stages=["recalibrate"], recovery={"original": "org/original"})
    assert stage.original(dropped).reference == "org/original"


# ---- a run with what is not the default ----


def test_documents_apart_under_a_gate(tmp_path):
    """The losses of the first step: joined documents see each other, separate ones do not, and the rest is the same."""
    make_staged_project(tmp_path)
    first = {}
    for documents in ("joined", "separate"):
        run = tmp_path / documents
        options = ("recalibrate.loss.gate=eaft", "recalibrate.train.scheduler=warmup_stable_decay")
        ended = train(tmp_path / "short.yaml", f"output.dir={run}", f"recalibrate.data.documents={documents}", *options)
        assert ended.code == 0, ended.out
        assert ("documents separate puts a batch in one row." in ended.out) == (documents == "separate")
        rows = metrics(run / "recalibrate")
        assert [row["step"] for row in rows] == [1, 2, 3, 4]
        assert rows[0]["eaft/gate_mean"] < 1
        first[documents] = rows[0]
        card = (run / "recalibrate" / "README.md").read_text()
        assert "cross-entropy weighted by the gate" in card and "- eaft\n" in card
        assert json.loads((run / "recalibrate" / "recovery.json").read_text())["points"][-1]["step"] == 4
    assert first["joined"]["num_tokens"] == first["separate"]["num_tokens"] == 256
    # a document's first token is predicted from the one before it, or not at all
    assert first["joined"]["eaft/trained_tokens"] == 4 * 63 > first["separate"]["eaft/trained_tokens"]
    assert first["joined"]["eaft/cross_entropy"] != first["separate"]["eaft/cross_entropy"]
