"""Runs a script in two processes, or more, that talk through gloo."""

from __future__ import annotations

from tests import forked


def run_two(script: str, *arguments: object) -> None:
    """Runs `script` (source text) with `arguments` as two ranks; its errors become the assertion's text."""
    run_ranks(2, script, *arguments)


def run_ranks(count: int, script: str, *arguments: object) -> None:
    """`run_two` with `count` ranks."""
    for ended in forked.run_ranks(count, forked.program, script, *map(str, arguments)):
        assert ended.code == 0, ended.err[-3000:]
