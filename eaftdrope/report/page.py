"""report.html: one file that shows what a folder of results holds, and `figures/` beside it.

    run.json       a training run          compare.json   a comparison of gates
    inspect.json   training data           probe.json     how far a context reaches
    eval.json      models on suites

It is drawn from files alone, so it can be drawn again, and the same files give the same page to the byte.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from eaftdrope.errors import UserError, missing_package
from eaftdrope.files import usable_path

from .blocks import Page

if TYPE_CHECKING:
    from rich.console import Console

    from .render import Drawer

NAME, COMPARISON_NAME = "report.html", "side_by_side.html"
_PAGES = {
    "run.json": ("run", "run_page"),
    "compare.json": ("comparison", "compare_page"),
    "inspect.json": ("inspection", "inspect_page"),
    "eval.json": ("evaluation", "eval_page"),
    "probe.json": ("context", "probe_page"),
}


def write_report(folder: str | Path, output: str | Path | None = None) -> Path:
    """Write the report of a folder, and its figures beside it as PNG and SVG.

    Args:
        folder: of a run, a comparison, an inspection, a probe or an evaluation; it need not be finished.
        output: the page; `folder`/report.html by default.

    Raises:
        UserError: there is nothing of ours in the folder, or a file in it can not be read.
    """
    name, draw = _who_draws(usable_path(folder))
    with _damage_told(Path(folder) / name):
        return _write(Path(folder), output, draw)


def write_side_by_side(folders: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write the page that compares training runs; side_by_side.html in the first folder by default.

    Raises:
        UserError: a folder is none of a training run that was probed.
    """
    from .sections.side_by_side import runs_page

    folders = [Path(folder) for folder in folders]
    for folder in folders:
        if not (folder / "run.json").is_file():
            raise UserError(f"{folder} holds no training run (no run.json), and only these are put side by side.")
    output = Path(output) if output else folders[0] / COMPARISON_NAME
    with _damage_told(*(folder / "run.json" for folder in folders)):
        from .render import Drawer, write_page

        page = runs_page(folders, Drawer(output.parent / "figures", "side_by_side_"))
    return write_page(page, output)


def report_or_say(folder: Path, console: Console) -> None:
    """Write the report of a result that is complete. What goes wrong here must not take the result with it (nor the stages
    and processes that wait), so it is told in a line, and `eaftdrope report` shows it whole."""
    try:
        path = _write(folder, None, _who_draws(folder)[1])
    except Exception as error:
        missing = missing_package(error) if isinstance(error, ModuleNotFoundError) else None
        console.print(
            f"no report could be drawn: {missing or f'{type(error).__name__}: {error}'}\nThe result in {folder} is complete. "
            f"`eaftdrope report {folder}` tries again.",
            highlight=False,
            markup=False,
        )
    else:
        console.print(f"report: {path}", highlight=False, markup=False)


def _write(folder: Path, output: str | Path | None, draw: Callable[[Path, Drawer], Page]) -> Path:
    # needs matplotlib, which only reports need
    from .render import Drawer, write_page

    output = Path(output) if output else folder / NAME
    return write_page(draw(folder, Drawer(output.parent / "figures")), output)


@contextlib.contextmanager
def _damage_told(*files: Path) -> Iterator[None]:
    """A page is drawn from files alone: where one of them is JSON and lacks what ours have, that is the error."""
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{' or '.join(map(str, files))}, or a file beside it, is not as eaftdrope writes it "
            f"({type(error).__name__}: {error}), so no report can be made of it. Was it cut off, or changed by hand?"
        ) from error


def _who_draws(folder: Path) -> tuple[str, Callable[[Path, Drawer], Page]]:
    """The document and who draws it, the first that fits: a run's folder may also hold an inspection of its data."""
    name = next((name for name in _PAGES if (folder / name).is_file()), None)
    if name is None:
        where = "holds no results of eaftdrope" if folder.is_dir() else "is not there"
        raise UserError(f"{folder} {where}: a report is made of one of {', '.join(_PAGES)}.")
    module, function = _PAGES[name]
    # one of them needs torch
    return name, getattr(import_module(f".sections.{module}", __package__), function)
