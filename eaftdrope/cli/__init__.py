"""The command line: one file a verb, imported only when that verb is asked for."""

from .app import main

__all__ = ["main"]
