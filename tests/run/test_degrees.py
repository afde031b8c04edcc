"""The section `parallel`: degrees against processes, the engine's environment, and a plan by data-parallel ranks."""

import os

import pytest

from eaftdrope.errors import RecipeError, UserError
from eaftdrope.recipe import load_recipe
from eaftdrope.recipe.load import make_recipe
from eaftdrope.recipe.parallel_section import Parallel
from eaftdrope.run import degrees
from eaftdrope.run.degrees import Degrees, parallel_environment
from eaftdrope.run.machine import Device
from eaftdrope.run.memory import gathered_bytes
from eaftdrope.run.plan import make_plan, meta_model, plan_lines, plan_text
from eaftdrope.run.record import DataStats
from eaftdrope.run.settings import eaft_settings

BASE = {"model": "tiny/model", "data": {"train": "tiny/data", "max_length": 256}, "output": {"dir": "runs/tiny"}}
CPU = Device("cpu", "a CPU", 2**34)


@pytest.mark.parametrize(
    ("section", "processes", "expected"),
    [
        ({}, 4, None),
        ({"timeout_minutes": 5}, 4, None),
        ({"preset": "fsdp2"}, 8, Degrees(1, 8, 1)),
        ({"preset": "fsdp2", "dp": 2}, 8, Degrees(1, 4, 2)),
        ({"preset": "tp_fsdp"}, 8, Degrees(2, 4, 1)),
        ({"preset": "tp_fsdp", "tp": 4}, 8, Degrees(4, 2, 1)),
        ({"tp": 2}, 2, Degrees(2, 1, 1)),
        ({"tp": 2, "fsdp": 2, "dp": 2}, 8, Degrees(2, 2, 2)),
        ({"fsdp": 2}, 8, Degrees(1, 2, 4)),
        ({"dp": 2}, 2, Degrees(1, 1, 2)),
    ],
)
def test_degrees(section, processes, expected):
    assert Degrees.of(Parallel(**section), processes) == expected


@pytest.mark.parametrize(
    ("section", "processes", "text"),
    [
        ({"tp": 2}, 1, "the degrees of parallel (tp 2, fsdp 1, dp 1) need 2 processes, and this is one process. Start it "
         "with `eaftdrope train RECIPE --launch 2`"),
        ({"tp": 2}, 4, "need 2 processes, and 4 were started"),
        ({"fsdp": 4}, 6, "need 4 processes or a multiple of it, and 6 were started"),
        ({"tp": 2, "fsdp": 4}, 4, "need 8 processes, and 4 were started"),
        ({"preset": "tp_fsdp"}, 3, "need 2 processes or a multiple of it, and 3 were started"),
        ({"preset": "fsdp2"}, 1, "parallel: fsdp2 shares the weights over several processes, and this is one. Start it with"),
    ],
)  # fmt: skip
def test_processes_that_do_not_fit(section, processes, text):
    with pytest.raises(UserError) as error:
        Degrees.of(Parallel(**section), processes)
    assert text in str(error.value)


REFUSED = [
    ({"parallel": {"cp": 2}}, "parallel.cp: context parallelism has not been verified"),
    ({"parallel": {"preset": "fsdp2", "tp": 2}}, "parallel.tp: the preset fsdp2 has no tensor parallelism"),
    ({"parallel": {"tp": 2, "dp": 2}}, "parallel.dp: transformers replicates a tensor-parallel model only together"),
    ({"parallel": {"tp": 2}, "lora": {"r": 4}}, "lora: PEFT's adapters cannot be trained on a tensor-parallel model"),
    ({"parallel": "tp_fsdp", "lora": {"r": 4}}, "lora: PEFT's adapters cannot be trained on a tensor-parallel model"),
    ({"parallel": {"tp": 2}, "loss": {"preset": "asft"}}, "loss: an anchor needs a second copy of the model"),
    ({"parallel": {"tp": 2}, "stages": ["drope", "eaft"], "drope": {}}, "stages[0]: the stage drope has not been verified"),
    ({"parallel": "fsdp2", "stages": ["eaft", "ttt"], "ttt": {}}, "stages[1]: the stage ttt reads the fast weights of all"),
    ({"parallel": "fsdp3"}, "parallel.preset: 'fsdp3' is not one of fsdp2, zero3, tp_fsdp"),
    ({"parallel": 2}, "expected fsdp2, zero3, tp_fsdp or a mapping, found 2 (a whole number)"),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "text"), REFUSED, ids=[text[:40] for _, text in REFUSED])
def test_refused_before_anything_is_loaded(changed, text):
    with pytest.raises(RecipeError) as error:
        make_recipe({**BASE, **changed})
    assert text in str(error.value)


