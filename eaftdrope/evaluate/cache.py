"""Scores that were measured once: kept by what was measured and with what, wherever the model's folder lies.

    key = score_key(identity_of(subject, tokenizer), probe, "cpu float32")
    scores = remembered(key, lambda: run_probes(model, tokenizer, [probe]))

    key = sha256(weights and configuration, tokenizer, probe with its options and items, setting,
                 our measuring code, torch, transformers)

One JSON file a key, under `cache_dir()/scores`, written when its probe is done: what a killed command has measured is
not measured again. A model that is in no file (one in training) has no fingerprint and is never looked up here.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eaftdrope.cache import cache_dir

from .scores import Score, scores_from_json, scores_to_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .subject import Subject


def identity_of(subject: Subject, tokenizer: PreTrainedTokenizerBase) -> str:
    """What is measured: the model's files and the tokenizer as it is now."""
    return _sha256(subject.fingerprint() + tokenizer_fingerprint(tokenizer))


def score_key(identity: str, measured: Any, setting: str) -> str:
    """The key of one measurement; `measured` is a probe, or plain data that says what is measured."""
    return _sha256(json.dumps([identity, plain(measured), setting, _code()], sort_keys=True))


def remembered(key: str, measure: Callable[[], list[Score]], *, fresh: bool = False) -> list[Score]:
    """What is kept under a key, measured and kept where nothing is (`fresh`: in any case)."""
    file = cache_dir() / "scores" / f"{key}.json"
    if file.is_file() and not fresh:
        return scores_from_json(file.read_text(encoding="utf-8"))
    scores = measure()
    file.parent.mkdir(parents=True, exist_ok=True)
    # two processes may measure the same
    partial = file.with_name(f".{key}.{os.getpid()}.partial")
    partial.write_text(scores_to_json(scores), encoding="utf-8")
    os.replace(partial, file)
    return scores


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that turns text into ids: vocabulary, rules, template and special tokens."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    rules = tokenizer.get_vocab() if core is None else json.loads(core.to_str())
    for how_called_last in ("padding", "truncation"):
        rules.pop(how_called_last, None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return _sha256(json.dumps([rules, tokenizer.chat_template, special], sort_keys=True))


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
def _code() -> list[str]:
    """What measures: a probe that was corrected is measured again."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    ours = _sha256("\0".join(file.read_text(encoding="utf-8") for file in sources))
    return [ours, version("torch"), version("transformers")]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
