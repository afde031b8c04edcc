"""A checkpoint folder as files: what it contains, what a converted one carries over, and how.

Weights are never loaded: safetensors files are hard-linked, or copied if a link cannot be made, and of a file whose
queries are rescaled only those bytes are rewritten. Free of torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eaftdrope.errors import UserError
from eaftdrope.files import atomic_folder, write_atomically

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ORIGINALS = "drope_original"
"""Folder in a converted checkpoint with what `undo` needs."""

MANIFEST = "manifest.json"

_RUN = "run.json"
_RUN_RECORDS = {
    *(_RUN, "recipe.yaml", "serve.yaml", "metrics.jsonl", "landscape.jsonl", "recovery.json", "recovery.png"),
    *("probes_before.json", "probes_during.jsonl", "probes_after.json", "agreement.safetensors", "samples.json"),
    *("report.html", "system.json", "inspect.json", "checkpoints", "figures", "merged", "ask", "ablations"),
}
"""What a training leaves in its folder beside the model."""

_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ckpt")


@dataclass(frozen=True)
class Tensor:
    """A tensor in a weight file: the file (relative), safetensors' name of the dtype, shape, first byte and byte count."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    length: int


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raise UserError if the file is not one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} is not a JSON object.")
    return data


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write a JSON file atomically: an existing file may be a hard link to another checkpoint's."""
    write_atomically(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def carried_files(folder: Path) -> tuple[list[str], list[str]]:
    """List the files that a conversion carries over, and the weight files in other formats that it leaves out.

    Both are relative and sorted. Hidden files and folders belong to tools (caches, locks) and not to the checkpoint, and the
    records of a training belong to the model that it left: its scores, checkpoints, and the texts that it was asked about.

    Raises:
        UserError: the folder has no safetensors weights, or a broken link.
    """
    files, records = [], _RUN_RECORDS if (folder / _RUN).is_file() else set()
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if any(part.startswith(".") for part in relative.parts) or relative.parts[0] in records:
            continue
        if path.is_symlink() and not path.exists():
            raise UserError(
                f"{path} is a link to {os.readlink(path)}, which does not exist. Download the checkpoint again."
            )
        if path.is_file():
            files.append(str(relative))
    others = [name for name in files if name.endswith(_OTHER_WEIGHTS)]
    if not any(name.endswith(".safetensors") for name in files):
        kind = f"only {', '.join(others[:3])}" if others else "none"
        raise UserError(
            f"{folder} has no safetensors weights ({kind}). A conversion never loads weights, and other formats cannot be "
            "carried over as files. Save them again first: `AutoModelForCausalLM.from_pretrained(SRC).save_pretrained(NEW)` "
            "and `AutoTokenizer.from_pretrained(SRC).save_pretrained(NEW)`."
        )
    return [name for name in files if name not in others], others


def weight_map(folder: Path) -> dict[str, str]:
    """Return tensor name -> file, of the checkpoint's model weights.

    Raises:
        UserError: neither model.safetensors nor its index exists, or a file of the index is missing.
    """
    if (folder / SINGLE).is_file():
        return dict.fromkeys(read_header(folder / SINGLE)[0], SINGLE)
    if not (folder / INDEX).is_file():
        raise UserError(f"{folder} has neither {SINGLE} nor {INDEX}. Is it the folder that `save_pretrained` wrote?")
    names = read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        raise UserError(f"{folder / INDEX} has no `weight_map` of tensor names to files. Download it again.")
    missing = sorted({file for file in names.values() if not (folder / file).is_file()})
    if missing:
        raise UserError(f"{folder}: {INDEX} lists files that do not exist: {', '.join(missing[:3])}. Download them.")
    return names


def read_header(file: Path) -> tuple[dict[str, Tensor], str]:
    """Read the header of a safetensors file: its tensors by name, and the hash of the header.

    Raises:
        UserError: the file is incomplete or not safetensors.
    """
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            text = stream.read(length)
            entries = json.loads(text)
        begin = 8 + length
        tensors = {name: _entry(file.name, entry, begin) for name, entry in entries.items() if name != "__metadata__"}
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error
    except (struct.error, ValueError, MemoryError, OverflowError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is not a safetensors file, or is cut off ({error}). Download it again.") from error
    end = max((tensor.start + tensor.length for tensor in tensors.values()), default=begin)
    if file.stat().st_size < end:
        raise UserError(f"{file} is cut off: {file.stat().st_size:,} bytes of {end:,}. Download it again.")
    return tensors, hashlib.sha256(text).hexdigest()


def _entry(file: str, entry: dict[str, Any], begin: int) -> Tensor:
    first, last = entry["data_offsets"]
    return Tensor(file, entry["dtype"], tuple(entry["shape"]), begin + first, last - first)


def link_or_copy(source: Path, target: Path, *, copy: bool = False) -> None:
    """Make `target` a hard link to `source` if possible (within one file system), else, or with `copy`, a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # a hub's cache has links to its blobs
    source = source.resolve()
    if not copy:
        try:
            os.link(source, target)
            return
        except OSError:
            pass
    shutil.copy2(source, target)


def check_outside(target: Path, source: Path) -> None:
    """Raise UserError if `target` is inside `source`, whose files it would become one of."""
    if source.resolve() in target.resolve().parents:
        raise UserError(f"{target} is inside {source}. Pass the path of a folder outside it.")


@contextmanager
def new_checkpoint(target: Path) -> Iterator[Path]:
    """Yield a folder to fill; it becomes `target` when the block ends, and is deleted on an error.

    Raises:
        UserError: `target` exists already or cannot be created, or the disk cannot hold what is written.
    """
    # `..` and links in its path are resolved, a link at the target itself is not
    target = target.parent.resolve() / target.name if target.name not in ("", "..") else target.resolve()
    if target == Path.cwd():
        raise UserError(f"{target} is the current folder, which cannot be replaced. Pass the path of a new one.")
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise UserError(f"{target} exists already. Pass the path of a new folder.")
    try:
        with atomic_folder(target) as partial:
            yield partial
    except OSError as error:
        raise UserError(
            f"{target} cannot be written: {error.strerror or error} ({error.filename or target})."
        ) from error
