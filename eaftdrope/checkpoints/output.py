"""Folders that a model is saved into, checked before anything is loaded."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import torch

from eaftdrope.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_output(output_dir: Path, dtype: str | None) -> None:
    """Check that a model can be saved into a folder, in a type.

    Raises:
        UserError: the folder is occupied, or there is no such type.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.")
    if output_dir.is_dir() and not any(output_dir.iterdir()):
        return
    if output_dir.exists():
        raise UserError(f"the output {output_dir} already exists and is not empty. Choose a new folder, or remove it.")


def check_space(output_dir: Path, needed: int) -> None:
    """Check that a disk has room for the weights of a model, in bytes; creates the folder above the model's.

    Raises:
        UserError: it has not, or cannot be written to.
    """
    try:
        output_dir.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {output_dir.parent}: {error.strerror}. Choose another folder.") from error
    needed += 64 << 20  # the tokenizer and the configuration
    free = shutil.disk_usage(output_dir.parent).free
    if free < needed:
        raise UserError(
            f"the merged model needs {math.ceil(needed / 1e6):,} MB in {output_dir.parent}, which has "
            f"{free // 10**6:,} MB free. Free some space, or choose a folder on another disk."
        )
