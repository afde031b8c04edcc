"""The base of every section of the schema: strict models, and the checks that more than one field needs."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, ValidationInfo
from pydantic_core import CoreSchema, core_schema

from eaftdrope.models import check_model_reference

from . import paths

# Beyond these a number is a typing error, and products with it overflow.
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
    """A mapping of the recipe. Unknown keys, values of another type, NaN and infinity are refused; it is immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, validate_default=True)


class OneOf:
    """Annotation of text that must be one of `words`: `Literal[...]` for words that are stated elsewhere."""

    def __init__(self, words: Iterable[str]) -> None:
        self.words = tuple(words)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.literal_schema(list(self.words))


def recipe_folder(info: ValidationInfo) -> Path | None:
    """The folder that relative paths start from; None if files are not checked."""
    return info.context["folder"] if info.context else None


def existing_file(path: str, info: ValidationInfo) -> str:
    """`path` as it was found beside the recipe or in the working directory; a ValueError if it is missing."""
    folder = recipe_folder(info)
    if folder is None:
        return path
    found = paths.find(path, folder)
    if found is None:
        raise ValueError(paths.missing(path, folder))
    return found


def existing_model(reference: str, info: ValidationInfo) -> str:
    """A model reference, a local one as it was found; a ValueError if there is no such model."""
    folder = recipe_folder(info)
    if folder is None:
        return reference
    reference = paths.resolved(reference, folder)
    problem = check_model_reference(reference)
    if problem:
        raise ValueError(problem)
    return reference


def describe(value: object) -> str:
    """A value in the words of a message: `'abc' (text)`, `3 (a whole number)`, `a list`."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return f"{str(value).lower()} (true/false)"
    if isinstance(value, int):
        # Python refuses to print numbers of more than 4,300 digits
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
    """Raise ValueError if the optional package `name` is not installed; `why` is what needs it."""
    if importlib.util.find_spec(name) is None:
        raise ValueError(f"{why} needs the package {requirement}, which is not installed: pip install {requirement}")
