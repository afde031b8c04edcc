"""`python -m benchmarks.ttt`: see the package's docstring."""

from __future__ import annotations

import sys

from benchmarks.command import run_typer


def main(arguments: list[str]) -> None:
    match arguments:
        case ["toy", *options]:
            from .toy.report import toy

            run_typer(toy, options)
        case ["smollm2", "run", *options]:
            from .smollm2.command import run

            run_typer(run, options)
        case ["smollm2", "report", *options]:
            from .smollm2.command import report

            run_typer(report, options)
        case _:
            sys.exit("usage: python -m benchmarks.ttt {toy,smollm2 run,smollm2 report} [--help]")


if __name__ == "__main__":
    main(sys.argv[1:])
