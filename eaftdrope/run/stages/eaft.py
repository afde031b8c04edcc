"""The stage eaft: fine-tune on conversations, each token's cross-entropy weighted by the gate."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from eaftdrope.loss.gates import resolve_gate
from eaftdrope.recipe.data_section import Data
from eaftdrope.recipe.training_sections import Lora, Loss, Train

from ..settings import TrainingSettings, eaft_settings
from .training import TrainingStage

_SPARSE_TAIL = (
    "; gradients with respect to the head's input and weight from the vocabulary columns that matter (sparse tail)"
)


@dataclass(frozen=True)
class EaftStage(TrainingStage):
    """Train the recipe's own sections data, loss, lora, train and probes."""

    name = "eaft"

    @property
    def data(self) -> Data:
        assert self.record.data is not None, "a recipe with the stage eaft has the section data"
        return self.record.data

    @property
    def loss(self) -> Loss:
        return self.record.loss

    @property
    def train(self) -> Train:
        return self.record.train

    @property
    def lora(self) -> Lora | None:
        return self.record.lora

    @property
    def merge(self) -> bool:
        return self.record.output.merge

    @property
    def learns(self) -> bool:
        return self.record.learns_before(self.name)

    def settings(self, config: PretrainedConfig) -> TrainingSettings:
        """See `TrainingStage.settings`. After the stage ttt the model is trained as it reads, its fast MLPs included."""
        ttt = self.record.ttt.config() if self.learns and self.record.ttt else None
        return eaft_settings(self.record, model=self.model, folder=str(self.folder.path), ttt=ttt)

    def method(self, settings: TrainingSettings) -> str:
        gate, lora = resolve_gate(self.loss.gate, **self.loss.gate_kwargs()), self.lora
        tuned = f"LoRA (r = {lora.r}, alpha = {lora.alpha:g})" if lora else "full fine-tune"
        # an approximate gradient is part of the method
        tail = _SPARSE_TAIL if self.loss.tail == "sparse" else ""
        exempt = f", except those of {', '.join(map(repr, self.loss.exempt))}" if self.loss.exempt else ""
        anchor = self.record.loss.anchor_of_loss
        kept = f", and {anchor.formula} added for every token" if anchor else ""
        return f"{tuned}, each token's cross-entropy weighted by the gate {gate.formula}{exempt}{kept}{tail}"
