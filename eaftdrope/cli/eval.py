"""`eaftdrope eval`: models on suites of probes, on a recipe's own probes, and on tasks of lm-eval."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .measure import DeviceName, Dtype

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from eaftdrope.evaluate import Score
    from eaftdrope.evaluate.suites.plan import EvaluationOptions, EvaluationPlan, RecipeProbes
    from eaftdrope.files import ResultFolder

_UNSHOWN = {"show_default": False}
_DEFAULT_SUITE = "general"
_STYLES = {"better": "green", "worse": "red", "no clear change": "dim"}


_Models = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL", help="Folders (adapters too), hub ids, package:NAME; the first is the base.", **_UNSHOWN
    ),
]
_Suite = Annotated[
    str | None,
    typer.Option(
        help="From general,medical,math,tool_use; medical:pubmedqa is one part; lm-eval:mmlu,ifeval are tasks of lm-eval.",
        show_default=f"{_DEFAULT_SUITE}, without --probes",
    ),
]
_Recipe = Annotated[
    Path | None,
    typer.Option(metavar="RECIPE", help="Also run the probes of this recipe, on its held-out rows.", **_UNSHOWN),
]
_Data = Annotated[
    list[str] | None,
    typer.Option(metavar="[PART=]FILE|FOLDER", help="Your rows for a part of a suite; repeatable.", **_UNSHOWN),
]
_Base = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL", help="The model that agreement compares with.", show_default="the first of several models"
    ),
]
_Limit = Annotated[
    int | None, typer.Option(min=1, help="Maximum rows per part and task (perplexity is not affected).", **_UNSHOWN)
]
_Include = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Folder with your own task files for lm-eval (YAML).", **_UNSHOWN)
]
_BatchTokens = Annotated[
    int, typer.Option(min=64, help="Tokens per forward pass, padding included; bounds the logits.")
]


def eval(
    models: _Models,
    suite: _Suite = None,
    probes: _Recipe = None,
    data: _Data = None,
    base: _Base = None,
    limit: _Limit = None,
    include_path: _Include = None,
    chat: Annotated[bool, typer.Option("--chat", help="lm-eval's prompts through the chat template.")] = False,
    device: DeviceName = "auto",
    dtype: Dtype = None,
    batch_tokens: _BatchTokens = 2048,
    output: Annotated[Path | None, typer.Option(help="Folder.", show_default="runs/eval/<first model>")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Ignore cached scores.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be measured; read the data, load no weights.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the results in the folder.")] = False,
) -> None:
    """Measure models with standard errors; the first of several is the base that changes are computed from.

    Writes eval.json and report.html. Scores of the same weights and the same probe come from a cache, so that the same
    command resumes an interrupted one.
    """
    if not sys.stderr.isatty():
        # nothing else turns off the bars of lm-eval; tqdm reads the variable when it is imported
        os.environ.setdefault("TQDM_DISABLE", "1")
    from eaftdrope.evaluate.suites.plan import EvaluationOptions
    from eaftdrope.models import short_name

    from .measure import device_and_dtype

    device, dtype, problems = device_and_dtype(device, dtype)
    folder = output or Path("runs") / "eval" / short_name(models[0])
    options = EvaluationOptions(
        models=tuple(models),
        suite=suite if suite or probes else _DEFAULT_SUITE,
        data=tuple(data or ()),
        recipe=probes.stem if probes else None,
        base=base,
        limit=limit,
        include=include_path,
        chat=chat,
        device=device,
        dtype=dtype,
        batch_tokens=batch_tokens,
    )
    recipe_probes = _recipe_probes(probes, models[0], folder) if probes else None
    _eval(options, problems, recipe_probes, folder, fresh=fresh, dry_run=dry_run, overwrite=overwrite)


def _recipe_probes(path: Path, model: str, folder: Path) -> RecipeProbes:
    """Return the probes of a recipe; its model and output are replaced.

    Raises:
        UserError: the recipe is wrong, or has no data section.
    """
    from eaftdrope.errors import UserError
    from eaftdrope.recipe.load import load_recipe

    recipe = load_recipe(path, [f"model={model}", f"output.dir={folder}"])
    if recipe.data is None:
        raise UserError(
            f"--probes {path}: it has no data section, and so no probes of its own. Pass a recipe with the stage eaft."
        )

    def build(tokenizer):
        from eaftdrope.run.build import build_run_probes
        from eaftdrope.run.data import build_data
        from eaftdrope.run.settings import eaft_settings

        return build_run_probes(recipe.probes, build_data(eaft_settings(recipe), tokenizer))

    return build


def _eval(
    options: EvaluationOptions,
    problems: list[str],
    recipe_probes: RecipeProbes | None,
    folder: Path,
    *,
    fresh: bool,
    dry_run: bool,
    overwrite: bool,
) -> None:

    from eaftdrope.evaluate.suites.plan import make_plan
    from eaftdrope.evaluate.suites.run import NAME, SCHEMA
    from eaftdrope.files import ResultFolder

    from .terminal import make_console, show_report, silence_libraries

    silence_libraries(bars=False)
    console = make_console()
    plan = make_plan(options, problems, recipe_probes)
    results = ResultFolder(folder, NAME, "an evaluation", plan.settings, schema=SCHEMA, overwrite=overwrite)
    if dry_run:
        console.print(plan_table(plan))
    else:
        found = _run(plan, results, console, fresh=fresh)
        console.print(score_table(found))
        console.print(f"written: {folder / NAME}", highlight=False, markup=False)
        show_report(folder, console)
    for note in plan.notes:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)


def _run(
    plan: EvaluationPlan, results: ResultFolder, console: Console, *, fresh: bool
) -> dict[str, dict[str, list[Score]]]:
    """Measure with a bar in a terminal, elsewhere one line per step, and report how much came from the cache."""
    from eaftdrope.evaluate.suites.run import SCHEMA, run_plan

    from .measure import about, bars

    command = shlex.join(["eaftdrope", *sys.argv[1:]])
    results.document = {
        "schema": SCHEMA,
        "kind": "eval",
        "status": "running",
        "settings": plan.settings,
        "about": about(plan.options.device),
        "command": command,
        "suites": plan.suites,
        "notes": list(plan.notes),
        "models": [],
    }
    measured = []
    with bars(console) as start:

        def started(model, step) -> Callable[[int, int], None]:
            measured.append((model, step))
            return start(f"{model.name}, {step}")

        found = run_plan(plan, results, started, fresh=fresh)
    results.document["status"] = "finished"
    results.save()
    to_measure = plan.to_measure
    if kept := sum(pair not in measured for pair in to_measure):
        console.print(f"{kept} of {len(to_measure)} came from the cache (--fresh ignores it)", highlight=False)
    return found


def plan_table(plan: EvaluationPlan) -> Table:
    """Table of the steps of a plan and their data."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Evaluation", title_justify="left")
    for column in ("model", "suite", "part", "data"):
        table.add_column(column)
    for model in plan.models:
        table.add_section()
        for step in model.steps:
            table.add_row(*map(Text, (model.name, step.suite, step.name, plan.data.get(step.name, ""))))
    return table


