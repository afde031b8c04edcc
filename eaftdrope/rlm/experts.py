"""A scripted expert for `needle` and `count`: a root that searches for the name in the query, reads what is printed, answers.

    for row in expert_rows(400):
        row["messages"]

Its runs through the engine are training rows for a small root. A root copies forms, so what must not be copied is varied,
each independently: the wording of the query, the form of the lines in the document, lines that contain the name but no
answer, and the names. In some runs the expert begins with a mistake: a search for a wording that the document does not have
or for another name, code that fails, a reply without code. Mistakes are context (`weight: 0`); the broader search, the
corrected code and the block after them are trained.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from .engine import RLM
from .limits import Limits
from .models import ScriptedModel
from .protocol import SYSTEM_SHORT
from .tasks import Task, make_task
from .tasks.task import NAMES, NOUNS

EXPERT_TASKS = ("needle", "count")
CHARS = 8_000

_SENTENCE = re.compile(r"The magic number for (\w+) is (\d+)\.")
_SENTENCES = (
    "The magic number for {key} is {number}.",
    "{key} has the magic number {number}.",
    "{number} is the magic number of {key}.",
    "magic number, {key}: {number}",
)
_LABELS = ("label: {key}", "label={key}", "tag: {key}", "labels [{key}]", "{key} (label)")
_NAMES = (
    "acorn amber badger bamboo basalt beacon beaver blanket bottle bracket bramble bucket button cabin camel "
    "carrot cedar chimney cobalt compass coral cradle cricket crystal dagger daisy dolphin donkey dragon ember "
    "falafel feather fiddle flannel fossil gazelle geyser ginger goblet granite gravel guitar harp hedgehog "
    "helmet heather ivory jacket jasmine kettle kitten ladder lemon leopard lizard lobster lotus magpie mammoth "
    "marble meteor mustard napkin nettle nickel nutmeg oboe olive onion orchid otter oyster paddle panther parrot "
    "pebble pepper piano pigeon pillow plover poppy pumpkin quartz rabbit raven ribbon rocket saffron salmon "
    "sandal scarf shovel sparrow spindle squirrel stork sulphur tulip turnip turtle velour violin walrus weasel "
    "willow window wombat zebra zinc"
)
_SYLLABLES = "ba do ke li mo nu pa ra si tu ve zo gan lor min tes"
# of no document
_WORDINGS = {
    "needle": ("magic number {key}", "{key} magic number", "number {key} is", "the {key} number is"),
    "count": ("label {key}", "records with {key}", "label is {key}", "{key} records"),
}
_FAILING = (
    'lines = context.search("{key}")\nprint(lines)',
    'print(lines["{key}"])',
    'with open("context") as file:\n    print(file.read().find("{key}"))',
    'import pandas\nprint(pandas.Series(context).str.contains("{key}"))',
)
_WITHOUT_CODE = ("The context is too long to read.", "I would look for {key} in the context.", "{key}")
_MISTAKES = ("wording", "misspelt", "failing", "without code")
_MISTAKEN = 0.35
"""The share of runs that begin with a mistake."""


def expert_rows(
    count: int,
    *,
    names: str = "train",
    first: int = 0,
    chars: int = CHARS,
    journals: Path | None = None,
) -> Iterator[dict[str, Any]]:
    """Run the expert through the engine and yield its conversations as chat rows: `id`, `messages`.

    Row number n is the same whatever the count.

    Args:
        count: number of rows; tasks alternate.
        names: the set of names, one of `SETS`. Phrasings are those of the set "train".
        first: number of the first row.
        chars: length of the contexts.
        journals: folder for the journals of the runs; None: they are not kept.

    Raises:
        UserError: the package of the sandbox is missing.
    """
    for number in range(first, first + count):
        yield _row(number, names, chars, journals)


def _row(number: int, names: str, chars: int, journals: Path | None) -> dict[str, Any]:
    random = Random(f"expert {names} {number}")
    kind = EXPERT_TASKS[number % len(EXPERT_TASKS)]
    task = make_task(kind, number, chars, names=names, phrasings="train")
    (key,) = {word for word in re.findall(r"[a-z]+", task.query) if word in NAMES[names]}
    if names == "train":
        task, key = _renamed(task, key, random)
    task, form = _varied(task, key, random)
    mistakes = [_mistake(task, key, random)] if random.random() < _MISTAKEN else []
    replies = [*mistakes, _search(key), _answer(task, key, form)]
    engine = RLM(ScriptedModel(replies, name="expert"), system=SYSTEM_SHORT, limits=Limits())
    name = f"{kind}-{names}-{number}"
    journal = None if journals is None else journals / f"{name}.jsonl"
    result = engine.complete(task.context, task.query, journal=journal)
    assert task.score(result.answer) == 1.0 and result.turns == len(replies), (name, result.answer)
    messages: list[dict[str, Any]] = [dict(message) for message in result.messages]
    turns = [message for message in messages if message["role"] == "assistant"]
    for turn in turns[: len(mistakes)]:
        turn["weight"] = 0
    return {"id": name, "messages": messages}


def _renamed(task: Task, key: str, random: Random) -> tuple[Task, str]:
    """The task with other names: half of the rows have words, half invented ones."""
    invented = ["".join(random.choices(_SYLLABLES.split(), k=random.randint(2, 4))) for _ in range(60)]
    words = random.sample(_NAMES.split(), 60) if random.random() < 0.5 else invented
    chosen: list[str] = []
    for word in words:
        # the search for one name must not find another
        if not any(word in other or other in word for other in chosen):
            chosen.append(word)
    new = dict(zip(NAMES["train"], chosen))
    pattern = re.compile(rf"\b({'|'.join(new)})\b")

    def rename(text: str) -> str:
        return pattern.sub(lambda found: new[found[1]], text)

    assert isinstance(task.context, str), "these tasks are one text"
    return replace(task, context=rename(task.context), query=rename(task.query)), new[key]


def _varied(task: Task, key: str, random: Random) -> tuple[Task, str]:
    """The task over a document whose lines have another form; that form of a line's label or sentence."""
    assert isinstance(task.context, str), "these tasks are one text"
    lines = task.context.split("\n")
    if task.kind == "needle":
        form = random.choice(_SENTENCES)
        lines = [_SENTENCE.sub(lambda found: form.format(key=found[1], number=found[2]), line) for line in lines]
    else:
        form = random.choice(_LABELS)
        lines = [re.sub(r"label: (\w+)", lambda found: form.format(key=found[1]), line) for line in lines]
    if random.random() < 0.4:
        # lines with the name that are not the answer
        for _ in range(random.randint(1, 2)):
            index = random.randrange(len(lines))
            lines[index] = re.sub(rf"\b({'|'.join(NOUNS)})\b", key, lines[index], count=1)
    return replace(task, context="\n".join(lines)), form


def _mistake(task: Task, key: str, random: Random) -> str:
    kind = random.choice(_MISTAKES)
    if kind == "without code":
        return random.choice(_WITHOUT_CODE).format(key=key)
    if kind == "failing":
        return _block(random.choice(_FAILING).format(key=key))
    if kind == "misspelt":
        return _search(random.choice((f"{key}s", key[:-1] + "x", f"{key}-", random.choice(NOUNS))))
    wording = random.choice(_WORDINGS[task.kind]).format(key=key)
    if task.kind == "count":
        return _block(f'print(context.count("{wording}"))')
    return _block(f'print([line for line in context.split("\\n") if "{wording}" in line])')


def _search(key: str) -> str:
    """The search that finds the name in any form of a document, and prints enough to see that form."""
    return _block(f'lines = [line for line in context.split("\\n") if "{key}" in line]\nprint(len(lines), lines[:3])')


def _answer(task: Task, key: str, form: str) -> str:
    value = f'"{task.gold}"'
    if task.kind == "count":
        value = f'sum("{form.format(key=key)}" in line for line in lines)'
    return _block(f'answer["content"] = {value}\nanswer["ready"] = True')


def _block(code: str) -> str:
    return f"```repl\n{code}\n```"
