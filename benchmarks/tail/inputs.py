"""Inputs of the benchmarks: hidden states of a real model over real rows, and the names of the sources."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from eaftdrope.errors import UserError


def load(model: str):
    """Return (model, tokenizer) for `trained_rows`; bfloat16, as in training.

    Raises:
        UserError: the head has a bias, a scale or a softcap, which the errors do not model.
    """
    from eaftdrope.loss.backends.tile import PLAIN
    from eaftdrope.models import load_model, load_tokenizer
    from eaftdrope.trainer.head import gathered_head

    loaded = load_model(model, dtype="bfloat16").eval()
    with gathered_head(loaded) as head:
        if head.bias is not None or head.transform != PLAIN:
            raise UserError(
                f"{model}: its head has a bias, a scale or a softcap. Use a model whose logits are hidden @ weight.T."
            )
    return loaded, load_tokenizer(model)


@torch.no_grad()
def trained_rows(model, tokenizer, source: str, count: int, max_length: int = 1024) -> tuple[Tensor, Tensor]:
    """Return (hidden `[count, D]` bfloat16, labels `[count]`) of the first trained tokens of `source`.

    Raises:
        UserError: the source has fewer.
    """
    from eaftdrope.data import Source, build_dataset

    # rows without a trained token are skipped, so that `count` rows are enough
    rows, _ = build_dataset([Source(source, limit=count)], tokenizer, max_length=max_length)
    hidden, labels, found = [], [], 0
    for row in rows:
        labels_N = torch.tensor(row["labels"])[1:]
        hidden_ND = model.base_model(input_ids=torch.tensor(row["input_ids"])[None]).last_hidden_state[0, :-1]
        hidden.append(hidden_ND[labels_N != -100])
        labels.append(labels_N[labels_N != -100])
        found += len(labels[-1])
        if found >= count:
            return torch.cat(hidden)[:count], torch.cat(labels)[:count]
    raise UserError(f"{source} has {found} trained tokens, fewer than {count}. Use fewer --tokens or other data.")


def source_name(source: str) -> str:
    """Return the base name of a file or folder; any other reference (`package:bfcl`, a hub id) unchanged."""
    path = Path(source)
    if not path.exists():
        return source
    return path.stem if path.is_file() else path.resolve().name
