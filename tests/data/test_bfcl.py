"""Rows of bfcl-eval, from a package made on the spot; the real one is looked at where it is installed."""

import importlib.util
import json
import sys

import pytest

from eaftdrope.data import Source, bfcl, check_source, examples_for_probe, iter_rows
from eaftdrope.errors import DataError


def _schema(**properties):
    return {"type": "dict", "properties": properties, "required": ["x"]}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package bfcl_eval with one row in two categories; importing it fails, as importing the real one would."""
    data = tmp_path / "bfcl_eval" / "data"
    (data / "possible_answer").mkdir(parents=True)
    (tmp_path / "bfcl_eval" / "__init__.py").write_text("raise RuntimeError('imported')")
    parameters = _schema(x={"type": "float"}, type={"type": "tuple", "items": {"type": "any"}}, d={"type": "dict"})
    row = {
        "id": "simple_python_0",
        "question": [[{"role": "user", "content": "q"}]],
        "function": [{"name": "a.f", "description": "F", "parameters": parameters}],
    }
    truth = [
        {"a.f": {"x": ["", 1.5, 2], "type": [["u", "v"], ["w"]], "d": [{"k": [3, 4], "o": ["", 1]}], "e": ["", 0]}}
    ]
    rows = {"simple_python": [(row, truth)]}
    rows["parallel"] = [
        (
            {**row, "id": "parallel_0", "function": [{"name": f"b{n}", "parameters": {}} for n in (1, 2)]},
            [{"b2": {}}, {"b1": {"z": []}}],
        )
    ]
    for category in bfcl.CATEGORIES:
        questions = [json.dumps(question) for question, _ in rows.get(category, [])]
        answers = [json.dumps({"id": q["id"], "ground_truth": truth}) for q, truth in rows.get(category, [])]
        (data / f"BFCL_v4_{category}.json").write_text("\n".join(questions))
        (data / "possible_answer" / f"BFCL_v4_{category}.json").write_text("\n".join(answers))
    monkeypatch.syspath_prepend(str(tmp_path))
    # the real one is there where another test has imported it
    monkeypatch.delitem(sys.modules, "bfcl_eval", raising=False)
    importlib.invalidate_caches()
    return truth


def test_rows(package):
    rows = {row["id"]: row for split in ("train", "test") for row in bfcl.rows(split)}
    assert set(rows) == {"simple_python_0", "parallel_0"}
    row = rows["simple_python_0"]
    # The required x takes its first value that is one; e may be left out, and its first accepted value says so.
    arguments = {"x": 1.5, "type": ["u", "v"], "d": {"k": 3}}
    call = {"type": "function", "function": {"name": "a.f", "arguments": arguments}}
    assert row["messages"] == [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    parameters = row["tools"][0]["function"]["parameters"]
    assert parameters == {
        "type": "object",
        "properties": {
            "x": {"type": "number"},
            "type": {"type": "array", "items": {"type": "string"}},
            "d": {"type": "object"},
        },
        "required": ["x"],
    }
    assert row["ground_truth"] == package
    calls = [call["function"] for call in rows["parallel_0"]["messages"][1]["tool_calls"]]
    assert calls == [{"name": "b2", "arguments": {}}, {"name": "b1", "arguments": {}}]


def test_functions_offered_together_stay_together():
    groups = bfcl._groups([["f"], ["c", "b"], ["d", "c"], ["e", "a"], ["b", "e"]])
    assert groups == {"f": "f", "a": "a", "b": "a", "c": "a", "d": "a", "e": "a"}


def test_a_package_that_is_missing_is_named_with_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = check_source(Source("package:bfcl"))
    assert "bfcl-eval is not installed. Run `pip install --no-deps bfcl-eval==2026.3.23`" in said
    with pytest.raises(DataError, match="bfcl-eval is not installed"):
        next(iter_rows(Source("package:bfcl")))
    assert "no split 'dev'; it has 'train' and 'test'" in check_source(Source("package:bfcl", split="dev"))


@pytest.mark.skipif(importlib.util.find_spec("bfcl_eval") is None, reason="bfcl-eval is not installed")
def test_the_real_package():
    offered = {}
    for split, count in (("train", 1088), ("test", 170)):
        rows = [row.data for row in iter_rows(Source("package:bfcl", split=split))]
        assert len(rows) == count
        offered[split] = {tool["function"]["name"] for row in rows for tool in row["tools"]}
        for row in rows:
            assert [next(iter(call)) for call in row["ground_truth"]] == [
                call["function"]["name"] for call in row["messages"][-1]["tool_calls"]
            ]
    assert len(offered["test"]) > 80
    assert not offered["train"] & offered["test"]
    examples = examples_for_probe(Source("package:bfcl", split="test"), count=5, seed=1)
    assert examples == examples_for_probe(Source("package:bfcl", split="test"), count=5, seed=1)
    assert examples != examples_for_probe(Source("package:bfcl", split="test"), count=5, seed=2)
    assert all(example.ground_truth and example.origin.startswith("package:bfcl[test]:") for example in examples)
