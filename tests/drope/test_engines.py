"""The table of engines: right, wrong and refused only where somebody ran it. What was run is held in tests/compat."""

import pytest

from eaftdrope.drope.engines import VERSIONS, engines_markdown, serving
from tests.drope.architectures import ARCHITECTURES
from tests.drope.others import OTHERS

RIGHT, WRONG, REFUSED, UNKNOWN = "right", "wrong", "refused", "unknown"


def raw(kind, form="llama3", layers="all"):
    return {"model_type": kind, "drope": {"form": form, "layers": layers}}


# transformers 5, transformers 4, llama.cpp; vLLM and SGLang were never run
@pytest.mark.parametrize(
    ("config", "verdicts"),
    [
        (raw("llama"), (RIGHT, RIGHT, RIGHT)),
        (raw("llama", "linear"), (RIGHT, RIGHT, RIGHT)),
        (raw("mistral"), (RIGHT, RIGHT, UNKNOWN)),
        (raw("qwen3"), (RIGHT, RIGHT, UNKNOWN)),
        (raw("phi3", "longrope"), (RIGHT, RIGHT, UNKNOWN)),
        (raw("gemma3_text"), (RIGHT, WRONG, UNKNOWN)),
        (raw("gemma3_text", layers="full_attention"), (RIGHT, RIGHT, UNKNOWN)),
        (raw("gemma3n_text"), (RIGHT, WRONG, UNKNOWN)),
        (raw("gemma3n_text", layers="full_attention"), (UNKNOWN, UNKNOWN, UNKNOWN)),
        (raw("nemotron"), (RIGHT, WRONG, UNKNOWN)),
        (raw("modernbert-decoder"), (RIGHT, WRONG, UNKNOWN)),
        (raw("olmo"), (RIGHT, REFUSED, UNKNOWN)),
        (raw("olmo2"), (RIGHT, REFUSED, UNKNOWN)),
        (raw("olmo2", "linear"), (RIGHT, RIGHT, UNKNOWN)),
        (raw("llama4_text"), (RIGHT, RIGHT, UNKNOWN)),
        (raw("llama4_text", "linear"), (RIGHT, REFUSED, UNKNOWN)),
        (raw("smollm3", layers="0,2"), (RIGHT, RIGHT, UNKNOWN)),
        (raw("ministral3"), (RIGHT, REFUSED, UNKNOWN)),
        (raw("zaya"), (UNKNOWN, UNKNOWN, UNKNOWN)),
        ({**raw("gemma3"), "text_config": {"model_type": "gemma3_text"}}, (UNKNOWN, UNKNOWN, UNKNOWN)),
    ],
    ids=lambda value: "" if isinstance(value, tuple) else f"{value['model_type']} {value['drope']['form']}",
)
def test_verdicts(config, verdicts):
    rows = {row.engine: row for row in serving(config)}
    assert tuple(rows[engine].verdict for engine in ("transformers 5", "transformers 4", "llama.cpp")) == verdicts
    assert rows["vLLM"].verdict == rows["SGLang"].verdict == UNKNOWN
    assert list(rows) == list(VERSIONS)
    for row in rows.values():
        assert row.version == f"{VERSIONS[row.engine]} ({'not run' if row.verdict == UNKNOWN else 'run'})"
        # what is not right comes with what to do about it, or why nothing can be done
        assert row.note or row.verdict == RIGHT


@pytest.mark.parametrize(
    "kind", ["minimax_m2", "minicpm3", "nanochat", "afmoe", "hyperclovax", "youtu", "jais2", "cwm"]
)
def test_classes_that_transformers_4_does_not_have(kind):
    row = {row.engine: row for row in serving(raw(kind))}["transformers 4"]
    assert (row.verdict, row.note) == (REFUSED, "version 4 does not have this class")


def test_every_class_of_the_compatibility_tests_is_in_the_table():
    kinds = {"StableLm": "stablelm", "GPTNeoX": "gpt_neox", "Gemma3Text": "gemma3_text", "Qwen3Moe": "qwen3_moe"}
    for kind in [*(kinds.get(name, name.lower()) for name in ARCHITECTURES), *OTHERS]:
        assert serving(raw(kind))[0].verdict == RIGHT, kind


def test_what_a_source_says_is_a_note_and_no_verdict():
    notes = {row.engine: row.note for row in serving(raw("qwen3"))}
    assert notes["vLLM"] == notes["SGLang"] == "not run. By its source it serves it"
    assert "silently wrong" in notes["llama.cpp"]
    assert "--for gguf" in notes["llama.cpp"] and "--rope-freq-scale 1e-30" in notes["llama.cpp"]
    assert "is silently wrong" in {row.engine: row.note for row in serving(raw("gemma3_text"))}["SGLang"]


def test_no_table_for_an_ordinary_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert engines_markdown(tmp_path) == ""
    assert engines_markdown(tmp_path / "nothing") == ""
