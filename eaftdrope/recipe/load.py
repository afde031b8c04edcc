"""A recipe file -> a validated Recipe, or one RecipeError that lists every problem with its line.

    text -> read_yaml (data, node tree) -> overrides -> schema + combinations -> Recipe

torch and transformers are not imported here.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from eaftdrope.errors import RecipeError, UserError, printable
from eaftdrope.files import usable_path

from .base import describe
from .combinations import combination_problems
from .schema import Recipe
from .stage_sections import STAGES
from .suggest import FOREIGN_KEYS, did_you_mean, nearest
from .ttt_section import REFUSED_KEYS
from .yaml_lines import Document, Loc, Problem, line_of, read_value, read_yaml

# sections that may be written as the value of one of their keys
_SHORTHANDS = {"model": "reference", "parallel": "preset"}
_HALF = re.compile("[\ud800-\udfff]")
_EXPECTED = {
    "string_type": "expected text",
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "int_parsing": "expected a whole number",
    "float_type": "expected a number",
    "float_parsing": "expected a number",
    "finite_number": "expected a finite number",
    "bool_type": "expected true or false",
    "bool_parsing": "expected true or false",
    "list_type": "expected a list",
    "dict_type": "expected a mapping (`key: value` lines)",
    "model_type": "expected a mapping (`key: value` lines)",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "string_too_short": "must not be empty",
    "too_short": "must not be empty",
    "string_pattern_mismatch": "must look like me/my-model",
}


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read and check the recipe at `path`, with `key.sub=value` overrides (values are read as YAML).

    Relative files are searched beside the recipe first, then in the working directory; the Recipe holds them as found.

    Raises:
        RecipeError: the file cannot be read, or with every problem of the recipe and the overrides.
    """
    try:
        file = usable_path(path)
        text = file.read_text(encoding="utf-8")
    except UserError as error:
        raise RecipeError(str(error)) from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text (byte {error.start}). A recipe is a YAML file.") from None
    except OSError as error:
        raise RecipeError(_unreadable(Path(path).expanduser(), error)) from None
    document = read_yaml(text)
    recipe, problems = _check(document, list(overrides), file.parent)
    if recipe is None:
        again = shlex.join(["eaftdrope", "validate", str(path), *map(_cut, overrides)])
        raise RecipeError(_render(str(path), problems, f"`{again}` checks again in a second."))
    return recipe


def make_recipe(data: dict, *, folder: str | Path = ".") -> Recipe:
    """A Recipe from plain data (as YAML would give it), with the same checks; relative files start from `folder`.

    Raises:
        RecipeError: with every problem.
    """
    recipe, problems = _check(Document(data=data), [], Path(folder))
    if recipe is None:
        raise RecipeError(_render("the recipe", problems, "Correct it and try again."))
    return recipe


def _check(document: Document, overrides: list[str], folder: Path) -> tuple[Recipe | None, list[Problem]]:
    problems, data = list(document.problems), document.data
    if not isinstance(data, dict):
        if not problems:
            text = f"a recipe is a mapping of sections (model, data, ...), found {describe(data)}"
            problems.append(Problem(text, line=document.root.start_mark.line + 1 if document.root else None))
        return None, problems
    applied: dict[Loc, str] = {}
    for override in overrides:
        problem = _apply(data, override, applied)
        if problem:
            problems.append(Problem(problem, override=override))
    # such text can be neither checked nor written nor shown
    no_text = [Problem("not Unicode text: it has half a character. Write the whole one", loc) for loc in _halves(data)]
    if no_text:
        return None, [_locate(problem, document, applied) for problem in [*problems, *no_text]]
    recipe = None
    try:
        recipe = Recipe.model_validate(data, context={"folder": folder})
    except ValidationError as error:
        # read_yaml has already reported the keys that are not text
        reported = "invalid_key" if document.root else ""
        sections = [name for name in Recipe.model_fields if name in data or name not in STAGES]
        problems += [_from_pydantic(entry, sections) for entry in error.errors() if entry["type"] != reported]
    problems += _empty_lora(document, applied)
    wrong = {problem.loc for problem in problems}
    problems += [problem for problem in combination_problems(data) if problem.loc not in wrong]
    located = [_locate(problem, document, applied) for problem in problems]
    located.sort(key=lambda problem: (problem.line is None, problem.line or 0))
    return (None if located else recipe), located


