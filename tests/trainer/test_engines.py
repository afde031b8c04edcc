"""Ten steps of SGD on every engine that a CPU can run: each tensor, loaded by stock transformers, is that of one process.

`make test-engines` runs the table, engine x variant; those marked `engines` are also run by .ci/run. ZeRO-3 runs with the
Python of EAFTDROPE_DEEPSPEED, which has DeepSpeed beside the packages of this one.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from eaftdrope.trainer.head import check_head
from tests import forked
from tests.trainer import engines
from tests.trainer.processes import run_ranks
from tests.trainer.tiny import tiny_model

ON_TWO = [f"{engine}-{variant}" for engine in ("ddp", "fsdp", "full", "sharded", "tp") for variant in engines.VARIANTS]
# PEFT's adapters cannot be trained on a tensor-parallel model; see test_adapters_on_a_tensor_parallel_model
ON_TWO.remove("tp-lora")
ON_FOUR = ["ddp-silent", "tp_fsdp-tied", "tp_fsdp-untied", "tp_fsdp-uneven"]
ZERO3 = [f"zero3-{variant}" for variant in engines.VARIANTS]
# one of each kind
ALWAYS = {"ddp-untied", "full-untied", "sharded-untied", "tp-untied", "zero3-untied"}
DEEPSPEED = os.environ.get("EAFTDROPE_DEEPSPEED", "")


def _marked(ranks, cases):
    for case in cases:
        mark = pytest.mark.engines if case in ALWAYS and ranks == 2 else pytest.mark.engine_table
        yield pytest.param(ranks, case, marks=mark, id=f"{case}-{ranks}")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of the runs, with what they begin with."""
    folder = tmp_path_factory.mktemp("engines")
    engines.make_starts(folder)
    return folder


@pytest.fixture(scope="module")
def ran(request, alone):
    """A function that returns the results of a case and of one process. All cases of this session on as many ranks share
    one pair of processes, started at the first of them."""
    chosen = [
        item.callspec.params for item in request.session.items if item.originalname == "test_equal_to_one_process"
    ]
    done, single = set(), set()

    def results(ranks, case):
        kind = (ranks, case.startswith("zero3"))
        if kind not in done:
            done.add(kind)
            cases = [other["case"] for other in chosen if (other["ranks"], other["case"].startswith("zero3")) == kind]
            (_run_deepspeed if kind[1] else _run)(ranks, alone, cases)
        variant = case.split("-")[1]
        if variant not in single:
            single.add(variant)
            engines.train(alone, f"single-{variant}")
        return alone, variant

    return results


def _run(ranks, folder, cases):
    # accelerate's FSDP2 changes the process, so it comes last
    run_ranks(ranks, Path(engines.__file__).read_text(), folder, *sorted(cases, key=lambda case: case[0] in "fs"))


def _run_deepspeed(ranks, folder, cases):
    together = {**forked._rendezvous(ranks), "DS_ACCELERATOR": "cpu", "PYTHONPATH": os.getcwd()}
    command = [DEEPSPEED, "-m", "tests.trainer.engines", str(folder), *cases]
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **together, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    texts = [process.communicate(timeout=900)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * ranks, texts[0][-3000:]


@pytest.mark.parametrize(("ranks", "case"), [*_marked(2, ON_TWO), *_marked(4, ON_FOUR), *_marked(2, ZERO3)])
def test_equal_to_one_process(ran, ranks, case):
    if case.startswith("zero3") and not DEEPSPEED:
        pytest.skip("EAFTDROPE_DEEPSPEED is not set: ZeRO-3 is NOT checked here")
    folder, variant = ran(ranks, case)
    start = {"tied": "tied", "lora": "lora"}.get(variant, "untied")
    begun, expected, found = (_weights(folder / name) for name in (f"start-{start}", f"single-{variant}", case))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-6 * value.norm(), name
        assert (found[name] - begun[name]).norm() > 1e-3 * value.norm(), name
    single, several = (json.loads((folder / f"{name}.json").read_text()) for name in (f"single-{variant}", case))
    assert several["losses"] == pytest.approx(single["losses"], abs=2e-6)
    # five rows in batches of two: what fills the last batch is not counted
    for key in ("before", "after"):
        if several[key] is not None:
            assert several[key] == pytest.approx(single[key], abs=2e-6), key


def _weights(folder):
    if (folder / "adapter_model.safetensors").is_file():
        return load_file(folder / "adapter_model.safetensors")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


@pytest.mark.engine_table
def test_adapters_on_a_tensor_parallel_model(alone):
    """Why a recipe with lora and parallel.tp is refused: torch and PEFT disagree about the shape of a shard. When this
    fails, the refusal can go."""
    ended = forked.run_ranks(2, forked.program, Path(engines.__file__).read_text(), str(alone), "tp-lora")
    assert all(rank.code != 0 for rank in ended)
    assert "RuntimeError: shape" in ended[0].err


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
