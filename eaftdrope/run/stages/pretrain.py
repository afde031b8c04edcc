"""The stage pretrain: a small model from random weights, trained on text with its rotary embedding."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rich.console import Console
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from eaftdrope.loss.gates import resolve_gate
from eaftdrope.processes import is_main_process
from eaftdrope.recipe.schema import Model
from eaftdrope.recipe.stage_sections import Pretrain, TextData, TextLoss, TextTrain
from eaftdrope.trainer import EAFTTrainer

from ..launch import refused_together, wait_for_everyone
from ..new_model import draw_weights, new_model
from ..settings import TrainingSettings, text_settings
from .training import Prepared, TrainingStage


@dataclass(frozen=True)
class PretrainStage(TrainingStage):
    """Train all weights on blocks of text, with the sections below `pretrain`."""

    name = "pretrain"

    @property
    def section(self) -> Pretrain:
        assert self.record.pretrain is not None, "a recipe with the stage pretrain has that section"
        return self.record.pretrain

    @cached_property
    def _new(self) -> Path:
        return new_model(self.record.model, self.section)

    @property
    def model(self) -> Model:
        return self.record.model.model_copy(update={"reference": str(self._new), "revision": None})

    @property
    def data(self) -> TextData:
        return self.section.data

    @property
    def loss(self) -> TextLoss:
        return self.section.loss

    @property
    def train(self) -> TextTrain:
        return self.section.train

    def settings(self, config: PretrainedConfig) -> TrainingSettings:
        """See `TrainingStage.settings`. Without data.max_length a block is as long as the model's context."""
        section = self.section
        length = section.data.max_length or config.get_text_config().max_position_embeddings
        return text_settings(self.record, self.name, self.model, self.folder.path, length=length)

    def output_config(self, config: PretrainedConfig) -> PretrainedConfig:
        return config

    def method(self, settings: TrainingSettings) -> str:
        train, loss = settings.train, self.loss
        formula = resolve_gate(loss.gate, **loss.gate_kwargs()).formula
        weighted = "plain cross-entropy" if loss.gate == "none" else f"cross-entropy weighted by the gate {formula}"
        return (
            f"Pretraining from random weights: all weights trained with {weighted} on text in blocks of "
            f"{settings.max_length:,} tokens (documents {self.data.documents}), {train.batch_size * train.accumulation} "
            f"blocks per step and device, peak learning rate {train.learning_rate:g}, {train.scheduler}"
        )

    def card_tags(self) -> list[str]:
        return [] if self.loss.gate == "none" else super().card_tags()

    def _load(self, prepared: Prepared, console: Console) -> tuple[EAFTTrainer, PreTrainedTokenizerBase]:
        with refused_together():
            if is_main_process():
                draw_weights(self._new, self.train.seed)
        wait_for_everyone()
        return super()._load(prepared, console)
