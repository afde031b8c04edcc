"""`eaftdrope ask` on tiny models: which reader answers, what each has read, and what the same command does again."""

import json
from pathlib import Path

import pytest

from eaftdrope import apply_ttt
from eaftdrope.ask import answer, find_run
from eaftdrope.ask.choice import choose_method, count_tokens, limits_of, measured_crossover
from eaftdrope.ask.reader import TTTReader, greedy_answer, question_tokens
from eaftdrope.cli import main
from eaftdrope.errors import UserError
from eaftdrope.recipe.serve_section import Serve
from eaftdrope.rlm import RLM, Limits
from eaftdrope.rlm.models import ScriptedModel
from eaftdrope.ttt import TTTConfig, TTTState
from tests.rlm.boxes import lacking
from tests.tiny_models import byte_tokenizer, save_model, tiny_llama

TEXT = "The rain fell on the town, and nobody minded. " * 6
READ = TTTConfig(window=96, sink=2, chunk=32, fast_blocks=1, lr=1.0)
ASKED = [{"role": "user", "content": "Who?"}]


def finished(folder, stages):
    record = {"status": "finished", "recipe": {"stages": stages} if stages else {}, "processes": 1, "data": {}}
    (folder / "run.json").write_text(json.dumps(record))


@pytest.fixture(scope="module")
def learner():
    model = tiny_llama(vocab_size=260, max_position_embeddings=512, initializer_range=0.3, eos_token_id=None)
    return apply_ttt(model, READ).eval()


@pytest.fixture(scope="module")
def built(tmp_path_factory, learner):
    """A run of the stages eaft and ttt, and its section serve; tests that write ask in a copy of the folder."""
    run = tmp_path_factory.mktemp("built") / "run"
    save_model(run / "eaft")
    learner.save_pretrained(run / "ttt")
    byte_tokenizer().save_pretrained(run / "ttt")
    finished(run / "eaft", ["eaft"])
    finished(run / "ttt", ["eaft", "ttt"])
    (run / "serve.yaml").write_text(
        "plain: {upto: 200}\nttt: {upto: 900}\nrlm: {limits: {iterations: 1}}\nanswer_tokens: 8\n"
    )
    return run


@pytest.fixture
def run(built, tmp_path):
    import shutil

    return find_run(str(shutil.copytree(built, tmp_path / "run")))


# ---- the reader ----


def reader_of(learner, policy="fork"):
    return TTTReader(learner, byte_tokenizer(), name="tiny", policy=policy)


def text_of(reader, reading):
    (reply,) = reading.generate([ASKED], 8)
    return reply.text


def test_an_answer_is_that_of_a_model_that_read_the_passages_in_order(learner):
    import torch

    reader, tokenizer = reader_of(learner), byte_tokenizer()
    reading = reader.begin()
    assert reading.count(["abc", "de"]) == 5 and reading.window == 96
    reading.read([TEXT, "And the end."])
    replies = reading.generate([ASKED, ASKED], 8)
    state = TTTState(learner)
    with torch.no_grad():
        learner(torch.tensor([tokenizer(f"{TEXT}\n\nAnd the end.").input_ids]), past_key_values=state)
    ids = question_tokens(tokenizer, "Who?", is_fresh=False)
    expected = tokenizer.decode(greedy_answer(learner, tokenizer, state.fork(), ids, 8), skip_special_tokens=True)
    assert [reply.text for reply in replies] == [expected] * 2
    assert (replies[0].tokens_in, replies[0].tokens_out) == (len(ids), 8)
    # learned, not only in view
    assert state.updates == 9 and reading.state().updates == 9
    assert reading.pieces[-1].end == state.position and 0 < reading.pieces[0].loss < 10


def test_what_a_question_leaves(learner):
    """fork: nothing; accumulate: itself and the answer; reset: only the last reading counts."""
    answers = {}
    for policy in ("fork", "accumulate", "reset"):
        reader = reader_of(learner, policy)
        reading = reader.begin()
        reading.read([TEXT])
        before = (text_of(reader, reading), reading.state().position)
        if reading.remembers:
            reading.note("Who?", before[0])
        assert (reading.state().position > before[1]) == (policy == "accumulate")
        reading.read(["Another text."])
        answers[policy] = reading.state().position
    alone = reader_of(learner).begin()
    alone.read(["Another text."])
    assert answers["reset"] == alone.state().position < answers["fork"] < answers["accumulate"]


