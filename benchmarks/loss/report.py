"""A whole run: a table after each case, files updated with it, and figures at the end."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from eaftdrope.errors import UserError

from . import results
from .cases import LOGITS, TRAINS, Case, choose
from .inputs import REFERENCE_ENTRIES, REFERENCE_ROWS
from .methods import methods
from .runner import MeasurementSettings, run
from .table import case_table, place


def bench_loss(
    cases: Sequence[Case], names: str | None, settings: MeasurementSettings, *, output: Path | None, command: str
) -> list[dict]:
    """Measure and print; with `output` also write. `names` are methods, separated by commas (None: all).

    Raises:
        UserError: an unknown method, or an output that is not a folder.
    """
    known = methods()
    chosen = [known[name] for name in (list(known) if names is None else choose(names, list(known), "--methods"))]
    if output is not None:
        if output.exists() and not output.is_dir():
            raise UserError(f"--output {output} is a file. Pass a folder.")
        output.mkdir(parents=True, exist_ok=True)
    # a log has no width; rich would assume 80 columns
    console = Console() if sys.stdout.isatty() else Console(width=150)
    about = _about(settings, command)
    versions = about["environment"]["versions"]
    console.print(place(about), ", ".join(f"{name} {number}" for name, number in versions.items() if number), sep="\n")
    console.print()
    written: list[dict] = []

    def finished(case: Case, rows: list[dict]) -> None:
        written.extend(rows)
        console.print(case_table(case, rows))
        if output is not None:
            results.write(output, written, about)

    with console.status("") as status:
        rows = run(
            cases, chosen, settings, lambda case, what: status.update(f"{case}: {what}", spinner="dots"), finished
        )
    if output is not None:
        from .figure import draw

        for path in [output / "loss.csv", output / "loss.json", *draw(rows, about, output)]:
            console.print(f"written  {path}", highlight=False)
    return rows


def _about(settings: MeasurementSettings, command: str) -> dict:
    return {
        "what": "one forward and backward of a language model's head and loss, against its bare matrix products",
        "command": command,
        "environment": results.environment(settings.isa),
        "settings": {
            **asdict(settings),
            "gradients_checked": f"{REFERENCE_ROWS} rows of dX, {REFERENCE_ENTRIES} vocabulary entries of dW, float64",
            "logits": LOGITS,
            "trains": TRAINS,
        },
    }
