"""Whole runs of recipes with the section `parallel`, on two processes. accelerate has its engines on accelerators only; here
the CPU is made to pass for one, as in test_sharded_run.py."""

import json

import pytest

from tests import forked
from tests.run.test_sharded_run import close
from tests.tiny_run import make_project, train

WORKER = """
import os
import signal
import sys
import torch
from accelerate import ParallelismConfig, state
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from tests.forked import end_together

torch.set_num_threads(1)
moment = sys.argv.pop(1)
from eaftdrope.cli import main
from eaftdrope.run import degrees
from eaftdrope.run.stages import training

degrees.check_shards_here = lambda engine: None
ParallelismConfig._validate_accelerator = lambda self, accelerator: None
if "parallel=fsdp2" in sys.argv:
    original, plugins = state.AcceleratorState.__init__, []

    def sharded(self, *args, **kwargs):
        original(self, *args, **kwargs)
        plugins or plugins.append(FullyShardedDataParallelPlugin())
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugins[0]

    state.AcceleratorState.__init__ = sharded
if moment == "signal":
    step = training.EAFTTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        if os.environ["RANK"] == "1" and self.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    training.EAFTTrainer.compute_loss = compute_loss
main(["train", *sys.argv[1:]])
end_together()
"""
SHORT = ("lora=null", "train.steps=4", "probes.general=[]")


def ranks(moment, *command):
    return forked.run_ranks(2, forked.program, WORKER, moment, *map(str, command))


@pytest.mark.engines
@pytest.mark.parametrize(
    ("parallel", "batch", "optimizer"),
    [
        ("{tp: 2}", 4, ("train.optimizer=sgd", "train.learning_rate=0.1")),
        ("{tp: 2}", 4, ("train.optimizer=adamw_torch", "train.learning_rate=1e-4")),
        ("fsdp2", 2, ("train.optimizer=sgd", "train.learning_rate=0.1")),
    ],
    ids=["tp", "tp with the state of AdamW", "fsdp2"],
)
def test_interrupted_and_resumed_as_one_process_trains(tmp_path, parallel, batch, optimizer):
    """A tensor-parallel group has the same rows, so its batch is that of one process; FSDP2's ranks have half of it each."""
    recipe, run, whole = make_project(tmp_path), tmp_path / "run", tmp_path / "whole"
    single = train(recipe, *SHORT, *optimizer, f"output.dir={whole}")
    assert single.code == 0, single.out
    command = (recipe, *SHORT, *optimizer, f"parallel={parallel}", f"train.batch_size={batch}", f"output.dir={run}")
    ended = ranks("signal", *command)
    assert [rank.code for rank in ended] == [143, 143], ended
    assert ended[0].err.splitlines()[-1] == "Interrupted at step 2 of 4. The same command resumes from checkpoint-2."
    ended = ranks("to the end", *command)
    assert [rank.code for rank in ended] == [0, 0], ended
    assert "resuming from checkpoint-2 of 4" in ended[0].out
    expected = {"{tp: 2}": "tp 2, 1 data-parallel rank", "fsdp2": "FSDP2 2, 2 data-parallel ranks"}[parallel]
    assert f"parallel      2 processes: {expected}\n" in ended[0].out
    assert "per step      4 rows" in ended[0].out
    assert close(run, whole, "model.safetensors")
    lines = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (run, whole)]
    losses = [[line["loss"] for line in found if "loss" in line] for found in lines]
    assert losses[0] == pytest.approx(losses[1], abs=2e-6)
    scores = [json.loads((folder / "probes_after.json").read_text())[0]["value"] for folder in (run, whole)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
