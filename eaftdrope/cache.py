"""Where this program keeps what it can make again: dequantised models, compiled loss, scores. Standard library only."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """`$EAFTDROPE_CACHE`, else `eaftdrope` in `$XDG_CACHE_HOME`, else `~/.cache/eaftdrope`."""
    if chosen := os.environ.get("EAFTDROPE_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "eaftdrope"
