"""The stage recalibrate: train on text after the rotary embeddings were dropped, and measure the recovered perplexity."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from eaftdrope.drope.config import trained_length
from eaftdrope.errors import UserError
from eaftdrope.recipe.schema import Model
from eaftdrope.recipe.stage_sections import Recalibrate

from ..data import RunData
from ..recovery import RecoveryProbe, read_curve, recovery_markdown, recovery_rows, show_recovery
from ..settings import TrainingSettings, text_settings
from .on_text import TextStage


@dataclass(frozen=True)
class RecalibrateStage(TextStage):
    """Train all weights on blocks of text, with the sections below `recalibrate`."""

    purpose = "Recalibration after dropping rotary embeddings (DroPE)"
    name = "recalibrate"

    @property
    def section(self) -> Recalibrate:
        assert self.record.recalibrate is not None, "a recipe with the stage recalibrate has that section"
        return self.record.recalibrate

    @property
    def model(self) -> Model:
        # all weights are trained, which 4 bits rule out
        return super().model.model_copy(update={"quantization": "none"})

    def settings(self, config: PretrainedConfig) -> TrainingSettings:
        """See `TrainingStage.settings`. The model decides the length of a block, and so the steps of a budget in tokens."""
        section = self.section
        length = section.data.max_length or trained_length(config)
        return text_settings(self.record, self.name, self.model, self.folder.path, length=length)

    def recovery(
        self, settings: TrainingSettings, config: PretrainedConfig, data: RunData, tokenizer: PreTrainedTokenizerBase
    ) -> RecoveryProbe:
        section = self.section.recovery
        rows = recovery_rows(section, settings, data, tokenizer)
        return RecoveryProbe(self.folder, settings, section, self.original(config), rows)

    def original(self, config: PretrainedConfig) -> Model:
        """The model before its rotary embeddings were dropped.

        Raises:
            UserError: this recipe did not drop them, and it does not set recovery.original.
        """
        given, model = self.section.recovery.original, self.record.model
        if given is not None:
            same = given == model.reference
            update = {"reference": given, "revision": model.revision if same else None, "quantization": "none"}
            return model.model_copy(update=update)
        if self.before is not None:
            # without drope in the recipe the recovery is that of the model that this stage starts from
            start = self.before if self.before.name == "drope" else self
            return start.model.model_copy(update={"quantization": "none"})
        if getattr(config, "drope", None):
            raise UserError(
                f"{model.reference} has no rotary embedding, and its recovery is measured against the model that had one. "
                "Set recalibrate.recovery.original to that model."
            )
        return model.model_copy(update={"quantization": "none"})

    def card_sections(self) -> list[str]:
        return [recovery_markdown(read_curve(self.folder))]

    def show_result(self, console: Console) -> None:
        show_recovery(self.folder, console)
