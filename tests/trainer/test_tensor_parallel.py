"""Tensor parallelism: the loss reads the part of the head that each rank holds, and never the whole."""

import pytest

from tests.trainer.processes import run_two
from tests.trainer.tiny import tiny_model

# the last rank has one token less
VOCAB = 129

WORKER = """
import sys
from unittest import mock
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from eaftdrope import apply_eaft
from eaftdrope.errors import UserError
from eaftdrope.trainer import head
from tests.forked import end_together
from tests.trainer.tiny import ragged_rows

start, base = sys.argv[1:]

def loaded(parallel=False):
    sharding = dict(distributed_config=DistributedConfig(tp_size=2)) if parallel else {}
    return AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32, **sharding)

def other(parallel=False):
    model = loaded(parallel)
    torch.manual_seed(3)
    with torch.no_grad():
        model.model.norm.weight.mul_(1 + 0.3 * torch.randn(model.model.norm.weight.shape))
    return model

def made(second=None, parallel=False):
    anchor = {} if second is None else dict(anchor={"kl": 0.7, "mask_target": True}, base_model=second)
    return apply_eaft(loaded(parallel), **anchor)

rows = list(ragged_rows(4))
width = max(len(row["input_ids"]) for row in rows)
fill = lambda values, by: torch.tensor([v + [by] * (width - len(v)) for v in values])
batch = dict(input_ids=fill([r["input_ids"] for r in rows], 0), labels=fill([r["labels"] for r in rows], -100))
batch["labels"][0, 5:8] = torch.tensor([64, 65, 128])

single = made(None if base == "none" else other()).train()
model = made(None if base == "none" else other(base == "sharded"), parallel=True).train()
weight = model.lm_head.weight
assert isinstance(weight, DTensor) and weight.to_local().shape[0] in (64, 65)

gathered = []
with mock.patch.object(head, "_whole", gathered.append):
    losses = [each(**batch).loss for each in (single, model)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    expected = dict(single.named_parameters())
    for name, parameter in model.named_parameters():
        found = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        error = (found - expected[name].grad).norm() / expected[name].grad.norm()
        assert error < 2e-6, (name, error.item())
    # plain cross-entropy, and the logits of the model
    with torch.no_grad():
        outputs = [each.eval()(**batch) for each in (single, model)]
    torch.testing.assert_close(outputs[1].loss, outputs[0].loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(outputs[1].logits, outputs[0].logits, rtol=1e-5, atol=1e-5)
assert not gathered

if base == "sharded":
    model = apply_eaft(loaded(), anchor={"kl": 0.7}, base_model=other(parallel=True)).train()
    try:
        model(**batch)
    except UserError as error:
        assert "base_model is sharded by vocabulary otherwise than the model is" in str(error)
    else:
        raise AssertionError("not refused")
end_together()
"""


@pytest.mark.engines
@pytest.mark.parametrize("base", ["none", "whole", "sharded"])
def test_gradients_of_a_sharded_vocabulary(tmp_path, base):
    tiny_model(tie_word_embeddings=False, vocab_size=VOCAB).save_pretrained(tmp_path)
    run_two(WORKER, tmp_path, base)
