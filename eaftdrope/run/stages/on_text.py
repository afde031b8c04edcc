"""What the stages that train all weights on blocks of text have in common: pretrain and recalibrate."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from eaftdrope.loss.gates import resolve_gate
from eaftdrope.recipe.stage_sections import Pretrain, Recalibrate, TextData, TextLoss, TextTrain

from ..settings import TrainingSettings
from .training import TrainingStage


@dataclass(frozen=True)
class TextStage(TrainingStage):
    """A stage whose section has text, and a loss that is plain cross-entropy by default.

    Attributes:
        purpose: what the training is, for the model card.
    """

    purpose: ClassVar[str]

    @property
    @abstractmethod
    def section(self) -> Pretrain | Recalibrate: ...

    @property
    def data(self) -> TextData:
        return self.section.data

    @property
    def loss(self) -> TextLoss:
        return self.section.loss

    @property
    def train(self) -> TextTrain:
        return self.section.train

    def method(self, settings: TrainingSettings) -> str:
        train, loss = settings.train, self.loss
        formula = resolve_gate(loss.gate, **loss.gate_kwargs()).formula
        weighted = "plain cross-entropy" if loss.gate == "none" else f"cross-entropy weighted by the gate {formula}"
        return (
            f"{self.purpose}: all weights trained with {weighted} on text in blocks of "
            f"{settings.max_length:,} tokens (documents {self.data.documents}), {train.batch_size * train.accumulation} "
            f"blocks per step and device, peak learning rate {train.learning_rate:g}, {train.scheduler}"
        )

    def card_tags(self) -> list[str]:
        return [] if self.loss.gate == "none" else super().card_tags()
