"""The matcher's verdicts, and the same table through BFCL's own checker."""

import importlib.util

import pytest

from eaftdrope.errors import DataError
from eaftdrope.evaluate.probes.function_calls import accepted_calls, calls_match, check_accepted, functions_match

PERSON = {"name": ["Ann"], "age": [30, 31], "city": ["", "Paris"]}
# label: (types of f's arguments, ground truth, calls, verdict). Calls are (name, arguments).
TABLE = {
    "same": ({"a": "integer"}, [{"f": {"a": [1]}}], [("f", {"a": 1})], True),
    "another accepted value": ({"a": "integer"}, [{"f": {"a": [1, 2]}}], [("f", {"a": 2})], True),
    "wrong number": ({"a": "integer"}, [{"f": {"a": [1, 2]}}], [("f", {"a": 3})], False),
    "integer for a float": ({"a": "float"}, [{"f": {"a": [5.0]}}], [("f", {"a": 5})], True),
    "float near but not equal": ({"a": "float"}, [{"f": {"a": [5.0]}}], [("f", {"a": 5.001})], False),
    "number as text": ({"a": "integer"}, [{"f": {"a": [5]}}], [("f", {"a": "5"})], False),
    "text as number": ({"a": "string"}, [{"f": {"a": ["5"]}}], [("f", {"a": 5})], False),
    "true": ({"a": "boolean"}, [{"f": {"a": [True]}}], [("f", {"a": True})], True),
    "false for true": ({"a": "boolean"}, [{"f": {"a": [True]}}], [("f", {"a": False})], False),
    "1 for true": ({"a": "boolean"}, [{"f": {"a": [True]}}], [("f", {"a": 1})], False),
    "true for 1": ({"a": "integer"}, [{"f": {"a": [1]}}], [("f", {"a": True})], False),
    "null": ({"a": "string"}, [{"f": {"a": ["x"]}}], [("f", {"a": None})], False),
    "letter case": ({"a": "string"}, [{"f": {"a": ["New York"]}}], [("f", {"a": "new york"})], True),
    "blanks and punctuation": (
        {"a": "string"},
        [{"f": {"a": ["April 1, 2024"]}}],
        [("f", {"a": "april 1 2024"})],
        True,
    ),
    "all punctuation": ({"a": "string"}, [{"f": {"a": ["x^2 * y/3"]}}], [("f", {"a": "x2y_3-."})], True),
    "quotes": ({"a": "string"}, [{"f": {"a": ["say 'hi'"]}}], [("f", {"a": 'say "hi"'})], True),
    "colon is no punctuation": ({"a": "string"}, [{"f": {"a": ["10:30"]}}], [("f", {"a": "1030"})], False),
    "other word": ({"a": "string"}, [{"f": {"a": ["red", "blue"]}}], [("f", {"a": "green"})], False),
    "optional left out": (
        {"a": "integer", "b": "string"},
        [{"f": {"a": [1], "b": ["", "x"]}}],
        [("f", {"a": 1})],
        True,
    ),
    "optional given": (
        {"a": "integer", "b": "string"},
        [{"f": {"a": [1], "b": ["", "x"]}}],
        [("f", {"a": 1, "b": "X"})],
        True,
    ),
    "optional given wrongly": (
        {"a": "integer", "b": "string"},
        [{"f": {"a": [1], "b": ["", "x"]}}],
        [("f", {"a": 1, "b": "y"})],
        False,
    ),
    "needed left out": ({"a": "integer", "b": "string"}, [{"f": {"a": [1], "b": ["x"]}}], [("f", {"a": 1})], False),
    "extra argument": ({"a": "integer", "c": "integer"}, [{"f": {"a": [1]}}], [("f", {"a": 1, "c": 2})], False),
    "no arguments": ({}, [{"f": {}}], [("f", {})], True),
    "wrong function": ({"a": "integer"}, [{"f": {"a": [1]}}], [("g", {"a": 1})], False),
    "name in other case": ({"a": "integer"}, [{"f": {"a": [1]}}], [("F", {"a": 1})], False),
    "no call": ({"a": "integer"}, [{"f": {"a": [1]}}], [], False),
    "one call too many": ({"a": "integer"}, [{"f": {"a": [1]}}], [("f", {"a": 1}), ("f", {"a": 1})], False),
    "parallel in order": (
        {"a": "integer"},
        [{"f": {"a": [1]}}, {"g": {"a": [2]}}],
        [("f", {"a": 1}), ("g", {"a": 2})],
        True,
    ),
    "parallel in another order": (
        {"a": "integer"},
        [{"f": {"a": [1]}}, {"g": {"a": [2]}}],
        [("g", {"a": 2}), ("f", {"a": 1})],
        True,
    ),
    "parallel, one missing": ({"a": "integer"}, [{"f": {"a": [1]}}, {"f": {"a": [2]}}], [("f", {"a": 1})], False),
    "parallel, one twice": (
        {"a": "integer"},
        [{"f": {"a": [1]}}, {"f": {"a": [2]}}],
        [("f", {"a": 1}), ("f", {"a": 1})],
        False,
    ),
    "list": ({"a": "array:integer"}, [{"f": {"a": [[1, 2]]}}], [("f", {"a": [1, 2]})], True),
    "list in another order": ({"a": "array:integer"}, [{"f": {"a": [[1, 2]]}}], [("f", {"a": [2, 1]})], False),
    "list too short": ({"a": "array:integer"}, [{"f": {"a": [[1, 2]]}}], [("f", {"a": [1]})], False),
    "element for a list": ({"a": "array:integer"}, [{"f": {"a": [[1]]}}], [("f", {"a": 1})], False),
    "list of texts": (
        {"a": "array:string"},
        [{"f": {"a": [["New York", "Rome"]]}}],
        [("f", {"a": ["new york", "ROME"]})],
        True,
    ),
    "list in a list": ({"a": "array:array"}, [{"f": {"a": [[[1, 2], [3]]]}}], [("f", {"a": [[1, 2], [3]]})], True),
    "dict": (
        {"a": "dict"},
        [{"f": {"a": [PERSON]}}],
        [("f", {"a": {"name": "ANN", "age": 31, "city": "paris"}})],
        True,
    ),
    "dict without its optional key": (
        {"a": "dict"},
        [{"f": {"a": [PERSON]}}],
        [("f", {"a": {"name": "Ann", "age": 30}})],
        True,
    ),
    "dict without a needed key": ({"a": "dict"}, [{"f": {"a": [PERSON]}}], [("f", {"a": {"name": "Ann"}})], False),
    "dict with a strange key": (
        {"a": "dict"},
        [{"f": {"a": [PERSON]}}],
        [("f", {"a": {"name": "Ann", "age": 30, "x": 1}})],
        False,
    ),
    "dict with a wrong value": (
        {"a": "dict"},
        [{"f": {"a": [PERSON]}}],
        [("f", {"a": {"name": "Ann", "age": 29}})],
        False,
    ),
    "list of dicts": (
        {"a": "array:dict"},
        [{"f": {"a": [[{"x": [1]}, {"x": [2, 3]}]]}}],
        [("f", {"a": [{"x": 1}, {"x": 3}]})],
        True,
    ),
    "list of dicts, one wrong": (
        {"a": "array:dict"},
        [{"f": {"a": [[{"x": [1]}, {"x": [2, 3]}]]}}],
        [("f", {"a": [{"x": 1}, {"x": 4}]})],
        False,
    ),
    "dict in a dict, plain inside": (
        {"a": "dict"},
        [{"f": {"a": [{"p": [{"x": 10.5, "y": 50}], "q": [30]}]}}],
        [("f", {"a": {"p": {"x": 10.5, "y": 50}, "q": 30}})],
        True,
    ),
}
# Right for us, wrong for BFCL.
LOOSER = {
    "float for an integer": ({"a": "integer"}, [{"f": {"a": [5]}}], [("f", {"a": 5.0})]),
    "no accepted value, left out": ({"a": "integer"}, [{"f": {"a": []}}], [("f", {})]),
    "texts deep in a list": ({"a": "array:array"}, [{"f": {"a": [[["Rome"]]]}}], [("f", {"a": [["rome"]]})]),
}


