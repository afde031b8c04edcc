"""Recipes that somebody, or something, has damaged: each is read, or refused in words with its line, and never a traceback.

FUZZ_RECIPES says how many (3,000; `make fuzz`: 50,000). The same number is the same recipes, in every run.
"""

import os
import random

import pytest

from eaftdrope.errors import UserError
from eaftdrope.loss.gates import ALL_GATE_OPTIONS
from eaftdrope.recipe import dump_recipe, load_recipe, make_recipe
from eaftdrope.recipe.load import section_at
from eaftdrope.recipe.schema import Recipe

COUNT = int(os.environ.get("FUZZ_RECIPES", "3000"))
# A batch is a test, so that a failure names a few hundred recipes; its seed is its number.
BATCH = 500

GOOD = """\
model: {reference: org/model, dtype: float32}
data:
  train: [{path: rows.jsonl, weight: 2, split: train}]
  held_out: 0.05
  max_length: 512
loss: {gate: eaft, alpha: 1.0, k: 20}
lora: {r: 16, target_modules: all-linear, modules_to_save: [lm_head]}
train:
  epochs: 1
  learning_rate: 1e-4
  scheduler: cosine
probes:
  target: [held_out_loss, {function_calls: {limit: 3}}]
  general: [perplexity, {multiple_choice: {limit: 9}}]
output: {dir: runs/mine, report_to: none}
"""
STAGED = """\
model: org/model
stages: [drope, recalibrate, eaft]
drope: {layers: [0, 1], temperature: 1.5}
recalibrate:
  data: {train: rows.jsonl, held_out: 0.1}
  tokens: 1e6
  recovery: {stop_at: 0.98, files: [rows.jsonl]}
  train: {learning_rate: 1e-3}
data: {train: rows.jsonl}
output: {dir: runs/mine}
"""


def words(text):
    return text.split()


NUMBERS = [
    *words(
        "0 -1 1e38 1e300 -1e300 1e-320 .inf -.inf .nan 1e400 0.5 2 10000000000000000000 0o7777777777777777777777 1e-4"
    ),
    *("0x" + "f" * 400, "0x" + "f" * 5000, "9" * 4300, "9" * 4301, "-" + "9" * 5000),
]
TEXTS = [
    *words(r"""'' "" text "\0" "a\ud800" "\udfff" "\ud83d\ude00" "\e[31mred\e[0m" "\u202e" "[/]{0}%s%n" "\n\t" """),
    *words("rows.jsonl null . .. /"),
    *words("~ ~/x ~nosuchuser/x /proc/self/environ /dev/null runs/[/red] [bold]x <sources> <share> package: org/name"),
    *words("package:bfcl a/b/c 2026-01-05 12:30 yes true 0.05 all auto none all-linear"),
    *("a" * 300, "a/" * 3000, "é" * 200),
]
TAGGED = """\
!!bool x|!!int x|!!int ''|!!float x|!!float ''|!!null x|!!timestamp x|!!timestamp 2026-13-99|!!binary x|!!binary 'é'
!!set {a, b}|!!set [a]|!!omap [a: 1]|!!omap {a: 1}|!!pairs [a: 1]|!!pairs x|!!map x|!!seq x|!!str {a: 1}|!!merge x
!!value x|!!python/name:os.system|!own x|!!python/object/apply:os.system [true]|!<tag:yaml.org,2002:int> z|! x|!!str 1
!!int 0b101|!!bool yes""".replace("\n", "|").split("|")
SHAPES = [
    *words("[] {} [{}] {a:1} [1,[2,[3]]] {?[a]:1} [a,a,a] [null] [[[[]]]] {a:{a:{a:{}}}} *missing"),
    *("{a: 1}", "{? [a]: 1}", "{1: 2}", "{null: 1}", "{true: 1}", "&a [*a]", "&a {b: *a}", "{<<: {a: 1}}", "{<<: [1]}"),
    *("{<<: *a}", "{<<: 3}", "- - - - 1", "|\n  text", ">-\n  x"),
]
PIECES = [*NUMBERS, *TEXTS, *TAGGED, *SHAPES]
# Half a second each, in PyYAML: seldom.
DEEP = ["[" * 900 + "]" * 900, "[" * 1200, "{a: " * 400 + "1" + "}" * 400]
SPLINTERS = [
    *words(": - { } [ ] &a *a ! !! % @ ` ' # | > ? , é \U0001f600 \x07 \ufeff \x1b"),
    *(": ", "- ", "? ", "\n", "\t", "  ", '"', "<<: *a", "---\n", "...\n", "%YAML 9.9\n", "\r", "\x85", "\u2028"),
]


def _keys(section=Recipe, path=()):
    """Every key of the schema as a path."""
    for name in section.model_fields:
        yield (*path, name)
        inner = section_at((*path, name))
        if inner is not None:
            yield from _keys(inner, (*path, name))


KEYS = [".".join(path) for path in _keys()]
NAMES = sorted({key.split(".")[-1] for key in KEYS} | set(ALL_GATE_OPTIONS))


