"""From runs to training rows: the round trip, the masks of the data pipeline, filters, repairs, and logs of rlms."""

import json

import pytest

from eaftdrope.data import encode, normalise
from eaftdrope.errors import UserError
from eaftdrope.rlm import RLM, Limits
from eaftdrope.rlm.models import ScriptedModel
from eaftdrope.rlm.rows import RowFilters, repaired, training_rows
from tests.tiny_models import byte_tokenizer

LOOK = "I look at it.\n```repl\nprint(context[:20])\n```"
WRONG = "```repl\nprint(contxt)\n```"
TALK = "I would like to think about this first."
ASK = '```repl\nx = llm_query("é " + context[:3])\nprint(x)\n```'
END = "```repl\nanswer['content'] = x\nanswer['ready'] = True\n```"


def run(folder, *replies, name="run.jsonl", **limits):
    """A run with a scripted root; its journal and the root."""
    root = ScriptedModel(list(replies))
    rlm = RLM(root, ScriptedModel(lambda messages: messages[-1]["content"].upper()), limits=Limits(**limits))
    result = rlm.complete("line one\nline two\n" * 40, "What?", journal=folder / name)
    return folder / name, root, result


def plain(messages):
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def test_the_round_trip_is_exact(tmp_path):
    file, root, _ = run(tmp_path, LOOK, WRONG, TALK, ASK, END)
    replies = [LOOK, WRONG, TALK, ASK, END]
    rows, counts = training_rows([file])
    assert not counts and len(rows) == 1
    # what the root saw at its last turn, and what it replied
    assert plain(rows[0]["messages"]) == [*root.seen[-1], {"role": "assistant", "content": END}]
    rows, counts = training_rows([file], per="turn")
    assert counts == {"nothing was run": 1}
    kept = [number for number, reply in enumerate(replies) if reply != TALK]
    for row, number in zip(rows, kept, strict=True):
        assert plain(row["messages"]) == [*root.seen[number], {"role": "assistant", "content": replies[number]}]
        assert row["id"] == f"run.jsonl:root:{number + 1}"


def test_a_resumed_run_gives_the_same_rows(tmp_path):
    file, *_ = run(tmp_path, LOOK, ASK, END)
    whole = training_rows([file])
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:6]) + lines[6][:20])
    # what the first start had asked is not asked again
    asked = sum(json.loads(line).get("place") == "root" and json.loads(line)["event"] == "call" for line in lines[:6])
    run(tmp_path, *[LOOK, ASK, END][asked:])
    assert asked == 2 and training_rows([file]) == whole


@pytest.mark.parametrize("per", ["conversation", "turn"])
def test_the_pipeline_trains_the_replies_and_their_stop_tokens(tmp_path, per):
    file, *_ = run(tmp_path, LOOK, TALK, ASK, END)
    rows, _ = training_rows([file], per=per)
    tokenizer = byte_tokenizer()
    trained = {"conversation": [[LOOK, ASK, END]], "turn": [[LOOK], [ASK], [END]]}[per]
    for row, replies in zip(rows, trained, strict=True):
        example = normalise(row, origin="row")
        assert set(example.fields_ignored) <= {"id"}
        encoded = encode(example, tokenizer, max_length=None)
        pieces, last = [], -2
        for place, label in enumerate(encoded.labels):
            if label != -100:
                pieces += [[]] if place != last + 1 else []
                pieces[-1].append(label)
                last = place
        assert [tokenizer.decode(piece) for piece in pieces] == [f"{reply}<|im_end|>" for reply in replies]
        # and everything the root saw is in the row
        whole = tokenizer.decode(encoded.input_ids)
        assert all(message["content"] in whole for message in row["messages"])


def test_filters(tmp_path):
    finished, *_ = run(tmp_path, LOOK, "FINAL(yes)", name="a.jsonl")
    short, *_ = run(tmp_path, "FINAL(yes)", name="b.jsonl")
    stopped, *_ = run(tmp_path, LOOK, LOOK, name="c.jsonl", iterations=2)
    long, *_ = run(tmp_path, LOOK, "FINAL(" + "yes " * 1_000 + ")", name="d.jsonl")
    files = [finished, short, stopped, long]

    def kept(filters=None, **options):
        rows, counts = training_rows(files, filters, **options)
        return [row["id"].partition(".")[0] for row in rows], dict(counts)

    assert kept() == (["a", "d"], {"fewer than 2 turns": 1, "not finished": 1})
    assert kept(RowFilters(min_turns=1, max_chars=3_000)) == (
        ["a", "b"],
        {"not finished": 1, "over 3,000 characters": 1},
    )
    assert kept(RowFilters(unfinished=True))[0] == ["a", "c", "d"]
    scores = {"a.jsonl": 0.0, "b.jsonl": 1.0, "c.jsonl": 1.0, "d.jsonl": 0.25}
    assert kept(scores=scores)[0] == ["d"] and kept(scores=scores)[1]["score 0"] == 1
    del scores["c.jsonl"]
    with pytest.raises(UserError, match=r"c.jsonl has no score"):
        kept(scores=scores)
    # of a turn that is too long only its own row is left out
    rows, counts = training_rows([long], RowFilters(max_chars=3_000), per="turn")
    assert [row["id"] for row in rows] == ["d.jsonl:root:1"] and counts == {"over 3,000 characters": 1}


