"""`python -m benchmarks.rlm`: see the package's docstring."""

from __future__ import annotations

import sys

from benchmarks.command import run_typer


def main(arguments: list[str]) -> None:
    match arguments:
        case ["bench", *options]:
            from .bench import bench

            run_typer(bench, options)
        case ["engine", *options]:
            from .engine import engine

            run_typer(engine, options)
        case ["peers", *options]:
            from .peers import peers

            run_typer(peers, options)
        case _:
            sys.exit("usage: python -m benchmarks.rlm {bench,engine,peers} [--help]")


if __name__ == "__main__":
    main(sys.argv[1:])
