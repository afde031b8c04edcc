"""samples.json: a few prompts with the model's greedy answers before and after training, for people to read.

[{"prompt", "reference", "before", "after"}]: held-out prompts, spread evenly, or general ones where no held-out row asks
anything (`reference` is null then); `after` is null until the training is done.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from eaftdrope.data import Example

    from .folder import RunFolder
    from .prepare import Prepared

SAMPLES_FILE = "samples.json"
SAMPLES = 4
_LONGEST = 128
_KEYS = {"prompt", "reference", "before", "after"}


def take_samples(
    when: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Prepared,
    folder: RunFolder,
    progress: Callable[[str, int, int], None],
    *,
    keeps: bool,
) -> None:
    """Answers of "before" or "after", written to the folder by the process that keeps them; those of before only if a former
    start has not."""
    from eaftdrope.evaluate.probes.answers import answer
    from eaftdrope.loaded_model import evaluating

    kept = kept_samples(folder)
    if when == "before" and kept is not None:
        return
    examples, references = _choose(prepared)
    with evaluating(model):
        answers = answer(
            model,
            tokenizer,
            examples,
            max_new_tokens=_LONGEST,
            batch_tokens=prepared.recipe.probes.batch_tokens,
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
        samples = [{**sample, "after": text} for sample, text in zip(kept, answers)]
    folder.write(SAMPLES_FILE, json.dumps(samples, indent=2, ensure_ascii=False) + "\n")


def kept_samples(folder: RunFolder) -> list[dict] | None:
    """The samples of a run; None where there are none, or the file is damaged."""
    try:
        samples = json.loads(folder.kept(SAMPLES_FILE) or "")
    except (ValueError, RecursionError):
        return None
    is_ours = isinstance(samples, list) and all(
        isinstance(sample, dict) and sample.keys() >= _KEYS for sample in samples
    )
    return samples if is_ours and samples else None


def asks(example: Example) -> bool:
    """Whether a row has an answer that can be asked for."""
    return example.prompt is not None or any(turn["role"] == "assistant" for turn in example.messages or [])


def _choose(prepared: Prepared) -> tuple[list[Example], list[str | None]]:
    """What is asked, and what would be right as far as it is known."""
    from eaftdrope.evaluate.probes.agreement import general_prompts
    from eaftdrope.evaluate.texts import evenly_spaced

    held_out = evenly_spaced([example for example in prepared.data.held_out_examples if asks(example)], SAMPLES)
    if held_out:
        return held_out, [_reference(example) for example in held_out]
    general = evenly_spaced(general_prompts(), SAMPLES)
    return general, [None] * len(general)


def _prompt(example: Example) -> str:
    """The last thing said before the answer."""
    return example.prompt_messages[-1]["content"] if example.messages else example.prompt


def _reference(example: Example) -> str:
    if not example.messages:
        return example.completion
    return "\n".join(filter(None, [example.answer["content"], *map(json.dumps, example.expected_calls)]))
