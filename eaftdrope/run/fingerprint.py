"""Fingerprints: hashes of everything that decides a run's result beside its recipe. If one changes, the run is another.

the training rows     ids, labels and weights of the tokens, in order
the held-out rows     the same; they decide the evaluation loss and some probes
the probes            their questions, as they were read
the chat template, the tokenizer
the base model        config.json, and of each weights file its size, its first and its last MiB
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from eaftdrope.evaluate import Probe
from eaftdrope.evaluate.likelihood import TokenRow
from eaftdrope.recipe.schema import Model

from .data import RunData, arrow_batches
from .model_files import model_fingerprint, model_folder

if TYPE_CHECKING:
    from datasets import Dataset

_BATCH = 1000
# origins of rows, and the place of a file of the run
_NOT_ASKED = ("origin", "captured", "fields_read", "fields_ignored")


def fingerprints(
    data: RunData,
    probes: list[Probe],
    recovery: list[TokenRow] | None,
    tokenizer: PreTrainedTokenizerBase,
    model: Model,
) -> dict[str, str]:
    """Hashes by name, as messages can use it.

    For one process, after the model was loaded: files of a model on the hub are here only then.

    Args:
        recovery: the text that a recalibration is measured on.
    """
    found = {"the training rows": rows_fingerprint(data.train)}
    if data.held_out is not None:
        found["the held-out rows"] = rows_fingerprint(data.held_out)
    if probes:
        found["the probes' questions"] = _sha256(json.dumps(_content(probes), sort_keys=True))
    if recovery is not None:
        found["the recovery's text"] = _sha256(json.dumps(_content(recovery)))
    found["the chat template"] = _sha256(json.dumps(tokenizer.chat_template, sort_keys=True))
    found["the tokenizer"] = tokenizer_fingerprint(tokenizer)
    folder = model_folder(model)
    if folder is not None:
        found["the base model"] = model_fingerprint(folder)
    return found


def rows_fingerprint(rows: Dataset) -> str:
    """Hash of the tokens, labels and weights, row by row; the place of the rows in a file does not matter."""
    import pyarrow.compute as pc

    digest = hashlib.sha256()
    kinds = {"input_ids": "<i8", "labels": "<i8", "token_weights": "<f4"}
    names = [name for name in kinds if name in rows.column_names]
    for batch in arrow_batches(rows, names, _BATCH):
        for name in names:
            column = batch[name]
            digest.update(pc.list_value_length(column).to_numpy().astype("<i8").tobytes())
            digest.update(pc.list_flatten(column).to_numpy().astype(kinds[name]).tobytes())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of its vocabulary and special tokens.

    Its rules decide the rows, which have a fingerprint of their own; their spelling differs between versions of the library.
    """
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return _sha256(json.dumps([sorted(tokenizer.get_vocab().items()), special], sort_keys=True))


def _content(value: object) -> object:
    """`value` as JSON: the content of a probe, without the origins of its rows and without names of classes."""
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {name: _content(field) for name, field in fields.items() if name not in _NOT_ASKED and field is not None}
    if isinstance(value, dict):
        return {str(key): _content(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_content(item) for item in value]
    return value if isinstance(value, str | int | float | None) else str(value)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()
