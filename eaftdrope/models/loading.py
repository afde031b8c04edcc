"""From a model reference to its configuration, tokenizer and model.

A GGUF file is dequantised once into the cache (`gguf/`). A tokenizer gives the tokens of its own tokenizer.json
(`tokenizer_file.py`), and no tensor of a model is missing unnoticed (`weights.py`). Whatever the libraries raise on files
that they cannot read becomes one sentence that names the file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from eaftdrope.errors import UserError
from eaftdrope.files import usable_path

from .gguf.copy import copy_folder, dequantised_copy, reading
from .references import DTYPES, PACKAGE_PREFIX, TTT_CONFIG, install_hint, locate, nearest
from .tokenizer_file import load_tokenizer_files
from .weights import check_config, check_room, failure_reason, load_complete, quantization_config_of


@dataclass(frozen=True)
class ModelSource:
    """A resolved reference: `path` is a hub id (kind "hub") or a folder with config.json ("package", "path")."""

    reference: str
    path: str
    kind: str
    revision: str | None = None


def resolve_model(reference: str, *, revision: str | None = None) -> ModelSource:
    """Find the folder or hub id of `reference`; a GGUF file is dequantised into the cache first (once, some 25 s).

    Raises:
        UserError: unknown or missing reference, `revision` given for something that is not on the hub, no disk space.
    """
    location = locate(reference)
    if location.kind == "hub":
        assert location.hub_id is not None
        return ModelSource(reference, location.hub_id, "hub", revision)
    if revision is not None:
        raise UserError(f"model {reference!r} is local, so revision {revision!r} cannot apply. Leave `revision` out.")
    folder = location.folder if location.gguf is None else dequantised_copy(location.gguf)
    return ModelSource(reference, str(folder), location.kind)


def needs_dequantising(reference: str) -> bool:
    """Return whether `resolve_model` would dequantise a GGUF file now, which takes half a minute.

    Raises:
        UserError: unknown or missing reference.
    """
    file = locate(reference).gguf
    return file is not None and not copy_folder(file).is_dir()


def load_config(reference: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """Load the configuration only. A GGUF file not yet in the cache is read in place (6 s), nothing is written.

    Raises:
        UserError: the reference is wrong, or the configuration cannot be read or fetched.
    """
    file = locate(reference).gguf
    if file is not None and revision is None and not copy_folder(file).is_dir():
        with reading(file):
            return AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    source = resolve_model(reference, revision=revision)
    with loading_errors_to_user_errors(reference, "configuration"):
        raw, _ = PretrainedConfig.get_config_dict(source.path, revision=source.revision)
        check_config(raw, f"{source.path}/config.json")
        return AutoConfig.from_pretrained(source.path, revision=source.revision, trust_remote_code=trust_remote_code)


def load_tokenizer(
    reference: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer with its chat template. A missing pad token becomes the end-of-sequence token.

    Raises:
        UserError: the reference is wrong, the tokenizer cannot be read or fetched, it does not give the tokens of its own
            tokenizer.json, or it has no token to pad with.
    """
    source = resolve_model(reference, revision=revision)
    with loading_errors_to_user_errors(reference, "tokenizer"):
        tokenizer = load_tokenizer_files(source.path, revision=source.revision, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(
                f"the tokenizer of {reference!r} has neither a pad token nor an end-of-sequence token. "
                "Set `pad_token` in its tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    reference: str,
    *,
    dtype: str = "float32",
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantization: str | None = None,
    distributed_config: Any = None,
) -> PreTrainedModel:
    """Load a causal language model; see [`load_complete`].

    Args:
        reference (`str`): the model, in one of the forms of `references.py`.
        dtype (`str`): "float32", "bfloat16" or "auto" (the checkpoint's own).
        attn_implementation (`str`, *optional*): passed on to transformers; None lets it choose.
        revision (`str`, *optional*): branch, tag or commit of a hub id.
        trust_remote_code (`bool`): run code that the checkpoint carries.
        quantization (`str`, *optional*): "4bit" for a bitsandbytes NF4 base (QLoRA), which needs bitsandbytes and a CUDA
            device.
        distributed_config ([`~transformers.distributed.DistributedConfig`], *optional*): load a part of the model into each
            process.

    Raises:
        UserError: the reference or an option is wrong, or the weights cannot be read or fetched, or not all are there.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.")
    quantization_config = quantization_config_of(quantization)
    # the configuration first: what is wrong in it is found before anything is built from it
    config = load_config(reference, revision=revision, trust_remote_code=trust_remote_code)
    source = resolve_model(reference, revision=revision)
    if source.kind != "hub":
        check_room(config, Path(source.path))
    with loading_errors_to_user_errors(reference, "model"):
        return load_complete(
            source.path,
            name=reference,
            revision=source.revision,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            quantization_config=quantization_config,
            **({} if distributed_config is None else {"distributed_config": distributed_config}),
        )


def ttt_config_file(reference: str, *, revision: str | None = None) -> Path | None:
    """Return the ttt_config.json of a checkpoint, from the hub if it is there; None for a model without TTT.

    Raises:
        UserError: unknown or missing reference.
    """
    location = locate(reference)
    place = location.folder if location.kind != "hub" else location.hub_id
    return None if place is None else find_file(place, TTT_CONFIG, revision=revision)


def find_file(place: str | Path, name: str, **hub: Any) -> Path | None:
    """Return the path of a file of a folder, or of a repository on the hub; None if it has no such file.

    Args:
        place (`str` or `Path`): a folder or a hub id.
        name (`str`): name of the file.
        hub: `revision`, `token`, `cache_dir` and `local_files_only`, as `from_pretrained` has them.
    """
    if Path(place).is_dir():
        file = Path(place) / name
        return file if file.is_file() else None
    found = cached_file(
        str(place),
        name,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub,
    )
    return None if found is None else Path(found)


def refuse_ttt(reference: str, *, revision: str | None = None) -> None:
    """Check that a model, or a folder with an adapter, has no test-time training, for callers that would leave it out.

    Raises:
        UserError: it has ttt_config.json, or the reference is unknown or missing.
    """
    is_folder = usable_path(reference).is_dir()
    file = find_file(reference, TTT_CONFIG) if is_folder else ttt_config_file(reference, revision=revision)
    if file is not None:
        raise UserError(
            f"model {reference!r} has a {TTT_CONFIG}: it learns as it reads, and would be used here without that, as another "
            "model. Measure it with `eaftdrope ttt eval`, train it with stages: [ttt], or use the model it was made from."
        )


@contextlib.contextmanager
def loading_errors_to_user_errors(reference: str, part: str) -> Iterator[None]:
    """Turn what the libraries raise on files that they cannot read (tokenizers: a plain Exception) into a UserError.

    Args:
        reference (`str`): the model reference, for the message.
        part (`str`): "configuration", "tokenizer" or "model".
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        why = failure_reason(error, part, _folder_on_disk(reference))
        raise UserError(f"the {part} of {reference!r} cannot be loaded: {why}{_advice(reference)}") from error


def _folder_on_disk(reference: str) -> Path | None:
    """Return the folder that a reference is read from: a GGUF file's copy or a hub id's snapshot, both in the cache."""
    location = locate(reference)
    if location.kind != "hub":
        return location.folder if location.gguf is None else copy_folder(location.gguf)
    assert location.hub_id is not None
    found = try_to_load_from_cache(location.hub_id, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def _advice(reference: str) -> str:
    if reference.startswith(PACKAGE_PREFIX):
        return install_hint(reference)
    if locate(reference).kind == "hub":
        return f" If you meant a local folder: it does not exist.{nearest(Path(reference))}"
    return ""
