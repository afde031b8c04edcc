"""The results of a lab as text."""

from __future__ import annotations


def lines(content: dict) -> list[str]:
    """Return the table of means and one sentence per comparison."""
    found = [content["question"], content["size"], ""]
    width = max((len(_name(row)) for row in content["means"]), default=0)
    found += [
        f"{_name(row):{width}}  {row['mean']:8.3f}  ({', '.join(f'{value:.3f}' for value in row['by_seed'])})"
        for row in content["means"]
    ]
    found += ["", *(sentence(one) for one in content["differences"])]
    if content["missing"]:
        found.append(f"missing: {', '.join(content['missing'])}")
    return found


def sentence(one: dict) -> str:
    """Return a comparison in one sentence."""
    low, high = one["interval"]
    return f"{one['title']}: {one['difference']:+.3f} (95 % over seeds {low:+.3f} to {high:+.3f}): {one['verdict']}"


def _name(row: dict) -> str:
    return f"{row['arm']}: {row['reading']}"
