"""What the benchmarks read: hidden states of a real model over real rows, and what the rows are called."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from eaftdrope.errors import UserError


def load(model: str):
    """(model, tokenizer) for `trained_rows`; bfloat16, as it is trained with.

    Raises:
        UserError: the head is more than a weight (a bias, a scale, a softcap), which the errors do not model.
    """
    from eaftdrope.loss.backends.tile import PLAIN
    from eaftdrope.models import load_model, load_tokenizer
    from eaftdrope.trainer.head import gathered_head

    loaded = load_model(model, dtype="bfloat16").eval()
    with gathered_head(loaded) as head:
        if head.bias is not None or head.transform != PLAIN:
            raise UserError(
                f"{model}: its head has a bias, a scale or a softcap. Take a model whose logits are hidden @ weight.T."
            )
    return loaded, load_tokenizer(model)


@torch.no_grad()
def trained_rows(model, tokenizer, source: str, count: int, max_length: int = 1024) -> tuple[Tensor, Tensor]:
    """(hidden `[count, H]` bfloat16, labels `[count]`) of the first trained tokens of `source`.

    Raises:
        UserError: it has fewer.
    """
    from eaftdrope.data import Source, build_dataset

    # a row without a trained token is left out, so that `count` rows are enough
    rows, _ = build_dataset([Source(source, limit=count)], tokenizer, max_length=max_length)
    hidden, labels, found = [], [], 0
    for row in rows:
        labels_N = torch.tensor(row["labels"])[1:]
        hidden_NH = model.base_model(input_ids=torch.tensor(row["input_ids"])[None]).last_hidden_state[0, :-1]
        hidden.append(hidden_NH[labels_N != -100])
        labels.append(labels_N[labels_N != -100])
        found += len(labels[-1])
        if found >= count:
            return torch.cat(hidden)[:count], torch.cat(labels)[:count]
    raise UserError(f"{source} has {found} trained tokens, fewer than {count}. Take fewer --tokens or other data.")


def source_name(source: str) -> str:
    """A file or folder by its base name; anything else (`package:bfcl`, a hub id) as it is written."""
    path = Path(source)
    if not path.exists():
        return source
    return path.stem if path.is_file() else path.resolve().name
