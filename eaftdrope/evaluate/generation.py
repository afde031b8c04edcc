"""Greedy answers to many prompts: batches of similar length, padded on the left; each answer ends at its end of turn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from eaftdrope.data.chat import template_of
from eaftdrope.ttt import is_ttt

from .likelihood import Progress, batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    max_new_tokens: int,
    batch_tokens: int,
    progress: Progress | None = None,
) -> list[str]:
    """Return the answer to every prompt, in order, without the prompt and without the token that ended the answer.

    The prompts are rendered text: no special token is added. The checkpoint's sampling defaults are ignored.
    `progress` counts tokens, `max_new_tokens` for each prompt.
    """
    ids = [tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids for prompt in prompts]
    answers = generate_ids(
        model, tokenizer, ids, max_new_tokens=max_new_tokens, batch_tokens=batch_tokens, progress=progress
    )
    return [tokenizer.decode(answer) for answer in answers]


def generate_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    batch_tokens: int,
    prefill_chunk: int | None = None,
    sample: bool = False,
    progress: Progress | None = None,
) -> list[list[int]]:
    """Return the token ids of each answer, without the token that ended it; see [`generate`].

    Args:
        prefill_chunk: tokens of a prompt per forward, for prompts too long for one.
        sample: draw every token from the model's whole distribution, with torch's global generator.
    """
    stops = stop_token_ids(model, tokenizer)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=stops,
        pad_token_id=tokenizer.pad_token_id,
        prefill_chunk_size=prefill_chunk,
        use_cache=True,
        # Stated because unset options come from the checkpoint.
        do_sample=sample,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        temperature=1.0,
        top_p=1.0,
        top_k=0 if sample else 50,
    )
    answers: list[list[int]] = [[]] * len(prompts)
    done = 0
    for batch in _batches(model, [len(row) for row in prompts], max_new_tokens, batch_tokens):
        tick = _Tick(progress, done * max_new_tokens, len(batch), len(prompts) * max_new_tokens)
        new = _generate_batch(model, [prompts[i] for i in batch], config, tick)
        for i, row in zip(batch, new):
            end = next((j for j, token in enumerate(row) if token in stops), len(row))
            answers[i] = row[:end]
        done += len(batch)
        if progress is not None:
            progress(done * max_new_tokens, len(prompts) * max_new_tokens)
    return answers


def _batches(model: PreTrainedModel, lengths: list[int], max_new_tokens: int, batch_tokens: int) -> Iterator[list[int]]:
    """Yield indices of prompts that are generated together."""
    for batch in batches([length + max_new_tokens for length in lengths], batch_tokens):
        if is_ttt(model):
            # its rows learn from the same chunks, so they have one length; a batch is in order of length
            yield from (list(group) for _, group in groupby(batch, key=lambda index: lengths[index]))
        else:
            yield batch


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return every token that ends an answer: the tokenizer's, the checkpoint's, and the chat template's end of turn."""
    stops = {tokenizer.eos_token_id, _end_of_turn(tokenizer)}
    from_checkpoint = model.generation_config.eos_token_id
    stops.update(from_checkpoint if isinstance(from_checkpoint, list) else [from_checkpoint])
    return sorted(stops - {None})


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    if tokenizer.chat_template is None:
        return None
    stop = template_of(tokenizer).stop
    return None if stop is None else tokenizer.convert_tokens_to_ids(stop)


class _Tick(StoppingCriteria):
    """Reports progress after every token of a batch, which may take a minute; never stops the generation."""

    def __init__(self, progress: Progress | None, done: int, rows: int, total: int) -> None:
        self.progress, self.done, self.rows, self.total = progress, done, rows, total

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: object) -> torch.BoolTensor:
        self.done += self.rows
        if self.progress is not None:
            self.progress(self.done, self.total)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@torch.no_grad()
def _generate_batch(
    model: PreTrainedModel, prompts: list[list[int]], config: GenerationConfig, tick: _Tick
) -> list[list[int]]:
    width = max(map(len, prompts))
    input_ids = torch.full((len(prompts), width), config.pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for i, row in enumerate(prompts):
        input_ids[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = 1
    with _contiguous_input(model.get_output_embeddings()):
        out = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([tick]),
        )
    return out[:, width:].tolist()


@contextmanager
def _contiguous_input(head: torch.nn.Module | None) -> Iterator[None]:
    """Makes the input of `head` contiguous; None (a model that does not state its head) changes nothing.

    After a prompt it is a slice of the hidden states, which torch multiplies as a batch: it copies the head's weights for
    each row, on a CPU in bfloat16 0.1 s per row for SmolLM2.
    """
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()