def _halves(data: object) -> Iterator[Loc]:
    """Locations of texts and keys with half of a surrogate pair (`"\\ud800"`, a byte that is not UTF-8)."""
    left: list[tuple[Loc, object]] = [((), data)]
    seen: set[int] = set()
    while left:
        loc, value = left.pop()
        if isinstance(value, str) and _HALF.search(value):
            yield loc
        elif isinstance(value, dict | list) and id(value) not in seen:
            seen.add(id(value))
            items = list(value.items() if isinstance(value, dict) else enumerate(value))
            yield from ((*loc, key) for key, _ in items if isinstance(key, str) and _HALF.search(key))
            left += [((*loc, key), item) for key, item in reversed(items)]


def _empty_lora(document: Document, applied: dict[Loc, str]) -> list[Problem]:
    """Refuse `lora:` with nothing after it, which reads as null, a full fine-tune: rarely what was meant."""
    problems = []
    for loc in (("lora",), ("ttt", "lora")):
        if document.root is None or any(path[: len(loc)] == loc for path in applied):
            continue
        line, found, node = line_of(document.root, loc)
        if found == loc and isinstance(node, yaml.ScalarNode) and node.value == "":
            text = (
                "nothing is set. Write `lora: {}` for adapters with the defaults, or `lora: null` for a full fine-tune"
            )
            problems.append(Problem(text, loc, line))
    return problems


# Overrides


def _apply(data: dict[str, Any], override: str, applied: dict[Loc, str]) -> str | None:
    """Set one `key.sub=value` in `data`; returns the problem with it, or None."""
    name, equals, text = override.partition("=")
    # an index; a longer number is not one
    parts = [int(part) if part.isdecimal() and len(part) < 10 else part for part in name.strip().split(".")]
    if not equals or "" in parts:
        return "expected key.sub=value, such as train.steps=10"
    try:
        value = read_value(text)
    except yaml.YAMLError as error:
        return f"the value is not YAML: {getattr(error, 'problem', None) or getattr(error, 'reason', None) or error}"
    if not isinstance(parts[0], str):
        return "expected key.sub=value, such as train.steps=10"
    here: Any = data
    for depth, part in enumerate(parts[:-1]):
        child = _get(here, part)
        if child is None and isinstance(here, dict):
            here[part] = child = {}
        elif depth == 0 and part in _SHORTHANDS and isinstance(child, str):
            child = data[part] = {_SHORTHANDS[part]: child}
        if not isinstance(child, (dict, list)):
            where = ".".join(map(str, parts[: depth + 1]))
            return f"{where} is {describe(child)} and has no keys. Set {where} itself"
        here = child
    last = parts[-1]
    if isinstance(here, list) and not (isinstance(last, int) and last < len(here)):
        where = ".".join(map(str, parts[:-1]))
        return f"{where} is a list of {len(here)}. Use an index from 0 to {len(here) - 1}, or set {where} itself"
    if isinstance(here, list):
        assert isinstance(last, int)
        here[last] = value
    else:
        here[str(last)] = value
    applied[tuple(parts)] = override
    return None


def _get(container: Any, part: str | int) -> Any:
    if isinstance(container, list):
        return container[part] if isinstance(part, int) and part < len(container) else None
    return container.get(str(part)) if isinstance(container, dict) else None


# Problems


def _from_pydantic(entry: Mapping[str, Any], sections: list[str]) -> Problem:
    """A problem of the schema in our words; a key that belongs in another of `sections` is reported as such."""
    kind, value, context = entry["type"], entry["input"], entry.get("ctx", {})
    # tags of unions (such as <sources>) are ours, not the user's; an unknown key is the user's, whatever it begins with
    at, last = entry["loc"][:-1], entry["loc"][-1:]
    loc = tuple(part for part in at if not str(part).startswith("<"))
    loc += last if kind == "extra_forbidden" or not str(*last).startswith("<") else ()
    if kind == "extra_forbidden":
        return Problem(_unknown_key(loc, sections), loc)
    if kind == "missing":
        return Problem(_missing_key(loc), loc)
    if kind == "value_error":
        return Problem(str(context["error"]), loc)
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        shown = describe(value).removesuffix(" (text)")
        hint = did_you_mean(value, choices) if isinstance(value, str) else ""
        return Problem(f"{shown} is not one of {', '.join(choices)}.{hint}", loc)
    bounds = {
        name: f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"
        for name, bound in context.items()
        if isinstance(bound, (int, float))
    }
    expected = _EXPECTED.get(kind, entry["msg"]).format(**bounds)
    hint = ""
    if kind in ("model_type", "dict_type") and value is None:
        hint = ". Remove the key, or put keys under it"
    if kind == "bool_type" and isinstance(value, str) and value.lower() in ("yes", "on", "no", "off"):
        hint = f". Write {'true' if value.lower() in ('yes', 'on') else 'false'}"
    if kind in ("int_type", "float_type") and isinstance(value, str) and re.fullmatch(r"[-+\d._eE]+", value):
        hint = ". Remove the quotes" if not re.search(r"\d_\d", value) else f". Write {value.replace('_', '')}"
    return Problem(f"{expected}, found {describe(value)}{hint}", loc)


