"""A temperature in the weights is a factor on the attention scores, in every architecture and to the rounding of it."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from eaftdrope.drope import convert
from eaftdrope.drope.temperature import beta_for, scaled_queries
from tests.drope.architectures import ARCHITECTURES, save

IDS = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(4))


def logits(folder, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(IDS).logits, model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_folded_weights_scale_the_scores(name, tmp_path):
    # a query norm whose weights are not 1, biases that are not 0: save() moves both
    save(name, tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "plain")
    convert(tmp_path / "source", tmp_path / "warm", temperature=1.3)
    plain, model = logits(tmp_path / "plain")
    with torch.no_grad(), scaled_queries(model, 1.3):
        wanted = model(IDS).logits
    folded, _ = logits(tmp_path / "warm")
    assert (wanted - plain).abs().max() > 1e-2
    assert (folded - wanted).abs().max() < 2e-4
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, plain), "the dial was not put back"


def test_stablelm_with_norms_of_each_head(tmp_path):
    save("StableLm", tmp_path / "source", qk_layernorm=True)
    convert(tmp_path / "source", tmp_path / "warm", temperature=1.3)
    convert(tmp_path / "source", tmp_path / "plain")
    _, model = logits(tmp_path / "plain")
    with torch.no_grad(), scaled_queries(model, 1.3):
        wanted = model(IDS).logits
    assert (logits(tmp_path / "warm")[0] - wanted).abs().max() < 2e-4


def test_beta_grows_with_the_logarithm_and_is_one_within_the_trained_length():
    assert beta_for(8192, 2048, 0.103) == pytest.approx(1 + 0.103 * 1.3862943611)
    assert beta_for(1024, 2048, 0.103) == 1.0
