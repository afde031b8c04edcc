"""The preview: what is marked, what is counted, and the verb."""

import json

import pytest

from eaftdrope.cli.app import main
from eaftdrope.data import Source
from eaftdrope.data.preview import make_preview, preview_text, report_text
from eaftdrope.errors import DataError
from tests.data import chat_templates as t


def talk(answer, question="q"):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_trained_text_is_marked_and_styled(make_tokenizer, write_jsonl):
    path = write_jsonl([talk("yes 😀")])
    shown = make_preview([Source(path)], make_tokenizer(t.MARKED), rows=3)
    assert shown.rows[0].stretches == [
        ("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", False),
        ("yes 😀<|im_end|>", True),
        ("\n", False),
    ]
    text = preview_text(shown, marks=True)
    lines = text.plain.splitlines()
    assert lines[0] == f"--- row 1: {path}:1"
    tokens, trained = shown.rows[0].tokens, shown.rows[0].trained_tokens
    assert lines[1] == f"    {tokens} tokens, {trained} trained ({trained / tokens:.1%})"
    assert lines[2:5] == ["<|im_start|>user", "q<|im_end|>", "<|im_start|>assistant"]
    assert lines[5] == "[[yes 😀<|im_end|>]]"
    styled = {text.plain[span.start : span.end]: span.style for span in text.spans}
    assert styled["[[yes 😀<|im_end|>]]"] == "bold green"
    assert styled["<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"] == "dim"
    assert "[[" not in preview_text(shown, marks=False).plain


def test_summary(make_tokenizer, write_jsonl):
    silent = {"messages": [{"role": "user", "content": "q"}]}
    path = write_jsonl([talk("one"), '{"a"', silent, talk("yes " * 200), {"x": 1}, talk("two")])
    shown = make_preview([Source(path)], make_tokenizer(t.MARKED), rows=2, max_length=50, on_bad_row="stop")
    lines = preview_text(shown, marks=True).plain.splitlines()
    start = lines.index("--- all rows")
    counts = shown.report.by_source[path]
    assert " ".join(lines[start + 1].split()) == "source read bad nothing trained truncated rows tokens trained"
    assert lines[start + 2].split() == [path, "6", "2", "1", "1", "3", str(counts.tokens), str(counts.trained_tokens)]
    assert lines[start + 3 :] == [
        f"trained: {counts.trained_tokens} of {counts.tokens} tokens ({counts.trained_tokens / counts.tokens:.1%})",
        "truncated at max_length 50: 1 of 3 rows (33.3%)",
        "left out, no trained token: 1 rows",
        "stop token: <|im_end|> is trained at the end of every complete row",
        "bad rows: 2 (training stops at the first: on_bad_row is stop)",
        f"  {path}:2: not valid JSON: Expecting ':' delimiter at column 5",
        f"  {path}:5: no known format has the fields x. Known formats: messages: messages; sharegpt: conversations; "
        "prompt_completion: prompt, completion; alpaca: instruction, output; text: text; "
        "reasoning: question, reasoning, response; pubmedqa: question, context, final_decision, long_answer; "
        "question_answer: question, answer; xlam: query, tools, answers; glaive: system, chat. "
        "Rename the fields to one of these.",
    ]


def test_the_table_of_fields(make_tokenizer, write_jsonl, monkeypatch):
    """What was read, what was not, and what the rendering lost or left out, for each source."""
    from eaftdrope.data import build
    from eaftdrope.errors import LostTextError

    def encode(example, *args, **options):
        question = example.messages[0]["content"]
        if question == "lost":
            raise LostTextError("gone", ("messages[1].reasoning_content", "messages[3].reasoning_content"))
        encoded = real(example, *args, **options)
        if question == "old":
            object.__setattr__(encoded, "dropped", ("messages[1].name",))
        return encoded

    real = build.encode
    monkeypatch.setattr(build, "encode", encode)
    path = write_jsonl([{**talk("a", "lost"), "id": 1}, {**talk("a", "old"), "hi\x1bnt": 2}, {"x": 1}])
    other = write_jsonl([talk("b")], "other.jsonl")
    shown = make_preview([Source(path), Source(other)], make_tokenizer(t.MARKED), rows=0)
    lines = report_text(shown).plain.splitlines()
    table = [line.split(maxsplit=1) if line[0] != " " else ["", line.strip()] for line in lines[1 : lines.index("")]]
    assert lines[0] == "--- fields"
    assert [[source, " ".join(rest.split())] for source, rest in table] == [
        ["source", "field rows"],
        [path, "messages[].role 2 of 3 read"],
        ["", "messages[].content 2 of 3 read"],
        ["", "id 1 of 3 not read (metadata)"],
        ["", "hi\\x1bnt 1 of 3 NOT READ"],
        ["", "messages[].name 1 of 3 left out by the chat template's design"],
        ["", "messages[].reasoning_content 1 of 3 LOST: not in the rendered text, row refused"],
        ["", "(bad rows, lost ones included) 2 of 3 refused"],
        [other, "messages[].role 1 of 1 read"],
        ["", "messages[].content 1 of 1 read"],
    ]


