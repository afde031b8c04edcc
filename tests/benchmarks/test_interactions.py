"""The interaction lab: every lab runs in its smallest size, and its intervals and rule are what LOG.md states."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.interactions import toy_training, u2, u3, u5, u8, u8c
from benchmarks.interactions.__main__ import LABS, main, open_lab
from benchmarks.interactions.drawing import draw
from benchmarks.interactions.lab import Comparison, Lab, Piece, Reading
from benchmarks.interactions.results import difference, document, write
from benchmarks.interactions.run import run_lab
from benchmarks.interactions.table import lines
from benchmarks.ttt.toy import task
from eaftdrope.errors import UserError
from eaftdrope.rlm.experts import expert_rows
from eaftdrope.rlm.protocol import parse


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("interactions")


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ("u5_text", "u8c"))) for name in LABS]
)
def test_a_lab_in_its_smallest_size(name, work):
    lab, said = open_lab(name, True), []
    assert run_lab(lab, work, 60, said.append) and len(said) == len(lab.pieces)
    content = document(lab, work, "command")
    assert content["missing"] == [] and len(content["differences"]) == len(lab.compared)
    assert all(np.isfinite([row["mean"], *row["curve"]]).all() for row in content["means"])
    assert len(lines(content)) > len(content["means"])
    if name == "u8":
        assert draw(content, work / "u8.png").read_bytes().startswith(b"\x89PNG")
    # nothing is computed again
    assert run_lab(lab, work, 0, said.append) and len(said) == len(lab.pieces)


def test_the_command(tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"usage: .*u1,u2"):
        main(["u9", "run"])
    with pytest.raises(SystemExit) as ended:
        main(["u7", "run", "--quick", "--minutes", "0", "--work", str(tmp_path)])
    assert not ended.value.code and capsys.readouterr().out == "next: none-42\n"
    # a test of the program stays apart from real pieces
    assert [path.name for path in tmp_path.iterdir()] == ["quick"]
    with pytest.raises(SystemExit):
        main(["u7", "report", "--quick", "--work", str(tmp_path), "--output", str(tmp_path / "results")])
    content = json.loads((tmp_path / "results/u7.json").read_text())
    assert content["pieces"] == [] and len(content["missing"]) == 6


# The rule


def pieces_of(first, second):
    """Pieces of two arms; `first` and `second` have the values per seed."""
    return [
        {"arm": arm, "seed": seed, "readings": {"loss": {"values": values, "curve": []}}}
        for arm, by_seed in (("a", first), ("b", second))
        for seed, values in enumerate(by_seed)
    ]


COMPARED = Comparison("a minus b", ("a", "loss"), ("b", "loss"), 0.1)


def test_an_interval_is_students():
    found = difference(pieces_of([[1.0, 3.0], [2.0, 4.0], [3.0, 5.0]], [[0.0, 2.0], [0.0, 2.0], [0.0, 2.0]]), COMPARED)
    # by seed 1, 2, 3: mean 2, standard deviation 1, 4.303 / sqrt(3) to each side
    assert found["difference"] == 2.0 and found["by_seed"] == [1.0, 2.0, 3.0]
    assert found["interval"] == pytest.approx([2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5], abs=1e-4)
    assert found["standard_error"] == 0.0 and found["verdict"] == "no difference shown"


@pytest.mark.parametrize(
    ("first", "verdict"),
    [
        ([[1.0], [1.1], [1.2]], "higher"),
        ([[-1.0], [-1.1], [-1.2]], "lower"),
        # steady, but below the smallest effect
        ([[0.05], [0.05], [0.051]], "no difference shown"),
        ([[1.0], [1.1], [-0.1]], "no difference shown"),
    ],
)
def test_what_counts(first, verdict):
    assert difference(pieces_of([one * 2 for one in first], [[0.0, 0.0]] * 3), COMPARED)["verdict"] == verdict


def test_one_seed_is_no_comparison():
    assert difference(pieces_of([[1.0, 1.0]], [[0.0, 0.0]]), COMPARED) is None


def counting_lab(calls, settings):
    def measure(weights):
        calls.append(weights)
        return {"loss": Reading([1.0, 2.0])}

    pieces = [Piece("arm", seed, settings, measure) for seed in (1, 2)]
    return Lab("test", "Question?", "Size.", "nats", "axis", pieces, [], {})


def test_a_stopped_run_resumes_and_other_settings_are_refused(tmp_path):
    calls, said = [], []
    lab = counting_lab(calls, {"steps": 1})
    assert not run_lab(lab, tmp_path, 0, said.append) and said == ["next: arm-1"] and not calls
    assert run_lab(replace(lab, pieces=lab.pieces[:1]), tmp_path, 1, said.append)
    assert run_lab(lab, tmp_path, 1, said.append) and len(calls) == 2
    path = write(document(lab, tmp_path, "command"), tmp_path / "test.json")
    assert [piece["readings"]["loss"]["values"] for piece in json.loads(path.read_text())["pieces"]] == [[1.0, 2.0]] * 2
    with pytest.raises(UserError, match="other settings"):
        run_lab(counting_lab(calls, {"steps": 2}), tmp_path, 1, said.append)


# The texts


def test_the_domain_has_one_table():
    text_BT = np.concatenate([u2.domain_batch(0, step, 8) for step in range(4)])
    successors = [np.bincount(text_BT[:, 1:][text_BT[:, :-1] == symbol], minlength=24) for symbol in range(24)]
    shares = [counts.max() / counts.sum() for counts in successors]
    assert min(shares) > task.FOLLOWS - 0.1


def test_a_contradicted_text_changes_half_of_the_successors():
    text_BT, changed_BS = u5.contradicted(64)
    assert text_BT.shape == (64, task.LENGTH) and (changed_BS.sum(1) == 12).all()
    half, agreed = task.LENGTH // 2, {True: [], False: []}
    for text_T, changed_S in zip(text_BT, changed_BS):
        for symbol in range(24):
            before, after = (
                np.bincount(part[1:][part[:-1] == symbol], minlength=24) for part in (text_T[:half], text_T[half:])
            )
            if before.max() > 2 and after.max() > 2:
                agreed[bool(changed_S[symbol])].append(before.argmax() == after.argmax())
    assert np.mean(agreed[True]) < 0.05 and np.mean(agreed[False]) > 0.95


def test_planted_pairs():
    (row,) = u8.sequences(np.random.default_rng(0), np.array([4]))
    start = u8._WRITTEN + u8._GAP
    written = {(key, value) for key, value in row[u8._WRITTEN - 16 : u8._WRITTEN].reshape(-1, 2).tolist()}
    queried = [tuple(pair) for pair in row[start : start + 8].reshape(-1, 2).tolist()]
    assert len(written) == 4 and sorted(queried) == sorted(written)
    assert (row[: u8._WRITTEN - 16] == u8.BLANK).all() and (row[u8._WRITTEN : start] == u8.BLANK).all()
    labels = u8._labels(torch.from_numpy(row)[None])[0]
    assert ((labels != -100).numpy() == ((row >= u8.KEYS) & (row < u8.BLANK))).all()


def test_a_thought_is_before_each_block_that_is_trained():
    rows, plain = u8c.rows_with_thoughts(12), list(expert_rows(12))
    thoughts = []
    for row, other in zip(rows, plain, strict=True):
        for message, before in zip(row["messages"], other["messages"], strict=True):
            trained = message["role"] == "assistant" and message.get("weight") != 0
            assert trained or message == before
            if trained:
                thought, _, rest = message["content"].partition("\n</think>\n")
                assert rest == before["content"] and parse(message["content"]) == parse(rest)
                thoughts.append(thought.removeprefix("<think>\n"))
    assert len(thoughts) == 24 and thoughts[0] == "I look for the lines with lizard."


def test_policies_differ_in_what_a_call_begins_with():
    model, start = toy_training.FIRST.new(0, "rope").eval(), list(range(20))
    passage = [int(n) for n in np.random.default_rng(0).integers(24, size=40)]
    prompt = [{"content": f"{' '.join(map(str, passage))} ? 3"}]
    readers = {policy: u3.LearningReader(model, policy, start) for policy in u3.POLICIES}
    for reader in readers.values():
        reader.generate([prompt, prompt], 1)
    positions = {policy: reader.state.position for policy, reader in readers.items()}
    # a fork begins after the start and leaves it; what is accumulated has both passages, and no question
    assert positions == {"reset": 0, "fork": 20, "accumulate": 80}


def test_a_majority():
    assert u3._majority(["3", "7", "7", "2"]) == "7" and u3._majority(["9", "4"]) == "4"
