"""Ten steps of SGD on every engine that a CPU can run: each tensor, loaded by stock transformers, is that of one process."""

import json
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from eaftdrope.trainer.head import check_head
from tests.trainer import engines
from tests.trainer.processes import run_ranks
from tests.trainer.tiny import tiny_model

# accelerate's FSDP2 changes the process, so it comes last
ON_TWO = [
    "ddp-tied",
    "ddp-untied",
    "fsdp-tied",
    "fsdp-untied",
    "tp-tied",
    "tp-untied",
    "accelerate-tied",
    "accelerate-untied",
]
ON_FOUR = ["ddp-tied", "tp-fsdp-tied", "tp-fsdp-untied"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of the runs, with those of one process."""
    folder = tmp_path_factory.mktemp("engines")
    engines.make_starts(folder)
    for case in ("single-tied", "single-untied"):
        engines.train(folder, case)
    return folder


@pytest.mark.engines
@pytest.mark.parametrize(("ranks", "cases"), [(2, ON_TWO), (4, ON_FOUR)])
def test_equal_to_one_process(alone, tmp_path, ranks, cases):
    run_ranks(ranks, Path(engines.__file__).read_text(), alone, *cases)
    for case in cases:
        tied = case.rsplit("-", 1)[1]
        start, expected, found = (_weights(alone / name) for name in (f"start-{tied}", f"single-{tied}", case))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert (found[name] - value).norm() <= 1e-6 * value.norm(), (case, name)
            assert (found[name] - start[name]).norm() > 1e-3 * value.norm(), (case, name)
        single, several = (json.loads((alone / f"{name}.json").read_text()) for name in (f"single-{tied}", case))
        assert case.startswith("tp") <= (several["gathered"] == 0), case
        assert several["losses"] == pytest.approx(single["losses"], abs=2e-6), case
        # five rows in batches of two: what fills the last batch is not counted
        for key in ("before", "after"):
            if several[key] is not None:
                assert several[key] == pytest.approx(single[key], abs=2e-6), (case, key)


def _weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


@pytest.mark.parametrize("tied", [True, False])
def test_checking_the_head_leaves_the_shards_in_place(tmp_path, tied):
    """Head and norm are one group that keeps its full weights, as transformers shards a model while loading it. An
    optimiser made after the check must find the shards."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = tiny_model(tie_word_embeddings=tied)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        ends = [model.model.norm, model.lm_head] + ([model.model.embed_tokens] if tied else [])
        fully_shard(ends, mesh=mesh, reshard_after_forward=False)
        fully_shard(model, mesh=mesh)
        before = {name: id(parameter) for name, parameter in model.named_parameters()}
        check_head(model)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    finally:
        torch.distributed.destroy_process_group()
