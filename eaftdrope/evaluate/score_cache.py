"""Scores that were measured once: kept by what was measured and with what, wherever the model's folder lies.

    key = score_key(identity_of(subject, tokenizer), probe, "cpu float32")
    scores = cached_scores(key, lambda: run_probes(model, tokenizer, [probe]))

    key = sha256(weights and configuration, tokenizer, probe with its options and items, setting,
                 our code that reads and measures, the versions of the libraries that it computes with)

One JSON file a key, under `cache_dir()/scores`, written when its probe is done: what a killed command has measured is
not measured again. A model that is in no file (one in training) has no fingerprint and is never looked up here. How many rows
the model takes at once is not in the key: it changes a score by rounding only, and a command that ran out of memory resumes
with fewer.
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

    from .suites.subject import Subject


PACKAGE = Path(__file__).parents[1]
_CODE = ("evaluate", "data", "models", "checkpoints/adapters.py")
"""What of our code loads models, reads and renders rows, and measures; report and recipe do neither."""

# A kernel or a package for the attention that is installed is used where a configuration asks for it.
_LIBRARIES = (
    *("torch", "transformers", "tokenizers", "sentencepiece", "jinja2", "peft", "safetensors", "bitsandbytes"),
    *("kernels", "flash-attn", "flash-linear-attention", "causal-conv1d", "mamba-ssm"),
)
_TOKENIZER_SETTINGS = ("model_max_length", "clean_up_tokenization_spaces", "split_special_tokens")


def identity_of(subject: Subject, tokenizer: PreTrainedTokenizerBase) -> str:
    """What is measured: the model's files and the tokenizer as it is now."""
    return _sha256(subject.fingerprint() + tokenizer_fingerprint(tokenizer))


def score_key(identity: str, measured: Any, setting: str) -> str:
    """The key of one measurement; `measured` is a probe, or plain data that says what is measured."""
    return _sha256(json.dumps([identity, plain(measured), setting, _code()], sort_keys=True))


def cached_scores(key: str, measure: Callable[[], list[Score]], *, fresh: bool = False) -> list[Score]:
    """What is kept under a key, measured and kept where nothing is, or nothing that can be read (`fresh`: in any case).

    Raises:
        UserError: the cache cannot be written to; nothing was measured then.
    """
    file = cache_dir() / "scores" / f"{key}.json"
    if not fresh and (known := _kept(file)) is not None:
        return known
    # before it is measured: what cannot be kept would be lost
    writable_folder(file.parent)
    scores = measure()
    # two processes may measure the same
    write_atomically(file, scores_to_json(scores), shared=True)
    return scores


def writable_folder(folder: Path) -> None:
    """Make a folder of the cache.

    Raises:
        UserError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror
    else:
        reason = None if os.access(folder, os.W_OK | os.X_OK) else "permission denied"
    if reason is not None:
        raise UserError(
            f"scores are kept in {folder}: {reason}. Set EAFTDROPE_CACHE to a folder that can be written to."
        )


def _kept(file: Path) -> list[Score] | None:
    """The scores of a file; None where there is none, or it is damaged."""
    try:
        return scores_from_json(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that turns text into ids and back: vocabulary, rules, template, special tokens and settings."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None:
        # the pieces' scores and the merges of a tokenizer in Python stand in its files only
        files = [Path(file) for name in tokenizer.vocab_files_names if (file := getattr(tokenizer, name, None))]
        rules: Any = [tokenizer.get_vocab(), [plain(file) for file in files if file.is_file()]]
    else:
        rules = json.loads(core.to_str())
        for how_called_last in ("padding", "truncation"):
            rules.pop(how_called_last, None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    settings = [type(tokenizer).__name__, *(getattr(tokenizer, name, None) for name in _TOKENIZER_SETTINGS)]
    return _sha256(json.dumps([rules, tokenizer.chat_template, special, settings], sort_keys=True))


def plain(value: Any) -> Any:
    """`value` as JSON can hold it, the classes of probes and items named.

    Raises:
        TypeError: something in it cannot be told apart by its content.
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
    raise TypeError(f"a {type(value).__name__} in a probe: the cache cannot tell two of them apart")


@functools.cache
def _code() -> list:
    """What measures: a probe that was corrected is measured again, and so is everything under other libraries."""
    return [code_hash(PACKAGE / name for name in _CODE), versions(_LIBRARIES)]


def code_hash(places: Iterable[Path]) -> str:
    """A hash of the Python files at `places` (files, or folders with all that is in them), names included."""
    digest = hashlib.sha256()
    for place in places:
        for file in [place] if place.is_file() else sorted(place.rglob("*.py")):
            digest.update(f"{file.relative_to(place.parent)}\0".encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Package -> its version, None where it is not installed."""
    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
