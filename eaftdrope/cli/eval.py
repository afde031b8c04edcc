"""`eaftdrope eval`: models on suites of probes, on a recipe's own probes, and on tasks of lm-eval."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from eaftdrope.errors import UserError, printable
from eaftdrope.files import write_atomically

from .measure import DeviceName, Dtype

if TYPE_CHECKING:
    from rich.console import Console

    from eaftdrope.evaluate import Score
    from eaftdrope.evaluate.suites.plan import EvaluationOptions, EvaluationPlan, RecipeProbes
    from eaftdrope.evaluate.suites.regressions import WorseningLimits
    from eaftdrope.files import ResultFolder

_UNSHOWN = {"show_default": False}
_DEFAULT_SUITE = "general"


_Models = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL", help="Folders (adapters too), hub ids, package:NAME; the first is the base.", **_UNSHOWN
    ),
]
_Suite = Annotated[
    str | None,
    typer.Option(
        help="From general,behaviour,recall,medical,math,tool_use; medical:pubmedqa is one part; lm-eval:mmlu,ifeval are "
        "tasks of lm-eval.",
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
_FailIfWorse = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[METRIC:MARGIN]",
        help="Exit with 1 if a metric is clearly worse than the base's: any, or METRIC by more than MARGIN; repeatable.",
        **_UNSHOWN,
    ),
]
_JUnit = Annotated[
    Path | None, typer.Option("--junit", metavar="FILE", help="Write the verdicts as JUnit XML.", **_UNSHOWN)
]
_GitHub = Annotated[
    bool,
    typer.Option("--github", envvar="GITHUB_ACTIONS", help="Print the verdicts as annotations of GitHub Actions."),
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
    fail_if_worse: _FailIfWorse = None,
    junit: _JUnit = None,
    github: _GitHub = False,
) -> None:
    """Measure models with standard errors; the first of several is the base that changes are computed from.

    Writes eval.json, report.html, and the scores as lm-eval and inspect-ai write them. Scores of the same weights and the
    same probe come from a cache, so that the same command resumes an interrupted one.

    Exit codes: 0; 1 if --fail-if-worse finds a metric that is clearly worse; 2 for an error of the user.
    """
    if not sys.stderr.isatty():
        # nothing else turns off the bars of lm-eval; tqdm reads the variable when it is imported
        os.environ.setdefault("TQDM_DISABLE", "1")
    from eaftdrope.evaluate.suites.plan import EvaluationOptions
    from eaftdrope.models import short_name

    from .measure import device_and_dtype

    device, dtype, problems = device_and_dtype(device, dtype)
    verdicts = _verdict_options(fail_if_worse, junit, github, len(models), problems)
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
    found = _eval(options, problems, recipe_probes, folder, fresh=fresh, dry_run=dry_run, overwrite=overwrite)
    if found is not None and _report_verdicts(found, verdicts):
        raise SystemExit(1)


class _VerdictOptions(NamedTuple):
    """What is done with the verdicts; `limits` is None without --fail-if-worse."""

    limits: WorseningLimits | None
    junit: Path | None
    github: bool


def _verdict_options(
    fail_if_worse: list[str] | None, junit: Path | None, github: bool, models: int, problems: list[str]
) -> _VerdictOptions:
    """Read the options on verdicts; what is wrong with them is added to `problems`."""
    from eaftdrope.evaluate.suites.regressions import parse_limits

    limits = None
    for option in ("--fail-if-worse",) * bool(fail_if_worse) + ("--junit",) * bool(junit):
        if models < 2:
            problems.append(f"{option}: there is nothing to compare. Pass the base model and at least one other.")
    if junit is not None and not junit.parent.is_dir():
        problems.append(f"--junit {junit}: there is no folder {junit.parent}. Create it, or choose another file.")
    if fail_if_worse:
        try:
            limits = parse_limits(fail_if_worse)
        except UserError as error:
            problems.append(str(error))
    return _VerdictOptions(limits, junit, github)


def _report_verdicts(found: dict[str, dict[str, list[Score]]], options: _VerdictOptions) -> bool:
    """Print and write the verdicts as the options require; return True if --fail-if-worse fails."""
    from eaftdrope.evaluate.suites.ci_output import github_annotations, junit_xml
    from eaftdrope.evaluate.suites.regressions import PASSED, WorseningLimits, check_models, summary
    from eaftdrope.evaluate.verdicts import WORSE

    if len(found) < 2 or not any(options):
        return False
    scores = {model: [score for part in suites.values() for score in part] for model, suites in found.items()}
    checked = check_models(scores, options.limits or WorseningLimits())
    if options.junit is not None:
        write_atomically(options.junit, junit_xml(checked))
    for line in github_annotations(checked) if options.github else []:
        typer.echo(line)
    if options.limits is None:
        return False
    typer.echo(printable(summary(checked)))
    for one in checked:
        if one.word != PASSED:
            typer.echo(f"  {printable(one.text)}")
    return any(one.word == WORSE for one in checked)


def _recipe_probes(path: Path, model: str, folder: Path) -> RecipeProbes:
    """Return the probes of a recipe; its model and output are replaced.

    Raises:
        UserError: the recipe is wrong, or has no data section.
    """
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

        settings = eaft_settings(recipe)
        return build_run_probes(recipe.probes, build_data(settings, tokenizer), length=settings.max_length)

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
) -> dict[str, dict[str, list[Score]]] | None:
    """Measure and print; return the scores by model and suite, None for a dry run."""
    from eaftdrope.evaluate.suites.plan import make_plan
    from eaftdrope.evaluate.suites.run import NAME, SCHEMA
    from eaftdrope.files import ResultFolder

    from .eval_tables import plan_table, score_table
    from .terminal import make_console, show_report, silence_libraries

    silence_libraries(bars=False)
    console = make_console()
    plan = make_plan(options, problems, recipe_probes)
    results = ResultFolder(folder, NAME, "an evaluation", plan.settings, schema=SCHEMA, overwrite=overwrite)
    found = None
    if dry_run:
        console.print(plan_table(plan))
    else:
        found = _run(plan, results, console, fresh=fresh)
        console.print(score_table(found))
        console.print(f"written: {folder / NAME}", highlight=False, markup=False, soft_wrap=True)
        show_report(folder, console)
    for note in plan.notes:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    return found


def _run(
    plan: EvaluationPlan, results: ResultFolder, console: Console, *, fresh: bool
) -> dict[str, dict[str, list[Score]]]:
    """Measure with a bar in a terminal, elsewhere one line per step, and report how much came from the cache."""
    from eaftdrope.evaluate.suites.other_formats import write_other_formats
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
    write_other_formats(
        results, {model: [s for part in suites.values() for s in part] for model, suites in found.items()}
    )
    to_measure = plan.to_measure
    if kept := sum(pair not in measured for pair in to_measure):
        console.print(f"{kept} of {len(to_measure)} came from the cache (--fresh ignores it)", highlight=False)
    return found
