"""A state is exact: saved, loaded, forked and reset, in this process and in another."""

import dataclasses
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from eaftdrope.ttt import TTTState, learned, load_ttt
from tests import forked
from tests.ttt.definition import read_row
from tests.ttt.tiny import CHUNK, WINDOWS, random_ids, read, stock_model, tiny

FLOAT = torch.float32


def after(model, ids, count, piece=4):
    """A state that has read the first `count` tokens."""
    state = TTTState(model)
    if count:
        read(model, ids[:, :count], piece, state)
    return state


@pytest.mark.parametrize("count", [0, 3, 5, 6, 13])
@pytest.mark.parametrize("window", WINDOWS)
def test_saved_and_loaded_it_continues_bit_for_bit(tmp_path, window, count):
    """Ten tokens on, one by one: across two updates."""
    model, ids = WINDOWS[window](dtype=FLOAT), random_ids()
    state = after(model, ids, count)
    state.save(tmp_path / "state.safetensors")
    loaded = TTTState.load(tmp_path / "state.safetensors", model)
    for name in ("position", "updates", "pending", "nbytes"):
        assert getattr(loaded, name) == getattr(state, name), name
    following = ids[:, count : count + 10]
    assert torch.equal(read(model, following, 1, loaded), read(model, following, 1, state))
    assert loaded.updates == state.updates == (count + 9) // CHUNK


def test_a_fork_is_not_disturbed_by_its_parent_nor_the_parent_by_it():
    model, ids = tiny(dtype=FLOAT), random_ids()
    other = random_ids(seed=5)
    expected = read(model, ids[:, 13:], 2, after(model, ids, 13))
    state = after(model, ids, 13)
    fork, second = state.fork(), state.fork()
    read(model, other[:, :9], 3, fork)
    assert torch.equal(read(model, ids[:, 13:], 2, state), expected)
    assert torch.equal(read(model, ids[:, 13:], 2, second), expected)
    assert (fork.position, state.position) == (22, 23)


def test_reset_is_a_fresh_state():
    model, ids = tiny(dtype=FLOAT), random_ids()
    state = after(model, ids, 13)
    state.reset()
    assert (state.position, state.updates, state.pending) == (0, 0, 0)
    assert torch.equal(read(model, ids, 4, state), read(model, ids, 4))


def test_reading_leaves_the_model_as_it_was():
    model, ids = tiny(dtype=FLOAT, layout="in_place"), random_ids()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        expected = model(ids).logits
    read(model, ids, 4)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)


def test_memory_does_not_grow_with_what_was_read():
    """32,768 tokens, 64 times the trained length."""
    model = tiny(dtype=FLOAT, window=512, chunk=512, fast_blocks=1)
    state, sizes = TTTState(model), []
    for part in random_ids(1, 32_768).split(4096, dim=1):
        logits = read(model, part, 4096, state)
        sizes.append(state.nbytes)
    assert state.position == 32_768 and state.updates == 63 and logits.isfinite().all()
    assert len(set(sizes)) == 1
    # what was learned and the chunk under way, once; keys and values of the window, of the fast block twice
    weights = sum(weight.numel() for weight in model.ttt.w0())
    keys_and_values = 2 * (512 - 1 + 2) * 8 * (4 + 1)
    assert sizes[0] == 4 * (weights + 512 * 16 + keys_and_values) + 8 * 512


def test_a_chosen_row_of_a_state_is_the_state_of_that_row():
    model, ids = tiny(), random_ids(3)
    state = after(model, ids, 13)
    state.batch_select_indices(torch.tensor([2, 0]))
    expected = read(model, ids[[2, 0], :], 4)[:, 13:]
    assert (read(model, ids[[2, 0], 13:], 3, state) - expected).abs().max() < 1e-12
    state = after(model, ids[:2], 13)
    state.batch_repeat_interleave(2)
    state.reorder_cache(torch.tensor([3, 0, 0]))
    expected = read(model, ids[[1, 0, 0], :], 4)[:, 13:]
    assert (read(model, ids[[1, 0, 0], 13:], 3, state) - expected).abs().max() < 1e-12


def test_a_state_is_not_cropped():
    model, ids = tiny(), random_ids()
    state = after(model, ids, 13)
    with pytest.raises(ValueError, match="fork"):
        state.crop(5)


@pytest.mark.parametrize("layout", ["prime", "in_place"])
def test_within_learned_the_model_starts_with_what_a_state_learned(layout):
    model, ids = tiny(layout=layout), random_ids(1)
    probe = random_ids(1, 12, seed=9)
    _, deltas = read_row(model, ids[0, :13])
    with torch.no_grad():
        before = model(probe).logits
        with learned(model, after(model, ids, 13)):
            inside = model(probe).logits
            (pieces,) = (read(model, probe, 3),)
        assert torch.equal(model(probe).logits, before)
        weights = model.ttt.w0()
        for weight, delta in zip(weights, deltas[2]):
            weight.add_(delta)
        expected = model(probe).logits
    assert (inside - expected).abs().max() < 1e-12
    assert (pieces - expected).abs().max() < 1e-12
    assert (inside - before).abs().max() > 1e-3