def as_calls(calls):
    return [{"name": name, "arguments": arguments} for name, arguments in calls]


@pytest.mark.parametrize("label", TABLE)
def test_verdict(label):
    _, accepted, calls, verdict = TABLE[label]
    check_accepted(accepted, "row")
    assert calls_match(as_calls(calls), accepted) is verdict


@pytest.mark.parametrize("label", LOOSER)
def test_looser_than_bfcl(label):
    _, accepted, calls = LOOSER[label]
    assert calls_match(as_calls(calls), accepted) is True


def test_an_argument_without_accepted_values_must_be_left_out():
    assert not calls_match(as_calls([("f", {"a": 1})]), [{"f": {"a": []}}])


def test_overlapping_answers_are_matched_one_to_one():
    """The first answer accepts both calls, the second only one: taking the first that fits would fail (BFCL's does)."""
    accepted = [{"f": {"a": [1, 2]}}, {"f": {"a": [1]}}]
    assert calls_match(as_calls([("f", {"a": 1}), ("f", {"a": 2})]), accepted)
    assert not calls_match(as_calls([("f", {"a": 2}), ("f", {"a": 2})]), accepted)


def test_no_well_formed_answer_matches_nothing():
    assert not calls_match(None, [{"f": {}}])
    assert not functions_match(None, [{"f": {}}])


