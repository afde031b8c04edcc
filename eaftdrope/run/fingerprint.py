"""Hashes of what decides a run's result beside its recipe: if one of them changes between two starts, the run is another.

the training rows     ids and labels, in order
the held-out rows     the same; they decide the evaluation loss and some probes
the probes            what they ask, as it was read
the chat template, the tokenizer
the base model        config.json, and of each weights file its size, its first and its last MiB
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from .prepare import Prepared

_BATCH = 1000
_MEBIBYTE = 1 << 20
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
# where a row came from, and where a file of the run lies
_NOT_ASKED = ("origin", "captured", "fields_read", "fields_ignored")


def fingerprints(prepared: Prepared) -> dict[str, str]:
    """Hashes by what they are of, in words that a message can use. For one process, once the model was loaded: of one on
    the hub, the files are here only then."""
    data, tokenizer = prepared.data, prepared.tokenizer
    found = {"the training rows": rows_fingerprint(data.train)}
    if data.held_out is not None:
        found["the held-out rows"] = rows_fingerprint(data.held_out)
    if prepared.probes:
        found["the probes' questions"] = _sha256(json.dumps(_content(prepared.probes), sort_keys=True))
    if prepared.recovery:
        found["the recovery's text"] = _sha256(json.dumps(_content(prepared.recovery.rows)))
    found["the chat template"] = _sha256(json.dumps(tokenizer.chat_template, sort_keys=True))
    found["the tokenizer"] = tokenizer_fingerprint(tokenizer)
    folder = _model_folder(prepared)
    if folder is not None:
        found["the base model"] = model_fingerprint(folder)
    return found


def rows_fingerprint(rows: Dataset) -> str:
    """Of the columns input_ids and labels, row by row; where the rows lie in a file does not matter."""
    import pyarrow.compute as pc

    digest = hashlib.sha256()
    for batch in rows.select_columns(["input_ids", "labels"]).with_format("arrow").iter(_BATCH):
        for name in ("input_ids", "labels"):
            column = batch[name]
            digest.update(pc.list_value_length(column).to_numpy().astype("<i8").tobytes())
            digest.update(pc.list_flatten(column).to_numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of its vocabulary and special tokens. Its rules decide the rows, which have a fingerprint of their own, and how a
    version of the library writes them down changes."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return _sha256(json.dumps([sorted(tokenizer.get_vocab().items()), special], sort_keys=True))


def model_fingerprint(folder: Path) -> str:
    """Of config.json and the weights files of a folder: a change in the middle of a file that keeps its size is not seen."""
    digest = hashlib.sha256()
    # the first kind that is there is the one that is loaded: a later download of another changes nothing
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


def _model_folder(prepared: Prepared) -> Path | None:
    """Where the files of the base model lie; None for one on the hub whose cache cannot be looked at."""
    from eaftdrope.models import resolve_model

    model = prepared.recipe.model
    found = resolve_model(model.reference, revision=model.revision)
    if found.kind != "hub":
        return Path(found.path)
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(found.path, "config.json", revision=model.revision)
    return Path(config).parent if isinstance(config, str) else None


def _content(value: object) -> object:
    """`value` as JSON: what a probe asks, without where its rows came from and without the names of our classes."""
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
