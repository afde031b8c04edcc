"""Log-likelihoods of token sequences: the one place where probes convert logits to nats.

    nll of a row = sum over its labelled positions t of  -log softmax(z_{t-1})[y_t]        (labels are not shifted)

Shapes: B rows of a batch, S tokens of the longest, P positions, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[int, int], None]
"""Called with (done, total)."""
IGNORED = -100
# Rows of logits converted to float32 at once: 256 x 152k x 4 bytes = 156 MB.
_CHUNK_ROWS = 256


class TokenRow(NamedTuple):
    """A sequence and its labels: the same ids, or -100 for tokens that do not count."""

    input_ids: list[int]
    labels: list[int]


@torch.no_grad()
def token_nll(
    model: PreTrainedModel, input_ids: torch.Tensor, labels: torch.Tensor, attention_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cross-entropy of the labelled tokens of each row, from one forward of the unchanged model.

    Args:
        model: causal language model (PEFT-wrapped or not), in the mode it should be measured in.
        input_ids, labels, attention_mask: int64 [B, S], labels not shifted, -100 = not counted, padded on the right.

    Returns:
        nll, float64 [B], the sum in nats; count, int64 [B], the number of tokens in it (the first token never counts).
    """
    targets = labels[:, 1:]
    counted = targets != IGNORED
    # Positions that predict a counted token in some row: the head, the largest part of a small model, runs on these only.
    positions = counted.any(0).nonzero().flatten()
    nll = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
    if len(positions) == 0:
        return nll, counted.sum(1)
    logits = logits_at(model, input_ids, attention_mask, positions)
    targets, counted = targets[:, positions], counted[:, positions]
    rows, columns = counted.nonzero(as_tuple=True)
    for start in range(0, len(rows), _CHUNK_ROWS):
        r, c = rows[start : start + _CHUNK_ROWS], columns[start : start + _CHUNK_ROWS]
        losses = F.cross_entropy(logits[r, c].float(), targets[r, c].to(logits.device), reduction="none")
        nll.index_add_(0, r, losses.double().to(nll.device))
    return nll, counted.sum(1)


def rows_nll(
    model: PreTrainedModel, rows: list[TokenRow], *, batch_tokens: int, progress: Progress | None = None
) -> list[tuple[float, float]]:
    """Return (nll, count) of every row, in order; batches have rows of similar length, `batch_tokens` with padding."""
    result: list[tuple[float, float]] = [(0.0, 0.0)] * len(rows)
    done = 0
    for batch in batches([len(row.input_ids) for row in rows], batch_tokens):
        nll, count = token_nll(model, *padded([rows[i] for i in batch], model.device))
        for i, total, weight in zip(batch, nll.tolist(), count.tolist()):
            result[i] = (total, float(weight))
        done += len(batch)
        if progress is not None:
            progress(done, len(rows))
    return result


def batches(lengths: list[int], batch_tokens: int) -> Iterator[list[int]]:
    """Yield indices in groups of similar length, longest first, each at most `batch_tokens` when padded (or one row)."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def bos_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that the tokenizer puts before any text: the BOS token, or none."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("").input_ids[:1] == [bos] else []


def logits_at(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Return the logits [B, P, V] after the tokens at `positions` [P], the same positions of every row [B, S]."""
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if keeps_logits(model):
        return model(**inputs, logits_to_keep=positions).logits
    return model(**inputs).logits[:, positions]


def padded(rows: list[TokenRow], device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return token ids, labels and attention mask [B, S] of rows padded on the right."""
    shape = (len(rows), max(len(row.input_ids) for row in rows))
    # Any id works as padding: it is masked, and no token on the left attends to it.
    input_ids = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORED, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.long)
    for i, row in enumerate(rows):
        length = len(row.input_ids)
        input_ids[i, :length] = torch.tensor(row.input_ids)
        labels[i, :length] = torch.tensor(row.labels)
        mask[i, :length] = 1
    return input_ids.to(device), labels.to(device), mask.to(device)


def keeps_logits(model: PreTrainedModel) -> bool:
    """Return True if the model's forward accepts `logits_to_keep`."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters
