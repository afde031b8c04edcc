"""The toy's pieces, arms and comparisons: the meaning of its numbers, not their values."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.ttt.toy import run as toy_run
from benchmarks.ttt.toy.arms import ARMS, QUICK, Arm, new_model, stock_nll
from benchmarks.ttt.toy.report import BUDGETS, at_budgets, differences, means
from benchmarks.ttt.toy.run import ToyRun
from eaftdrope.errors import UserError

WINDOW = QUICK[0]


def new_run(folder, arms=(WINDOW,)):
    return ToyRun(
        folder, tuple(replace(arm, steps=min(arm.steps, 1)) for arm in arms), seeds=(42,), sequences=2, validation=1
    )


def test_a_finished_piece_is_not_computed_again(tmp_path, monkeypatch):
    (first,) = new_run(tmp_path).run(lambda line: None)
    assert len(first["readings"]["as trained"]["by_bin"]) == 8
    monkeypatch.setattr(toy_run, "train", None)
    assert new_run(tmp_path).run(lambda line: None) == [json.loads(json.dumps(first))]
    # the weights are kept, too: a lost piece costs its reading only
    (tmp_path / "pieces" / "window-42.json").unlink()
    assert new_run(tmp_path).run(lambda line: None) == [first]


def test_a_piece_of_other_settings_is_refused(tmp_path):
    new_run(tmp_path).run(lambda line: None)
    other = ToyRun(tmp_path, (replace(WINDOW, rate=0.1),), seeds=(42,), sequences=2, validation=1)
    with pytest.raises(UserError, match="other settings"):
        other.run(lambda line: None)


def test_the_window_is_one():
    torch.manual_seed(0)
    model = new_model("window")
    tokens = torch.randint(24, (1, 120))
    far = tokens.clone()
    # three layers of 16 tokens reach 46: token 60 is out of view from position 106 on
    far[0, 60] = (far[0, 60] + 1) % 24
    with torch.no_grad():
        apart = (stock_nll(model, tokens) - stock_nll(model, far))[0].abs()
    assert apart[105] > 0 and (apart[106:] == 0).all()


def test_the_models_are_of_about_the_same_size():
    sizes = [sum(weight.numel() for weight in new_model(kind).parameters()) for kind in ("window", "full", "mamba2")]
    assert sizes[0] == sizes[1] == 71_904 and abs(sizes[2] / sizes[0] - 1) < 0.05


def test_arms_have_their_own_names():
    assert len({arm.name for arm in ARMS}) == len(ARMS)


def new_piece(arm, seed, by_sequence):
    reading = {"nll": float(np.mean(by_sequence)), "by_bin": [1.0, seed - 41.0], "by_sequence": by_sequence}
    curve = [{"step": 10 * n, "cpu_seconds": 20.0 * n, "nll": 5.0 - n - (seed == 43)} for n in range(1, 4)]
    training = {"cpu_seconds": 2.0 * (seed - 41), "curve": curve}
    settings = {"steps": 3}
    return {"arm": arm, "seed": seed, "settings": settings, "training": training, "readings": {"as trained": reading}}


def test_means_and_paired_differences():
    pieces = [
        new_piece("first", 42, [1.0, 2.0, 3.0]),
        new_piece("second", 42, [0.5, 1.0, 1.5]),
        new_piece("first", 43, [3.0, 4.0, 5.0]),
        new_piece("second", 43, [2.5, 4.0, 5.5]),
        new_piece("second", 44, [9.0, 9.0, 9.0]),
    ]
    first, second = means(pieces, threshold=2.5)
    assert (first["nll"], first["seeds"], first["cpu_seconds"], first["by_bin"]) == (3.0, [42, 43], 3.0, [1.0, 1.5])
    # sequences 2, 3, 4 in the mean over seeds; seeds 2 and 4
    assert first["standard_error"] == pytest.approx(1 / 3**0.5, abs=1e-4)
    assert first["spread_over_seeds"] == pytest.approx(2**0.5, abs=1e-4)
    # 4, 3, 2 and 3, 2, 1 at steps 10, 20, 30
    assert first["reached"] == {"step": 20, "cpu_seconds": 40.0}
    assert means(pieces, threshold=1.5)[0]["reached"] is None
    assert second["seeds"] == [42, 43, 44]
    (line,) = differences(pieces)
    # only the seeds of both; by sequence .5, .5, .5
    assert (line["difference"], line["standard_error"], line["by_seed"]) == (0.5, 0.0, [1.0, 0.0])


def test_an_arm_stays_within_its_seeds(tmp_path):
    arms = (Arm("all", "", "full", 1), Arm("one", "", "full", 1, seeds=1))
    names = [(arm.name, seed) for arm, seed in ToyRun(tmp_path, arms, (42, 43), 2, 1).jobs()]
    assert names == [("all", 42), ("one", 42), ("all", 43)]


def test_before_training_ttt_reads_as_the_window_model(tmp_path):
    run = new_run(tmp_path)
    torch.manual_seed(0)
    window = new_model("window")
    for init in ("copied", "random"):
        model = new_model("full")
        model.load_state_dict(window.state_dict())
        toy_run.with_ttt(model, Arm("", "", "ttt", init=init), seed=1)
        on, off = (run._read(toy_run.with_changes(model, lr=lr), Arm("", "", "ttt"), run.test_BT) for lr in (1.0, 0.0))
        plain = run._read(window, WINDOW, run.test_BT)
        torch.testing.assert_close(off, plain, rtol=0, atol=1e-5)
        # the first chunk is read before anything is learned, and position 16 is its last target
        torch.testing.assert_close(on[:, :16], plain[:, :16], rtol=0, atol=1e-5)
        assert (on[:, 16:] - plain[:, 16:]).abs().max() > 0.01
        gate, up, down = model.ttt.w0()
        own = model.model.layers[-1].mlp
        assert torch.equal(gate, own.gate_proj.weight) == torch.equal(up, own.up_proj.weight) == (init == "copied")
        assert not down.any()


def test_naive_ttt_has_the_inner_rate_that_is_best_on_validation_sequences(tmp_path):
    arms = (WINDOW, Arm("naive", "", "naive", init="copied"))
    _, piece = new_run(tmp_path, arms).run(lambda line: None)
    sweep = piece["validation_by_rate"]
    assert sweep[f"{piece['inner_rate']:g}"] == min(sweep.values()) and len(set(sweep.values())) == len(sweep)


def test_equal_budgets_are_read_off_the_curves():
    found = at_budgets([new_piece("first", seed, [1.0]) for seed in (42, 43)], "cpu_seconds")["first"]
    # the curves have points at 20, 40 and 60 CPU seconds, with losses 4, 3, 2 and 3, 2, 1
    at = dict(zip(BUDGETS["cpu_seconds"], found, strict=True))
    assert at[30] == {"mean": 3.0, "lowest": 2.5, "highest": 3.5}
    assert at[60] == {"mean": 1.5, "lowest": 1.0, "highest": 2.0}
    assert at[10] is at[100] is None
