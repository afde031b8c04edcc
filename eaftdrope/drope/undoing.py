"""`undo`: what a conversion was made from, to the last bit."""

from __future__ import annotations

from pathlib import Path

from eaftdrope.errors import UserError

from . import queries
from .checkpoint import MANIFEST, ORIGINALS, carry, made, outside, read_header, read_json


def undo(folder: str | Path, target: str | Path, *, copy: bool = False) -> Path:
    """Make `target` from the converted checkpoint `folder`: every file as the conversion found it, to the last bit.

    Raises:
        UserError: `folder` was not made by `convert`, or its weight files are no longer those of the conversion.
    """
    folder, target = Path(folder), Path(target).expanduser()
    kept = folder / ORIGINALS
    if not (kept / MANIFEST).is_file():
        raise UserError(f"{folder} cannot be undone: it has no {ORIGINALS}/{MANIFEST}, so `convert` did not make it.")
    manifest = read_json(kept / MANIFEST)
    whole = {"headers": dict, "patches": list, "carried": list, "replaced": list, "renamed": dict}
    if not all(isinstance(manifest.get(key), kind) for key, kind in whole.items()):
        raise UserError(f"{folder} cannot be undone: {kept / MANIFEST} is not whole. Convert the source again instead.")
    outside(target, folder)
    for name, header in manifest["headers"].items():
        if not (folder / name).is_file() or read_header(folder / name)[1] != header:
            raise UserError(
                f"{folder} cannot be undone: {name} is not the file that the conversion made (the model was saved "
                "again, or quantised). Convert the source again instead."
            )
    patched = {patch[0] for patch in manifest["patches"]}
    with made(target) as partial:
        for name in manifest["carried"]:
            carry(folder / name, partial / manifest["renamed"].get(name, name), copy=copy or name in patched)
        for name in manifest["replaced"]:
            carry(kept / name, partial / name, copy=copy)
        patches = [queries.Patch(manifest["renamed"].get(p[0], p[0]), p[1], p[2]) for p in manifest["patches"]]
        if patches:
            queries.restore(partial, patches, kept / queries.SAVED)
    return target
