"""report.html: one page on the results in a folder, and `figures/` beside it.

    run.json       a training run          compare.json   a comparison of gates
    inspect.json   training data           probe.json     how far a context reaches
    eval.json      models on suites        ttt.json       what learning while reading adds
    *.jsonl        journals of RLM runs    rlm_bench.json an RLM beside its baselines
    STAGE/run.json a pipeline of stages, whose numbers are collected in system.json

The journal of one RLM run (recursive language model) has a page of its own, JOURNAL.html. A page is built from files only,
so it can be rendered again, and the same files give the same bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eaftdrope.errors import UserError
from eaftdrope.files import usable_path

from .blocks import Page
from .render import FigureWriter, write_page
from .sections.comparison import compare_page
from .sections.context import context_page
from .sections.evaluation import eval_page
from .sections.inspection import inspect_page
from .sections.rlm_bench import rlm_bench_page
from .sections.rlm_run import rlm_run_page
from .sections.rlm_runs import journals_in, rlm_runs_page
from .sections.run import run_page
from .sections.side_by_side import runs_page
from .sections.system import system_page
from .sections.ttt_eval import ttt_page
from .system import is_pipeline

if TYPE_CHECKING:
    from rich.console import Console

PageBuilder = Callable[[Path, FigureWriter], Page]

NAME, COMPARISON_NAME = "report.html", "side_by_side.html"
_FIGURES = "figures"
# The first document found decides: the folder of a run may also contain an inspection of its data.
_BUILDERS: dict[str, PageBuilder] = {
    "run.json": run_page,
    "compare.json": compare_page,
    "inspect.json": inspect_page,
    "eval.json": eval_page,
    "probe.json": context_page,
    "ttt.json": ttt_page,
    "rlm_bench.json": rlm_bench_page,
}


def write_report(source: str | Path, output: str | Path | None = None) -> Path:
    """Write the report of a folder, and its figures beside it as PNG and SVG; or the page of a journal.

    Args:
        source: a folder with results, finished or not; or the journal of a recursive language model.
        output: the page; by default `source`/report.html, and for a journal the same name with the suffix .html.

    Raises:
        UserError: the folder contains no results of eaftdrope, or one of its files cannot be read.
    """
    source = usable_path(source)
    name = "" if source.is_file() else page_builder(source)[0]
    with _damage_to_user_error(source / name):
        return _write(source, output)


def write_side_by_side(folders: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write the page that compares training runs; side_by_side.html in the first folder by default.

    Raises:
        UserError: a folder does not contain a training run with probes.
    """
    runs = [Path(folder) for folder in folders]
    for folder in runs:
        if not (folder / "run.json").is_file():
            raise UserError(
                f"{folder} does not contain a training run (no run.json). Only training runs can be compared side by side."
            )
    output = Path(output) if output else runs[0] / COMPARISON_NAME
    with _damage_to_user_error(*(folder / "run.json" for folder in runs)):
        page = runs_page(runs, FigureWriter(output.parent / _FIGURES, "side_by_side_"))
    return write_page(page, output)


def try_write_report(source: Path, console: Console) -> None:
    """Write the report of a complete result (a folder, or a journal), and report a failure in one line.

    An error here must not invalidate the result, nor stop the stages and processes that wait for it. `eaftdrope report`
    shows the error in full.
    """
    try:
        path = _write(source, None)
    except Exception as error:
        console.print(
            f"the report could not be written: {type(error).__name__}: {error}\nThe result in {source} is complete. "
            f"Run `eaftdrope report {source}` to try again.",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    else:
        console.print(f"report: {path}", highlight=False, markup=False, soft_wrap=True)


def page_builder(folder: Path) -> tuple[str, PageBuilder]:
    """Return the document in a folder ("": it is a pipeline, or has journals) and the function that builds its page.

    Raises:
        UserError: the folder does not exist or contains no such document.
    """
    name = next((name for name in _BUILDERS if (folder / name).is_file()), None)
    if name is None and is_pipeline(folder):
        return "", system_page
    if name is None and journals_in(folder):
        return "", rlm_runs_page
    if name is None:
        problem = "contains no results of eaftdrope" if folder.is_dir() else "does not exist"
        raise UserError(
            f"{folder} {problem}. A report needs one of {', '.join(_BUILDERS)}, stages, or journals of RLM runs."
        )
    return name, _BUILDERS[name]


def _write(source: Path, output: str | Path | None) -> Path:
    if source.is_file():
        output = Path(output) if output else source.with_suffix(".html")
        page = rlm_run_page(source)
        if output.exists() and output.samefile(source):
            raise UserError(f"{output} is the journal itself. Choose another file for the page with --output.")
        return write_page(page, output)
    output = Path(output) if output else source / NAME
    return write_page(page_builder(source)[1](source, FigureWriter(output.parent / _FIGURES)), output)


@contextlib.contextmanager
def _damage_to_user_error(*files: Path) -> Iterator[None]:
    """A page is built from files only, so an unexpected structure of a document is the file's error, not the program's."""
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{' or '.join(map(str, files))}, or a file beside it, does not have the structure that eaftdrope writes "
            f"({type(error).__name__}: {error}), so no report can be built. It may be truncated or edited by hand."
        ) from error