def nested(rng, depth=0):
    """Plain data of any shape, as Python might hand it over: other types, surrogates, numbers of any size."""
    kind = rng.randrange(9 if depth < 4 else 6)
    if kind < 4:
        return rng.choice(
            [
                None,
                True,
                -1,
                0,
                3,
                2.5,
                1e300,
                float("inf"),
                float("nan"),
                10**400,
                10**5000,
                "x",
                "",
                "\ud800",
                "\0",
                b"x",
            ]
        )
    if kind < 6:
        return rng.choice(
            [(1, 2), {1, 2}, object(), range(3), "a" * 300, "~nosuchuser", "[/red]", "rows.jsonl", "\x1b[2J"]
        )
    if kind < 7:
        return [nested(rng, depth + 1) for _ in range(rng.randrange(4))]
    keys = [*rng.sample(NAMES, 2), "x", "\udc80", "<list>", 3, None, ("a",)]
    return {rng.choice(keys): nested(rng, depth + 1) for _ in range(rng.randrange(4))}


def damaged_text(rng):
    """A recipe of which something was replaced, doubled, cut out, moved or put in."""
    lines = rng.choice((GOOD, STAGED)).splitlines(keepends=True)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at, kind = rng.randrange(len(lines)), rng.randrange(8)
        line = lines[at]
        key, colon, _ = line.partition(":")
        if kind < 3 and colon:
            lines[at] = f"{key}: {rng.choice(PIECES if rng.randrange(100) else DEEP)}\n"
        elif kind == 3:
            lines.insert(at, rng.choice((line, f"{rng.choice(NAMES)}: {rng.choice(PIECES)}\n")))
        elif kind == 4:
            lines[at] = line.replace(*rng.choice((("1", rng.choice(NUMBERS)), ("a", "\ta"), (": ", ":"), ("  ", " "))))
        elif kind == 5:
            place = rng.randrange(len(line) + 1)
            lines[at] = line[:place] + rng.choice((*SPLINTERS, *PIECES)) + line[place:]
        elif kind == 6:
            words = line.split(" ")
            words[rng.randrange(len(words))] = rng.choice((*NAMES, *PIECES))
            lines[at] = " ".join(words).rstrip("\n") + "\n"
        elif len(lines) > 1:
            lines.append(lines.pop(at)) if rng.randrange(2) else lines.pop(at)
    return "".join(lines)


def damaged_bytes(rng):
    """A recipe whose bytes were flipped, cut off or repeated; some are then no UTF-8."""
    data = bytearray(damaged_text(rng) if rng.randrange(2) else GOOD, "utf-8")
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(4)
        if kind == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del data[at : at + rng.randrange(40)]
        elif kind == 2:
            data[at:at] = data[at : at + rng.randrange(40)]
        else:
            data = data[: max(1, at)]
    return bytes(data)


def override(rng):
    """`key.sub=value`, with a key of the schema or none, and any value."""
    key = rng.choice(
        (rng.choice(KEYS), rng.choice(KEYS), rng.choice(("", ".", "a..b", "<list>", "\t<<: *a", "data.train.0.path")))
    )
    if not rng.randrange(6):
        key = rng.choice(
            (key + ".0", key + "." + "9" * 5000, key + ".x.y", "\udcff" + key, key.upper(), "\x1b]0;" + key)
        )
    value = rng.choice((*PIECES, "\udc80", "a\x00b", "a: b: c", "\t", "- x\n- y", "= ="))
    if not rng.randrange(100):
        value = rng.choice(DEEP)
    return key + rng.choice(("=", "=", "=", "=", "", "==", " = ")) + value


def attempts(rng, path):
    """One call of the reader, and what it was given."""
    kind = rng.randrange(10)
    overrides = [override(rng) for _ in range(rng.choice((0, 0, 1, 2)))] if kind < 8 else []
    if kind < 5:
        content = damaged_text(rng).encode("utf-8", "surrogatepass")
    elif kind < 7:
        content = damaged_bytes(rng)
    elif kind < 9:
        content, overrides = GOOD.encode(), overrides or [override(rng)]
    else:
        data = nested(rng)
        if rng.randrange(2):
            data = {"model": "org/model", "data": {"train": "org/rows"}, "output": {"dir": "x"}}
            data[rng.choice((*Recipe.model_fields, "x"))] = nested(rng)
        shown = ascii(list(data))[:400] if isinstance(data, dict) else type(data)
        return (lambda: make_recipe(data, folder=path.parent)), f"make_recipe of {shown}"
    path.write_bytes(content)
    return (lambda: load_recipe(path, overrides)), f"{content!r:.3000} {[ascii(one)[:400] for one in overrides]}"


@pytest.fixture
def path(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text('{"text": "a row"}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path / "mine.yaml"


@pytest.mark.parametrize("batch", range(-(-COUNT // BATCH)))
def test_any_recipe_is_read_or_refused_in_words(batch, path):
    rng = random.Random(batch)
    read = refused = 0
    for number in range(min(BATCH, COUNT - BATCH * batch)):
        call, given = attempts(rng, path)
        try:
            recipe = call()
            # what is taken must also be what a run writes down, and shows
            dump_recipe(recipe, folder=path.parent).encode()
            read += 1
        except UserError as error:
            text = str(error)
            refused += 1
            assert text and "Traceback" not in text and "pydantic" not in text, given
            # nothing of a recipe steers the terminal, and anything can be printed
            assert "\x1b" not in text and text.encode(), given
        except Exception as error:
            pytest.fail(f"recipe {number} of batch {batch}: {type(error).__name__}: {str(error)[:200]}\n{given}")
    # it can fail, and it is no wall
    assert refused > 0.8 * (read + refused) and (read > 0 or COUNT < BATCH)
