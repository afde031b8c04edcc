"""The miniature's training, evaluation and pieces: the meaning of its numbers, not their values."""

import csv
import dataclasses
import json

import pytest
import torch

from benchmarks.command import run_typer
from benchmarks.miniature import __main__ as command
from benchmarks.miniature import data
from benchmarks.miniature.__main__ import miniature
from benchmarks.miniature.arms import QUICK, Group, MiniatureSettings, groups, read_pieces
from benchmarks.miniature.evaluate import View, fit_slope, measure, text
from benchmarks.miniature.results import turning_share
from benchmarks.miniature.runner import prepare, run
from benchmarks.miniature.train import Training, TrainingRecipe, branch_rate, build, model_config, trunk_rate
from benchmarks.miniature.worker import Worker
from eaftdrope.errors import UserError

TINY = MiniatureSettings((40.0,), seeds=1, steps=4, batch=2, sequences=2, fit=2, adamw_seeds=0, compiled=False)


def new_recipe(muon=True, theta=40.0):
    return TrainingRecipe(theta, seed=3, steps=8, batch=2, muon=muon, compiled=False)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = build(model_config(new_recipe()), "sdpa").eval()
    # attention that matters: at the usual initialisation it is next to uniform
    for layer in made.model.layers:
        layer.self_attn.q_norm.weight.data.mul_(4)
        layer.self_attn.v_proj.weight.data.mul_(10)
    return made


# training


def test_rates():
    assert [trunk_rate(step, 1000) for step in (0, 39, 500, 899, 950, 999)] == [1 / 40, 1, 1, 1, 0.5, 0.01]
    assert branch_rate(900, 900, 1000) == pytest.approx(1 / 3)
    assert branch_rate(950, 900, 1000) == 0.5 and branch_rate(999, 900, 1000) == 0.01


@pytest.mark.parametrize("muon", [True, False])
def test_a_run_that_goes_on_from_a_snapshot_is_the_run_that_was_not_stopped(muon, tmp_path):
    whole = Training(new_recipe(muon))
    whole.run_to(1)
    torch.save(whole.snapshot(), tmp_path / "snapshot.pt")
    whole.run_to(2)
    continued = Training(new_recipe(muon))
    continued.restore(torch.load(tmp_path / "snapshot.pt"))
    continued.run_to(2)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, continued.model.state_dict()[name]), name


def test_training_learns_and_both_optimisers_have_all_weights():
    for muon in (True, False):
        training = Training(new_recipe(muon))
        held = sum(
            weight.numel()
            for optimiser, _ in training.optimisers
            for group in optimiser.param_groups
            for weight in group["params"]
        )
        assert held == sum(weight.numel() for weight in training.model.parameters())
    before = training.model.state_dict()["lm_head.weight"].clone()
    training.run_to(1)
    assert not torch.equal(before, training.model.state_dict()["lm_head.weight"])


def test_a_branch_has_no_rotation():
    tokens, places = torch.arange(1, 21)[None], torch.arange(20)[None]
    # given as a mapping it is taken as it is: transformers reads gaps between places as separate documents
    mask = {"full_attention": None}
    for dropped_at, same in ((None, False), (4, True), (0, True)):
        model = Training(new_recipe(), dropped_at).model.model
        model.set_attn_implementation("sdpa")
        with torch.no_grad():
            near, far = (
                model(tokens, attention_mask=mask, position_ids=places * step).last_hidden_state for step in (1, 7)
            )
        assert torch.equal(near, far) is same


# evaluation


def test_at_the_training_length_a_stretch_is_rope_itself(model):
    batch = text(0, 1, 4)
    cells = [measure(View(model, method), batch, 1) for method in ("rope", "pi", "ntk", "yarn")]
    assert all(cell == cells[0] for cell in cells)
    assert measure(View(model, "nope"), batch, 1) != cells[0]


def test_beyond_it_every_arm_is_another(model):
    batch = text(0, 4, 4)
    losses = {
        method: measure(View(model, method), batch, 4)["answer_loss"]
        for method in ("rope", "pi", "ntk", "yarn", "nope")
    }
    assert len(set(losses.values())) == 5


def test_a_crop_sees_the_last_training_length_alone(model):
    batch = text(0, 4, 4)
    changed = batch.tokens_BT.clone()
    changed[:, 1:-63] = changed[:, 1:-63].flip(1)
    other = data.Batch(changed, batch.filler_BT, batch.answer_BT, batch.depth_BT)
    crop, rope = View(model, "rope", crop=True), View(model, "rope")
    assert measure(crop, batch, 4) == measure(crop, other, 4)
    assert measure(rope, batch, 4) != measure(rope, other, 4)


def test_a_temperature_is_taken_back(model):
    batch = text(0, 2, 4)
    plain = measure(View(model, "rope"), batch, 2)
    hot = measure(View(model, "rope"), batch, 2, slope=1.0)
    assert hot["beta"] == 1.6931 and hot["answer_loss"] != plain["answer_loss"]
    assert measure(View(model, "rope"), batch, 2) == plain


