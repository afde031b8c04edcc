"""Cached scores, by content: the same model measured with the same probe is found again, wherever its folder is.

    key = score_key(subject.identity(tokenizer), probe, "cpu float32")
    scores = cached_scores(key, lambda: run_probes(model, tokenizer, [probe]))

    key = sha256(weights and configuration, tokenizer, probe with its options and items, setting,
                 our code that reads and measures, the versions of the libraries that it uses)

One JSON file per key, in `cache_dir()/scores`, written as soon as its probe is done: a command that was killed resumes
after its last finished probe. A model in training has no files, so it is never cached. The batch size is not in the key: it
changes a score by rounding only, and a command that ran out of memory resumes with smaller batches.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eaftdrope.errors import UserError
from eaftdrope.files import cache_dir, write_atomically

from .scores import Score, scores_from_json, scores_to_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


PACKAGE = Path(__file__).parents[1]
_CODE = ("evaluate", "rlm", "data", "models", "checkpoints/adapters.py", "loaded_model.py")
"""The code that loads models, reads and renders rows, and measures."""

# A package with an attention kernel is used if it is installed and the configuration names it.
_LIBRARIES = (
    *("torch", "transformers", "tokenizers", "sentencepiece", "jinja2", "peft", "safetensors", "bitsandbytes"),
    *("kernels", "flash-attn", "flash-linear-attention", "causal-conv1d", "mamba-ssm"),
)
_TOKENIZER_SETTINGS = ("model_max_length", "clean_up_tokenization_spaces", "split_special_tokens")


def score_key(identity: str, measured: Any, setting: str) -> str:
    """Return the key of one measurement; `measured` is a probe, or plain data that identifies the measurement."""
    return content_hash([identity, measured, setting, _code()])


def cached_scores(key: str, measure: Callable[[], list[Score]], *, fresh: bool = False) -> list[Score]:
    """Return the scores stored under a key; measure and store them if they are missing or damaged.

    Args:
        key: from [`score_key`].
        measure: called without arguments to measure the scores.
        fresh: measure in any case.

    Raises:
        UserError: the cache cannot be written to; nothing was measured then.
    """
    file = cache_dir() / "scores" / f"{key}.json"
    if not fresh and (stored := _stored(file)) is not None:
        return stored
    # checked first: scores that cannot be stored would be lost
    writable_folder(file.parent)
    scores = measure()
    # two processes may measure the same
    write_atomically(file, scores_to_json(scores), shared=True)
    return scores


def writable_folder(folder: Path) -> None:
    """Create a folder of the cache.

    Raises:
        UserError: it cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror
    else:
        reason = None if os.access(folder, os.W_OK | os.X_OK) else "permission denied"
    if reason is not None:
        raise UserError(
            f"scores cannot be stored in {folder}: {reason}. Set EAFTDROPE_CACHE to a folder that can be written to."
        )


def _stored(file: Path) -> list[Score] | None:
    """Return the scores of a file; None if it is missing or damaged."""
    try:
        return scores_from_json(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of all that converts text to ids and back: vocabulary, rules, template, special tokens, settings."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None:
        # the scores of pieces and the merges of a tokenizer in Python are in its files only
        files = [Path(file) for name in tokenizer.vocab_files_names if (file := getattr(tokenizer, name, None))]
        rules: Any = [tokenizer.get_vocab(), [plain(file) for file in files if file.is_file()]]
    else:
        rules = json.loads(core.to_str())
        for state in ("padding", "truncation"):
            # left from the last call
            rules.pop(state, None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    settings = [type(tokenizer).__name__, *(getattr(tokenizer, name, None) for name in _TOKENIZER_SETTINGS)]
    return content_hash([rules, tokenizer.chat_template, special, settings])


def content_hash(value: Any) -> str:
    """Return the sha256 of plain data, dataclasses (such as probes) and files, by content.

    Raises:
        TypeError: `value` contains something else.
    """
    return hashlib.sha256(json.dumps(plain(value), sort_keys=True).encode()).hexdigest()


def plain(value: Any) -> Any:
    """Return `value` as JSON data; dataclasses are labelled with their class, files replaced by their hash.

    Raises:
        TypeError: `value` contains something that has no such form.
    """
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Path):
        return ["file", hashlib.sha256(value.read_bytes()).hexdigest()]
    if dataclasses.is_dataclass(value):
        fields = {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return [f"{type(value).__module__}.{type(value).__qualname__}", fields]
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    raise TypeError(f"a {type(value).__name__} in a probe: the cache cannot distinguish two of them")


@functools.cache
def _code() -> list:
    """Return hashes of the code and libraries: a corrected probe is measured again, as is everything under other versions."""
    return [code_hash(PACKAGE / name for name in _CODE), versions(_LIBRARIES)]


def code_hash(places: Iterable[Path]) -> str:
    """Return a hash of the Python files at `places` (files, or folders with their subfolders), names included."""
    digest = hashlib.sha256()
    for place in places:
        for file in [place] if place.is_file() else sorted(place.rglob("*.py")):
            digest.update(f"{file.relative_to(place.parent)}\0".encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Return the version of each package, None if it is not installed."""
    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