def test_children_are_conversations_of_their_own(tmp_path):
    parent = "```repl\nx = rlm_query('Count.', context[:50])\nanswer['content'] = x\nanswer['ready'] = True\n```"

    def root(messages):
        is_child = "Query: Count." in messages[1]["content"]
        if not is_child:
            return parent
        return "```repl\nx = 3\n```" if len(messages) == 2 else END

    rlm = RLM(ScriptedModel(root), limits=Limits(depth=2))
    assert rlm.complete("a b\n" * 50, "How many?", journal=tmp_path / "run.jsonl").answer == "3"
    rows, counts = training_rows([tmp_path / "run.jsonl"], RowFilters(min_turns=1))
    assert [(row["id"], len(row["messages"])) for row in rows] == [("run.jsonl:root:1", 3), ("run.jsonl:root/1:2", 5)]
    assert not counts


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("FINAL(total)", "FINAL_VAR(total)"),
        ("So:\n  FINAL(total)\nDone.", "So:\n  FINAL_VAR(total)\nDone."),
        ("FINAL_VAR(the total is 5)", "FINAL(the total is 5)"),
        ("```repl\nFINAL(total)\n```\nFINAL(total)", "```repl\nFINAL(total)\n```\nFINAL_VAR(total)"),
        ("<think>\nFINAL(total)\n</think>\nFINAL(total)", "<think>\nFINAL(total)\n</think>\nFINAL_VAR(total)"),
        # right as they are
        ("FINAL(other)", None),
        ("FINAL(5)", None),
        ("FINAL_VAR(total)", None),
        ("```repl\nFINAL(total)\n```", None),
        (END, None),
    ],
)
def test_repairs(reply, expected):
    messages = [
        {"role": "user", "content": "other = 1"},
        {"role": "assistant", "content": "```repl\ntotal = 5\nprint(total == other)\n```"},
        {"role": "user", "content": "False"},
        {"role": "assistant", "content": reply},
    ]
    assert repaired(messages) == (expected or reply)


def test_repairs_are_counted_and_can_be_left_out(tmp_path):
    file, *_ = run(tmp_path, "```repl\nx = 5\n```", "FINAL(x)")
    (row,), counts = training_rows([file])
    assert (row["messages"][-1]["content"], dict(counts)) == ("FINAL_VAR(x)", {"repaired": 1})
    (row,), counts = training_rows([file], RowFilters(repair=False))
    assert (row["messages"][-1]["content"], dict(counts)) == ("FINAL(x)", {})


def rlms_log(folder):
    """As `rlms` 0.1.3 writes it: two completions of one logger."""
    first = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    second = [*first, {"role": "assistant", "content": "```repl\nprint(5)\n```"}, {"role": "user", "content": "5"}]
    block = {"code": "print(5)", "result": {"stdout": "5\n", "stderr": "", "locals": {}, "final_answer": None}}

    def iteration(number, prompt, response, answer):
        entry = {"type": "iteration", "iteration": number, "timestamp": "2026-11-28T09:59:34", "prompt": prompt}
        return {**entry, "response": response, "code_blocks": [block], "final_answer": answer, "iteration_time": 0.1}

    lines = [
        {"type": "metadata", "timestamp": "2026-11-28T09:59:34", "root_model": "m", "max_depth": 1},
        iteration(1, first, "```repl\nprint(5)\n```", None),
        iteration(2, second, END, "A"),
        iteration(1, "only a string", LOOK, None),
    ]
    file = folder / "rlm_log.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file, second


def test_logs_of_rlms(tmp_path):
    file, second = rlms_log(tmp_path)
    rows, counts = training_rows([file])
    assert [row["messages"] for row in rows] == [[*second, {"role": "assistant", "content": END}]]
    assert counts == {"not finished": 1}
    rows, _ = training_rows([file], RowFilters(unfinished=True, min_turns=1), per="turn")
    assert [plain(row["messages"])[-1]["content"] for row in rows] == ["```repl\nprint(5)\n```", END, LOOK]
    assert rows[2]["messages"][0] == {"role": "user", "content": "only a string"}
    assert rows[1]["messages"][2]["weight"] == 0 and "weight" not in rows[1]["messages"][4]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not JSON\n", "is not a journal of an RLM run"),
        ('{"event": "call"}\n', "is not a journal of an RLM run"),
        ('{"type": "metadata"}\n{"type": "iteration"}\n', r"x.jsonl:2: not a line of a log of rlms 0.1 \(KeyError"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        training_rows([tmp_path / "x.jsonl"])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none.jsonl: no such file"):
        training_rows([tmp_path / "none.jsonl"])


def test_line_separators_inside_of_a_log_do_not_cut_it(tmp_path):
    file, _ = rlms_log(tmp_path)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[1]["response"] = "\u2028\x85 seen\n" + lines[1]["response"]
    file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    (first, *_), _ = training_rows([file], RowFilters(min_turns=1), per="turn")
    assert first["messages"][-1]["content"].startswith("\u2028\x85 seen\n")


def test_an_unknown_form_of_rows_is_refused():
    with pytest.raises(UserError, match="per='row': not one of conversation, turn"):
        training_rows([], per="row")
