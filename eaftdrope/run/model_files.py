"""The files of a base model, and a hash that tells two of them apart without reading them whole."""

from __future__ import annotations

import hashlib
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from eaftdrope.models import resolve_model
from eaftdrope.recipe.schema import Model

_MEBIBYTE = 1 << 20
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")


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


def model_folder(model: Model) -> Path | None:
    """The folder with the files of the base model; None for one on the hub whose cache cannot be read."""
    found = resolve_model(model.reference, revision=model.revision)
    if found.kind != "hub":
        return Path(found.path)
    config = try_to_load_from_cache(found.path, "config.json", revision=model.revision)
    return Path(config).parent if isinstance(config, str) else None
