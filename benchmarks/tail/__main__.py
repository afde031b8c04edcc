"""Command line of the tail-sparse benchmark; see the package's docstring."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from eaftdrope.errors import UserError
from eaftdrope.files import write_atomically

SCHEMA = 1
MODEL = "package:smollm2-135m-instruct"
BFCL = "package:bfcl"


def parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--model", default=MODEL)
    common.add_argument("--threads", type=_positive, help="CPU threads; by default all")
    common.add_argument("--out", type=Path, help="JSON file for the result")
    common.add_argument("--figure", type=Path, help="PNG or SVG file for the figure")
    whole = argparse.ArgumentParser(prog="python -m benchmarks.tail", description=__doc__)
    verbs = whole.add_subparsers(dest="verb", required=True)

    errors = verbs.add_parser("errors", parents=[common], help="gradient errors of one pass")
    errors.add_argument("--data", nargs="+", default=[BFCL], help=".jsonl files or package:bfcl")
    errors.add_argument("--tokens", type=_positive, default=2048, help="trained tokens per data source")

    curves = verbs.add_parser("curves", parents=[common], help="training with exact and with sparse gradients")
    curves.add_argument("--data", default=BFCL, help="rows to train on: a .jsonl file or package:bfcl")
    curves.add_argument("--held-out", help="rows for evaluation; by default those after the training rows")
    curves.add_argument("--steps", type=_positive, default=40)
    curves.add_argument("--batch-size", type=_positive, default=4)
    curves.add_argument("--max-length", type=_positive, default=512)
    curves.add_argument("--held-out-rows", type=_positive, default=64)
    curves.add_argument("--eval-every", type=_positive, default=5, help="steps")
    curves.add_argument("--learning-rate", type=float, default=5e-5)
    curves.add_argument("--scheduler", choices=("cosine", "linear", "constant"), default="cosine")
    curves.add_argument("--seeds", type=_positive, default=3, help="orders of the rows; at least 2")
    curves.add_argument("--gates", nargs="+", default=["eaft", "none"])

    draw = verbs.add_parser(
        "draw", help="draw the figure of a result, which may be interrupted after its first verdict"
    )
    draw.add_argument("result", type=Path)
    draw.add_argument("figure", type=Path)
    return whole


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def main(arguments: list[str] | None = None) -> None:
    command = parser()
    options = command.parse_args(arguments)
    try:
        {"errors": _errors, "curves": _curves, "draw": _draw}[options.verb](options)
    except UserError as error:
        command.exit(2, f"error: {error}\n")


def _check(options) -> None:
    """Check the options before the run: some problems would only appear after an hour."""
    from eaftdrope.data import Source, check_source
    from eaftdrope.models import check_model_reference

    problems = [check_model_reference(options.model)]
    sources = options.data if options.verb == "errors" else filter(None, [options.data, options.held_out])
    problems += [check_source(Source(source)) for source in sources]
    for name in ("out", "figure"):
        path = getattr(options, name)
        if path is not None and not path.parent.is_dir():
            problems.append(f"--{name} {path}: the folder {path.parent} does not exist. Create it first.")
    if options.figure is not None and options.figure.suffix not in (".png", ".svg"):
        problems.append(f"--figure {options.figure}: pass a .png or .svg file.")
    found = [problem for problem in problems if problem]
    if found:
        raise UserError("\n".join(found))


def _errors(options) -> None:
    _check(options)
    _set_threads(options)
    from .errors import run, table
    from .figure import draw_errors

    result = _about(options) | run(options.model, options.data, options.tokens)
    print(table(result))
    _finish(options, result, draw_errors)


def _curves(options) -> None:
    _check(options)
    if options.seeds < 2:
        raise UserError("--seeds 1: the verdict compares with the spread over seeds, which needs at least 2.")
    if options.steps % options.eval_every:
        raise UserError(
            f"--eval-every {options.eval_every} does not divide --steps {options.steps}: the final loss would be missing."
        )
    _check_gates(options.gates)
    _set_threads(options)
    from .curves import CurveSettings, run, settings_for_json
    from .figure import draw_curves

    names = ("model", "steps", "batch_size", "max_length", "held_out_rows", "eval_every", "learning_rate", "scheduler")
    settings = CurveSettings(
        **{name: getattr(options, name) for name in (*names, "seeds")}, gates=tuple(dict.fromkeys(options.gates))
    )
    about = _about(options) | {"settings": settings_for_json(settings, options.data, options.held_out)}
    result = about | run(settings, options.data, options.held_out, lambda so_far: _write(options.out, about | so_far))
    print(json.dumps(result["verdict"], indent=2))
    _finish(options, result, draw_curves)


def _draw(options) -> None:
    try:
        result = json.loads(options.result.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{options.result} cannot be read: {error}") from error
    verb = str(result.get("what", "")).rpartition(" ")[2]
    if verb not in ("errors", "curves") or not result.get("verdict" if verb == "curves" else "results"):
        raise UserError(f"{options.result} has nothing to draw: no verdict of `curves` and no results of `errors`.")
    from .figure import draw_curves, draw_errors

    (draw_errors if verb == "errors" else draw_curves)(result, options.figure)


def _check_gates(names: list[str]) -> None:
    from eaftdrope.loss.gates import resolve_gate

    for name in names:
        try:
            resolve_gate(name)
        except ValueError as error:
            raise UserError(f"--gates {name}: {error}") from error


def _set_threads(options) -> None:
    import torch

    if options.threads is not None:
        torch.set_num_threads(options.threads)


def _about(options) -> dict:
    import torch

    from ..loss.results import environment
    from .inputs import source_name

    where = environment(os.environ.get("ONEDNN_MAX_CPU_ISA"))
    return {
        "schema": SCHEMA,
        "what": f"benchmarks.tail {options.verb}",
        "model": source_name(options.model),
        "environment": where | {"threads": torch.get_num_threads()},
    }


def _finish(options, result: dict, draw) -> None:
    _write(options.out, result)
    if options.figure is not None:
        draw(result, options.figure)


def _write(path: Path | None, result: dict) -> None:
    if path is not None:
        write_atomically(path, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
