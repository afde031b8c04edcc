"""FSDP2: the head inside the root's group, and sharded on its own (a DTensor while the loss runs)."""

import pytest

from tests.trainer.processes import run_two

WORKER = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from eaftdrope import apply_eaft
from tests.forked import end_together
from tests.trainer.tiny import ragged_rows, tiny_model

own_group, tied = sys.argv[1] == "own group", sys.argv[2] == "tied"
dist.init_process_group("gloo")
rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))

def batch(part):
    rows = list(ragged_rows(8))[part * 4 : part * 4 + 4]
    width = max(len(row["input_ids"]) for row in rows)
    fill = lambda values, by: torch.tensor([v + [by] * (width - len(v)) for v in values])
    ids = [row["input_ids"] for row in rows]
    mask = [[1] * len(row) for row in ids]
    return dict(input_ids=fill(ids, 0), labels=fill([r["labels"] for r in rows], -100), attention_mask=fill(mask, 0))

items = sum((batch(part)["labels"][:, 1:] != -100).sum() for part in (0, 1))
reference = apply_eaft(tiny_model(tie_word_embeddings=tied)).train()
for part in (0, 1):
    reference(**batch(part), num_items_in_batch=items).loss.backward()
expected = {name: p.grad for name, p in reference.named_parameters()}

model = apply_eaft(tiny_model(tie_word_embeddings=tied)).train()
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
if own_group:
    fully_shard(model.lm_head, mesh=mesh)
fully_shard(model, mesh=mesh)
# FSDP averages over ranks, the Trainer multiplies by their number
(2 * model(**batch(rank), num_items_in_batch=items).loss).backward()
for name, parameter in model.named_parameters():
    error = (parameter.grad.full_tensor() - expected[name]).norm() / expected[name].norm()
    assert error < 1e-6, (name, error.item())
end_together()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("group", "tied"), [("root", "tied"), ("root", "untied"), ("own group", "untied")])
def test_gradients_of_a_sharded_model(tmp_path, group, tied):
    run_two(WORKER, group, tied)
