"""Compute the missing pieces of a lab for a limited time; a later call resumes where this one stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from eaftdrope.errors import UserError
from eaftdrope.files import write_atomically

from .lab import Lab, Piece


def run_lab(lab: Lab, folder: Path, minutes: float, report: Callable[[str], None]) -> bool:
    """Compute pieces until about `minutes` have passed; return whether nothing is missing.

    Args:
        folder (`Path`): of the pieces, and of trained weights, which labs share.

    Raises:
        UserError: a piece in the folder has other settings.
    """
    (folder / "weights").mkdir(parents=True, exist_ok=True)
    (folder / "pieces" / lab.name).mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * minutes
    for piece in lab.pieces:
        if read_piece(lab, piece, folder) is not None:
            continue
        if time.monotonic() >= deadline:
            report(f"next: {piece.key}")
            return False
        started = time.process_time()
        readings = piece.measure(folder / "weights")
        content = {
            "arm": piece.arm,
            "seed": piece.seed,
            "settings": piece.settings,
            "cpu_seconds": round(time.process_time() - started, 1),
            "readings": {name: _rounded(asdict(reading)) for name, reading in readings.items()},
        }
        write_atomically(_file(lab, piece, folder), json.dumps(content) + "\n")
        means = ", ".join(f"{name} {sum(one.values) / len(one.values):.3f}" for name, one in readings.items())
        report(f"{piece.key}: {means} ({content['cpu_seconds']:.0f} CPU s)")
    return True


def read_piece(lab: Lab, piece: Piece, folder: Path) -> dict | None:
    """Return a finished piece, or None.

    Raises:
        UserError: it was made with other settings.
    """
    path = _file(lab, piece, folder)
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["settings"] != json.loads(json.dumps(piece.settings)):
        raise UserError(f"{path} has other settings. Choose another --work, or remove the file.")
    return content


def _file(lab: Lab, piece: Piece, folder: Path) -> Path:
    return folder / "pieces" / lab.name / f"{piece.key}.json"


def _rounded(reading: dict) -> dict:
    return {name: [round(float(value), 4) for value in values] for name, values in reading.items()}
