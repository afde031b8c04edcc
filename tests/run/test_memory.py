"""The memory estimate against what torch really keeps and allocates."""

import pytest

from eaftdrope.recipe import make_recipe
from eaftdrope.run.memory import activation_bytes, optimizer_bytes, weight_bytes
from eaftdrope.run.plan import meta_model
from tests.tiny_models import llama_config

BATCH, LENGTH, VOCABULARY = 4, 256, 128


def tiny_config(kv_heads=4):
    return llama_config(
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_key_value_heads=kv_heads,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        max_position_embeddings=512,
    )


def recipe(*, lora=None, dtype="float32", checkpointing=False, optimizer="adamw_torch"):
    return make_recipe(
        {
            "model": {"reference": "tiny/model", "dtype": dtype},
            "data": {"train": "tiny/data", "max_length": LENGTH},
            "lora": lora,
            "train": {"batch_size": BATCH, "gradient_checkpointing": checkpointing, "optimizer": optimizer},
            "output": {"dir": "runs/tiny"},
        }
    )


def saved_bytes(recipe, config, *, autocast):
    """Bytes of the storages that autograd saves in one forward of the body, parameters and casts of them left out."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, recipe.model.dtype)).train()
    if recipe.lora:
        from peft import get_peft_model

        from eaftdrope.run.lora import lora_config

        model = get_peft_model(model, lora_config(recipe.lora, model))
        body = model.get_base_model().model
    else:
        body = model.model
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {tuple(sorted(p.shape)) for p in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        cast_weight = tensor.dim() == 2 and tuple(sorted(tensor.shape)) in shapes
        if storage.data_ptr() not in weights and not cast_weight:
            # the tensor is kept too, so that no storage is freed and counted again at the same address
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH))
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        body(input_ids=ids)
    return sum(size for size, _ in saved.values())


@pytest.mark.parametrize(
    ("kv_heads", "options", "autocast"),
    [
        (4, {}, False),
        (2, {}, False),
        (2, {"dtype": "bfloat16"}, False),
        (2, {}, True),
        (4, {"lora": {"r": 8}}, False),
        (2, {"lora": {"r": 8}}, True),
        (2, {"lora": {"r": 8}, "dtype": "bfloat16"}, False),
        (2, {"lora": {"r": 8}, "dtype": "bfloat16"}, True),
        (2, {"lora": {"r": 8, "dropout": 0.1}}, False),
    ],
)
def test_activations_match_what_autograd_saves(kv_heads, options, autocast):
    run, config = recipe(**options), tiny_config(kv_heads)
    measured = saved_bytes(run, config, autocast=autocast)
    estimated = activation_bytes(
        config, meta_model(run.model, run.lora, config), tokens=BATCH * LENGTH, lora=run.lora, autocast=autocast
    )
    assert estimated == pytest.approx(measured, rel=0.10)


def test_checkpointing_keeps_the_inputs_of_the_layers_and_one_layer():
    config, layers, hidden = tiny_config(), 3, 64
    model = meta_model(recipe().model, None, config)
    plain, checkpointed = (
        activation_bytes(config, model, tokens=BATCH * LENGTH, recompute=on, autocast=False) for on in (False, True)
    )
    end = BATCH * LENGTH * 8 * hidden
    assert checkpointed - end == (plain - end) // layers + BATCH * LENGTH * layers * 4 * hidden


@pytest.mark.parametrize(
    ("optimizer", "make"), [("adamw_torch", "AdamW"), ("sgd", "SGD"), ("adagrad", "Adagrad"), ("rmsprop", "RMSprop")]
)
@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_optimizer_state_matches_torch(optimizer, make, lora):
    import torch

    run, config = recipe(optimizer=optimizer, lora=lora), tiny_config()
    model = meta_model(run.model, run.lora, config)
    parameters = [
        torch.nn.Parameter(torch.zeros(p.shape, dtype=p.dtype)) for p in model.parameters() if p.requires_grad
    ]
    real = getattr(torch.optim, make)(parameters, lr=1e-3)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    real.step()
    state = [value for values in real.state.values() for value in values.values()]
    allocated = sum(value.numel() * value.element_size() for value in state if value.dim())
    assert optimizer_bytes(optimizer, model) == allocated


def test_optimizer_state_of_adafactor_is_rows_and_columns():
    import torch
    from transformers.optimization import Adafactor

    run, config = recipe(optimizer="adafactor"), tiny_config()
    model = meta_model(run.model, run.lora, config)
    parameters = [torch.nn.Parameter(torch.zeros(p.shape)) for p in model.parameters()]
    real = Adafactor(parameters, lr=1e-3, relative_step=False, scale_parameter=False)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    real.step()
    state = [value for values in real.state.values() for value in values.values()]
    allocated = sum(value.numel() * value.element_size() for value in state if hasattr(value, "dim") and value.dim())
    assert optimizer_bytes("adafactor", model) == allocated


def test_weights_are_the_parameters_and_their_casts():
    config = tiny_config()
    run = recipe()
    model = meta_model(run.model, run.lora, config)
    parameters = sum(p.numel() for p in model.parameters())
    linear = 3 * (4 * 64 * 64 + 3 * 64 * 192)
    assert parameters == VOCABULARY * 64 + linear + 7 * 64
    assert weight_bytes(model, autocast=False) == 4 * parameters
    assert weight_bytes(model, autocast=True) == 4 * parameters + 2 * linear
    assert weight_bytes(model, autocast=True, recompute=True) == 4 * parameters + 2 * linear // 3
    half = meta_model(recipe(dtype="bfloat16").model, None, config)
    assert weight_bytes(half, autocast=True) == 2 * parameters
