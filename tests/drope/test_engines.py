"""The table of engines: what was read in their sources, as verdicts. What transformers does is run in tests/compat."""

import pytest

from eaftdrope.drope.engines import VERSIONS, engines_markdown, serving

RIGHT, WRONG, REFUSED, UNKNOWN = "right", "wrong", "refused", "unknown"


def raw(kind, form="llama3", layers="all"):
    return {"model_type": kind, "drope": {"form": form, "layers": layers}}


# transformers 5, transformers 4, vLLM, SGLang, llama.cpp
@pytest.mark.parametrize(
    ("config", "verdicts"),
    [
        (raw("llama"), (RIGHT, RIGHT, RIGHT, RIGHT, RIGHT)),
        (raw("llama", "linear"), (RIGHT, RIGHT, REFUSED, REFUSED, RIGHT)),
        (raw("qwen3"), (RIGHT, RIGHT, RIGHT, RIGHT, WRONG)),
        (raw("qwen3", "linear"), (RIGHT, RIGHT, REFUSED, REFUSED, RIGHT)),
        (raw("phi3", "longrope"), (RIGHT, RIGHT, RIGHT, RIGHT, WRONG)),
        (raw("gemma3_text"), (RIGHT, WRONG, UNKNOWN, WRONG, WRONG)),
        (raw("gemma3_text", layers="full_attention"), (RIGHT, RIGHT, UNKNOWN, WRONG, WRONG)),
        (raw("olmo2"), (RIGHT, REFUSED, RIGHT, RIGHT, WRONG)),
        (raw("olmo3"), (RIGHT, WRONG, UNKNOWN, WRONG, WRONG)),
        (raw("smollm3", layers="0,2"), (RIGHT, RIGHT, RIGHT, RIGHT, WRONG)),
        (raw("ministral3"), (RIGHT, REFUSED, RIGHT, WRONG, REFUSED)),
        (raw("granite"), (RIGHT, RIGHT, UNKNOWN, UNKNOWN, RIGHT)),
        (raw("gpt_neox"), (RIGHT, RIGHT, UNKNOWN, UNKNOWN, WRONG)),
    ],
    ids=lambda value: "" if isinstance(value, tuple) else f"{value['model_type']} {value['drope']['form']}",
)
def test_verdicts(config, verdicts):
    rows = serving(config)
    assert tuple(row.verdict for row in rows) == verdicts
    assert [row.engine for row in rows] == list(VERSIONS)
    # what is not right comes with what to do about it, or why nothing can be done
    assert all(row.note for row in rows if row.verdict != RIGHT)


def test_a_silently_wrong_gguf_names_the_way_out():
    note = {row.engine: row for row in serving(raw("qwen3"))}["llama.cpp"].note
    assert "--for gguf" in note and "--rope-freq-scale 1e-30" in note


def test_no_table_for_an_ordinary_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert engines_markdown(tmp_path) == ""
    assert engines_markdown(tmp_path / "nothing") == ""
