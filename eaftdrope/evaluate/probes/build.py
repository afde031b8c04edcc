"""Building probes from a recipe's names and options, and running them on a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eaftdrope.errors import UserError
from eaftdrope.loaded_model import evaluating

from ..scores import Score
from .agreement import AgreementProbe
from .answers import READINGS, AnswersProbe
from .base import CheapProbe, HeldOut, Probe
from .call_refusal import CallRefusalProbe
from .format_keeping import FormatKeepingProbe
from .function_calls import FunctionCallsProbe
from .held_out_loss import HeldOutLossProbe
from .instructions import InstructionsProbe
from .language_drift import LanguageDriftProbe
from .long_loss import LongLossProbe
from .long_recall import LongRecallProbe
from .multiple_choice import MultipleChoiceProbe
from .perplexity import PerplexityProbe
from .rlm_tasks import RLMTasksProbe
from .serving import ServingProbe
from .turn_consistency import TurnConsistencyProbe
from .verbosity import VerbosityProbe

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from eaftdrope.data import Example

PROBES: dict[str, type[Probe]] = {
    "held_out_loss": HeldOutLossProbe,
    "function_calls": FunctionCallsProbe,
    "perplexity": PerplexityProbe,
    "multiple_choice": MultipleChoiceProbe,
    **dict.fromkeys(READINGS, AnswersProbe),
    "instructions": InstructionsProbe,
    "agreement": AgreementProbe,
    "rlm_tasks": RLMTasksProbe,
    "format_keeping": FormatKeepingProbe,
    "call_refusal": CallRefusalProbe,
    "verbosity": VerbosityProbe,
    "language_drift": LanguageDriftProbe,
    "turn_consistency": TurnConsistencyProbe,
    "long_recall": LongRecallProbe,
    "long_loss": LongLossProbe,
    "serving": ServingProbe,
}
"""A recipe's name of each probe -> its class, which documents its options; the recipe's schema has their defaults."""


def build_probes(
    wanted: list[tuple[str, str, dict[str, Any]]],
    *,
    held_out_examples: list[Example] | None = None,
    held_out_dataset: Dataset | None = None,
) -> list[Probe]:
    """Build probes from their names, groups and options.

    Args:
        wanted (`list[tuple[str, str, dict]]`): name, group ("target" or "general") and all options of each probe, named
            as in a recipe.
        held_out_examples (`list[Example]` or `None`): held-out rows, for probes that generate.
        held_out_dataset (`Dataset` or `None`): the same, encoded (columns `input_ids`, `labels`), for `held_out_loss`.

    Raises:
        UserError: unknown name, or a probe needs held-out data that does not exist, or its file cannot be used.
    """
    held_out = HeldOut(held_out_examples, held_out_dataset)
    for name, _, _ in wanted:
        if name not in PROBES:
            raise UserError(f"unknown probe {name!r}. Probes: {', '.join(PROBES)}.")
    return [PROBES[name].from_options(options, held_out, name=name, group=group) for name, group, options in wanted]


def run_probes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probes: list[Probe],
    *,
    batch_tokens: int = 2048,
    progress: Callable[[str, int, int], None] | None = None,
    capture: Path | None = None,
) -> list[Score]:
    """Run every probe in evaluation mode without gradients; the model is left in the mode it came in.

    Args:
        model (`PreTrainedModel`): the model to measure, PEFT-wrapped or not.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        probes (`list[Probe]`): as from [`build_probes`].
        batch_tokens (`int`): tokens of a batch, padding included; bounds the logits to `batch_tokens` x vocabulary.
        progress (`Callable[[str, int, int], None]` or `None`): called with (probe name, done, total) after each batch.
        capture (`Path` or `None`): set if the model is the base model: the predictions that later models are compared
            with are stored in this file, unless it exists.
    """
    scores = []
    with evaluating(model):
        for probe in probes:
            report = None
            if progress is not None:

                def report(done: int, total: int, name: str = probe.name) -> None:
                    progress(name, done, total)

            if capture is not None and isinstance(probe, AgreementProbe):
                scores += probe.capture(model, tokenizer, capture, batch_tokens=batch_tokens, progress=report)
            else:
                scores += probe.run(model, tokenizer, batch_tokens=batch_tokens, progress=report)
    return scores


def cheap_probes(probes: list[Probe], limit: int) -> list[CheapProbe]:
    """Return the probes that can run during training, on at most `limit` rows, windows, questions or prompts each."""
    return [probe.subset(limit) for probe in probes if isinstance(probe, CheapProbe)]
