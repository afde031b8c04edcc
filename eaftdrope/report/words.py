"""Words and numbers of the report: text cut to what a page can hold, tokens made visible, lists, intervals."""

from __future__ import annotations

from collections.abc import Sequence

from eaftdrope.evaluate.scores import Score
from eaftdrope.evaluate.table import error_text, number_text


def clip(text: str, most: int, *, file: str) -> str:
    """The beginning of a text, and how much more of it is in `file`."""
    return text if len(text) <= most else f"{text[:most].rstrip()} … ({len(text) - most:,} more characters in {file})"


def start_of(text: str, most: int) -> str:
    return text if len(text) <= most else text[:most].rstrip() + " …"


def end_of(text: str, most: int) -> str:
    return text if len(text) <= most else "… " + text[-most:].lstrip()


def visible(token: str) -> str:
    """A token's text with the blanks that it begins or ends with, and its line ends, made visible."""
    body = token.strip(" ")
    before = len(token) - len(token.lstrip(" ")) if body else len(token)
    after = len(token) - before - len(body)
    return "␣" * before + body.replace("\n", "⏎").replace("\t", "⇥") + "␣" * after


def listing(names: Sequence[str]) -> str:
    """a, b and c; a name with a comma of its own is put in quotes."""
    names = [f"“{name}”" if "," in name else name for name in names]
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def plural(count: int, one: str, many: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def left_out(shown: int, total: int, what: str, file: str) -> str:
    """What a list that was cut says below; "" where it is whole."""
    return "" if shown >= total else f"{shown:,} of {total:,} {what} are shown; all of them are in {file}."


def score_of(row: dict) -> Score:
    """A score from JSON, with or without its units."""
    return Score(**{**row, "units": tuple((total, weight) for total, weight in row.get("units", ()))})


def value_text(score: Score | None) -> str:
    """The value with its standard error."""
    if score is None:
        return "–"
    return number_text(score.value, score.kind) + error_text(score.stderr, score.kind)


def interval_text(score: Score) -> str:
    """95 % by the normal approximation, cut to what is possible."""
    if not score.stderr:
        return "not known"
    low, high = score.value - 1.96 * score.stderr, score.value + 1.96 * score.stderr
    low = max(low, 0.0) if score.value >= 0 else low
    high = min(high, 1.0) if score.kind == "share" else high
    ends = [number_text(end, score.kind) for end in (low, high)]
    # narrower than the digits of the table
    return " to ".join(ends) if ends[0] != ends[1] else ends[0] + error_text(1.96 * score.stderr, score.kind)


def arrowed(metric: str, better: str) -> str:
    """The metric's name with its good direction, as in the table on the screen."""
    return f"{metric} {'↓' if better == 'lower' else '↑'}"
