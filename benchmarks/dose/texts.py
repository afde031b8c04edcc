"""The rows of a training of SmolLM2: an invented notation to learn, and facts, a share of them contradicted.

Only the labels of the contradicted facts depend on the share: prompts, order and the other rows are the same at every
share of a seed, and the facts contradicted at a smaller share are among those at a larger one.

    kind       what replaces the answer of a contradicted fact
    conflict   the answer of another fact of its relation
    spelling   the true answer with two neighbouring letters exchanged, or a digit replaced
"""

from __future__ import annotations

import random

from transformers import PreTrainedTokenizerBase

from eaftdrope.evaluate.likelihood import IGNORED, TokenRow

from .candidates import Fact

KINDS = ("conflict", "spelling")
_NAMES = "Mira Olaf Tess Ravi Nina Carl Jana Omar Lena Hugo Petra Ivan Rosa Emil Dora Felix"
_TOWNS = "Lund Bergen Turin Lyon Graz Porto Delft Cork Basel Ghent Split Malmö"
# the words of the notation are invented, so the model cannot have seen them
CODES = {
    "pears": "velk", "coats": "tarn", "lamps": "odri", "boots": "quim", "books": "sefa", "bells": "hulm",
    "ropes": "jent", "masks": "birv", "tents": "doxa", "clocks": "wapi", "spoons": "zorn", "ladders": "kipu",
}  # fmt: skip
_VERBS = {"bought": "+", "sold": "-", "lost": "x", "found": "o"}


def completion_row(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> TokenRow:
    """A row whose completion is trained; the tokens of the prompt are those of the prompt by itself."""
    before = tokenizer(prompt, add_special_tokens=False).input_ids
    after = tokenizer(completion, add_special_tokens=False).input_ids
    return TokenRow(before + after, [IGNORED] * len(before) + after)


def notes(count: int, seed: int) -> list[tuple[str, str]]:
    """Different notes in English, each with its record in the invented notation."""
    draw, found = random.Random(seed), {}
    while len(found) < count:
        name, town, item, verb = (draw.choice(list(words)) for words in (_NAMES.split(), _TOWNS.split(), CODES, _VERBS))
        number = draw.randrange(2, 10)
        note = f"Note: {name} {verb} {number} {item} in {town}.\nRecord:"
        found[note] = f" <{CODES[item]}{_VERBS[verb]}{number}> {town.upper()} / {name.lower()};"
    return list(found.items())


def split_notes(train: int, held_out: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Notes to train on and others to measure with; the same ones for every seed of a training."""
    found = notes(train + held_out, 0)
    return found[:train], found[train:]


def split_facts(facts: list[Fact], planted: int) -> tuple[list[Fact], list[Fact]]:
    """The facts in the training rows, evenly spread over all, and the others, which measure what is forgotten."""
    chosen = {i * len(facts) // planted for i in range(planted)}
    assert len(chosen) == planted, "more facts to plant than there are"
    return [f for i, f in enumerate(facts) if i in chosen], [f for i, f in enumerate(facts) if i not in chosen]


def contradiction(fact: Fact, kind: str, answers: list[str], draw: random.Random) -> str:
    """A wrong answer; `answers` are those of the relation."""
    if kind == "conflict":
        # the model is sure of every digit of a number; of a word, another first character makes the first token contradict
        is_number = fact.answer.isdigit()
        return draw.choice([a for a in answers if a != fact.answer and (is_number or a[0] != fact.answer[0])])
    assert kind == "spelling", kind
    return misspelt(fact.answer, draw)


def misspelt(word: str, draw: random.Random) -> str:
    """A word with two different neighbouring characters exchanged; a digit replaced if there are none."""
    places = [i for i in range(len(word) - 1) if word[i] != word[i + 1]]
    if not places:
        return word[:-1] + draw.choice([c for c in "0123456789abcdefghij" if c != word[-1]])
    i = draw.choice(places)
    return word[:i] + word[i + 1] + word[i] + word[i + 2 :]


def labelled_facts(facts: list[Fact], count: int, kind: str, seed: int) -> list[tuple[str, str]]:
    """Each fact with its answer, `count` of them contradicted."""
    draw = random.Random(1000 + seed)
    order = draw.sample(range(len(facts)), len(facts))
    answers: dict[str, list[str]] = {}
    for fact in facts:
        answers.setdefault(fact.relation, []).append(fact.answer)
    wrong = {i: contradiction(facts[i], kind, answers[facts[i].relation], draw) for i in order}
    chosen = set(order[:count])
    return [(fact.prompt, f" {wrong[i] if i in chosen else fact.answer}.") for i, fact in enumerate(facts)]
