"""A whole run on a model that two processes share by FSDP2. accelerate shards on accelerators alone; here it is told that
the processor is one."""

import json

import pytest

from tests.tiny_run import make_project, train
from tests.trainer.processes import run_two

WORKER = """
import sys
import torch
from accelerate import state
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from tests.trainer.processes import end_together

torch.set_num_threads(1)
original, plugins = state.AcceleratorState.__init__, []

def sharded(self, *args, **kwargs):
    original(self, *args, **kwargs)
    plugins or plugins.append(FullyShardedDataParallelPlugin(fsdp_version=2))
    self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugins[0]

state.AcceleratorState.__init__ = sharded
from eaftdrope.cli import main
main(["train", *sys.argv[1:]])
end_together()
"""
# what `accelerate launch` makes of the options in the recipes' headers
LAUNCHED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


@pytest.mark.slow
def test_trained_probed_and_saved_as_without_it(tmp_path, monkeypatch):
    """Its rows are those of one process with batches twice as large, so all that comes out of it must be the same."""
    from safetensors.torch import load_file

    recipe = make_project(tmp_path)
    agreement = "{agreement: {limit: 2, max_tokens: 32, max_new_tokens: 4}}"
    changes = ["lora=null", "train.steps=3", f"probes.general=[{{perplexity: {{files: [text.txt]}}}}, {agreement}]"]
    whole = train(recipe, *changes, "train.batch_size=8", f"output.dir={tmp_path / 'whole'}")
    assert whole.code == 0, whole.out
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    run_two(tmp_path, WORKER, recipe, *changes, f"output.dir={tmp_path / 'sharded'}")
    runs = [tmp_path / "whole", tmp_path / "sharded"]
    expected, weights = (load_file(run / "model.safetensors") for run in runs)
    # gathered weights are copies: the tied head is one more, which loading ties again
    head = weights.pop("lm_head.weight")
    assert head.equal(weights["model.embed_tokens.weight"])
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert (weights[name] - value).norm() / value.norm() < 1e-4, name
    for file in ("probes_before.json", "probes_after.json"):
        one, two = (json.loads((run / file).read_text()) for run in runs)
        assert [score["metric"] for score in one] == [score["metric"] for score in two]
        for score, other in zip(one, two):
            assert other["value"] == pytest.approx(score["value"], rel=2e-3, abs=2e-3), score["metric"]
    samples = [json.loads((run / "samples.json").read_text()) for run in runs]
    assert [sample["before"] for sample in samples[0]] == [sample["before"] for sample in samples[1]]
    assert json.loads((tmp_path / "sharded" / "run.json").read_text())["status"] == "finished"
