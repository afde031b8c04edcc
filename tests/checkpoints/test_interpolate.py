"""The line between a base model and what was trained from it."""

import pytest
import torch

from eaftdrope.checkpoints.interpolate import adapter_line, full_line
from tests.trainer.tiny import tiny_model


def test_the_line_of_full_weights_is_exact_at_its_ends():
    torch.manual_seed(0)
    base, trained = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    start = {name: weight.detach().clone() for name, weight in base.named_parameters()}
    end = {name: weight.detach().clone() for name, weight in trained.named_parameters()}
    move = full_line(trained, start)
    for share, expected in (
        (0.0, start),
        (1.0, end),
        (0.25, {name: start[name] + 0.25 * (end[name] - start[name]) for name in start}),
    ):
        assert move(share) is trained
        for name, weight in trained.named_parameters():
            tolerance = 0.0 if share in (0.0, 1.0) else 1e-7
            torch.testing.assert_close(weight.detach(), expected[name], rtol=0.0, atol=tolerance)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_line_of_an_adapter_is_that_of_its_merged_weights(use_rslora):
    """Logits of a scaled adapter, with a head that was trained in full, against interpolated merged weights."""
    from peft import LoraConfig, get_peft_model

    base = tiny_model(
        tie_word_embeddings=False, scale=0.02, vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1
    )
    start = {name: weight.detach().clone() for name, weight in base.named_parameters()}
    lora = LoraConfig(
        r=2, lora_alpha=8, target_modules="all-linear", modules_to_save=["lm_head"], use_rslora=use_rslora
    )
    model = get_peft_model(base, lora).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.3 * torch.randn_like(weight))
    ids = torch.arange(8)[None]
    move = adapter_line(model)
    with torch.no_grad():
        live = {share: move(share)(ids).logits for share in (0.0, 0.5, 1.0)}
        move(1.0)
        merged = model.merge_and_unload()
        line = full_line(merged, start)
        for share, logits in live.items():
            torch.testing.assert_close(logits, line(share)(ids).logits, rtol=1e-5, atol=1e-5)
        assert (live[0.0] - live[1.0]).abs().max() > 0.1