def test_the_fitted_slope_is_the_best_of_those_tried(model):
    slope, tried = fit_slope(View(model, "rope"), 0, 2, 4)
    assert tried[f"{slope:g}"] == min(tried.values())
    losses = list(tried.values())
    assert next(iter(tried)) == "0" and all(losses[i] <= min(losses[: i + 1]) for i in range(len(losses) - 1))


# pieces


def test_groups_are_seed_by_seed_and_cover_what_is_promised():
    settings = MiniatureSettings((40.0, 10000.0), 2, 100, 8, 8, 8, 1, False)
    found = groups(settings)
    assert [group.name for group in found] == [
        "theta40-muon-seed0",
        "theta10000-muon-seed0",
        "nope-muon-seed0",
        "theta40-muon-seed1",
        "theta10000-muon-seed1",
        "nope-muon-seed1",
        "theta40-adamw-seed0",
        "theta10000-adamw-seed0",
    ]
    assert "drope-50" in found[1].arms and "drope-50" not in found[0].arms


def test_only_a_missing_piece_is_made_again(tmp_path):
    prepare(tmp_path, TINY)
    group = Group(40.0, 0, "muon", ("rope", "crop", "drope-25"))
    Worker(group, TINY, tmp_path).run()
    pieces, missing = read_pieces(tmp_path, [group])
    assert not missing and [piece["arm"] for piece in pieces] == list(group.arms)
    assert list((tmp_path / "snapshots").iterdir()) == []
    kept = group.piece(tmp_path, "rope").stat().st_mtime_ns
    group.piece(tmp_path, "drope-25").unlink()
    assert read_pieces(tmp_path, [group])[1] == ["theta40-muon-seed0-drope-25"]
    Worker(group, TINY, tmp_path).run()
    again = read_pieces(tmp_path, [group])[0]
    assert group.piece(tmp_path, "rope").stat().st_mtime_ns == kept
    # the same numbers: everything follows from the seed
    assert [piece["fitted"] for piece in again] == [piece["fitted"] for piece in pieces]


def test_a_folder_of_other_settings_is_refused(tmp_path):
    prepare(tmp_path, TINY)
    prepare(tmp_path, TINY)
    with pytest.raises(UserError, match=r"other settings \(thetas, steps, batch\)"):
        prepare(tmp_path, MiniatureSettings((99.0,), 1, 9, 5, 2, 2, 0, False))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        prepare(tmp_path / "file", TINY)


def test_without_a_compiler_it_says_so_before_it_starts(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"training step is compiled, and .*no-such-compiler"):
        prepare(tmp_path / "new", MiniatureSettings((40.0,), 1, 9, 5, 2, 2, 0, True))
    assert not (tmp_path / "new").exists()


def test_a_worker_that_dies_is_named_and_the_rest_goes_on(tmp_path, monkeypatch):
    prepare(tmp_path, TINY)
    said = []
    monkeypatch.setattr("sys.executable", "false")
    failures = run(tmp_path, TINY, 2, said.append)
    assert failures == said and len(failures) == 2
    assert any(line.startswith("nope-muon-seed0 failed (exit status 1)") for line in failures)


@pytest.mark.parametrize("thetas", ["", "forty", "40,0.5"])
def test_wrong_thetas_are_refused(thetas):
    with pytest.raises(UserError, match="pass numbers above 1"):
        miniature(thetas=thetas)


def test_thetas_are_comparable_by_how_many_pairs_turn():
    assert turning_share(40.0) == 11 / 16
    assert turning_share(10000.0) == 5 / 16
    # Llama 2 and 3, and SmolLM-360M
    assert turning_share(1e4, 4096, 128) == 46 / 64
    assert turning_share(5e5, 8192, 128) == 35 / 64
    assert turning_share(1e4, 2048, 64) == 21 / 32


@pytest.mark.end_to_end
def test_quick_from_end_to_end(tmp_path, capsys, monkeypatch):
    # half a minute becomes two without instructions for bfloat16, in which Muon computes
    monkeypatch.setattr(command, "QUICK", dataclasses.replace(QUICK, steps=8, batch=2))
    with pytest.raises(SystemExit) as stop:
        run_typer(miniature, ["--quick", "--output", str(tmp_path / "out")])
    assert not stop.value.code and "theta 40: RoPE is NOT saturated at 1x" in capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "miniature.json").read_text())
    expected = groups(QUICK)[0].arms + groups(QUICK)[1].arms
    assert [piece["arm"] for piece in result["pieces"]] == list(expected)
    assert result["missing"] == result["failures"] == []
    assert result["cpu_seconds"]["all"] > 0
    with (tmp_path / "out" / "miniature.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(expected) * 5 * 2
    row = next(
        row
        for row in rows
        if (row["arm"], row["scale"], row["dense"], row["temperature"]) == ("yarn", "8", "0", "plain")
    )
    cell = next(piece for piece in result["pieces"] if piece["arm"] == "yarn")["plain"]["8"]
    assert float(row["accuracy"]) == cell["accuracy"] and float(row["quarter_1"]) == cell["by_quarter"][0]
    assert (tmp_path / "out" / "miniature.png").read_bytes().startswith(b"\x89PNG")