def score_table(found: dict[str, dict[str, list[Score]]]) -> Table:
    """One column per model, those after the first with the change from it; one section per suite."""
    from rich.table import Table
    from rich.text import Text

    from eaftdrope.evaluate.table import NOTE
    from eaftdrope.report.words import arrowed, value_text

    first, *others = found
    caption = NOTE if others else "± is one standard error."
    table = Table(title="Evaluation", caption=caption, title_justify="left", caption_justify="left")
    table.add_column("")
    table.add_column(Text(first), justify="right")
    for name in others:
        table.add_column(Text(name), justify="right")
        table.add_column("change", justify="right")
    table.add_column("n", justify="right")
    for suite in dict.fromkeys(suite for suites in found.values() for suite in suites):
        by_model = [{(s.probe, s.metric): s for s in suites.get(suite, [])} for suites in found.values()]
        table.add_section()
        table.add_row(Text(suite, "bold"))
        for key in dict.fromkeys(key for scores in by_model for key in scores):
            base, *rest = (scores.get(key) for scores in by_model)
            score = next(filter(None, (base, *rest)))
            cells = [text for other in rest for text in (value_text(other), _change(base, other))]
            name = Text(f"  {arrowed(score.metric, score.better)}")
            table.add_row(name, value_text(base), *cells, f"{score.n:,}")
    return table


def _change(base: Score | None, other: Score | None) -> str:
    """Return the change with its paired error, in the colour of the verdict."""
    from eaftdrope.evaluate.table import comparison_lines

    if base is None or other is None:
        return "–"
    (line,) = comparison_lines([base], [other])
    mark = "" if line.verdict == "no clear change" else f" {line.verdict}"
    return f"[{_STYLES[line.verdict]}]{line.change}{mark}[/]"
