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
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedTokenizerBase

from eaftdrope.evaluate import Probe
from eaftdrope.evaluate.likelihood import TokenRow
from eaftdrope.models import resolve_model
from eaftdrope.recipe.schema import Model

from .data import RunData, arrow_batches

if TYPE_CHECKING:
    from datasets import Dataset

_BATCH = 1000
_MEBIBYTE = 1 << 20
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
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
    folder = _model_folder(model)
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


def model_fingerprint(folder: Path) -> str:
    """Hash of config.json and the weights files of a folder; a change in the middle of a file of the same size is missed."""
    digest = hashlib.sha256()
    # the first kind that exists is the one that is loaded: a later download of another changes nothing
    weights = next((found for pattern in _WEIGHTS if (found := sorted(folder.glob(pattern)))), [])
    for file in (folder / "config.json", *weights):
        if not file.is_file():
            continue
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with open(file, "rb") as opened:
            digest.update(opened.read(_MEBIBYTE))
            opened.seek(max(0, size - _MEBIBYTE))
            digest.update(opened.read(_MEBIBYTE))
    return digest.hexdigest()


def _model_folder(model: Model) -> Path | None:
    """The folder with the files of the base model; None for one on the hub whose cache cannot be read."""
    found = resolve_model(model.reference, revision=model.revision)
    if found.kind != "hub":
        return Path(found.path)
    config = try_to_load_from_cache(found.path, "config.json", revision=model.revision)
    return Path(config).parent if isinstance(config, str) else None


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