WRITER = """
import sys, torch
from tests.ttt.tiny import random_ids, read, stock_model, tiny
from eaftdrope.ttt import TTTState
folder = sys.argv[1]
model, ids = tiny(dtype=torch.float32), random_ids(1, 200)
model.save_pretrained(folder)
state = TTTState(model)
read(model, ids[:, :98], 40, state)
state.save(folder + "/state.safetensors")
torch.save(read(model, ids[:, 98:], 1, state), folder + "/expected.pt")
"""
READER = """
import sys, torch
from tests.ttt.tiny import random_ids, read
from eaftdrope.ttt import TTTState, load_ttt
folder = sys.argv[1]
model = load_ttt(folder, dtype=torch.float32)
state = TTTState.load(folder + "/state.safetensors", model)
assert state.position == 98, state.position
torch.save(read(model, random_ids(1, 200)[:, 98:], 1, state), folder + "/found.pt")
"""


def test_another_process_predicts_the_same_to_the_last_bit(tmp_path):
    for program in (WRITER, READER):
        ended = forked.run_source(program, tmp_path)
        assert ended.code == 0, ended.err[-3000:]
    expected, found = (torch.load(tmp_path / name) for name in ("expected.pt", "found.pt"))
    assert expected.shape == (1, 102, 31) and torch.equal(found, expected)


# What is refused


def saved(model, folder):
    state = after(model, random_ids(), 13)
    state.save(folder / "state.safetensors")
    return folder / "state.safetensors"


def test_a_state_of_another_model_is_refused(tmp_path):
    file = saved(tiny(dtype=FLOAT), tmp_path)
    others = {
        "slow weights": lambda model: model.model.layers[0].self_attn.q_proj.weight,
        "W0": lambda model: model.ttt.primes[1].down,
        "norm of a prime": lambda model: model.ttt.primes[0].norm.weight,
        "head": lambda model: model.lm_head.weight,
    }
    for name, choose in others.items():
        model = tiny(dtype=FLOAT)
        with torch.no_grad():
            choose(model).view(-1)[3] += 0.01
        with pytest.raises(ValueError, match="model"):
            TTTState.load(file, model)
            pytest.fail(name)
    assert TTTState.load(file, tiny(dtype=FLOAT)).position == 13


@pytest.mark.parametrize(
    "change", [{"window": 7}, {"sink": 1}, {"chunk": 4}, {"layout": "in_place"}, {"fast_blocks": 1}], ids=str
)
def test_a_state_of_other_shapes_is_refused(tmp_path, change):
    file = saved(tiny(dtype=FLOAT), tmp_path)
    with pytest.raises(ValueError):
        TTTState.load(file, tiny(dtype=FLOAT, **change))


def test_a_state_of_another_class_is_refused(tmp_path):
    file = saved(tiny("qwen3", dtype=FLOAT), tmp_path)
    for other in (tiny("llama", dtype=FLOAT), tiny("qwen3", dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="another model"):
            TTTState.load(file, other)


@pytest.mark.parametrize(
    "change",
    [{"rope_parameters": {"rope_type": "default", "rope_theta": 1e3}}, {"max_position_embeddings": 12}],
    ids=str,
)
def test_a_state_of_the_same_weights_with_other_positions_is_refused(tmp_path, change):
    """As DroPE and longer contexts have them: keys that were rotated in another way do not fit."""
    file = saved(tiny(dtype=FLOAT), tmp_path)
    with pytest.raises(ValueError, match="another model: the rotary embedding"):
        TTTState.load(file, tiny(dtype=FLOAT, shape=change))


def test_learning_options_may_change_between_save_and_load(tmp_path):
    model = tiny(dtype=FLOAT)
    file = saved(model, tmp_path)
    model.ttt.config = dataclasses.replace(model.ttt.config, lr=0.1, clip=0.5, horizon=1)
    assert TTTState.load(file, model).updates == 2


def test_damaged_and_foreign_files_are_refused(tmp_path):
    model = tiny(dtype=FLOAT)
    file = saved(model, tmp_path)
    whole = file.read_bytes()
    damaged = tmp_path / "damaged.safetensors"
    for content in (b"", whole[:100], whole[: len(whole) // 2], b"{" * 50):
        damaged.write_bytes(content)
        with pytest.raises(ValueError, match="damaged"):
            TTTState.load(damaged, model)
    save_file({"x": torch.zeros(3)}, damaged)
    with pytest.raises(ValueError):
        TTTState.load(damaged, model)
    with pytest.raises((ValueError, FileNotFoundError), match="nowhere"):
        TTTState.load(tmp_path / "nowhere", model)


def test_another_version_is_refused(tmp_path):
    model = tiny(dtype=FLOAT)
    file = saved(model, tmp_path)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file(load_file(file), file, metadata={**metadata, "version": "999"})
    with pytest.raises(ValueError, match="999"):
        TTTState.load(file, model)


def test_a_save_that_is_stopped_leaves_the_old_file_only(tmp_path, monkeypatch):
    model = tiny(dtype=FLOAT)
    file = saved(model, tmp_path)
    old = file.read_bytes()

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        after(model, random_ids(), 20).save(file)
    assert file.read_bytes() == old and [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_state_saved_from_a_folder_names_what_it_is(tmp_path):
    """The file is a plain safetensors file: no code runs when it is loaded."""
    model = tiny(dtype=FLOAT)
    with safe_open(saved(model, tmp_path), "pt") as opened:
        assert len(opened.keys()) > 0
        assert json.dumps(opened.metadata())


def test_a_state_belongs_to_one_model():
    """A state of one model that is passed to another is refused, even one of the same shape."""
    state = after(tiny(dtype=FLOAT), random_ids(), 13)
    with pytest.raises(ValueError, match="another model"):
        read(tiny(dtype=FLOAT), random_ids(), 4, state)


def test_loading_a_folder_without_ttt_is_an_error(tmp_path):
    stock_model(dtype=FLOAT).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="ttt_config"):
        load_ttt(str(tmp_path))