def test_functions_match_counts_names_only():
    accepted = [{"f": {"a": [1]}}, {"f": {"a": [2]}}, {"g": {}}]
    assert functions_match(as_calls([("g", {"z": 0}), ("f", {}), ("f", {})]), accepted)
    assert not functions_match(as_calls([("g", {}), ("f", {}), ("g", {})]), accepted)
    assert not functions_match(as_calls([("f", {"a": 1})]), accepted)


def test_reference_calls_are_their_own_only_answer():
    calls = as_calls([("f", {"a": 5, "b": [1, {"c": ["x", "y"]}], "d": {"e": [1, 2], "g": {"h": "Hi"}}})])
    accepted = accepted_calls(calls)
    check_accepted(accepted, "row")
    assert calls_match(calls, accepted)
    same = as_calls([("f", {"a": 5.0, "b": [1, {"c": ["X", "y."]}], "d": {"e": [1, 2], "g": {"h": "hi"}}})])
    assert calls_match(same, accepted)
    # A list inside a dict is one value, not a choice of values.
    for wrong in ({"e": 1, "g": {"h": "Hi"}}, {"e": [1, 2]}, {"e": [1, 2], "g": {"h": "Hi", "i": 1}}):
        assert not calls_match(as_calls([("f", {**calls[0]["arguments"], "d": wrong})]), accepted)


@pytest.mark.parametrize("wrong", ["42", [{"f": {}, "g": {}}], [{"f": {"a": 1}}], [{"f": [1]}], ["f"], {"f": {}}])
def test_another_ground_truth_is_refused_with_its_row(wrong):
    with pytest.raises(DataError, match=r"^data\.jsonl:7: `ground_truth` is not a list of \{function: "):
        check_accepted(wrong, "data.jsonl:7")


@pytest.fixture
def bfcl_checker(bfcl):
    """BFCL's checker for functions of which only the types of the arguments are known."""

    def check(argument_types, accepted, calls):
        properties = {}
        for name, kind in argument_types.items():
            outer, _, inner = kind.partition(":")
            properties[name] = {"type": outer, **({"items": {"type": inner}} if inner else {})}
        names = {name for call in accepted for name in call}
        functions = [{"name": name, "parameters": {"properties": properties, "required": []}} for name in names]
        given = [{name: arguments} for name, arguments in calls]
        return bfcl(functions, given, accepted, "parallel")

    return check


def test_bfcl_gives_the_same_verdicts(bfcl_checker):
    found = {label: bfcl_checker(*row[:3]) for label, row in TABLE.items()}
    assert found == {label: row[3] for label, row in TABLE.items()}


def test_bfcl_is_stricter_where_we_say_so(bfcl_checker):
    assert {label: bfcl_checker(*row) for label, row in LOOSER.items()} == dict.fromkeys(LOOSER, False)


def test_every_reference_call_of_bfcl_is_right(bfcl_checker):
    """The first accepted value of each argument (an empty one left out) must pass the matcher in every simple row."""
    import json
    from pathlib import Path

    folder = Path(importlib.util.find_spec("bfcl_eval").submodule_search_locations[0]) / "data" / "possible_answer"
    rows = 0
    for category in ("simple_python", "multiple", "parallel", "parallel_multiple", "live_simple"):
        for line in (folder / f"BFCL_v4_{category}.json").read_text().splitlines():
            accepted = json.loads(line)["ground_truth"]
            check_accepted(accepted, category)
            calls = [
                (name, {key: first(values) for key, values in arguments.items() if values and values[0] != ""})
                for call in accepted
                for name, arguments in call.items()
            ]
            assert calls_match(as_calls(calls), accepted), line
            rows += 1
    assert rows > 1000


def first(values):
    """The call's value for `values` of a ground truth: the first accepted, the same inside lists and dicts."""
    value = values[0]
    if isinstance(value, list):
        return [first([element]) for element in value]
    if isinstance(value, dict):
        alternatives = {key: inner if isinstance(inner, list) else [inner] for key, inner in value.items()}
        return {key: first(inner) for key, inner in alternatives.items() if inner[0] != ""}
    return value
