"""Architectures that no test names: accepted if they pass the identity checks, which name what failed."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BitNetConfig,
    GemmaConfig,
    GraniteConfig,
    LlamaModel,
    MistralConfig,
    Olmo2Config,
    SeedOssConfig,
)

from eaftdrope import UserError, remove_ttt
from eaftdrope.ttt import is_ttt
from tests.ttt.test_apply import attributes
from tests.ttt.tiny import LENGTH, SHAPE, WINDOW, add_ttt, random_ids, read, stock_model, window_mask

OTHERS = {
    "SeedOss": SeedOssConfig(**SHAPE, head_dim=8),
    "Gemma": GemmaConfig(**SHAPE, head_dim=8),
    "Granite, no factors": GraniteConfig(**SHAPE),
    "Mistral, its own long window": MistralConfig(**SHAPE, head_dim=8, sliding_window=64),
}


def other_model(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", OTHERS)
def test_another_architecture_that_passes(name):
    ids = random_ids()
    stock, model = (other_model(OTHERS[name]) for _ in range(2))
    mask = window_mask(LENGTH, WINDOW, 2)[None, None].expand(2, -1, -1, -1)
    with torch.no_grad():
        add_ttt(model, zero=True, lr=0.0)
        assert (model(ids).logits - stock(ids, attention_mask=mask).logits).abs().max() < 1e-5
        remove_ttt(model)
        add_ttt(model)
        expected = model(ids).logits
        assert (read(model, ids, 3) - expected).abs().max() < 1e-5
        assert (stock(ids, attention_mask=mask).logits - expected).abs().max() > 1e-3


FAILING = {
    "a norm after the MLP": (Olmo2Config(**SHAPE), {}, r"Olmo2ForCausalLM.* h \+ mlp\(norm\(h\)\)"),
    "a factor on the embeddings": (
        GraniteConfig(**SHAPE, embedding_multiplier=12.0),
        {},
        "GraniteForCausalLM: with a window longer than the text it is not the original model",
    ),
    "the same, in its own attention": (
        GraniteConfig(**SHAPE, embedding_multiplier=12.0),
        {"window": None},
        "GraniteForCausalLM: with its own attention it is not the original model",
    ),
    "a factor on what a block adds": (GraniteConfig(**SHAPE, residual_multiplier=0.5), {}, r"h \+ mlp\(norm\(h\)\)"),
    "a norm inside the MLP": (
        BitNetConfig(**SHAPE),
        {"layout": "in_place"},
        r"BitNetForCausalLM: its MLP is not down\(",
    ),
}


@pytest.mark.parametrize("name", FAILING)
def test_another_architecture_that_fails_a_check(name):
    config, options, message = FAILING[name]
    model, ids = other_model(config), random_ids()
    before = attributes(model)
    with pytest.raises(UserError, match=message):
        add_ttt(model, **options)
    assert attributes(model).keys() == before.keys()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, other_model(config)(ids).logits)


def test_a_norm_inside_the_mlp_does_not_matter_to_a_prime():
    stock, ids = other_model(BitNetConfig(**SHAPE)), random_ids(length=5)
    with torch.no_grad():
        expected = stock(ids).logits
        assert torch.equal(add_ttt(stock, zero=True)(ids).logits, expected)


class DeafModel(LlamaModel):
    """Its attention ignores the mask."""

    def forward(self, *arguments, attention_mask=None, **options):
        return super().forward(*arguments, **options)


def test_a_class_that_ignores_masks_fails_a_check():
    model = stock_model("llama", dtype=torch.float32)
    model.model.__class__ = DeafModel
    model.config.model_type = "deaf"
    with pytest.raises(UserError, match="the mask of a window has no effect on it"):
        add_ttt(model)
    assert not is_ttt(model)


class DriftingModel(LlamaModel):
    """It looks at how many blocks it has."""

    def forward(self, *arguments, **options):
        output = super().forward(*arguments, **options)
        output.last_hidden_state = output.last_hidden_state * (1 + len(self.layers))
        return output


def test_a_class_that_cannot_be_run_in_parts_fails_a_check():
    model = stock_model("llama", dtype=torch.float32)
    model.model.__class__ = DriftingModel
    model.config.model_type = "drifting"
    with pytest.raises(UserError, match="LlamaForCausalLM: with a window longer than the text it is not the original"):
        add_ttt(model)
    assert not is_ttt(model)
