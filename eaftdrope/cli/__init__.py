"""The command line: one file per verb, imported only when that verb is asked for."""

from .app import main

__all__ = ["main"]
