"""YAML text -> plain Python data, and from a path of keys to the line it was written on.

Read as YAML 1.2 reads it, where PyYAML follows 1.1: `1e-5` is a number, and `yes`, `no`, `on`, `off`, `12:30` and dates
are text. Duplicate keys, which PyYAML silently merges, are reported with both lines.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

import yaml

Loc = tuple[str | int, ...]


@dataclass(frozen=True)
class Problem:
    """One problem of a recipe. `loc` is the path of keys, `line` counts from 1 (None: not from the file), `override` is the
    `key=value` of the command line that it comes from, if any."""

    text: str
    loc: Loc = ()
    line: int | None = None
    override: str | None = None


@dataclass
class Document:
    """The data of a YAML text, its node tree (for the lines), and the problems found in it."""

    data: object = None
    root: yaml.Node | None = None
    problems: list[Problem] = field(default_factory=list)


# far beyond any recipe, and far below Python's recursion limit, which other libraries of a process may raise
_MAX_DEPTH = 100


class _Loader(yaml.SafeLoader):
    """SafeLoader with the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema) and merge keys."""

    # PyYAML's own class attribute, emptied of the 1.1 rules
    yaml_implicit_resolvers: dict = {}

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """The next node, refused below `_MAX_DEPTH` others."""
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, f"nested too deeply (at most {_MAX_DEPTH} levels)", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> object:
        """The value of a node. Raises yaml.YAMLError with the node's place where PyYAML's constructors, which look a value
        up, match it or convert it, let the errors of that through."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
            raise _misfit(node, error) from error

    def construct_scalar(self, node: yaml.Node) -> str:
        """Text, with the two halves that JSON escapes a character beyond U+FFFF in put together."""
        # pyrefly: ignore[bad-argument-type]  # a node of another kind is an error of PyYAML's own
        value = super().construct_scalar(node)
        if any("\ud800" <= char <= "\udbff" for char in value):
            value = value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
        return value


class _Dumper(yaml.SafeDumper):
    """Quotes text that either YAML 1.1 or 1.2 would read as something else."""


def _resolve(tag: str, pattern: str, first: str) -> None:
    for reader_or_writer in (_Loader, _Dumper):
        reader_or_writer.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"^(?:{pattern})$"), list(first))


_resolve("bool", "true|True|TRUE|false|False|FALSE", "tTfF")
_resolve("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789")
_resolve(
    "float",
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
    "-+0123456789.",
)
_resolve("null", "~|null|Null|NULL|", "~nN")
_Loader.yaml_implicit_resolvers[""] = _Loader.yaml_implicit_resolvers["~"]
_resolve("merge", "<<", "<")


def _misfit(node: yaml.Node, error: Exception) -> yaml.YAMLError:
    tag = node.tag.removeprefix("tag:yaml.org,2002:")
    if isinstance(node, yaml.ScalarNode):
        found = f"'{node.value}'" if len(node.value) <= 60 else f"a value of {len(node.value):,} characters"
        what = f"{found} is not a value of the type {tag}"
    else:
        what = f"this is not a value of the type {tag} ({error})"
    return yaml.constructor.ConstructorError(None, None, what, node.start_mark)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def read_yaml(text: str) -> Document:
    """Parse `text`. Never raises: `.problems` has the errors with their lines."""
    document = Document()
    try:
        # the reader checks for forbidden characters at once, so this line can fail too
        loader = _Loader(text)
        document.root = loader.get_single_node()
    except yaml.YAMLError as error:
        document.problems.append(_syntax_problem(error, text))
        return document
    if document.root is None:
        document.problems.append(Problem("the file is empty. A recipe starts with `model: ...`", line=1))
        return document
    try:
        _check_keys(document.root, (), document.problems, set())
        document.data = loader.construct_document(document.root)
    except yaml.YAMLError as error:
        document.problems.append(_syntax_problem(error, text))
    return document


def read_value(text: str) -> object:
    """The value of an override, read as YAML. Raises yaml.YAMLError."""
    loader = _Loader(text)
    node = loader.get_single_node()
    return None if node is None else loader.construct_document(node)


def write_yaml(data: dict) -> str:
    """`data` as YAML that `read_yaml`, and any reader of YAML 1.1 or 1.2, reads back unchanged."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def write_inline(value: object) -> str:
    """A value as YAML in one line, that `read_yaml`, and any reader of YAML 1.1 or 1.2, reads back unchanged."""
    text = yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=True, width=math.inf
    )
    return text.removesuffix("\n").removesuffix("\n...")


def line_of(root: yaml.Node, loc: Loc) -> tuple[int, Loc, yaml.Node]:
    """The line (from 1) of the deepest part of `loc` that the text has, that part of `loc`, and its node.

    An index that the text leaves out (`train: {path: x}` means `train: [{path: x}]`) is skipped.
    """
    node, line = root, root.start_mark.line + 1
    found: Loc = ()
    for position, part in enumerate(loc):
        step = _child(node, part)
        if step is not None:
            line, node = step
            found = loc[: position + 1]
        elif not isinstance(part, int):
            break
    return line, found, node


def _child(node: yaml.Node, part: str | int) -> tuple[int, yaml.Node] | None:
    if isinstance(node, yaml.MappingNode):
        # the last one wins, as in the data: a merge (<<) puts the merged pairs first
        for key, value in reversed(node.value):
            if isinstance(key, yaml.ScalarNode) and key.value == str(part):
                return key.start_mark.line + 1, value
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        item = node.value[part]
        return item.start_mark.line + 1, item
    return None


def _check_keys(node: yaml.Node, loc: Loc, problems: list[Problem], seen: set[int]) -> None:
    """Check that every key is text and unique in its mapping. `seen` stops at anchors used twice, or inside themselves."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _check_keys(item, (*loc, index), problems, seen)
    if not isinstance(node, yaml.MappingNode):
        return
    first_line: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode) or key.tag.rsplit(":", 1)[-1] not in ("str", "merge"):
            shown = f"`{key.value}`" if isinstance(key, yaml.ScalarNode) else "a list or mapping"
            problems.append(Problem(f"a key must be text, found {shown}", loc, line))
            continue
        name = key.value
        if name in first_line and name != "<<":
            text = f"this key is already on line {first_line[name]}. Keep one of the two"
            problems.append(Problem(text, (*loc, name), line))
        first_line.setdefault(name, line)
        _check_keys(value, (*loc, name), problems, seen)


def _syntax_problem(error: yaml.YAMLError, text: str) -> Problem:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is None:  # ReaderError: a character YAML does not allow, with its position in the text
        position = getattr(error, "position", 0)
        return Problem(f"not a text file: {getattr(error, 'reason', error)}", line=text.count("\n", 0, position) + 1)
    line, lines = mark.line + 1, text.splitlines()
    # a tab often surfaces as an error on the line after it
    for candidate in (line, line - 1):
        if 1 <= candidate <= len(lines) and re.match(r" *\t", lines[candidate - 1]):
            return Problem("the line is indented with a tab, which YAML does not allow. Use spaces", line=candidate)
    parts = (getattr(error, "context", None), getattr(error, "problem", None))
    what = ", ".join(part for part in parts if part)
    hint = ""
    if "mapping values are not allowed" in what:
        hint = ". Two `key: value` on one line, or a wrong indentation? Text with `: ` in it needs quotes"
    elif "expected <block end>" in what:
        hint = ". Is this line indented like the lines above it?"
    elif "but found another document" in what:
        hint = ". One file is one recipe: remove the `---`"
    return Problem(f"not valid YAML: {what}{hint}", line=line)
