"""Function-calling rows from the pip package `bfcl-eval` (Berkeley Function-Calling Leaderboard v4, Apache-2.0).

- Each row: `messages` (question and reference call), `tools`, and `ground_truth` (every accepted value).
- The reference call has the first accepted value of each argument.
- Split by function name: functions offered together in any row form a group, and a group is wholly in "test" (about one
  group in five, by a hash of its first name) or in "train". So no function offered in one split is seen in the other.
- It is an evaluation set: a model trained on it must never report a BFCL score.

- `irrelevant_rows`: questions that none of the functions on offer answers, for the probe `call_refusal`; no reference call.

The package is found, never imported (importing it needs numpy 1.26 and a dozen model clients).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eaftdrope.errors import DataError

IRRELEVANCE = "irrelevance"
CATEGORIES = ("simple_python", "multiple", "parallel", "parallel_multiple", "live_simple")
INSTALL = "pip install --no-deps bfcl-eval==2026.3.23"
_JSON_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}
# Accepted values: "" stands for "may be left out", and a few rows have no accepted value at all for an optional argument.
_LEFT_OUT = object()


def check(split: str) -> str | None:
    """Return what is wrong if the package or the split does not exist, else None."""
    if split not in ("train", "test"):
        return f"package:bfcl: no split {split!r}; it has 'train' and 'test' (disjoint functions)."
    folder = _folder()
    if folder is None:
        return f"package:bfcl: the package bfcl-eval is not installed. Run `{INSTALL}`, or use a file or hub dataset."
    if not (folder / f"BFCL_v4_{CATEGORIES[0]}.json").is_file():
        return f"package:bfcl: the installed bfcl-eval has other data files. Run `{INSTALL}`."
    return None


def rows(split: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of `split` ("train" or "test"): `id`, `messages`, `tools`, `ground_truth`, in the package's order.

    Raises:
        DataError: the package is not installed, or has no such split.
    """
    problem = check(split)
    if problem is not None:
        raise DataError(problem)
    questions = [(row, answer) for category in CATEGORIES for row, answer in _pairs(category)]
    group = _groups([[function["name"] for function in row["function"]] for row, _ in questions])
    for row, answer in questions:
        if (split == "test") == _is_test(group[row["function"][0]["name"]]):
            yield _convert(row, answer)


def irrelevant_rows() -> Iterator[dict[str, Any]]:
    """Yield the 240 questions that no function on offer answers: `id`, `messages` (the question), `tools`.

    Raises:
        DataError: the package is not installed.
    """
    problem = check("test")
    if problem is not None:
        raise DataError(problem)
    folder = _folder()
    assert folder is not None, "checked above"
    for row in _read(folder / f"BFCL_v4_{IRRELEVANCE}.json"):
        yield {"id": row["id"], "messages": row["question"][0], "tools": _tools(row)}


def _folder() -> Path | None:
    spec = importlib.util.find_spec("bfcl_eval")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations))) / "data"


def _pairs(category: str) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    folder = _folder()
    assert folder is not None, "checked by `rows`"
    answers = {row["id"]: row["ground_truth"] for row in _read(folder / "possible_answer" / f"BFCL_v4_{category}.json")}
    for row in _read(folder / f"BFCL_v4_{category}.json"):
        yield row, answers[row["id"]]


def _read(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def _groups(offered: list[list[str]]) -> dict[str, str]:
    """Return function name -> alphabetically first name of its group (names offered together share a group)."""
    first: dict[str, str] = {}

    def find(name: str) -> str:
        first.setdefault(name, name)
        while first[name] != name:
            name = first[name]
        return name

    for names in offered:
        roots = sorted({find(name) for name in names})
        for root in roots:
            first[root] = roots[0]
    return {name: find(name) for name in first}


def _is_test(group: str) -> bool:
    return int(hashlib.sha256(group.encode("utf-8")).hexdigest(), 16) % 5 == 0


def _convert(row: dict[str, Any], ground_truth: list[dict[str, Any]]) -> dict[str, Any]:
    tools = _tools(row)
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    calls = []
    for call in ground_truth:
        for name, accepted in call.items():
            required = schemas[name].get("required", [])
            arguments = {key: _first(values, key in required) for key, values in accepted.items()}
            arguments = {key: value for key, value in arguments.items() if value is not _LEFT_OUT}
            calls.append({"type": "function", "function": {"name": name, "arguments": arguments}})
    answer = {"role": "assistant", "content": "", "tool_calls": calls}
    return {"id": row["id"], "messages": [*row["question"][0], answer], "tools": tools, "ground_truth": ground_truth}


def _tools(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"type": "function", "function": {**function, "parameters": _json_schema(function["parameters"])}}
        for function in row["function"]
    ]


def _first(values: Any, is_required: bool) -> Any:
    """Return the first accepted value; nested dictionaries hold lists of accepted values in turn."""
    if is_required:
        values = [value for value in values if value != ""] or values
    if not values or values[0] == "":
        return _LEFT_OUT
    return _first_inside(values[0])


def _first_inside(value: Any) -> Any:
    if isinstance(value, dict):
        chosen = {key: _first(item, False) if isinstance(item, list) else item for key, item in value.items()}
        return {key: item for key, item in chosen.items() if item is not _LEFT_OUT}
    if isinstance(value, list):
        return [_first_inside(item) for item in value]
    return value


def _json_schema(schema: Any) -> Any:
    """Replace the package's type names (Python's) by those of JSON Schema. `type` may also be the name of a property."""
    if isinstance(schema, list):
        return [_json_schema(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    converted = {key: _json_schema(value) for key, value in schema.items()}
    if isinstance(schema.get("type"), str):
        converted["type"] = _JSON_TYPES.get(schema["type"].lower(), schema["type"].lower())
    return converted
