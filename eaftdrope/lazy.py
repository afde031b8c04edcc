"""Lazy names for a package's `__init__`: a name is imported on first use, so importing the package costs nothing.

    _LAZY = {"convert": "conversion"}        # name -> the submodule that defines it
    __all__ = ["convert"]
    __getattr__, __dir__ = lazy_names(__name__, _LAZY)

A submodule may be listed under its own name. Type checkers read the same names from an `if TYPE_CHECKING:` block.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the `__getattr__` and the `__dir__` of a package whose names are imported on first use.

    Args:
        package (`str`): `__name__` of the package.
        homes (`Mapping[str, str]`): name -> submodule that defines it, relative to the package (`"conversion"`,
            `"callbacks.progress"`; a leading dot goes to the parent package).
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home = homes[name]
        module = import_module(f".{home}", package)
        return module if name == home else getattr(module, name)

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return get, names
