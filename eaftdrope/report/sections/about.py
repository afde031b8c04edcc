"""Where, when and with what a result was made."""

from __future__ import annotations

from ..blocks import Facts, Folded, Section


def about_section(document: dict, *more: tuple[str, str | None]) -> Section:
    """Command, date, hardware and versions of a JSON document of ours, with its recipe where it has one.

    Args:
        more: facts that come first; those without a value are left out.
    """
    about = document["about"]
    versions = about.get("versions") or {}
    pairs = [
        *more,
        ("Command", document.get("command")),
        ("Date", about.get("date")),
        ("Hardware", about.get("device")),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
    blocks = [Facts([pair for pair in pairs if pair[1]])]
    recipe = document.get("recipe")
    if isinstance(recipe, str):
        blocks.append(Folded("The whole recipe", recipe.strip()))
    return Section("run", "What was run", blocks)
