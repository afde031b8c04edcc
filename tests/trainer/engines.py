"""A training of ten steps on every engine that runs on a CPU, in one process or as a rank: what came out of it in a folder.

    python -m tests.trainer.engines FOLDER CASE ...

writes FOLDER/CASE/ (the saved model) and FOLDER/CASE.json (evaluation loss before and after, the logs, and how often the
training gathered a sharded head).
"""

import gc
import json
import os
import sys
from pathlib import Path
from unittest import mock

import torch
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from eaftdrope import EAFTTrainer
from eaftdrope.trainer import head
from tests.forked import end_together
from tests.tiny_models import make_word_tokenizer
from tests.trainer.test_invariance import arguments
from tests.trainer.tiny import ragged_rows, tiny_model

LOADED = {"fsdp": dict(fsdp_size=2), "tp": dict(tp_size=2), "tp-fsdp": dict(tp_size=2, fsdp_size=2)}


def train(folder: Path, case: str) -> None:
    """`case` is an engine and "tied" or "untied": single, ddp, accelerate (FSDP2 by accelerate), fsdp, tp, tp-fsdp (sharded
    by transformers when the model is loaded)."""
    engine, tied = case.rsplit("-", 1)
    start = folder / f"start-{tied}"
    sharding = {"distributed_config": DistributedConfig(**LOADED[engine])} if engine in LOADED else {}
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32, **sharding)
    ranks = int(os.environ.get("WORLD_SIZE", "1")) // (2 if "tp" in engine else 1)
    trainer = EAFTTrainer(
        model,
        arguments(
            folder / "out",
            optim="sgd",
            max_steps=10,
            learning_rate=0.3,
            lr_scheduler_type="linear",
            max_grad_norm=1.0,
            per_device_train_batch_size=8 // ranks,
            per_device_eval_batch_size=2,
            ddp_find_unused_parameters=False,
        ),
        train_dataset=ragged_rows(16),
        # does not fill the last batch of two processes, nor of four
        eval_dataset=ragged_rows(5, seed=9),
        processing_class=make_word_tokenizer(),
    )
    # also before the training: it must not take the parameters away from the optimiser
    # accelerate wants the optimiser when it shards
    original = head._whole
    before = None if engine == "accelerate" else trainer.evaluate()["eval_loss"]
    gathered = []
    with mock.patch.object(head, "_whole", lambda parameter: gathered.append(parameter) or original(parameter)):
        trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(folder / case))
    if trainer.accelerator.is_main_process:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        (folder / f"{case}.json").write_text(
            json.dumps({"before": before, "after": after, "losses": losses, "gathered": len(gathered)})
        )


def make_starts(folder: Path) -> None:
    """The models that every case begins with."""
    for tied in (True, False):
        tiny_model(tie_word_embeddings=tied).save_pretrained(folder / f"start-{'tied' if tied else 'untied'}")


def _shard_by_accelerate() -> None:
    """accelerate shards on accelerators only: here it takes the processor for one."""
    original, plugins = AcceleratorState.__init__, []

    def sharded(self, *args, **kwargs):
        original(self, *args, **kwargs)
        plugins or plugins.append(FullyShardedDataParallelPlugin(fsdp_version=2))
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugins[0]

    AcceleratorState.__init__ = sharded


SHARDED_BY_ACCELERATE = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def main(folder: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    # it has no name for several processes on CPUs
    ParallelismConfig._validate_accelerator = lambda self, accelerator: None
    original = AcceleratorState.__init__
    for case in cases:
        by_accelerate = case.startswith("accelerate")
        if by_accelerate:
            os.environ.update(SHARDED_BY_ACCELERATE)
            _shard_by_accelerate()
        train(folder, case)
        gc.collect()
        for name in SHARDED_BY_ACCELERATE if by_accelerate else ():
            del os.environ[name]
        AcceleratorState.__init__ = original
        AcceleratorState._reset_state()
        GradientState._reset_state()
        PartialState._reset_state()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    end_together()
