"""Options and helpers shared by the measuring verbs: device, environment, and a progress bar."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eaftdrope.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from eaftdrope.evaluate.long_context.plan import ContextPlan
    from eaftdrope.evaluate.long_context.results import ContextResults

Text = Annotated[Path | None, typer.Option(help="A text file, or JSONL with `text`.", show_default="a short novel")]
Windows = Annotated[int, typer.Option(min=1, help="At most this many windows for perplexity, at each length.")]
TrainedLength = Annotated[
    int | None, typer.Option(min=2, help="In tokens; overrides the configuration.", show_default=False)
]
DeviceName = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or auto.", show_default="float32 on cpu, else bfloat16")
]
BatchTokens = Annotated[int, typer.Option(min=1, help="Tokens in the cache at once (at least one prompt or window).")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete the results in the folder, and start over.")]


def parse_names(text: str) -> tuple[str, ...]:
    """`a,b` -> names, each once."""
    return tuple(dict.fromkeys(filter(None, (part.strip() for part in text.split(",")))))


def choose_device(name: str) -> str:
    """Return a torch device; `auto` is the accelerator if there is one, else the CPU.

    Raises:
        UserError: the name is not a device, or the device is not present.
    """
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return "cpu" if accelerator is None else accelerator.type
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: unknown device. Use auto, cpu, cuda or cuda:1.") from None
    present = device.type == "cpu" or (
        accelerator is not None
        and device.type == accelerator.type
        and (device.index or 0) < torch.accelerator.device_count()
    )
    if not present:
        raise UserError(f"--device {name}: not present on this machine. Use auto or cpu.")
    return name


def device_and_dtype(device: str, dtype: str | None) -> tuple[str, str, list[str]]:
    """Return the device and dtype to measure with, and the problems of those that were passed. The default dtype is
    float32 on the CPU, which is fastest there, and bfloat16 elsewhere."""
    from eaftdrope.models import DTYPES

    problems = []
    try:
        device = choose_device(device)
    except UserError as error:
        problems.append(str(error))
    if dtype is not None and dtype not in DTYPES:
        problems.append(f"--dtype {dtype}: not one of {', '.join(DTYPES)}.")
    return device, dtype or ("float32" if device == "cpu" else "bfloat16"), problems


def about(device: str) -> dict:
    """Return date, device and versions, for the results."""
    from eaftdrope.run.machine import accelerators, cpu_name

    kind = device.split(":")[0]
    names = [found.name for found in accelerators()] if kind != "cpu" else [cpu_name()]
    packages = ("eaftdrope", "torch", "transformers")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": names[0] if names else kind,
        "versions": {name: version(name) for name in packages},
    }


def run_with_progress(plan: ContextPlan, results: ContextResults, console: Console) -> None:
    """Measure the remaining cells of the plan: a bar in a terminal, elsewhere one line per cell."""
    from eaftdrope.evaluate.long_context.run import run_plan

    results.begin(about(plan.options.device))
    left, total = len(results.left()), len(plan.cells)
    if 0 < left < total:
        console.print(f"resuming: {total - left} of {total} cells are already measured", highlight=False)
    with bars(console) as start:
        counted = iter(range(total - left + 1, total + 1))

        def started(cell) -> Callable[[int, int], None]:
            return start(f"{next(counted)}/{total} {cell.model}, {cell.variant}: {cell.probe} at {cell.length:,}")

        run_plan(plan, results, started=started)


@contextlib.contextmanager
def bars(console: Console) -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """Yield `start(text)`, which replaces the last bar by a new one and returns `step(done, total)`."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:

        def start(text: str) -> Callable[[int, int], None]:
            if not console.is_terminal:
                console.print(text, highlight=False, markup=False)
            for old in progress.task_ids:
                progress.remove_task(old)
            task = progress.add_task(text, total=None)
            return lambda done, total: progress.update(task, completed=done, total=total)

        yield start
