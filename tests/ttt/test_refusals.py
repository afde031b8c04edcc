"""What cannot be done is refused with its reason."""

import dataclasses

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    Olmo2Config,
    PhiConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

from eaftdrope import UserError, apply_ttt
from eaftdrope.ttt import TTTConfig, TTTState, is_ttt, sliding
from tests.ttt.tiny import SHAPE, random_ids, stock_model, tiny

CONFIG = TTTConfig(window=6, sink=2, chunk=5, fast_blocks=2)
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 2.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 256,
}
MIXED = ["sliding_attention", "full_attention"] * 2

# name -> (configuration, TTTConfig, a part of the message)
MODELS = {
    "dynamic rope": (LlamaConfig(**SHAPE, rope_parameters=DYNAMIC), CONFIG, "dynamic"),
    "longrope": (LlamaConfig(**SHAPE, rope_parameters=LONG), CONFIG, "longrope"),
    "scaled embeddings": (GraniteConfig(**SHAPE, embedding_multiplier=12.0), CONFIG, "embedding"),
    "a table per layer type": (Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=8), CONFIG, ""),
    "scaled embeddings and mixed windows": (Gemma2Config(**SHAPE, head_dim=8, sliding_window=8), CONFIG, ""),
    "mixed windows": (
        Qwen3Config(**SHAPE, head_dim=8, use_sliding_window=True, sliding_window=8, layer_types=MIXED),
        TTTConfig(window=None, chunk=5, fast_blocks=2),
        "sliding",
    ),
    "experts, Mixtral": (MixtralConfig(**SHAPE, num_local_experts=2), CONFIG, "expert"),
    "experts, Qwen 3": (
        Qwen3MoeConfig(**SHAPE, head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8),
        CONFIG,
        "expert",
    ),
    "more fast blocks than blocks": (
        Qwen3Config(**SHAPE, head_dim=8),
        TTTConfig(window=6, chunk=5, fast_blocks=5),
        "5",
    ),
}


def model_of(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    config, settings, message = MODELS[name]
    model = model_of(config)
    before = {key for key in vars(model)}
    with pytest.raises(ValueError, match=f"(?i){message}") as error:
        apply_ttt(model, settings)
    assert len(str(error.value)) > 40
    assert not is_ttt(model) and vars(model).keys() == before
    ids = random_ids()
    with torch.no_grad():
        # it is as it was
        assert torch.equal(model(ids).logits, model_of(config)(ids).logits)


def test_an_encoder_decoder():
    model = T5ForConditionalGeneration(T5Config(vocab_size=31, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2))
    with pytest.raises(UserError):
        apply_ttt(model, CONFIG)


@pytest.mark.parametrize(
    "options",
    [
        {"window": 0},
        {"sink": -1},
        {"chunk": 0},
        {"chunk": 7, "window": 6},
        {"fast_blocks": 0},
        {"layout": "parallel"},
        {"lr": -1.0},
        {"lr": float("nan")},
        {"clip": -1.0},
        {"clip": float("nan")},
        {"horizon": 0},
        {"inner_gate": "nothing"},
        {"inner_gate": "talr"},
        {"warmup": -1},
    ],
    ids=str,
)
def test_settings(options):
    (name, *_), (value, *_) = options.keys(), options.values()
    with pytest.raises(ValueError) as error:
        TTTConfig(**options)
    assert name in str(error.value) or str(value) in str(error.value)


def test_settings_that_shape_the_model_cannot_be_replaced():
    model, ids = tiny(), random_ids()
    for change in ({"fast_blocks": 1}, {"layout": "in_place"}):
        with pytest.raises(ValueError, match=next(iter(change))):
            model.ttt.config = dataclasses.replace(model.ttt.config, **change)
    # others can, but a state that began with other ones cannot be continued
    state = TTTState(model)
    model(ids, past_key_values=state)
    for change in ({"window": 7}, {"sink": 1}, {"chunk": 4}):
        model.ttt.config = dataclasses.replace(model.ttt.config, **change)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, tiny(**change)(ids).logits)
        with pytest.raises(ValueError, match="another window, sink, chunk"):
            model(ids, past_key_values=state)
        model.ttt.config = tiny().ttt.config


# Calls


def test_packed_rows():
    model, ids = tiny(), random_ids(1)
    for first in (1, 2, 10):
        positions = torch.cat([torch.arange(first), torch.arange(23 - first)])[None]
        for mask in (None, torch.ones_like(ids)):
            with pytest.raises(ValueError, match="packed"):
                model(ids, position_ids=positions, attention_mask=mask)