def test_the_name_follows_what_was_read(learner):
    readings = [reader_of(learner).begin() for _ in range(4)]
    for reading, texts in zip(readings, (["ab", "c"], ["ab", "c"], ["abc"], ["c", "ab"])):
        reading.read(texts)
    names = [reading.name for reading in readings]
    assert names[0] == names[1] and len(set(names)) == 3 and names[0].startswith("tiny, fork, after ")


def test_a_root_that_selects_and_a_model_that_learns(learner, tmp_path):
    """Librarian and reader, resumed from the journal without reading again."""
    if reason := lacking("monty"):
        pytest.skip(reason)
    code = '```repl\nparts = [line for line in context if "rain" in line]\nread(parts)\nreply = llm_query("Who?")\n```'
    replies = [code, "FINAL_VAR(reply)"]
    reader = reader_of(learner)
    context = [TEXT, "nothing here", "More rain fell."]
    limits, journal = Limits(sub_tokens=8), tmp_path / "run.jsonl"
    result = RLM(ScriptedModel(replies), reader=reader, limits=limits).complete(context, "Who?", journal=journal)
    reading = reader.begin()
    reading.read([TEXT, "More rain fell."])
    assert result.answer == text_of(reader, reading)
    again = RLM(ScriptedModel([]), reader=_unused(learner), limits=limits).complete(context, "Who?", journal=journal)
    assert (again.answer, again.usage["replayed"]) == (result.answer, 3)


def _unused(learner):
    class Unused(TTTReader):
        def begin(self):
            reading = super().begin()
            reading.state = reading.generate = reading.generate_each = None
            return reading

    return Unused(learner, byte_tokenizer(), name="tiny")


# ---- the choice ----


@pytest.mark.parametrize(
    ("tokens", "method", "expected"),
    [
        (200, "auto", "plain"),
        (201, "auto", "ttt"),
        (901, "auto", "rlm"),
        (10**9, "rlm", "rlm"),
        (100, "ttt", "ttt"),
        (
            201,
            "plain",
            "have 201 tokens, and plain reads at most 200. Use --method ttt or rlm, or raise serve.plain.upto",
        ),
        (901, "ttt", "have 901 tokens, and ttt reads at most 900. Use --method rlm, or raise serve.ttt.upto"),
    ],
)
def test_the_number_of_tokens_decides(run, tokens, method, expected):
    if " " not in expected:
        assert choose_method(run, method, tokens, 400) == expected
        return
    with pytest.raises(UserError) as caught:
        choose_method(run, method, tokens, 400)
    assert expected in str(caught.value)


def test_what_a_run_lacks_is_no_method(run, built):
    import dataclasses

    alone = dataclasses.replace(run, ttt=None, serve=Serve())
    assert limits_of(alone, 300) == {"plain": 300, "rlm": None}
    with pytest.raises(UserError, match=r"--method ttt: .* has no model for it. It has: plain, rlm"):
        choose_method(alone, "ttt", 10, 300)
    with pytest.raises(UserError, match=r"have 301 tokens, and no reader .* \(plain: 300\). Use --method rlm"):
        choose_method(alone, "auto", 301, 300)
    with pytest.raises(UserError, match="holds no finished run"):
        find_run(str(built.parent))


def test_a_bench_decides_the_length_of_plain(tmp_path):
    def cell(chars, arm, score, tokens):
        trial = {"seed": 0, "score": score, "finished": True, "tokens": tokens, "calls": 1, "seconds": 0.0}
        return {"task": "needle", "chars": chars, "arm": arm, "trials": [trial]}

    cells = [
        cell(1000, "plain", 1.0, 260),
        cell(1000, "rlm", 1.0, 900),
        cell(8000, "plain", 0.0, 400),
        cell(8000, "rlm", 1.0, 900),
    ]
    (tmp_path / "rlm_bench.json").write_text(json.dumps({"cells": cells}))
    assert measured_crossover(str(tmp_path)) == 260
    (tmp_path / "rlm_bench.json").write_text(json.dumps({"cells": cells[2:]}))
    assert measured_crossover(str(tmp_path / "rlm_bench.json")) == 0
    (tmp_path / "rlm_bench.json").write_text(json.dumps({"cells": cells[:1]}))
    with pytest.raises(UserError, match="does not compare a plain call with the RLM"):
        measured_crossover(str(tmp_path))
    with pytest.raises(UserError, match="has no results of `eaftdrope rlm bench`"):
        measured_crossover(str(tmp_path / "none.json"))


