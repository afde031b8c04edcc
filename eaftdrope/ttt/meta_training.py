"""`TTTTrainer`: the EAFTTrainer for a model that learns as it reads.

The model's forward reads and learns, so the loss and its gradient need nothing. What is added: the fast MLPs stay trainable
beside adapters, they are saved with every checkpoint and restored from it, and the loss is logged by position.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from eaftdrope.errors import UserError
from eaftdrope.trainer.patch import log_positions
from eaftdrope.trainer.trainer import EAFTTrainer

from .fast_mlps import fast_mlps
from .saved import WEIGHTS_FILE, load_primes, save_ttt

_BINS = 24


class TTTTrainer(EAFTTrainer):
    """
    [`EAFTTrainer`] for a model with TTT (`apply_ttt(model)`): the meta-training of its slow weights and of the initial values
    of its fast ones.

    With `peft_config` the slow weights get adapters, and the fast MLPs are trained in full beside them. Every checkpoint has
    the fast MLPs in `ttt.safetensors`, and a resumed training restores them. Every log carries `position/nll_0_512`,
    `position/nll_512_1024`, `position/nll_1024_2048`, ...: the cross-entropy by position in the row, in bins that double; in
    the first one, a chunk, nothing has been learned yet.

    Raises:
        UserError: TTT is not applied to the model; FSDP, DeepSpeed ZeRO-3 or an anchor.
        ValueError: rows without padding, in which sequences follow each other (`packing`, `padding_free`).
    """

    _tag_names = ["trl", "sft", "eaft", "ttt"]

    def __init__(self, model: Any, *trainer_args: Any, **kwargs: Any) -> None:
        # before the base class wraps it
        fast_mlps(model)
        super().__init__(model, *trainer_args, **kwargs)
        self._refuse_sharding()
        if getattr(self.args, "anchor", None) is not None:
            raise UserError(
                "an anchor is not supported for a model that learns as it reads: its fast MLPs are trained in full, so the "
                "model without its adapters is not the base. Leave the anchor out."
            )
        fast = fast_mlps(self.model)
        # peft freezes all but its adapters
        fast.requires_grad_(True)
        chunk = fast.config.chunk
        log_positions(self.model, (0, *(chunk << power for power in range(_BINS))))

    def _refuse_sharding(self) -> None:
        sharded = "FSDP" if self.is_fsdp_enabled else "DeepSpeed ZeRO-3" if is_deepspeed_zero3_enabled() else None
        if sharded:
            raise UserError(sharding_refused(sharded))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            assert folder is not None
            save_ttt(self.model, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if fast_mlps(self.model).config.layout == "prime":
            load_primes(self.model, Path(resume_from_checkpoint) / WEIGHTS_FILE)


def sharding_refused(name: str) -> str:
    """The error for an engine that shards the weights."""
    return (
        f"{name} keeps a part of each weight on each process and gathers a block's when it runs, while TTT reads the fast "
        "weights of all blocks at once and runs them again for every chunk. Use one process per GPU without sharding (DDP), "
        "with LoRA for the slow weights where they do not fit."
    )