def test_second_order_through_a_head_with_a_bias_is_refused_before_anything_runs():
    model = stock_model("llama")
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size, dtype=model.dtype))
    with pytest.raises(UserError, match="horizon=2: a head with a bias"):
        apply_ttt(model, TTTConfig(window=6, chunk=5, horizon=2))
    assert not hasattr(model, "ttt")


def test_positions_that_are_those_of_the_rows_are_accepted():
    model, ids = tiny(), random_ids()
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(model(ids, position_ids=torch.arange(23)[None]).logits, expected)
        assert torch.equal(model(ids, position_ids=torch.arange(23)[None].expand(2, -1)).logits, expected)


def test_a_cache_of_transformers():
    model, ids = tiny(), random_ids()
    caches = [DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=64)]
    for cache in caches:
        with pytest.raises(ValueError, match="TTTState"):
            model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="TTTState"):
            model.generate(ids, past_key_values=cache, max_new_tokens=2)
    with pytest.raises(ValueError):
        model.generate(ids, cache_implementation="static", max_new_tokens=2)


def test_a_use_of_the_cache_without_a_state_returns_one():
    """generate makes its own; a call that only asks for a cache must not get one that learned nothing."""
    model, ids = tiny(), random_ids()
    with torch.no_grad():
        found = model(ids, use_cache=True)
        plain = model(ids)
    assert torch.equal(found.logits, plain.logits)
    assert found.past_key_values is None or isinstance(found.past_key_values, TTTState)


def test_assisted_decoding():
    model, ids = tiny(), random_ids(1, 8)
    with pytest.raises(ValueError, match="assisted decoding"):
        model.generate(ids, assistant_model=stock_model(seed=4), max_new_tokens=4)
    with pytest.raises(ValueError, match="assisted decoding"):
        model.generate(ids, prompt_lookup_num_tokens=2, max_new_tokens=4)


def test_embeddings_in_place_of_tokens():
    model, ids = tiny(), random_ids()
    embedded = model.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match="inputs_embeds"):
        model(inputs_embeds=embedded)
    with pytest.raises(ValueError, match="inputs_embeds"):
        model(inputs_embeds=embedded, past_key_values=TTTState(model))


def test_rows_of_several_lengths_with_a_state():
    model, ids = tiny(), random_ids()
    mask = torch.ones_like(ids)
    mask[1, 17:] = 0
    with pytest.raises(ValueError, match="length"):
        model(ids, attention_mask=mask, past_key_values=TTTState(model))


def test_another_number_of_rows_than_the_state_has():
    model = tiny()
    state = TTTState(model)
    model(random_ids(2), past_key_values=state)
    with pytest.raises(ValueError, match="rows"):
        model(random_ids(3), past_key_values=state)


def test_a_mask_with_a_hole():
    model, ids = tiny(), random_ids()
    mask = torch.ones_like(ids)
    mask[1, 7] = 0
    with pytest.raises(ValueError, match="padding between the tokens"):
        model(ids, attention_mask=mask)


def test_a_4d_mask():
    model, ids = tiny(), random_ids()
    with pytest.raises(ValueError, match="mask"):
        model(ids, attention_mask=torch.ones(2, 1, 23, 23, dtype=torch.bool).tril())


def test_modules_to_save_would_copy_the_primes_away_from_their_hooks():
    model = tiny()
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["ttt"]))
    with pytest.raises(ValueError, match="modules_to_save"):
        peft(random_ids())


@pytest.mark.parametrize("window", [0, -3])
def test_sliding_windows(window):
    with pytest.raises(ValueError, match="window"):
        sliding(stock_model(), window=window)


def test_classes_without_a_stock_window():
    biased = stock_model("llama", attention_bias=True)
    with pytest.raises(ValueError, match="bias"):
        sliding(biased, window=6)
    olmo = model_of(Olmo2Config(**SHAPE))
    with pytest.raises(ValueError, match="olmo2"):
        sliding(olmo, window=6)


# Other architectures


@pytest.mark.parametrize(
    "config",
    [PhiConfig(**{**SHAPE, "num_key_value_heads": 2}), GPT2Config(vocab_size=31, n_embd=16, n_layer=4, n_head=2)],
    ids=["phi", "gpt2"],
)
def test_blocks_that_have_no_norm_before_a_gated_mlp(config):
    with pytest.raises(ValueError, match=type(model_of(config)).__name__):
        apply_ttt(model_of(config), CONFIG)