def test_zero3_needs_deepspeed_and_the_degrees_for_itself(monkeypatch):
    from eaftdrope.recipe import base

    with pytest.raises(RecipeError, match="'zero3' needs the package deepspeed, which is not installed"):
        make_recipe({**BASE, "parallel": "zero3"})
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: object())
    assert Degrees.of(make_recipe({**BASE, "parallel": "zero3"}).parallel, 4) == Degrees(fsdp=4, engine="ZeRO-3")
    for changed, text in (
        ({"parallel": {"preset": "zero3", "tp": 2}}, "zero3 shards over all processes, so tp does not apply"),
        ({"parallel": "zero3", "loss": {"anchor": {"kl": 0.1}}}, "zero3 gathers weights in the order of one forward"),
    ):
        with pytest.raises(RecipeError, match=text):
            make_recipe({**BASE, **changed})


def test_a_preset_can_be_set_beside_another_key_on_the_command_line(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "model: tiny/model\ndata: {train: tiny/data}\nparallel: fsdp2\noutput: {dir: runs/tiny}\n"
    )
    section = load_recipe(tmp_path / "recipe.yaml", ["parallel.timeout_minutes=5"]).parallel
    assert (section.preset, section.timeout_minutes) == ("fsdp2", 5)


# ---- the environment ----


@pytest.fixture
def sharding(monkeypatch):
    """A machine whose devices can shard."""
    monkeypatch.setattr(degrees, "training_device", lambda: Device("cuda", "a GPU", 2**36))


@pytest.mark.parametrize(
    ("section", "processes"),
    [
        ({"preset": "fsdp2"}, 2),
        ({"fsdp": 2, "dp": 2}, 4),
        ({"tp": 2}, 2),
        ({"preset": "tp_fsdp", "dp": 2}, 8),
        ({"dp": 3}, 3),
    ],
)
def test_what_the_recipe_sets_is_read_back_from_the_environment(sharding, monkeypatch, section, processes):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    before = dict(os.environ)
    with parallel_environment(Parallel(**section)):
        assert Degrees.present() == Degrees.of(Parallel(**section), processes)
    assert dict(os.environ) == before


def test_a_launcher_that_sets_an_engine_too_is_refused(sharding, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with parallel_environment(Parallel()):
        assert Degrees.present() == Degrees(fsdp=2)
    with (
        pytest.raises(
            UserError, match="the launcher's configuration sets FSDP, and the recipe's section parallel does too"
        ),
        parallel_environment(Parallel(tp=2)),
    ):
        pass


@pytest.mark.parametrize(("section", "name"), [({"preset": "fsdp2"}, "FSDP2"), ({"tp": 2}, "tensor parallelism")])
def test_engines_that_accelerate_has_on_accelerators_only(monkeypatch, section, name):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(degrees, "training_device", lambda: CPU)
    with pytest.raises(UserError, match=f"accelerate has {name} on accelerators only, and this machine has none"):
        parallel_environment(Parallel(**section)).__enter__()
    # a plan may be made anywhere
    with parallel_environment(Parallel(**section), planned=2):
        assert Degrees.present().processes == 2


# ---- the plan ----


@pytest.fixture
def config():
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=96,
        tie_word_embeddings=False,
        max_position_embeddings=512,
        architectures=["LlamaForCausalLM"],
    )


def plan(config, section, processes):
    recipe = make_recipe({**BASE, "train": {"batch_size": 4, "accumulation": 2}, "parallel": section})
    with parallel_environment(recipe.parallel, planned=processes):
        settings = eaft_settings(recipe)
        made = make_plan(settings, config, DataStats(81, 8100, 100), autocast=False, device=CPU)
        return made, meta_model(settings.model, None, config, CPU), settings.tokens_per_step


def test_rows_and_steps_follow_the_data_parallel_ranks(config):
    """8 processes: 8 ranks under FSDP2, 4 under tensor parallelism of 2, 2 of 4."""
    for section, rows, steps in (("fsdp2", 64, 2), ({"preset": "tp_fsdp"}, 32, 3), ({"tp": 4, "fsdp": 2}, 16, 6)):
        made, _, tokens = plan(config, section, 8)
        assert (made.rows_per_step, made.steps, tokens) == (rows, steps, rows * 256)
    assert "parallel      8 processes: tp 4 x FSDP2 2, 2 data-parallel ranks\n" in plan_text(plan_lines(made))


def test_memory_follows_the_degrees(config):
    whole, model, _ = plan(config, {}, 1)
    sharded, _, _ = plan(config, "fsdp2", 4)
    tensor, _, _ = plan(config, {"tp": 2}, 2)
    both, _, _ = plan(config, {"tp": 2, "fsdp": 2}, 4)
    for made, parts in ((sharded, 4), (tensor, 2), (both, 4)):
        for name in ("weights", "gradients", "optimizer"):
            assert getattr(made.memory, name) == getattr(whole.memory, name) // parts, name
        assert made.memory.activations == whole.memory.activations
    layers = gathered_bytes(model, autocast=False)
    assert [made.memory.gathered for made in (whole, sharded, tensor, both)] == [0, layers, 0, layers // 2]
