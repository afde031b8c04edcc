"""Repairs of finished models and adapters, against plain tensors."""

import pytest
import torch

from eaftdrope.checkpoints.repair import repair_adapter, repair_model
from eaftdrope.checkpoints.repair_options import Repair
from eaftdrope.errors import UserError
from tests.checkpoints.test_spectrum import plain
from tests.trainer.tiny import tiny_model

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}


def weights(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def trained_pair():
    """A base model, and one whose change is a signal of rank 1 in noise in every matrix; its norms have changed too."""
    base, trained = (tiny_model(scale=0.02, **SIZES) for _ in range(2))
    trained.load_state_dict(base.state_dict())
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in trained.parameters():
            change = 0.01 * torch.randn_like(weight)
            if weight.ndim == 2:
                change += torch.randn(weight.shape[0], 1) @ torch.randn(1, weight.shape[1])
            weight += change
    return base, trained


def test_every_repair_of_full_weights():
    base, trained = trained_pair()
    start, end = weights(base), weights(trained)
    kept = repair_model(trained, base, Repair(0.5, True, ("k_proj", "layers.1.mlp")))
    assert {one.tensor for one in kept} == start.keys()
    for name, found in weights(trained).items():
        change = end[name] - start[name]
        if "k_proj" in name or "layers.1.mlp" in name:
            expected = 0 * change
        else:
            expected = 0.5 * (plain(change)[0] if change.ndim == 2 else change.double())
        torch.testing.assert_close(found.double(), start[name].double() + expected, rtol=0, atol=1e-5)
    by_name = {one.tensor: one for one in kept}
    query, key = (by_name[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qk")
    assert (query.spectrum.kept, query.spectrum.total) == (1, 16) and 0.49 < query.norm < 0.5
    assert (key.norm, key.spectrum) == (0.0, None)
    # a norm has no spectrum
    norm = by_name["model.norm.weight"]
    assert (norm.norm, norm.spectrum) == (0.5, None)


def adapter(**options):
    from peft import LoraConfig, get_peft_model

    base = tiny_model(scale=0.02, tie_word_embeddings=False, **SIZES)
    start = weights(base)
    lora = LoraConfig(r=6, lora_alpha=8, target_modules="all-linear", modules_to_save=["lm_head"], **options)
    model = get_peft_model(base, lora).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                weight.copy_(0.1 * torch.randn_like(weight))
                if "lora_B" in name:
                    # one direction that stands out
                    weight[:, 0] *= 40
    return model, start


@pytest.mark.parametrize("use_rslora", [False, True])
def test_every_repair_of_an_adapter_is_that_of_its_merged_weights(use_rslora):
    model, start = adapter(use_rslora=use_rslora)
    end = weights(adapter(use_rslora=use_rslora)[0].merge_and_unload())
    kept = {one.tensor: one for one in repair_adapter(model, Repair(0.5, True, ("k_proj",)))}
    found = weights(model.merge_and_unload())
    assert found.keys() == start.keys()
    query = "model.layers.0.self_attn.q_proj.weight"
    for name, weight in found.items():
        change = (end[name] - start[name]).double()
        if "k_proj" in name:
            expected = 0 * change
        elif name == "lm_head.weight":
            expected = 0.5 * plain(change)[0]
        elif "proj" in name:
            left, singular, right = torch.linalg.svd(change, full_matrices=False)
            expected = 0.5 * (left[:, :1] * singular[:1]) @ right[:1]
            assert kept[name].spectrum.kept == 1 and kept[name].spectrum.total == 6
        else:
            assert not change.any()
            expected = change
        torch.testing.assert_close(weight.double(), start[name].double() + expected, rtol=0, atol=1e-5)
    assert kept[query].norm < 0.5 and kept["model.layers.0.self_attn.k_proj.weight"].norm == 0.0
    assert (end[query] - start[query]).abs().max() > 0.05


def test_what_cannot_be_repaired():
    base, trained = trained_pair()
    before = weights(trained)
    with pytest.raises(UserError, match=r"restore q_porj: the model has no such module. Did you mean `q_proj`"):
        repair_model(trained, base, Repair(restore=("k_proj", "q_porj")))
    assert all(torch.equal(weight, before[name]) for name, weight in weights(trained).items())
    model, _ = adapter()
    with pytest.raises(UserError, match="restore embed_tokens: the adapter has no such module"):
        repair_adapter(model, Repair(restore=("embed_tokens",)))
    from peft import LoraConfig, get_peft_model

    thin = get_peft_model(tiny_model(scale=0.02, **SIZES), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(UserError, match=r"q_proj has rank 2, and a threshold needs at least 4 singular values"):
        repair_adapter(thin, Repair(denoise=True))


def test_the_options_of_merge():
    assert Repair().options == [] and not Repair()
    assert Repair(0.25, True, ("q_proj", "k_proj")).options == [
        *("--denoise", "--restore", "q_proj,k_proj", "--share", "0.25")
    ]
