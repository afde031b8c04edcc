"""What every section of the schema is made of: strict models, and the checks that more than one field needs."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo

from eaftdrope.models import check_model_reference

from . import paths as files

# Beyond these a number is a slip of the pen, and what it is multiplied with overflows.
MOST = 10**9
"""Upper bound of every count: rows, steps, tokens per row, megabytes."""
MOST_TOKENS = 1e18
"""Upper bound of a token budget: the largest models saw some 1e14."""
STRONGEST = 1e6
"""Upper bound of a gate's exponent, slope or weight, and of an adapter's scale."""
LARGEST_RATE = 1e30
"""Upper bound of learning rate, weight decay and norm: float32 can hold it, and training then stops by diverging."""

Positive = Annotated[int, Field(ge=1, le=MOST)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A mapping of the recipe. Unknown keys, values of another type, and NaN or infinity are refused; no assignment
    after construction."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, validate_default=True)


def recipe_folder(info: ValidationInfo) -> Path | None:
    """The folder that relative paths start from, or None: then no file is looked for."""
    return info.context["folder"] if info.context else None


def existing_file(path: str, info: ValidationInfo) -> str:
    """`path` as it was found beside the recipe or here. Raises ValueError where it is not."""
    folder = recipe_folder(info)
    if folder is None:
        return path
    found = files.find(path, folder)
    if found is None:
        raise ValueError(files.missing(path, folder))
    return found


def existing_model(reference: str, info: ValidationInfo) -> str:
    """A model reference, a local one as it was found. Raises ValueError where it leads nowhere."""
    folder = recipe_folder(info)
    if folder is None:
        return reference
    reference = files.resolved(reference, folder)
    problem = check_model_reference(reference)
    if problem:
        raise ValueError(problem)
    return reference


def describe(value: object) -> str:
    """A value as it is called in a message: `'abc' (text)`, `3 (a whole number)`, `a list`."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return f"{str(value).lower()} (true/false)"
    if isinstance(value, int):
        # Python refuses to write out what has more than 4,300 digits
        digits = value.bit_length() * math.log10(2)
        return f"{value} (a whole number)" if digits < 30 else f"a whole number of about {digits:,.0f} digits"
    if isinstance(value, float):
        return f"{value} (a number)"
    if isinstance(value, str):
        return f"'{_shortened(value)}' (text)"
    if isinstance(value, dict):
        keys = (_shortened(key) if isinstance(key, str) else describe(key) for key in list(value)[:4])
        return f"a mapping ({', '.join(keys)})"
    return "a list" if isinstance(value, list) else type(value).__name__


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def require_package(name: str, requirement: str, why: str) -> None:
    """Raise ValueError when the optional package `name` cannot be imported; `why` names what needs it."""
    if importlib.util.find_spec(name) is None:
        raise ValueError(f"{why} needs the package {requirement}, which is not installed: pip install {requirement}")
