"""FSDP2: the head inside the root's group, and sharded on its own (a DTensor while the loss runs); with an anchor too."""

import pytest

from tests.trainer.processes import run_two

WORKER = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from peft import LoraConfig, get_peft_model
from eaftdrope import apply_eaft
from tests.forked import end_together
from tests.trainer.tiny import ragged_rows, tiny_model

own_group, tied, base = sys.argv[1] == "own group", sys.argv[2] == "tied", sys.argv[3]
dist.init_process_group("gloo")
rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))

def batch(part):
    rows = list(ragged_rows(8))[part * 4 : part * 4 + 4]
    width = max(len(row["input_ids"]) for row in rows)
    fill = lambda values, by: torch.tensor([v + [by] * (width - len(v)) for v in values])
    ids = [row["input_ids"] for row in rows]
    mask = [[1] * len(row) for row in ids]
    return dict(input_ids=fill(ids, 0), labels=fill([r["labels"] for r in rows], -100), attention_mask=fill(mask, 0))

def made():
    model = tiny_model(tie_word_embeddings=tied)
    if base == "no anchor":
        return apply_eaft(model).train()
    options = dict(anchor={"kl": 0.7, "mask_target": True})
    if base == "second model":
        return apply_eaft(model, **options, base_model=tiny_model(3, tie_word_embeddings=tied)).train()
    torch.manual_seed(5)
    save = ["lm_head"] if base == "adapters and head" else None
    model = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, modules_to_save=save)
    )
    return apply_eaft(model, **options).train()

items = sum((batch(part)["labels"][:, 1:] != -100).sum() for part in (0, 1))
reference = made()
for part in (0, 1):
    reference(**batch(part), num_items_in_batch=items).loss.backward()
expected = {name: p.grad for name, p in reference.named_parameters() if p.requires_grad}

model = made()
inner = model.get_base_model() if hasattr(model, "get_base_model") else model
for layer in inner.model.layers:
    fully_shard(layer, mesh=mesh)
if own_group:
    fully_shard(inner.lm_head, mesh=mesh)
fully_shard(model, mesh=mesh)
# FSDP averages over ranks, the Trainer multiplies by their number
(2 * model(**batch(rank), num_items_in_batch=items).loss).backward()
trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
assert trained.keys() == expected.keys() and trained
for name, parameter in trained.items():
    error = (parameter.grad.full_tensor() - expected[name]).norm() / expected[name].norm()
    assert error < 1e-6, (name, error.item())
end_together()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("group", "tied"), [("root", "tied"), ("root", "untied"), ("own group", "untied")])
def test_gradients_of_a_sharded_model(tmp_path, group, tied):
    run_two(WORKER, group, tied, "no anchor")


@pytest.mark.engines
@pytest.mark.parametrize(
    ("group", "tied", "base"),
    [
        ("root", "tied", "second model"),
        ("own group", "untied", "second model"),
        ("root", "tied", "adapters"),
        ("own group", "untied", "adapters"),
        ("root", "untied", "adapters and head"),
    ],
)
def test_an_anchor_on_a_sharded_model(tmp_path, group, tied, base):
    run_two(WORKER, group, tied, base)
