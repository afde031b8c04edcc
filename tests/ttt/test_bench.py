"""`eaftdrope bench ttt`: every arm is measured in turn, on what it claims to be measured on."""

import json

import pytest
import torch

from eaftdrope.cli import main
from eaftdrope.ttt import cost
from eaftdrope.ttt.cost import FIRST_ORDER, FULL, PLAIN, TTT, WINDOW, CostShape, ReadingCost, crossover

TINY = CostShape(blocks=2, hidden=64, width=32, vocabulary=64, tokens=16, window=8, chunk=4, fast_blocks=1)


def numbered(monkeypatch, arms):
    """Let every call take as many seconds as its place in the round, from 1."""
    ticks = iter(range(10_000))

    def seconds(call, device):
        call()
        return float(next(ticks) % arms + 1)

    monkeypatch.setattr(cost, "_seconds", seconds)


def test_every_arm_of_training_has_its_ratio_to_the_plain_window(monkeypatch):
    numbered(monkeypatch, 6)
    steps = cost.training_costs(TINY, "cpu", repeat=3)
    assert [(step.arm, step.seconds, step.ratio) for step in steps] == [
        (PLAIN, 1.0, 1.0),
        (FIRST_ORDER, 2.0, 2.0),
        ("horizon 2", 3.0, 3.0),
        ("second order", 4.0, 4.0),
        ("second order, checkpointed", 5.0, 5.0),
        ("first order, checkpointed", 6.0, 6.0),
    ]


def test_reading_leaves_caches_and_state_as_they_were(monkeypatch):
    numbered(monkeypatch, 1)
    read, seen = cost._read, []

    def watched(model, cache, ids):
        before = cache.get_seq_length()
        read(model, cache, ids)
        seen.append((type(model).__name__, before, ids.shape[1], getattr(cache, "updates", None)))

    monkeypatch.setattr(cost, "_read", watched)
    found = cost.reading_costs(TINY, (40, 16), "cpu", repeat=2)
    assert [row.position for row in found] == [16, 40]
    # what a state holds does not grow
    assert found[1].state_bytes == found[0].state_bytes
    # one call before the two that count; the chunks of the arms without TTT are calls of their own
    for position in (16, 40):
        full = [call for call in seen if call[1:3] == (position, 4)]
        assert len(full) == 6
        # with TTT: 16 tokens after position + 1, four chunks further
        ttt = [call for call in seen if call[1:3] == (position + 1, 16)]
        assert [call[3] for call in ttt] == [position // 4 + 4] * 3
        # a single token learns nothing, the one after a complete chunk does
        assert {call[3] for call in seen if call[1:3] == (position + 1, 1)} == {position // 4}
        assert {call[3] for call in seen if call[1:3] == (position + 4, 1)} == {position // 4 + 1}


def test_noise_is_as_long_as_what_was_read():
    full = TINY.model("cpu")
    cache = cost._noise(full, TINY, 20, "cpu")
    assert [layer.keys.shape for layer in cache.layers] == [torch.Size([1, 1, 20, 64])] * 2
    window = cost.sliding(TINY.model("cpu"), 8)
    cache = cost._noise(window, TINY, 20, "cpu")
    assert [layer.keys.shape for layer in cache.layers] == [torch.Size([1, 1, 7, 64])] * 2
    assert cache.get_seq_length() == 20


@pytest.mark.parametrize(
    ("full", "expected"),
    [((1.0, 1.5, 4.0), 1000 + 1000 * 0.5 / 2.5), ((3.0, 4.0, 5.0), 0.0), ((1.0, 1.0, 1.5), None)],
)
def test_the_crossover_lies_between_two_positions(full, expected):
    rows = [
        ReadingCost(position, {FULL: seconds, WINDOW: 1.0, TTT: 2.0}, 2.0, {}, 0.0, 0)
        for position, seconds in zip((500, 1000, 2000), full, strict=True)
    ]
    assert crossover(rows) == (None if expected is None else pytest.approx(expected))


def test_the_command_prints_both_tables_and_writes_them(monkeypatch, tmp_path, capsys):
    steps = [cost.StepCost(PLAIN, 1.0, 1.0, 2_000_000), cost.StepCost(FIRST_ORDER, 1.25, 1.25, None)]
    row = ReadingCost(512, {FULL: 0.001, WINDOW: 0.002, TTT: 0.003}, 1.5, {FULL: 0.1, WINDOW: 0.2, TTT: 0.3}, 0.4, 5)
    monkeypatch.setattr(cost, "training_costs", lambda *_: steps)
    monkeypatch.setattr(cost, "reading_costs", lambda *_: [row])
    file = tmp_path / "cost.json"
    with pytest.raises(SystemExit) as stop:
        main(["bench", "ttt", "--quick", "--device", "cpu", "--output", str(file)])
    out = capsys.readouterr().out
    assert stop.value.code in (0, None)
    lines = [line.split() for line in out.splitlines()]
    assert ["plain", "window", "1.000", "1.00", "2"] in lines and ["first", "order", "1.250", "1.25", "-"] in lines
    assert ["512", "1.0", "2.0", "3.0", "1.50", "100.0", "200.0", "300.0", "400.0"] in lines
    assert "with full attention at none of these positions." in out
    document = json.loads(file.read_text())
    assert document["reading"]["rows"][0]["chunk_seconds"][TTT] == 0.003
    assert document["training"]["shape"]["tokens"] == 512 and document["about"]["repeat"] == 7
