"""samples.json: a few prompts with the model's greedy answers before and after training, for people to read.

    [{"prompt", "reference", "before", "after"}]

Evenly spaced held-out prompts, or general ones (with `reference` null) where no held-out row has a question; `after` is null
until the training is done.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eaftdrope.data import Example
from eaftdrope.evaluate.probes.agreement import general_prompts
from eaftdrope.evaluate.probes.answers import answer
from eaftdrope.evaluate.texts import evenly_spaced
from eaftdrope.loaded_model import evaluating

from .data import SAMPLES
from .folder import RunFolder

SAMPLES_FILE = "samples.json"
_MAX_NEW_TOKENS = 128
_KEYS = {"prompt", "reference", "before", "after"}


def take_samples(
    when: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    held_out: list[Example],
    folder: RunFolder,
    progress: Callable[[str, int, int], None],
    *,
    batch_tokens: int,
    keeps: bool,
) -> None:
    """Generate the answers of "before" or "after"; those of before only if an earlier start has not stored them.

    Args:
        keeps: this process writes the answers to the folder.
    """
    stored = read_samples(folder)
    if when == "before" and stored is not None:
        return
    examples, references = _choose(held_out)
    with evaluating(model):
        answers = answer(
            model,
            tokenizer,
            examples,
            max_new_tokens=_MAX_NEW_TOKENS,
            batch_tokens=batch_tokens,
            progress=lambda done, total: progress("samples", done, total),
        )
    if not keeps:
        return
    if when == "before":
        samples = [
            {"prompt": _prompt(example), "reference": reference, "before": text, "after": None}
            for example, reference, text in zip(examples, references, answers)
        ]
    else:
        assert stored is not None, "the answers of before are stored first"
        samples = [{**sample, "after": text} for sample, text in zip(stored, answers)]
    folder.write(SAMPLES_FILE, json.dumps(samples, indent=2, ensure_ascii=False) + "\n")


def read_samples(folder: RunFolder) -> list[dict] | None:
    """The samples of a run; None if there are none, or the file is damaged."""
    try:
        samples = json.loads(folder.stored(SAMPLES_FILE) or "")
    except (ValueError, RecursionError):
        return None
    is_sound = isinstance(samples, list) and all(
        isinstance(sample, dict) and sample.keys() >= _KEYS for sample in samples
    )
    return samples if is_sound and samples else None


def has_question(example: Example) -> bool:
    """True if a row has an answer, which the model can be prompted for."""
    return example.prompt is not None or any(turn["role"] == "assistant" for turn in example.messages or [])


def _choose(held_out: list[Example]) -> tuple[list[Example], list[str | None]]:
    """The prompts, and their correct answers as far as these are known."""
    chosen = evenly_spaced([example for example in held_out if has_question(example)], SAMPLES)
    if chosen:
        return chosen, [_reference(example) for example in chosen]
    general = evenly_spaced(general_prompts(), SAMPLES)
    return general, [None] * len(general)


def _prompt(example: Example) -> str | None:
    """The last message before the answer."""
    return example.prompt_messages[-1]["content"] if example.messages else example.prompt


def _reference(example: Example) -> str | None:
    if not example.messages:
        return example.completion
    return "\n".join(filter(None, [example.answer["content"], *map(json.dumps, example.expected_calls)]))