def section_at(loc: Loc) -> type[BaseModel] | None:
    """The schema class of the mapping at `loc` (() is the Recipe), or None."""
    section: type[BaseModel] | None = Recipe
    for part in loc:
        if isinstance(part, int):
            continue
        field = section.model_fields.get(part) if section else None
        section = _section_in(field.annotation) if field else None
    return section


def _section_in(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section_in(part))), None)


def _unknown_key(loc: Loc, sections: list[str]) -> str:
    section, key = section_at(loc[:-1]), str(loc[-1])
    assert section is not None, "the schema found the key in a section"
    if loc in REFUSED_KEYS:
        return REFUSED_KEYS[loc]
    keys = list(section.model_fields)
    near = did_you_mean(key, keys)
    elsewhere = [
        f"{name}.{key}"
        for name in sections
        if (other := section_at((name,))) and other is not section and key in other.model_fields
    ]
    if elsewhere:
        near = f" It belongs elsewhere: {' or '.join(f'`{path}`' for path in elsewhere)}."
    elif key in FOREIGN_KEYS and nearest(key, keys, limit=1) != [FOREIGN_KEYS[key].split(".")[-1]]:
        near = f" Did you mean `{FOREIGN_KEYS[key]}`?"
    # a long list is noise beside a suggestion
    here = "" if near and len(keys) > 12 else f"   (keys here: {', '.join(keys)})"
    return f"unknown key.{near}{here}"


def _missing_key(loc: Loc) -> str:
    section = section_at(loc[:-1])
    assert section is not None, "the schema missed the key in a section"
    field = section.model_fields[str(loc[-1])]
    return f"missing. {field.description}"


def _locate(problem: Problem, document: Document, applied: dict[Loc, str]) -> Problem:
    """The problem with the line, or the override, that it comes from."""
    if problem.override or (problem.line and not problem.loc):
        return problem
    if document.root is None:
        return _from_override(problem, (), applied) or problem
    line, found, node = line_of(document.root, problem.loc)
    from_override = _from_override(problem, found, applied)
    if from_override:
        return from_override
    # shorthand: a problem of `train: x.jsonl` is found at train[0].path, which is not in the text
    loc = found if isinstance(node, yaml.ScalarNode) else problem.loc
    return replace(problem, line=problem.line or line, loc=loc)


def _from_override(problem: Problem, found: Loc, applied: dict[Loc, str]) -> Problem | None:
    for path, override in reversed(applied.items()):
        inside = problem.loc[: len(path)] == path
        # `trian.epochs=1` made the unknown section `trian`
        made = path[: len(problem.loc)] == problem.loc and len(found) < len(problem.loc)
        if problem.loc and (inside or made):
            return replace(problem, override=override, line=None)
    return None


def _shown(loc: Loc) -> str:
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _render(name: str, problems: list[Problem], again: str) -> str:
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    lines = [f"{name} has {count}"]
    width = max((len(str(problem.line)) for problem in problems if problem.line), default=0)
    for problem in problems:
        if problem.override:
            place = f"override {_cut(problem.override)}"
        else:
            place = f"line {problem.line:>{width}}" if problem.line else ""
        key = f"{_shown(problem.loc)}: " if problem.loc else ""
        # keys and values of a recipe from elsewhere must not steer the terminal
        lines.append(f"  {printable(place)}  {printable(key)}{printable(problem.text, lines=True)}")
    return "\n".join([*lines, f"Nothing was loaded. {printable(again)}"])


def _cut(override: str) -> str:
    """An override as it is shown, shortened to a readable length."""
    return override if len(override) <= 200 else f"{override[:197]}..."


def _unreadable(path: Path, error: OSError) -> str:
    if os.path.isdir(path):
        return f"{path} is a folder. Use the path of a recipe inside it."
    if not isinstance(error, FileNotFoundError):
        return f"{path} cannot be read: {error.strerror}."
    names = sorted(os.listdir(path.parent)) if os.access(path.parent, os.R_OK) and path.parent.is_dir() else []
    hint = did_you_mean(path.name, [name for name in names if name.endswith((".yaml", ".yml"))])
    return f"no recipe at {path}.{hint} `eaftdrope recipes ls` lists the recipes that come with eaftdrope."