def test_long_texts_are_counted_in_pieces(monkeypatch):
    from eaftdrope.ask import choice

    monkeypatch.setattr(choice, "_PIECE_CHARS", 10)
    text = "one\ntwo\n" * 5 + "x" * 35
    assert count_tokens(byte_tokenizer(), text) == len(text)


# ---- the command ----


def ask(capfd, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(["ask", *map(str, arguments)])
    out, err = capfd.readouterr()
    return ended.value.code or 0, out, err


def test_plain_and_ttt_by_length(run, tmp_path, capfd):
    (tmp_path / "short.txt").write_text(TEXT[:80])
    (tmp_path / "long.txt").write_text(TEXT)
    code, out, _ = ask(capfd, run.folder, tmp_path / "short.txt", "Who?", "--json")
    short = json.loads(out)
    assert (code, short["method"], short["finished"], short["file"]) == (0, "plain", True, None)
    assert short["tokens"] > short["text_tokens"] > 80 and short["cpu_seconds"] > 0
    first, second = (json.loads(ask(capfd, run.folder, tmp_path / "long.txt", "Who?", "--json")[1]) for _ in range(2))
    assert first["method"] == "ttt" and first["text_tokens"] > len(TEXT)
    assert [first[key] for key in ("answer", "tokens", "file")] == [second[key] for key in ("answer", "tokens", "file")]
    code, out, err = ask(capfd, run.folder, tmp_path / "long.txt", "Who?", "--method", "plain")
    assert code == 2 and f"text and question have {first['text_tokens']:,} tokens, and plain reads at most 200." in err
    out = ask(capfd, run.folder, tmp_path / "long.txt", "Who?")[1]
    assert "the text was read before" in out and f"ttt: {first['tokens']:,} tokens read and written, " in out


def test_answers_are_remembered_where_the_recipe_has_it_so(run):
    import dataclasses

    keeping = dataclasses.replace(
        run, serve=Serve.model_validate({"ttt": {"policy": "accumulate"}, "answer_tokens": 8})
    )
    first, second = (answer(keeping, TEXT, "Who?", method="ttt") for _ in range(2))
    assert first.file == second.file and second.tokens > first.tokens
    fresh = dataclasses.replace(run, serve=Serve.model_validate({"ttt": {"policy": "reset"}, "answer_tokens": 8}))
    assert answer(fresh, TEXT, "Who?", method="ttt").file is None


def test_an_rlm_answers_what_is_too_long_and_a_limit_is_no_answer(run, tmp_path, capfd):
    if reason := lacking("monty"):
        pytest.skip(reason)
    (tmp_path / "long.txt").write_text(TEXT * 4)
    found = []
    for _ in range(2):
        code, out, _ = ask(capfd, run.folder, tmp_path / "long.txt", "Who?", "--json")
        found.append(json.loads(out))
        assert (code, found[-1]["method"]) == (1, "rlm")
    assert found[0]["stopped"].startswith(("iterations: 1", "window of the root"))
    assert {**found[0], "cpu_seconds": 0} == {**found[1], "cpu_seconds": 0}
    events = [json.loads(line) for line in Path(found[0]["file"]).read_text().splitlines()]
    assert events[0]["reader"].startswith("ttt@") and events[-1]["event"] == "end"
    assert "read(texts)" in events[1]["messages"][0]["content"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["text.txt"], "ask needs files and a question"),
        (["text.txt", " "], "the question, which comes last, is empty"),
        (["text.txt", "Who?", "--method", "magic"], "--method magic: not one of auto, plain, ttt, rlm"),
        (["none.txt", "Who?"], "none.txt: no such file"),
    ],
)
def test_mistakes_in_the_command(run, tmp_path, monkeypatch, capfd, arguments, problem):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    code, _, err = ask(capfd, run.folder, *arguments)
    assert code == 2 and problem in err


def test_a_damaged_section_names_its_key(run):
    (run.folder / "serve.yaml").write_text("ttt: {policy: forget}\n")
    with pytest.raises(UserError, match=r"serve.yaml: ttt.policy: "):
        find_run(str(run.folder))
