"""A training of ten steps on every engine that runs on a CPU, in one process or as a rank: what came out of it in a folder.

    python -m tests.trainer.engines FOLDER CASE ...

writes FOLDER/CASE/ (the saved model) and FOLDER/CASE.json (evaluation loss before and after, the logs, and how often the
training gathered a sharded head). A case is an engine and a variant of the training, such as `ddp-lora`.
"""

import gc
import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from unittest import mock

import torch
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from datasets import Dataset
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from eaftdrope import EAFTTrainer
from eaftdrope.run.result import gather_on_save
from eaftdrope.trainer import head
from tests.forked import end_together
from tests.tiny_models import make_word_tokenizer
from tests.trainer.test_invariance import arguments
from tests.trainer.tiny import ragged_rows, tiny_model

LOADED = {"fsdp": dict(fsdp_size=2), "tp": dict(tp_size=2), "tp_fsdp": dict(tp_size=2, fsdp_size=2)}
"""Engines that transformers shards with when the model is loaded, with their degrees."""
BY_ACCELERATE = {"full": "FULL_STATE_DICT", "sharded": "SHARDED_STATE_DICT"}
"""FSDP2 by accelerate, with the type of its state dict."""
VARIANTS = ("tied", "untied", "lora", "checkpointing", "uneven", "silent")
"""`uneven`: rows of which one token to all are trained, and accumulation. `silent`: only one rank has trained tokens."""


def train(folder: Path, case: str) -> None:
    """Engines: single, ddp, full and sharded, fsdp, tp and tp_fsdp, zero3 (which needs DeepSpeed)."""
    engine, variant = case.split("-")
    trainer = make_trainer(folder, engine, variant)
    # also before the training: it must not take the parameters away from the optimiser
    # accelerate and DeepSpeed want the optimiser when they shard
    before = None if engine in (*BY_ACCELERATE, "zero3") else trainer.evaluate()["eval_loss"]
    original, gathered = head._whole, []
    with mock.patch.object(head, "_whole", lambda parameter: gathered.append(parameter) or original(parameter)):
        trainer.train()
    after = trainer.evaluate()["eval_loss"]
    if trainer.is_fsdp_enabled:
        trainer._save(str(folder / case), state_dict=trainer.accelerator.get_state_dict(trainer.model))
    else:
        trainer.save_model(str(folder / case))
    if trainer.accelerator.is_main_process:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        (folder / f"{case}.json").write_text(
            json.dumps({"before": before, "after": after, "losses": losses, "gathered": len(gathered)})
        )


def make_trainer(folder: Path, engine: str, variant: str, *, max_steps: int = 10) -> EAFTTrainer:
    sharding = {"distributed_config": DistributedConfig(**LOADED[engine])} if engine in LOADED else {}
    ranks = int(os.environ.get("WORLD_SIZE", "1")) // (2 if engine.startswith("tp") else 1)
    accumulation = 2 if variant in ("uneven", "checkpointing") else 1
    settings = arguments(
        folder / "out",
        optim="sgd",
        max_steps=max_steps,
        learning_rate=0.3,
        lr_scheduler_type="linear",
        max_grad_norm=1.0,
        per_device_train_batch_size=8 // ranks // accumulation,
        gradient_accumulation_steps=accumulation,
        gradient_checkpointing=variant == "checkpointing",
        per_device_eval_batch_size=2,
        ddp_find_unused_parameters=False,
        use_cpu=engine != "zero3",
    )
    start = "tied" if variant == "tied" else "untied"
    model = AutoModelForCausalLM.from_pretrained(folder / f"start-{start}", dtype=torch.float32, **sharding)
    if variant == "lora":
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(folder / "start-lora"), is_trainable=True)
    trainer = EAFTTrainer(
        model,
        settings,
        train_dataset=_rows(variant),
        # does not fill the last batch of two processes, nor of four
        eval_dataset=ragged_rows(5, seed=9),
        processing_class=make_word_tokenizer(),
    )
    gather_on_save(trainer)
    return trainer


def _rows(variant: str) -> Dataset:
    if variant == "uneven":
        rows = ragged_rows(16).to_list()
        for index, row in enumerate(rows):
            trained = 1 if index % 2 else len(row["labels"])
            row["labels"] = [-100] * (len(row["labels"]) - trained) + row["labels"][-trained:]
        return Dataset.from_list(rows)
    if variant == "silent":
        # all of them are in every step
        rows = ragged_rows(8).to_list()
        return Dataset.from_list(
            [row if index == 5 else {**row, "labels": [-100] * len(row["labels"])} for index, row in enumerate(rows)]
        )
    return ragged_rows(16)


def make_starts(folder: Path) -> None:
    """What every case begins with: the models, and adapters none of whose tensors is zero."""
    from peft import LoraConfig, get_peft_model

    for tied in (True, False):
        tiny_model(tie_word_embeddings=tied).save_pretrained(folder / f"start-{'tied' if tied else 'untied'}")
    torch.manual_seed(3)
    adapters = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.0)
    get_peft_model(tiny_model(tie_word_embeddings=False), adapters).save_pretrained(folder / "start-lora")


# ---- engines that accelerate has on accelerators only: here the CPU passes for one ----


@contextmanager
def _accelerate_shards(state_dict: str):
    original, plugins = AcceleratorState.__init__, []

    def sharded(self, *args, **kwargs):
        original(self, *args, **kwargs)
        plugins or plugins.append(FullyShardedDataParallelPlugin(fsdp_version=2))
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugins[0]

    launched = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_STATE_DICT_TYPE": state_dict,
        "FSDP_RESHARD_AFTER_FORWARD": "true",
    }
    with mock.patch.object(AcceleratorState, "__init__", sharded), mock.patch.dict(os.environ, launched):
        yield


@contextmanager
def _deepspeed_shards():
    import_module("deepspeed")
    # compiled at its first use, for minutes, and not needed; as an attribute of the package `torch` is torch itself
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    backend = mock.patch.object(
        PartialState, "_prepare_backend", lambda *args, **kwargs: ("gloo", DistributedType.MULTI_CPU)
    )
    launched = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    with backend, mock.patch.dict(os.environ, launched):
        os.environ.pop("ACCELERATE_USE_CPU", None)
        yield


def main(folder: Path, cases: list[str], work: Callable[[Path, str], None] = train) -> None:
    torch.set_num_threads(1)
    # it has no name for several processes on CPUs
    ParallelismConfig._validate_accelerator = lambda self, accelerator: None
    for case in cases:
        engine = case.split("-")[0]
        with ExitStack() as held:
            if engine in BY_ACCELERATE:
                held.enter_context(_accelerate_shards(BY_ACCELERATE[engine]))
            elif engine == "zero3":
                held.enter_context(_deepspeed_shards())
            work(folder, case)
            gc.collect()
        AcceleratorState._reset_state()
        GradientState._reset_state()
        PartialState._reset_state()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    end_together()
