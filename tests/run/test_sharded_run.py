"""A whole run on a model that two processes share by FSDP2. accelerate shards only on accelerators; here the CPU is made
to pass for one. ZeRO-3 needs DeepSpeed, which is not among the tests' packages: of it only what we set is looked at."""

import json
from types import SimpleNamespace

import pytest

from tests import forked
from tests.tiny_run import make_project, train
from tests.trainer.processes import run_two

WORKER = """
import os
import signal
import sys
import torch
from accelerate import state
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from tests.forked import end_together

torch.set_num_threads(1)
original, plugins = state.AcceleratorState.__init__, []

def sharded(self, *args, **kwargs):
    original(self, *args, **kwargs)
    plugins or plugins.append(FullyShardedDataParallelPlugin(fsdp_version=2))
    self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugins[0]

state.AcceleratorState.__init__ = sharded
from eaftdrope.cli import main
from eaftdrope.run.stages import training

moment = sys.argv.pop(1)

class Killed(BaseException):
    pass

def killed(*arguments):
    raise Killed

if moment == "after training":
    training.save_result = killed
if moment == "signal":
    step = training.EAFTTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        if os.environ["RANK"] == "1" and self.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    training.EAFTTrainer.compute_loss = compute_loss
try:
    main(["train", *sys.argv[1:]])
except Killed:
    pass
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
    run_two(WORKER, "to the end", recipe, *changes, f"output.dir={tmp_path / 'sharded'}")
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


def close(run, other, name):
    """Whether the tensors of two files are the same but for the order of sums."""
    from safetensors.torch import load_file

    expected, found = load_file(other / name), load_file(run / name)
    found = {key: value for key, value in found.items() if key in expected or key != "lm_head.weight"}
    assert found.keys() == expected.keys()
    return all((found[key] - value).norm() <= 1e-4 * value.norm() for key, value in expected.items())


# three optimizer steps with SGD: AdamW makes of a rounding of a small gradient a whole step
SHORT = ("train.steps=3", "train.optimizer=sgd", "train.save_every=1", "probes.target=[]", "probes.general=[]")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "weights", "loader"),
    [
        pytest.param(("lora=null", "train.learning_rate=0.1"), "model.safetensors", "AutoModelForCausalLM", id="full"),
        pytest.param(
            ("lora.dropout=0", "train.learning_rate=1.0"),
            "adapter_model.safetensors",
            "AutoPeftModelForCausalLM",
            id="lora",
            marks=pytest.mark.engines,
        ),
    ],
)
def test_sharded_state_dicts_leave_a_result_that_stock_libraries_load(tmp_path, monkeypatch, changes, weights, loader):
    """accelerate's default for FSDP2, of which the Trainer itself saves no weights; killed after the training and resumed."""
    import peft
    import torch
    import transformers

    recipe = make_project(tmp_path)
    whole, run = tmp_path / "whole", tmp_path / "sharded"
    ended = train(recipe, *SHORT, *changes, "train.batch_size=8", f"output.dir={whole}")
    assert ended.code == 0, ended.out
    for name, value in {**LAUNCHED, "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}.items():
        monkeypatch.setenv(name, value)
    command = (recipe, *SHORT, *changes, f"output.dir={run}")
    run_two(WORKER, "after training", *command)
    assert json.loads((run / "run.json").read_text())["status"] == "running"
    assert not (run / weights).exists()
    lines = (run / "metrics.jsonl").read_bytes()
    manifest = json.loads((run / "checkpoints" / "checkpoint-3" / "manifest.json").read_text())["files"]
    assert {"rng_state_0.pth", "rng_state_1.pth", "trainer_state.json"} <= manifest.keys()
    assert {f"optimizer_0/__{rank}_0.distcp" for rank in range(2)} <= manifest.keys()
    run_two(WORKER, "to the end", *command)
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    assert (run / "metrics.jsonl").read_bytes() == lines
    assert close(run, whole, weights)
    load = getattr(peft if "Peft" in loader else transformers, loader).from_pretrained
    ids = torch.arange(4, 24)[None]
    logits = [load(folder).eval()(ids).logits for folder in (run, whole)]
    assert (logits[0] - logits[1]).abs().max() < 1e-4


@pytest.mark.engines
def test_a_signal_to_one_rank_saves_the_shards_of_all(tmp_path, monkeypatch):
    """And the run ends as one that was not interrupted."""
    recipe, run, whole = make_project(tmp_path), tmp_path / "run", tmp_path / "whole"
    short = [change for change in SHORT if "save_every" not in change]
    changes = (*short, "lora=null", "train.learning_rate=0.1")
    for name, value in {**LAUNCHED, "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}.items():
        monkeypatch.setenv(name, value)
    arguments = map(str, ("signal", recipe, *changes, f"output.dir={run}"))
    ranks = forked.run_ranks(2, forked.program, WORKER, *arguments)
    assert [rank.code for rank in ranks] == [143, 143], ranks
    assert ranks[0].err.splitlines()[-1] == "Interrupted at step 2 of 3. The same command resumes from checkpoint-2."
    run_two(WORKER, "to the end", recipe, *changes, f"output.dir={run}")
    run_two(WORKER, "to the end", recipe, *changes, f"output.dir={whole}")
    assert close(run, whole, "model.safetensors")


# ---- what is asked of other engines, and of any result ----


def test_zero_3_gathers_its_weights_when_a_model_is_saved():
    from eaftdrope.run.result import gather_on_save

    for stage in (2, 3):
        config = {"zero_optimization": {"stage": stage}}
        plugin = SimpleNamespace(zero_stage=stage, deepspeed_config=config)
        accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
        gather_on_save(SimpleNamespace(accelerator=accelerator, is_deepspeed_enabled=True))
        gathers = config["zero_optimization"].get("stage3_gather_16bit_weights_on_model_save")
        assert gathers == (True if stage == 3 else None)
    gather_on_save(SimpleNamespace(accelerator=SimpleNamespace(state=object()), is_deepspeed_enabled=False))


def test_a_result_is_looked_at_without_zero_3(saved, monkeypatch):
    """transformers would shard it over all processes, of which one looks; and afterwards it is on again."""
    from transformers import PreTrainedModel
    from transformers.integrations import deepspeed

    from eaftdrope.run.result import check_weights

    class Config:
        def is_zero3(self):
            return True

    monkeypatch.setattr(deepspeed, "is_accelerate_available", lambda: True)
    monkeypatch.setattr(deepspeed, "is_deepspeed_available", lambda: True)
    config, seen = Config(), []
    deepspeed.set_hf_deepspeed_config(config)
    load = PreTrainedModel.from_pretrained.__func__

    def looked(cls, *args, **kwargs):
        seen.append(deepspeed.is_deepspeed_zero3_enabled())
        return load(cls, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(looked))
    try:
        check_weights(saved)
        assert (seen, deepspeed.is_deepspeed_zero3_enabled()) == ([False], True)
    finally:
        deepspeed.unset_hf_deepspeed_config()


@pytest.fixture
def saved(tmp_path):
    from tests.tiny_models import save_model

    return save_model(tmp_path / "model")


def without_a_weight(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
        (without_a_weight, "the weights model.norm.weight are missing"),
        (cut, "incomplete metadata, file not fully covered"),
    ],
    ids=["config", "file", "weight", "cut"],
)
def test_a_result_without_its_weights_is_never_finished(saved, damage, reason):
    from eaftdrope.errors import UserError
    from eaftdrope.run.result import check_weights

    check_weights(saved)
    damage(saved)
    with pytest.raises(UserError) as error:
        check_weights(saved)
    start, text = f"the training is done, but its result in {saved} is incomplete: ", str(error.value)
    assert text.startswith(start) and reason in text and text.endswith("it trains nothing twice.")


def test_an_adapter_without_its_weights_is_never_finished(saved, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    from eaftdrope.errors import UserError
    from eaftdrope.run.result import check_adapter

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(saved),
        LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], ensure_weight_tying=False),
    )
    adapter = tmp_path / "adapter"
    model.save_pretrained(adapter)
    check_adapter(adapter, model)
    file, name = adapter / "adapter_model.safetensors", "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    weights = load_file(file)
    for replaced, reason in ((torch.zeros(0), "empty"), (None, "missing")):
        others = {key: value for key, value in weights.items() if key != name}
        save_file(others if replaced is None else {**others, name: replaced}, file)
        with pytest.raises(UserError, match=f"is incomplete: the weight {name} is {reason}"):
            check_adapter(adapter, model)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"is incomplete: adapter_config\.json is missing"):
        check_adapter(adapter, model)
