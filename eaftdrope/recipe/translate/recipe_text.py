"""A translation as text: the recipe with its comments, and the table of what became of every key."""

from __future__ import annotations

import textwrap
from typing import Any

from eaftdrope.errors import printable

from ..schema import Recipe
from ..yaml_lines import write_inline
from .draft import Fate, KeyFate, Translation

SECTIONS = tuple(Recipe.model_fields)
"""The sections of a recipe, in their order."""
_WIDTH = 120


def recipe_text(translation: Translation, source: str) -> str:
    """Return the recipe as YAML; its header lists what was not translated, and comments state where each value is from.

    Args:
        source: name of the configuration, for the header.
    """
    lines = [f"# Translated from {printable(source)} ({translation.tool}) by `eaftdrope recipes from`."]
    lines += ["# Check it with `eaftdrope validate`, and look at the trained tokens with `eaftdrope preview`."]
    lost = [one for one in translation.fates if one.fate is Fate.LOST]
    if lost:
        lines += ["#", "# Not translated:"]
        width = min(40, max(len(_shown(one)) for one in lost))
        for one in lost:
            indent = f"#   {'':{width}}  "
            text = f"{_shown(one):{width}}  {printable(one.note)}"
            lines += textwrap.wrap(
                text, _WIDTH, initial_indent="#   ", subsequent_indent=indent, break_long_words=False
            )
    for section, content in translation.recipe.items():
        lines += ["", f"{section}:"]
        lines += _entries(content, section, translation.origins)
    return "\n".join(lines) + "\n"


def _shown(fate: KeyFate) -> str:
    value = write_inline(fate.value)
    return printable(f"{fate.key}: {value if len(value) <= 40 else value[:37] + '...'}")


def _entries(content: dict[str, Any], path: str, origins: dict[str, str]) -> list[str]:
    lines = []
    for key, value in content.items():
        origin = origins.get(f"{path}.{key}", key)
        comment = f"  # {printable(origin)}" if origin not in ("", key) else ""
        if isinstance(value, list) and value and isinstance(value[0], dict):
            lines.append(f"  {key}:{comment}")
            lines += [f"    - {write_inline(entry)}" for entry in value]
        else:
            lines.append(f"  {key}: {write_inline(value)}{comment}")
    return lines


def fates_table(translation: Translation) -> str:
    """Return the table of what became of every key, as plain text."""
    rows = [(_shown(one), one.fate.value, printable(one.note)) for one in translation.fates]
    head = (f"key of {translation.tool}", "", "key of the recipe, or the reason")
    widths = [max(len(row[column]) for row in [head, *rows]) for column in (0, 1)]
    lines = [f"{a:{widths[0]}}  {b:{widths[1]}}  {c}".rstrip() for a, b, c in [head, *rows]]
    counts = {fate: sum(one.fate is fate for one in translation.fates) for fate in Fate}
    return "\n".join([*lines, "; ".join(f"{count} {fate.value}" for fate, count in counts.items())])
