"""Dequantised copies of GGUF files in the cache, as folders of safetensors.

Reading the copy takes seconds, dequantising half a minute. It is in float32, because Q4_1 values (scale * q + minimum)
are not exact in bfloat16.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import torch
from filelock import FileLock
from transformers import AutoConfig, GgufConfig

from eaftdrope.errors import UserError
from eaftdrope.files import atomic_folder, cache_dir, honour_umask

from ..weights import load_complete
from .tokenizer import read_tokenizer

# Raised when the same file gives another copy; copies of other versions are left alone and not used.
# 2: the tokenizer splits text as the file states
_VERSION = 2


def copy_folder(gguf: Path) -> Path:
    """Return the folder of a file's dequantised copy.

    Its name has the file's name, a hash of its content (size, first and last MiB) and the version of the conversion.
    """
    size, mebibyte = gguf.stat().st_size, 1 << 20
    digest = hashlib.sha256(str(size).encode())
    with gguf.open("rb") as file:
        digest.update(file.read(mebibyte))
        file.seek(max(0, size - mebibyte))
        digest.update(file.read(mebibyte))
    return cache_dir() / "models" / f"{gguf.stem}-{digest.hexdigest()[:12]}-v{_VERSION}"


def dequantised_copy(gguf: Path) -> Path:
    """Return the cached copy of `gguf`; a missing one is written by one process at a time, and renamed when complete.

    Raises:
        UserError: the file cannot be read, its tokenizer is unknown, or the disk has no room.
    """
    final = copy_folder(gguf)
    if final.is_dir():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    # The lock ends with its process, so its holder may remove what a killed one left.
    with FileLock(f"{final}.lock"):
        if not final.is_dir():
            with atomic_folder(final) as partial:
                _dequantise(gguf, partial)
    return final


@contextlib.contextmanager
def reading(gguf: Path) -> Iterator[None]:
    """Turn what the readers of a damaged or unknown GGUF file raise into UserError."""
    try:
        yield
    except UserError:
        raise
    # gguf and transformers trust the counts, offsets and types that the file states
    except (OSError, ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError, struct.error) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"the GGUF file {str(gguf)!r} cannot be read: {reason}. Compare its size and checksum with the original; a "
            "model family that transformers cannot read from GGUF must come as safetensors."
        ) from error


def _dequantise(gguf: Path, folder: Path) -> None:
    with reading(gguf):
        # transformers' reader stops at the end of a file whose counts are wrong; gguf's, which reads the tokenizer, would
        # fill the memory first
        AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
        tokenizer, ends = read_tokenizer(gguf)
        model = load_complete(
            gguf.parent,
            name=str(gguf),
            gguf_file=gguf.name,
            dtype=torch.float32,
            # Otherwise the model stays "quantized": it cannot be saved, and the trainer refuses it.
            quantization_config=GgufConfig(dequantize=True),
        )
    if ends:
        model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    tokenizer.model_max_length = model.config.max_position_embeddings

    size = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    _require_space(folder.parent, size + (64 << 20), gguf.name)
    model.save_pretrained(folder)
    honour_umask(folder)
    tokenizer.save_pretrained(folder)


def _require_space(folder: Path, needed: int, name: str) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"dequantising {name} needs {needed / 1e6:,.0f} MB in {folder}, which has {free / 1e6:,.0f} MB free. "
            "Make room, or set EAFTDROPE_CACHE to a folder on another disk."
        )
