"""What may change between two starts of a run: its length, what is kept of it, and how its steps are shared out.

A run may be lengthened, and moved to another number of processes or another batch size, with as many rows per step:
its steps keep their rows as long as batch_size x accumulation x processes stays the same.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eaftdrope.loss.gates import GATES
from eaftdrope.recipe.training_sections import Loss
from eaftdrope.trainer.shard_checkpoints import OPTIMIZER_FILE

from .degrees import Degrees
from .machine import sharding_engine

_SHARES = ("batch_size", "accumulation")
# what engines name their optimiser in a checkpoint
_FSDP, _DEEPSPEED = ("optimizer.bin", "optimizer_[0-9]*"), ("global_step*",)
_TENSOR_PARALLEL = "tensor parallelism"


@dataclass(frozen=True)
class Continuation:
    """A stored run, compared with the present start of it.

    Args:
        recipe: the stored recipe, with the defaults of keys that it did not have.
        now: the present one.
        processes: the number that shared a step.
        processes_now: the number that do.
    """

    recipe: dict[str, Any]
    now: dict[str, Any]
    processes: int
    processes_now: int

    @property
    def lengthened(self) -> str:
        """The change of `train.steps` or `train.epochs`, as a sentence; "" unless the run is longer now.

        Only of conversations: text is read for as many steps as there are.
        """
        if self._section != "train":
            return ""
        for key in ("steps", "epochs"):
            then, now = (self._train(recipe).get(key) for recipe in (self.recipe, self.now))
            if then and now and now > then:
                return (
                    f"train.{key} was {then:g} and is {now:g}: continued, with the learning-rate schedule of a run of that "
                    "length"
                )
        return ""

    @property
    def moved(self) -> bool:
        """True if the rows of a step are shared out differently."""
        return self.processes != self.processes_now or any(
            self._train(self.recipe).get(key) != self._train(self.now)[key] for key in _SHARES
        )

    @property
    def same_rows(self) -> bool:
        """True if each step keeps its rows, and the gate gives them the same weights."""
        return self._rows(self.recipe, self.processes) == self._rows(self.now, self.processes_now) and not (
            self.moved and self._compares_tokens
        )

    @property
    def free_keys(self) -> tuple[str, ...]:
        """Keys that may differ."""
        keys = [f"train.{key}" for key in ("steps", "epochs") if self.lengthened]
        return (*keys, *(f"{self._section}.{key}" for key in _SHARES if self.same_rows))

    def refusal(self) -> str:
        """Why the present processes cannot continue the run, as the rest of a sentence, and what could; "" if they can."""
        if self.same_rows:
            return ""
        then, now = self._train(self.recipe), self._train(self.now)
        if self._compares_tokens:
            return (
                f"on {self.processes} processes, and this run has {self.processes_now}: the gate {self._gate} compares the "
                "tokens of a batch with each other, so other batches would give them other weights."
            )
        rows_now = self._rows(self.now, self.processes_now)
        rows, per_pass = self._rows(self.recipe, self.processes), now["batch_size"] * self.processes_now
        hint = f" Set {self._section}.accumulation={rows // per_pass} to resume it." if rows % per_pass == 0 else ""
        return (
            f"on {self.processes} processes with {rows} rows per step (batch_size {then.get('batch_size')}, accumulation "
            f"{then.get('accumulation')}), and this run has {self.processes_now} with {rows_now}: "
            f"its steps would have other rows.{hint}"
        )

    @property
    def _section(self) -> str:
        """The section that has the length of this training."""
        stages = self.now.get("stages")
        return "train" if not stages or stages[-1] in ("eaft", "drope") else f"{stages[-1]}.train"

    @property
    def _gate(self) -> str:
        stage = self._section.removesuffix("train").removesuffix(".")
        return ((self.now[stage] if stage else self.now).get("loss") or {}).get("gate", Loss().gate)

    @property
    def _compares_tokens(self) -> bool:
        """True if the gate of a token depends on the other tokens of its batch."""
        return not GATES[self._gate].row_local

    def _train(self, recipe: dict[str, Any]) -> dict[str, Any]:
        for name in self._section.split("."):
            # an older version's may lack it
            recipe = recipe.get(name) or {}
        return recipe

    def _rows(self, recipe: dict[str, Any], processes: int) -> int:
        train = self._train(recipe)
        return train.get("batch_size", 0) * train.get("accumulation", 0) * processes


def other_engine(checkpoint: Path | None, *, moved: bool) -> str:
    """Why the present engine cannot load a checkpoint, as the rest of a sentence; "" if it can.

    Args:
        checkpoint: a complete one, or None.
        moved: the rows of a step are shared out differently than before.
    """
    if checkpoint is None:
        return ""
    then = "one that replicates the weights"
    if any(found for pattern in _FSDP for found in checkpoint.glob(pattern)):
        then = "FSDP"
    elif any(found for pattern in _DEEPSPEED for found in checkpoint.glob(pattern)):
        then = "DeepSpeed"
    elif (checkpoint / OPTIMIZER_FILE).is_file():
        then = _TENSOR_PARALLEL
    now = "one that replicates the weights"
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("true", "1"):
        now = "DeepSpeed"
    elif engine := sharding_engine():
        now = "DeepSpeed" if engine.startswith("DeepSpeed") else engine
    elif Degrees.present().tp > 1:
        now = _TENSOR_PARALLEL
    if then != now:
        return f"whose {checkpoint.name} was written by another engine ({then}; now {now}), with other files."
    if moved and now == "DeepSpeed":
        return f"whose {checkpoint.name} was written by DeepSpeed, which loads it on the same number of processes only."
    return ""
