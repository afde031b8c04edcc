"""Which GPUs a run fits on: known points with the arithmetic written out, and an order that must hold."""

import pytest
import torch

from eaftdrope.loss.compute import default_tile_bytes
from eaftdrope.recipe import make_recipe
from eaftdrope.run.lora import non_text_modules
from eaftdrope.run.machine import format_bytes
from eaftdrope.run.memory import COUNTS, SIZES, fit_lines, fits, gathered_bytes, smallest
from eaftdrope.run.plan import meta_model
from eaftdrope.run.settings import eaft_settings
from tests.run.full_size import MODELS

QWEN = "Qwen/Qwen3-4B-Instruct-2507"
GEMMA = "google/gemma-3-4b-it"
GB = 10**9


def planned(name=QWEN, *, dtype="float32", lora=None, length=16384, checkpointing=True, quantised=False):
    """(recipe, configuration, model on meta, fits) of a run in bfloat16 autocast, one row at a time."""
    recipe = make_recipe(
        {
            "model": {"reference": "org/model", "dtype": dtype},
            "data": {"train": "org/data", "max_length": length},
            "lora": lora,
            "train": {"batch_size": 1, "gradient_checkpointing": checkpointing},
            "output": {"dir": "runs/x"},
        }
    )
    if quantised:
        # as it is where bitsandbytes is installed
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"quantization": "4bit"})})
    config = MODELS[name][0]()
    model = meta_model(recipe.model, recipe.lora, config)
    return recipe, config, model, fits(eaft_settings(recipe), config, model, autocast=True)


def on_one(*args, **options):
    return planned(*args, **options)[3][0].needed


def test_full_fine_tune_of_4b_by_hand():
    """16 bytes a parameter (weight 4, gradient 4, AdamW's moments 8), and what the batch takes."""
    parameters, layers, hidden, vocabulary, tokens = 4_022_468_096, 36, 2560, 151936, 16384
    query, key, inner = 32 * 128, 8 * 128, 9728
    linear = 2 * hidden * query + 2 * hidden * key + 3 * hidden * inner
    # of the 16-bit copies of the weights, those of the layer at work
    weights = 4 * parameters + 2 * linear
    # kept: each layer's input; whole, of the one recomputed: norms, five 16-bit inputs, attention, feed-forward
    layer = 2 * 8 * hidden + 5 * 2 * hidden + 2 * (2 * query + 2 * key) + 4 * 2 * inner
    activations = tokens * (layers * 4 * hidden + layer + 8 * hidden)
    # the loss: a tile of whole 16-bit rows of logits, and the gradient of the hidden states
    budget = default_tile_bytes(None, torch.device("cuda"), vocabulary)
    loss = budget // (2 * vocabulary) * 2 * vocabulary + 2 * tokens * hidden
    assert on_one() == weights + 12 * parameters + activations + loss
    assert 16 * parameters == pytest.approx(64.4 * GB, rel=1e-3)
    assert on_one() == pytest.approx(74.3 * GB, rel=0.01)


def test_full_fine_tune_of_4b_sharded_by_hand():
    """An eighth of the 16 bytes; whole are two layers and a gradient of one in 16 bits, and the tied embedding with its
    float32 gradient."""
    _, _, model, found = planned()
    layer = 2 * 2560 * 4096 + 2 * 2560 * 1024 + 3 * 2560 * 9728 + 2 * 2560 + 2 * 128
    embedding = 151936 * 2560
    gathered = 3 * 2 * layer + 2 * (embedding + 2560) + 4 * embedding + 2 * 2560
    assert gathered_bytes(model, autocast=True) == gathered
    alone, shared = found[0].needed, found[3].needed
    assert found[3].devices == 8
    states = 16 * 4_022_468_096 + 2 * (layer - 2 * 2560 - 2 * 128)
    assert alone - shared == states - states // 8 - gathered
    assert [(fit.devices, fit.size) for fit in found] == [(1, 141), (2, 80), (4, 40), (8, 24)]


def test_adapters_and_four_bits():
    """A frozen base costs its weights alone: 2 bytes a parameter in bfloat16, some half a byte in 4 bits."""
    half, quarter = on_one(dtype="bfloat16", lora={"r": 64}), on_one(dtype="bfloat16", lora={"r": 64}, quantised=True)
    linear = 36 * (2 * 2560 * 4096 + 2 * 2560 * 1024 + 3 * 2560 * 9728)
    assert half - quarter == pytest.approx(linear * (2 - 0.5 - 0.127 / 8), rel=1e-6)
    assert half < 18 * GB and quarter < 12 * GB
    # bitsandbytes' bytes are not sharded
    assert len(planned(dtype="bfloat16", lora={"r": 64}, quantised=True)[3]) == 1


@pytest.mark.parametrize("name", MODELS)
def test_more_devices_need_less_on_each(name):
    _, _, model, found = planned(name)
    parameters, trained = MODELS[name][1:]
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == trained
    assert [fit.devices for fit in found] == list(COUNTS[: len(found)])
    needed = [fit.needed for fit in found]
    assert needed == sorted(needed, reverse=True) and len(set(needed)) == len(needed)
    assert all(fit.size is None or 0.9 * fit.size * GB >= fit.needed for fit in found)


def test_what_costs_more_costs_more():
    order = [
        on_one(dtype="bfloat16", lora={"r": 16}, quantised=True),
        on_one(dtype="bfloat16", lora={"r": 16}),
        on_one(dtype="bfloat16", lora={"r": 256}),
        on_one(dtype="bfloat16"),
        on_one(length=1024),
        on_one(length=16384),
        on_one(length=16384, checkpointing=False),
    ]
    assert order == sorted(order)


def test_sizes_are_those_with_room_to_spare():
    assert [smallest(needed) for needed in (0, int(14.4 * GB), int(14.5 * GB), int(72 * GB), int(126 * GB))] == [
        16,
        16,
        24,
        80,
        141,
    ]
    assert smallest(127 * GB) is None
    assert list(SIZES) == sorted(SIZES)


def test_lines():
    found = planned("Qwen/Qwen2.5-32B-Instruct")[3]
    assert fit_lines(found) == [
        f"1 GPU: no, {format_bytes(found[0].needed)} needed on each",
        f"2 GPUs with FSDP: no, {format_bytes(found[1].needed)} needed on each",
        f"4 GPUs with FSDP: no, {format_bytes(found[2].needed)} needed on each",
        f"8 GPUs with FSDP: from 141 GB ({format_bytes(found[3].needed)} needed on each)",
    ]


def test_what_text_does_not_reach_is_not_trained():
    _, _, model, _ = planned(GEMMA)
    outside = non_text_modules(model)
    assert outside and all(name.startswith(("model.vision_tower", "model.multi_modal_projector")) for name in outside)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == name.startswith(("model.language_model.", "lm_head")), name
    assert non_text_modules(planned(QWEN)[2]) == []
    adapted = [
        name for name, parameter in planned(GEMMA, lora={"r": 8})[2].named_parameters() if parameter.requires_grad
    ]
    assert adapted and all("language_model" in name and "lora_" in name for name in adapted)