def test_an_error_that_nobody_foresaw_is_one_bad_row(make_tokenizer, write_jsonl, monkeypatch):
    from eaftdrope.data import build, build_dataset, iter_examples

    def fails(row, *args, **options):
        if "bad" in row:
            raise AttributeError("no such thing")
        return real(row, *args, **options)

    real = build.normalise
    monkeypatch.setattr(build, "normalise", fails)
    path = write_jsonl([talk("a"), {"bad": 1}])
    reason = r"the row cannot be used: AttributeError: no such thing \(at test_data_preview.py:\d+; not foreseen"
    with pytest.raises(DataError, match=f"{path}:2: {reason}"):
        build_dataset([Source(path)], make_tokenizer(t.MARKED))
    _, report = build_dataset([Source(path)], make_tokenizer(t.MARKED), on_bad_row="skip")
    assert (report.rows, report.skipped_rows) == (1, 1)
    with pytest.raises(DataError, match=f"{path}:2: {reason}"):
        list(iter_examples(Source(path)))


def test_file_names_cannot_steer_the_terminal(make_tokenizer, write_jsonl):
    path = write_jsonl([talk("a"), {"x": 1}], "a\x1b[2J\u202e.jsonl")
    text = preview_text(make_preview([Source(path)], make_tokenizer(t.MARKED)), marks=True).plain
    assert "--- row 1: " in text and "a\\x1b[2J\\u202e.jsonl:1\n" in text
    assert "\x1b" not in text and "\u202e" not in text


def test_rows_are_spread_and_the_scan_is_bounded(make_tokenizer, write_jsonl):
    path = write_jsonl([{"text": f"a{number}"} for number in range(50)])
    shown = make_preview([Source(path)], make_tokenizer(), rows=3, scan=30)
    assert [row.origin for row in shown.rows] == [f"{path}:1", f"{path}:11", f"{path}:21"]
    assert "Counted over the first 30 rows of each source." in preview_text(shown, marks=True).plain
    whole = make_preview([Source(path)], make_tokenizer(), rows=3, scan=2000)
    assert not whole.is_partial


def test_warnings_are_shown_once_and_control_characters_not_at_all(make_tokenizer, write_jsonl, recwarn):
    path = write_jsonl([talk("\x1b[2J\u202e bad")])
    shown = make_preview([Source(path)], make_tokenizer(t.WITHOUT_STOP))
    text = preview_text(shown, marks=True).plain
    assert "[[\\x1b[2J\\u202e bad\n\n]]" in text
    assert text.count("warning: 1 of 1 complete rows do not end in a trained stop token") == 1
    assert not [warning for warning in recwarn if warning.category is UserWarning]


@pytest.fixture
def recipe(make_tokenizer, write_jsonl, tmp_path):
    """A recipe on a tiny model folder and a file of two rows."""
    from transformers import LlamaConfig

    write_jsonl([talk("yes"), talk("no")], "talks.jsonl")
    make_tokenizer(t.CHATML).save_pretrained(tmp_path / "model")
    LlamaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=500).save_pretrained(tmp_path / "model")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        json.dumps({"model": "model", "data": {"train": "talks.jsonl", "max_length": 64}, "output": {"dir": "out"}})
    )
    return path


def test_the_verb(recipe, capsys):
    with pytest.raises(SystemExit) as left:
        main(["preview", str(recipe), "data.max_length=100", "--rows", "1"])
    assert left.value.code in (0, None)
    out = capsys.readouterr().out
    assert "[[yes<|im_end|>]]" in out
    assert "truncated at max_length 100: 0 of 2 rows (0.0%)" in out
    assert "\x1b" not in out


def test_the_verb_names_what_is_wrong(recipe, capsys):
    recipe.with_name("talks.jsonl").write_text('{"messages": [{"role": "user", "content": "q"}]}\n')
    with pytest.raises(SystemExit) as left:
        main(["preview", str(recipe)])
    assert left.value.code == 2
    assert "has no trained token in any row" in capsys.readouterr().err


def validated(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        main(["validate", *arguments])
    return left.value.code or 0, *capsys.readouterr()


def test_validate_reads_the_rows(recipe, capsys, write_jsonl):
    held_out = write_jsonl([{**talk("yes"), "label": 1}], "held.jsonl")
    write_jsonl([talk("yes"), {**talk("no"), "hint": "h"}, {"x": 1}], "talks.jsonl")
    recipe.write_text(
        json.dumps({**json.loads(recipe.read_text()), "data": {"train": "talks.jsonl", "held_out": held_out}})
    )
    code, out, err = validated([str(recipe), "--data"], capsys)
    assert code == 2
    assert err == f"{recipe}: 1 bad rows, and training stops at the first (on_bad_row: stop). See above.\n"
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert {"hint 1 of 3 NOT READ", "label 1 of 1 NOT READ"} <= set(lines)
    assert "bad rows: 1 (training stops at the first: on_bad_row is stop)" in lines
    assert not [line for line in lines if line.startswith("ok")]
    code, out, _ = validated([str(recipe), "data.on_bad_row=skip", "--data", "--scan", "2"], capsys)
    assert code == 0
    assert "Counted over the first 2 rows of each source." in out
    assert f"ok  {recipe}\n" in out
    assert validated([str(recipe), "--scan", "2"], capsys)[0] == 2
