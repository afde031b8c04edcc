"""A model that no training has touched: the configuration and tokenizer of another, as the section `pretrain` changes them.

It is an ordinary folder in the cache, whose name is a digest of everything that decides its content. Configuration and
tokenizer are there before anything is trained, so that the rows of every later stage can be encoded; the random weights are
drawn when the stage begins.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from eaftdrope.data import iter_examples
from eaftdrope.errors import UserError
from eaftdrope.files import cache_dir
from eaftdrope.models import load_config, load_tokenizer
from eaftdrope.recipe.schema import Model
from eaftdrope.recipe.stage_sections import Pretrain, TextData
from eaftdrope.recipe.suggest import did_you_mean

# Entries of a configuration that follow from others, and are computed again where one of those is changed.
_FOLLOWING = {"head_dim": ("hidden_size", "num_attention_heads"), "layer_types": ("num_hidden_layers",)}
_OF_THE_SOURCE = ("_name_or_path", "_model_name_or_path", "transformers_version", "dtype")
_WEIGHTS = "model.safetensors"
# characters that a tokenizer is trained on, at most
_TOKENIZER_CHARS = 20_000_000


def new_model(source: Model, section: Pretrain) -> Path:
    """The folder with configuration and tokenizer; it is made on the first call.

    Raises:
        UserError: the configuration has no such key, or no model can be built with it; a source of text cannot be read.
    """
    how: dict[str, Any] = {"revision": source.revision, "trust_remote_code": source.trust_remote_code}
    tokenizer = load_tokenizer(source.reference, **how)
    texts = list(_texts(section.data)) if section.vocabulary else []
    base = load_config(source.reference, **how)
    # the length that it is trained with, unless the recipe has another
    context = {"max_position_embeddings": section.data.max_length} if section.data.max_length else {}
    config = changed_config(base, context | section.config)
    parts = [
        {key: value for key, value in config.to_dict().items() if key not in _OF_THE_SOURCE},
        _backend(tokenizer),
        tokenizer.chat_template,
        section.vocabulary,
        texts,
        section.train.seed,
    ]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
    folder = cache_dir() / "untrained" / digest
    if folder.is_dir():
        return folder
    if section.vocabulary:
        # only tokenizers in Rust can be trained
        train = getattr(tokenizer, "train_new_from_iterator", None)
        if train is None:
            raise UserError(
                f"pretrain.vocabulary: the tokenizer of {source.reference} cannot be trained. Leave it out, or set another "
                "model."
            )
        tokenizer = train(iter(texts), section.vocabulary, show_progress=False)
    _use_tokens(config, tokenizer)
    _check_buildable(config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{digest}.") as made:
        config.save_pretrained(made)
        tokenizer.save_pretrained(made)
        _rename(Path(made), folder)
    return folder


def draw_weights(folder: Path, seed: int) -> None:
    """Write random weights into a folder of `new_model`, unless it has them."""
    if (folder / _WEIGHTS).is_file():
        return
    config = load_config(str(folder))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as made:
        model.save_pretrained(made, max_shard_size="1000GB")
        # the weights last: a folder that has them has everything
        for name in ("generation_config.json", "config.json", _WEIGHTS):
            if (Path(made) / name).is_file():
                os.replace(Path(made) / name, folder / name)


def changed_config(base: PretrainedConfig, changes: dict[str, Any]) -> PretrainedConfig:
    """A configuration of the same class with other values.

    Raises:
        UserError: it has no such key.
    """
    values = base.to_dict()
    values.pop("vocab_size")
    for key, value in changes.items():
        rotary = values.get("rope_parameters")
        if key == "rope_theta" and isinstance(rotary, dict):
            values["rope_parameters"] = {**rotary, key: value}
        elif key == "vocab_size":
            raise UserError("pretrain.config.vocab_size: the tokenizer decides it. Set pretrain.vocabulary instead.")
        elif key not in values:
            raise UserError(
                f"pretrain.config: {type(base).__name__} has no {key!r}.{did_you_mean(key, sorted(values))} Its keys are "
                "those of the model's config.json."
            )
        else:
            values[key] = value
    for key, origins in _FOLLOWING.items():
        if key not in changes and any(origin in changes for origin in origins):
            values.pop(key, None)
    for key in _OF_THE_SOURCE:
        values.pop(key, None)
    try:
        config = type(base).from_dict(values)
    # each class checks its own values
    except Exception as error:
        raise UserError(f"pretrain.config: {_first_line(error)}") from error
    config.vocab_size = base.vocab_size
    return config


def _use_tokens(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    config.vocab_size = len(tokenizer)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))


def _check_buildable(config: PretrainedConfig) -> None:
    try:
        with torch.device("meta"):
            # some sizes meet only as it runs
            AutoModelForCausalLM.from_config(config)(torch.zeros(1, 2, dtype=torch.long))
    # a size that does not divide another, for example: each class raises its own error
    except Exception as error:
        raise UserError(f"pretrain.config: no model can be built with it: {_first_line(error)}") from error


def _texts(data: TextData) -> Iterator[str]:
    """The text of the sources, up to `_TOKENIZER_CHARS`."""
    chars = 0
    for source in data.train_sources():
        for example in iter_examples(source, format=data.format):
            turns = [message["content"] for message in example.messages or []]
            for text in filter(None, (example.text, example.prompt, example.completion, *turns)):
                yield text
                chars += len(text)
                if chars > _TOKENIZER_CHARS:
                    return


def _backend(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)


def _rename(made: Path, folder: Path) -> None:
    """Give a folder its name; another process may have made the same one by now."""
    target = made / "whole"
    target.mkdir()
    for file in made.iterdir():
        if file != target:
            file.rename(target / file.name)
    try:
        target.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
