"""The section on provenance: command, date, hardware and versions of a result."""

from __future__ import annotations

from ..blocks import Facts, Folded, PageSection


def about_section(document: dict, *more: tuple[str, str | None]) -> PageSection:
    """Return the provenance of a result document, with its recipe if it has one.

    Args:
        more: facts listed first; those without a value are omitted.
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
    blocks: list[object] = [Facts([(name, value) for name, value in pairs if value])]
    recipe = document.get("recipe")
    if isinstance(recipe, str):
        blocks.append(Folded("Full recipe", recipe.strip()))
    return PageSection("run", "How it was run", blocks)
