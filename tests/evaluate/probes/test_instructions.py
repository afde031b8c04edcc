"""Every constraint from both sides, and the instructions that come with us."""

from collections import Counter

import pytest

from eaftdrope.evaluate import build_probes, run_probes
from eaftdrope.evaluate.probes.instructions import CHECKS, Instruction, InstructionsProbe, shipped_instructions

# name, values, texts that keep it, texts that do not
SIDES = [
    ("words_at_least", (3,), ["one two three", "a b\nc d"], ["one two", ""]),
    ("words_at_most", (2,), ["one", "one two"], ["one two three", ""]),
    (
        "sentences",
        (2,),
        ["One. Two!", "It costs 3.5 dollars? Yes", '"One." Then two.', "One...\n\nTwo."],
        ["One.", "One. Two. Three.", ""],
    ),
    ("paragraphs", (2,), ["a\nb\n\nc", "a\n \n\nb\n"], ["a\nb", "a\n\nb\n\nc", ""]),
    ("lines", (2,), ["a\nb", "a\n\nb\n"], ["a", "a\nb\nc", ""]),
    ("bullets", (2,), ["- a\n- b", "Here:\n* a\n  • b"], ["- a", "- a\n- b\n- c", "a - b\n-c", "1. a\n2. b"]),
    (
        "numbered",
        (2,),
        ["1. a\n2. b", "Steps:\n1) a\n 2) b"],
        ["1. a", "1. a\n3. b", "1. a\n2. b\n3. c", "in 1. and 2."],
    ),
    ("lower_case", (), ["all lower, 5", "é"], ["One", "", "123"]),
    ("upper_case", (), ["ALL UP 5", "É!"], ["ALl", "", "123"]),
    ("contains", ("cat",), ["a Cat.", "cat"], ["category", "concat", ""]),
    (
        "contains_times",
        (
            "milk",
            2,
        ),
        ["Milk and milk"],
        ["milk", "milk milk milk", "milkmilk"],
    ),
    ("avoids", ("cat",), ["category", "a dog"], ["A CAT!", ""]),
    ("avoids_characters", (",;",), ["a. b"], ["a, b", "a; b", ""]),
    ("begins_with", ("Dear",), ["Dear you", "\nDear"], ["dear", "My Dear", ""]),
    ("ends_with", ("it!",), ["do it!\n"], ["do it", "it! ok", ""]),
    ("quoted", (), ['"a b"', "\u201ca\u201d"], ['a "b"', '"', "'a'", ""]),
    (
        "json_keys",
        (["a", "b"],),
        ['{"b": 1, "a": [2]}', '```json\n{"a": 1, "b": 2}\n```'],
        ['{"a": 1}', '{"a": 1, "b": 2, "c": 3}', 'So: {"a": 1, "b": 2}', "[1, 2]", ""],
    ),
    ("json_list", (2,), ['["a", 1]', "```\n[1, 2]\n```"], ["[1]", "[1, 2, 3]", '{"a": 1, "b": 2}', "1, 2"]),
    (
        "separated",
        (
            ",",
            2,
        ),
        ["a, b", "a,b\n"],
        ["a", "a, b, c", "a,", ","],
    ),
    ("title", (), ["<<A title>>\ntext"], ["<A title>", "<<>>", "<< >>", ""]),
]


def test_every_kind_has_both_sides():
    assert {name for name, *_ in SIDES} == set(CHECKS)
    assert all(kept and broken for _, _, kept, broken in SIDES)


@pytest.mark.parametrize(("name", "values", "kept", "broken"), SIDES, ids=[name for name, *_ in SIDES])
def test_constraint(name, values, kept, broken):
    for text in kept:
        assert CHECKS[name](text, *values) is True, text
    for text in broken:
        assert CHECKS[name](text, *values) is False, text


def test_the_shipped_instructions():
    instructions = shipped_instructions(None)
    assert len(instructions) == 40 and len({instruction.prompt for instruction in instructions}) == 40
    used = Counter(name for instruction in instructions for name, _ in instruction.checks)
    assert used.keys() == CHECKS.keys()
    for instruction in instructions:
        # every check takes the values that it is given, and an empty answer keeps nothing
        assert instruction.kept("") == [False] * len(instruction.checks)
        assert not any(instruction.kept("<think> Let me count"))
    assert [instruction.prompt for instruction in shipped_instructions(4)] == [
        instruction.prompt for instruction in instructions[::10]
    ]
    (probe,) = build_probes([("instructions", "general", {"limit": 5, "max_new_tokens": 7})])
    assert (len(probe.instructions), probe.max_new_tokens, probe.group) == (5, 7, "general")


def test_prompts_and_constraints_are_counted(answering, byte_tokenizer):
    model = answering({"A": "one two", "B": "ONE", "C": "<think>x</think>\nyes"})
    probe = InstructionsProbe(
        [
            Instruction("A", (("words_at_most", (2,)), ("lower_case", ()))),
            Instruction("B", (("words_at_most", (2,)), ("lower_case", ()), ("contains", ("two",)))),
            Instruction("C", (("begins_with", ("yes",)),)),
        ],
        max_new_tokens=30,
    )
    prompts, constraints = run_probes(model, byte_tokenizer, [probe])
    assert (prompts.metric, [hit for hit, _ in prompts.units]) == ("instructions kept", [1.0, 0.0, 1.0])
    assert (constraints.metric, [hit for hit, _ in constraints.units]) == ("constraints kept", [1, 1, 1, 0, 0, 1])
    assert (prompts.n, constraints.n, prompts.kind, prompts.better) == (3, 6, "share", "higher")
