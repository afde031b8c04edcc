"""The stage pretrain: a small model from random weights, trained on text with its rotary embedding."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rich.console import Console
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from eaftdrope.processes import is_main_process
from eaftdrope.recipe.schema import Model
from eaftdrope.recipe.stage_sections import Pretrain
from eaftdrope.trainer import EAFTTrainer

from ..launch import refused_together, wait_for_everyone
from ..new_model import draw_weights, new_model
from ..settings import TrainingSettings, text_settings
from .on_text import TextStage
from .training import Prepared


@dataclass(frozen=True)
class PretrainStage(TextStage):
    """Train all weights on blocks of text, with the sections below `pretrain`."""

    purpose = "Pretraining from random weights"
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

    def settings(self, config: PretrainedConfig) -> TrainingSettings:
        """See `TrainingStage.settings`. Without data.max_length a block is as long as the model's context."""
        section = self.section
        length = section.data.max_length or config.get_text_config().max_position_embeddings
        return text_settings(self.record, self.name, self.model, self.folder.path, length=length)

    def output_config(self, config: PretrainedConfig) -> PretrainedConfig:
        return config

    def _load(self, prepared: Prepared, console: Console) -> tuple[EAFTTrainer, PreTrainedTokenizerBase]:
        with refused_together():
            if is_main_process():
                draw_weights(self._new, self.train.seed)
        wait_for_everyone()
        return super()._load(prepared, console)
