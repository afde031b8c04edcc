"""A temperature in the weights is a factor on the attention scores, in every architecture and to the rounding of it."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from eaftdrope.drope import convert, undo
from eaftdrope.drope.temperature import beta_for, scaled_queries
from eaftdrope.errors import UserError
from tests.drope.architectures import ARCHITECTURES, LENGTH, save
from tests.tiny_run import hashes

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


def test_by_position_a_llama_becomes_a_ministral3_with_a_temperature_that_grows(tmp_path):
    # one layer: what earlier tokens' queries were scaled by does not reach the last one
    save("Llama", tmp_path / "source", num_hidden_layers=1)
    result = convert(tmp_path / "source", tmp_path / "new", slope_by_position=0.3, max_length=4 * LENGTH)
    plain = convert(tmp_path / "source", tmp_path / "plain")
    assert result.architecture == "Ministral3ForCausalLM" and all(check.passed for check in result.checks)
    ids = torch.randint(3, 96, (1, 3 * LENGTH), generator=torch.Generator().manual_seed(5))
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    still = AutoModelForCausalLM.from_pretrained(plain.target)
    with torch.no_grad():
        got, flat = model.eval()(ids).logits, still.eval()(ids).logits
        assert torch.equal(got[:, :LENGTH], flat[:, :LENGTH]), "within the trained length nothing changes"
        with scaled_queries(still, 1 + 0.3 * math.log(3)):
            last = still(ids).logits[:, -1]
    assert (got[:, -1] - flat[:, -1]).abs().max() > 1e-3
    # the last position is in the third block of the trained length
    assert (got[:, -1] - last).abs().max() < 1e-4
    undo(tmp_path / "new", tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(tmp_path / "source")


def test_by_position_after_a_recalibration_and_refused_elsewhere(tmp_path):
    save("Llama", tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "nope", max_length=4 * LENGTH)
    result = convert(tmp_path / "nope", tmp_path / "new", slope_by_position=0.1)
    rope = json.loads((tmp_path / "new" / "config.json").read_text())["rope_parameters"]
    assert rope["original_max_position_embeddings"] == LENGTH and rope["llama_4_scaling_beta"] == 0.1
    assert all(check.passed for check in result.checks)
    save("Qwen3", tmp_path / "qwen")
    with pytest.raises(UserError, match=r"qwen3 is not Llama-shaped.*--target-length"):
        convert(tmp_path / "qwen", tmp_path / "other", slope_by_position=0.1)
