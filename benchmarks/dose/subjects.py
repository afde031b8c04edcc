"""What the study needs of a base model: its weights, the rows of its trainings, and what measures it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedModel

from eaftdrope.evaluate.likelihood import TokenRow

from .plan import DoseCell


@dataclass(frozen=True)
class Measured:
    """Rows that measure a model.

    Attributes:
        held_out: the new skill; its loss is the target.
        facts: facts that the model was sure of and that no training row has; only the answer is labelled.
        text: general text; its perplexity.
    """

    held_out: list[TokenRow]
    facts: list[TokenRow]
    text: list[TokenRow]


@dataclass(frozen=True)
class Subject:
    """A base model with the data of its trainings.

    Attributes:
        load: a new copy of the base model, in float32.
        rows: of a cell, in the order in which all arms see them.
        trains: whether a weight is trained, by its name.
    """

    load: Callable[[], PreTrainedModel]
    rows: Callable[[DoseCell], list[TokenRow]]
    measured: Measured
    trains: Callable[[str], bool]
