"""From the number of tokens to the reader."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from eaftdrope.errors import UserError
from eaftdrope.evaluate.rlm.results import NAME as BENCH_NAME
from eaftdrope.evaluate.rlm.table import cells_of, crossover
from eaftdrope.files import read_json, usable_path

from .built import BuiltRun

METHODS = ("plain", "ttt", "rlm")

# a tokenizer needs some hundred bytes for each token of a piece
_PIECE_CHARS = 1 << 16


def count_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Tokens of a text of any length, read in pieces that end with a line where possible."""
    count = start = 0
    while start < len(text):
        end = min(len(text), start + _PIECE_CHARS)
        line_end = text.rfind("\n", start, end) + 1
        if end < len(text) and line_end > start:
            end = line_end
        count += len(tokenizer(text[start:end], add_special_tokens=False, verbose=False).input_ids)
        start = end
    return count


def choose_method(run: BuiltRun, method: str, tokens: int, window: int | None) -> str:
    """The reader of a text: `method` if it can read it; of "auto", the first that may.

    Args:
        tokens: of the text and the question.
        window: context of the model of plain, in tokens, without the answer.

    Raises:
        UserError: the method cannot read so much, or the run has no model for it; of auto: no reader may.
    """
    limits = limits_of(run, window)
    if method != "auto":
        if method not in limits:
            raise UserError(f"--method {method}: {run.folder} has no model for it. It has: {', '.join(limits)}.")
        limit = limits[method]
        if limit is not None and tokens > limit:
            raise too_long(method, tokens, limit, limits)
        return method
    # without the section an RLM answers only where it is asked for
    offered = [name for name in limits if name != "rlm" or run.serve.rlm is not None]
    found = next((name for name in offered if fits(limits[name], tokens)), None)
    if found is None:
        raise UserError(
            f"text and question have {tokens:,} tokens, and no reader of {run.folder} may read so many "
            f"({', '.join(f'{name}: {limits[name]:,}' for name in offered)}). Use --method rlm, or add serve.rlm to the "
            "recipe."
        )
    return found


def too_long(method: str, tokens: int, limit: int, limits: dict[str, int | None]) -> UserError:
    """The refusal of a text that is longer than a method may read, with the ones that may."""
    longer = [name for name in limits if name != method and fits(limits[name], tokens)]
    remedy = f"Use --method {' or '.join(longer)}" if longer else "Ask about a shorter text"
    return UserError(
        f"text and question have {tokens:,} tokens, and {method} reads at most {limit:,}. {remedy}, or raise "
        f"serve.{method}.upto if the model can read more."
    )


def limits_of(run: BuiltRun, window: int | None) -> dict[str, int | None]:
    """Reader -> tokens that it reads at most (None: no limit), shortest texts first."""
    limits: dict[str, int | None] = {}
    if run.plain is not None:
        assert window is not None, "the model of plain has a context"
        upto = run.serve.plain.upto
        limits["plain"] = min(
            window, measured_crossover(upto) if isinstance(upto, str) else window if upto is None else upto
        )
    if run.ttt is not None:
        limits["ttt"] = run.serve.ttt.upto
    if run.plain is not None or (run.serve.rlm and run.serve.rlm.root):
        limits["rlm"] = None
    return limits


def fits(limit: int | None, tokens: int) -> bool:
    return limit is None or tokens <= limit


def measured_crossover(file: str) -> int:
    """Tokens of a plain call at the last length where the RLM of a bench is not above it; 0 if it is above at every length.

    Args:
        file: the rlm_bench.json, or its folder.

    Raises:
        UserError: no such results, or a plain call and the RLM share no length.
    """
    path = usable_path(file)
    path = path / BENCH_NAME if path.is_dir() else path
    document: Any = read_json(path) if path.is_file() else None
    if not isinstance(document, dict) or "cells" not in document:
        raise UserError(
            f"serve.plain.upto: {file} has no results of `eaftdrope rlm bench`. Set a number of tokens instead."
        )
    cells = cells_of(document)
    found = crossover(cells)
    if found is None:
        raise UserError(
            f"serve.plain.upto: {file} does not compare a plain call with the RLM. Measure --arms rlm,plain."
        )
    below, _ = found
    if below is None:
        return 0
    return max(trial.tokens for key, trials in cells.items() if key[1:] == (below, "plain") for trial in trials)


def joined(context: str | Sequence[str]) -> str:
    return context if isinstance(context, str) else "\n\n".join(context)
