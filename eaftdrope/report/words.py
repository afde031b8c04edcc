"""Text and numbers as a report shows them: truncated texts, visible tokens, lists, values with errors, intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eaftdrope.evaluate.scores import Score
from eaftdrope.evaluate.table import error_text, number_text


def clip(text: str, most: int, *, file: str) -> str:
    """Truncate a text to `most` characters, and state how much more of it is in `file`."""
    return text if len(text) <= most else f"{text[:most].rstrip()} … ({len(text) - most:,} more characters in {file})"


def start_of(text: str, most: int) -> str:
    """Return the first `most` characters, with an ellipsis if the text is longer."""
    return text if len(text) <= most else text[:most].rstrip() + " …"


def end_of(text: str, most: int) -> str:
    """Return the last `most` characters, with an ellipsis if the text is longer."""
    return text if len(text) <= most else "… " + text[-most:].lstrip()


def visible(token: str) -> str:
    """Return the text of a token with its leading and trailing spaces, tabs and line breaks as visible characters."""
    body = token.strip(" ")
    before = len(token) - len(token.lstrip(" ")) if body else len(token)
    after = len(token) - before - len(body)
    return "␣" * before + body.replace("\n", "⏎").replace("\t", "⇥") + "␣" * after


def listing(names: Sequence[str]) -> str:
    """Return `a, b and c`; a name that contains a comma is quoted."""
    names = [f"“{name}”" if "," in name else name for name in names]
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def plural(count: int, one: str, many: str | None = None) -> str:
    """Return `1 row`, `2 rows`; `many` is an irregular plural."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def percent(share: float | None) -> str:
    """Return a share in percent; a dash for None."""
    return "–" if share is None else f"{100 * share:.1f} %"


def number(value: float | None, digits: int = 3) -> str:
    """Return a value with `digits` decimals; a dash for None."""
    return "–" if value is None else f"{value:,.{digits}f}"


def left_out(shown: int, total: int, what: str, file: str) -> str:
    """Return the note below a truncated list; "" if the list is complete."""
    return "" if shown >= total else f"{shown:,} of {total:,} {what} are shown; the full list is in {file}."


def score_of(row: dict) -> Score:
    """Read a score from JSON, with or without its units."""
    fields: dict[str, Any] = {**row, "units": tuple((total, weight) for total, weight in row.get("units", ()))}
    return Score(**fields)


def value_text(score: Score | None) -> str:
    """Return the value with its standard error; a dash for None."""
    if score is None:
        return "–"
    return number_text(score.value, score.kind) + error_text(score.stderr, score.kind)


def interval_text(score: Score) -> str:
    """Return the 95 % interval by the normal approximation, limited to possible values."""
    if not score.stderr:
        return "not known"
    low, high = score.value - 1.96 * score.stderr, score.value + 1.96 * score.stderr
    low = max(low, 0.0) if score.value >= 0 else low
    high = min(high, 1.0) if score.kind == "share" else high
    ends = [number_text(end, score.kind) for end in (low, high)]
    # an interval narrower than the table's precision
    return " to ".join(ends) if ends[0] != ends[1] else ends[0] + error_text(1.96 * score.stderr, score.kind)


def arrowed(metric: str, better: str) -> str:
    """Return the metric's name with the arrow of its better direction, as in the terminal's table."""
    return f"{metric} {'↓' if better == 'lower' else '↑'}"
