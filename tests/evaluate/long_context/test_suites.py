"""lm-eval's results as scores, and what it is asked; lm-eval itself is stood in for."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from eaftdrope.errors import UserError
from eaftdrope.evaluate.long_context.plan import ContextOptions
from eaftdrope.evaluate.long_context.run import run_suite, scores_of

RULER = {
    "results": {
        "niah_single_1": {"alias": "niah_single_1", "4096,none": -1.0, "8192,none": 0.75, "8192_stderr,none": 0.1},
        "ruler": {"alias": "ruler", "4096,none": -1.0, "4096_stderr,none": "N/A"},
    },
    "n-samples": {"niah_single_1": {"original": 500, "effective": 20}},
}
LONGBENCH = {
    "results": {
        "longbench_lcc": {"score,none": 0.4, "score_stderr,none": 0.02, "alias": " - lcc"},
        "longbench": {"score,none": 0.3, "score_stderr,none": "N/A"},
        "longbench_empty": {"alias": "x"},
    }
}


def test_scores():
    assert scores_of(RULER, "8192") == [{"task": "niah_single_1", "value": 0.75, "stderr": 0.1, "n": 20}]
    assert scores_of(LONGBENCH, None) == [
        {"task": "longbench_lcc", "value": 0.4, "stderr": 0.02, "n": None},
        {"task": "longbench", "value": 0.3, "stderr": None, "n": None},
    ]


@pytest.fixture
def asked(monkeypatch):
    """What lm-eval was asked, and what it answers with (`asked["answer"]` may raise)."""
    calls = {"answer": lambda: RULER}

    def simple_evaluate(**options):
        calls["evaluate"] = options
        return calls["answer"]()

    def wrapper(**options):
        calls["wrapper"] = options
        return "wrapped"

    module, one_bos = ModuleType("lm_eval"), ModuleType("one_bos")
    module.simple_evaluate, one_bos.OneBos = simple_evaluate, wrapper
    monkeypatch.setitem(sys.modules, "lm_eval", module)
    monkeypatch.setitem(sys.modules, "eaftdrope.evaluate.one_bos", one_bos)
    return calls


def suite(name, tmp_path, crop=None):
    (tmp_path / "config.json").write_text("{}")
    planned = SimpleNamespace(reference=str(tmp_path), tokenizer="tokenizer")
    return run_suite(name, "model", planned, 8192, crop=crop, options=ContextOptions((str(tmp_path),), trials=20))


def test_ruler_is_asked_for_the_length(asked, tmp_path):
    assert suite("ruler", tmp_path)["scores"][0]["value"] == 0.75
    assert asked["wrapper"] == {"pretrained": "model", "tokenizer": "tokenizer", "max_length": 8192, "batch_size": 1}
    assert asked["evaluate"]["tasks"] == ["ruler"] and asked["evaluate"]["limit"] == 20
    assert asked["evaluate"]["metadata"] == {"tokenizer": str(tmp_path), "max_seq_lengths": [8192]}


def test_a_crop_is_the_longest_prompt(asked, tmp_path):
    asked["answer"] = lambda: LONGBENCH
    assert [score["value"] for score in suite("longbench", tmp_path, crop=2048)["scores"]] == [0.4, 0.3]
    assert asked["wrapper"]["max_length"] == 2048


def test_data_that_cannot_be_had(asked, tmp_path):
    def unreachable():
        raise ConnectionError("no route\nto the hub")

    asked["answer"] = unreachable
    with pytest.raises(
        UserError, match=r"--suite ruler: lm-eval cannot measure it: no route to the hub .*lm-eval\[hf,ruler\]"
    ):
        suite("ruler", tmp_path)
