"""Sources to one dataset: weights, bad rows, rows without a trained token, stop tokens, truncation."""

import json
import random
import re
import warnings

import pytest

from eaftdrope.data import Source, build_dataset, held_out_warnings, hold_out, iter_examples
from eaftdrope.errors import DataError
from tests.data import chat_templates as t


def talk(answer, question="q"):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def build(sources, tokenizer, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return build_dataset(sources, tokenizer, **options)


def test_columns_counts_and_order(make_tokenizer, trained, write_jsonl):
    tokenizer = make_tokenizer(t.CHATML)
    talks = write_jsonl([talk("one"), talk("two")], "talks.jsonl")
    mixed = write_jsonl([{"prompt": "p ", "completion": "c"}, {"instruction": "i", "output": "o"}], "mixed.jsonl")
    dataset, report = build([Source(talks), Source(mixed)], tokenizer)
    assert dataset.column_names == ["input_ids", "labels", "origin"]
    assert dataset["origin"][:] == [f"{talks}:1", f"{talks}:2", f"{mixed}:1", f"{mixed}:2"]
    answers = [text for row in dataset for text in trained(tokenizer, row)]
    assert answers == [f"{answer}<|im_end|>" for answer in ("one", "two", "c", "o")]
    assert report.rows == report.read == report.encoded == 4
    assert report.tokens == sum(map(len, dataset["input_ids"]))
    assert report.trained_tokens == sum(label != -100 for row in dataset for label in row["labels"][1:])
    assert [(name, counts.rows) for name, counts in report.by_source.items()] == [(talks, 2), (mixed, 2)]
    assert report.stop_token_trained
    assert report.stop_tokens == ["<|im_end|>"]
    assert report.warnings == report.skipped == []


def test_batches_come_together_in_order(make_tokenizer, write_jsonl):
    path = write_jsonl([{"text": str(number)} for number in range(2345)])
    seen = []
    dataset, report = build([Source(path)], make_tokenizer(), progress=seen.append)
    assert dataset["origin"][:] == [f"{path}:{number + 1}" for number in range(2345)]
    assert seen == [0, 1000, 2000]
    assert report.rows == 2345


@pytest.mark.parametrize(("weight", "counts"), [(1.0, {1}), (2.0, {2}), (0.5, {0, 1}), (2.5, {2, 3}), (0.01, {0, 1})])
def test_weights(make_tokenizer, write_jsonl, weight, counts):
    plain = write_jsonl([{"text": f"a{number}"} for number in range(101)], "plain.jsonl")
    other = write_jsonl([{"text": f"b{number}"} for number in range(101)], "other.jsonl")
    sources = [Source(plain), Source(other, weight=weight)]
    dataset, report = build(sources, make_tokenizer())
    taken = {f"{other}:{number + 1}": 0 for number in range(101)}
    for origin in dataset["origin"][101:]:
        taken[origin] += 1
    assert set(taken.values()) == counts
    assert sum(taken.values()) == int(weight * 101 + 0.5) == report.by_source[other].rows
    assert dataset["origin"][:101] == [f"{plain}:{number + 1}" for number in range(101)]
    assert report.tokens == sum(map(len, dataset["input_ids"]))
    again, _ = build(sources, make_tokenizer())
    assert again["origin"][:] == dataset["origin"][:]
    if len(counts) == 2:
        differently, _ = build(sources, make_tokenizer(), seed=1)
        assert differently["origin"][:] != dataset["origin"][:]
        assert len(differently) == len(dataset)


def test_the_choice_does_not_depend_on_where_the_files_lie(make_tokenizer, write_jsonl, tmp_path):
    rows = [{"text": f"row {number}"} for number in range(101)]
    chosen = []
    for folder in ("here", "elsewhere"):
        (tmp_path / folder).mkdir()
        path = write_jsonl(rows, f"{folder}/rows.jsonl")
        dataset, _ = build([Source(path, weight=0.2)], make_tokenizer())
        chosen.append([origin.rpartition(":")[2] for origin in dataset["origin"][:]])
    assert chosen[0] == chosen[1] and len(chosen[0]) == 20


def test_a_source_named_twice_is_counted_twice(make_tokenizer, write_jsonl):
    path = write_jsonl([{"text": "a"}, {"text": "b"}])
    said = (
        f"1 of 3 rows are copies of earlier ones (the first: {path}:1 of {path}:1) and count as often. Remove them, unless "
        "that is meant."
    )
    with pytest.warns(UserWarning, match=re.escape(said)):
        _, report = build_dataset([Source(path, limit=1), Source(path)], make_tokenizer())
    assert report.warnings == [said]
    assert [(name, counts.read) for name, counts in report.by_source.items()] == [(f"{path} #1", 1), (f"{path} #2", 2)]


def test_weights_that_leave_nothing(make_tokenizer, write_jsonl):
    with pytest.raises(DataError, match=r"the weights leave no row of .*rows.jsonl \(1 rows\)\. Raise a weight"):
        build([Source(write_jsonl([{"text": "a"}]), weight=0.2)], make_tokenizer())


BAD = [talk("one"), '{"messages": ', {"question": "?"}, talk(None), talk("two")]


def test_a_bad_row_stops_with_file_and_line(make_tokenizer, write_jsonl):
    path = write_jsonl(BAD)
    with pytest.raises(DataError) as caught:
        build([Source(path)], make_tokenizer(t.CHATML))
    assert str(caught.value) == (
        f"{path}:2: not valid JSON: Expecting value at column 14\n"
        "Repair the row, or set on_bad_row: skip to leave such rows out."
    )


def test_bad_rows_are_skipped_and_counted(make_tokenizer, write_jsonl):
    path = write_jsonl(BAD)
    dataset, report = build([Source(path)], make_tokenizer(t.CHATML), on_bad_row="skip")
    assert dataset["origin"][:] == [f"{path}:1", f"{path}:5"]
    assert report.skipped_rows == 3
    assert [origin for origin, _ in report.skipped] == [f"{path}:2", f"{path}:3", f"{path}:4"]
    assert report.skipped[2][1].startswith("messages[1].content is null and there are no tool_calls")


def test_a_row_that_the_template_refuses_is_a_bad_row(make_tokenizer, write_jsonl):
    path = write_jsonl([talk("one"), {"messages": [{"role": "user", "content": "q"}] * 2}])
    _, report = build([Source(path)], make_tokenizer(t.LLAMA2, eos="</s>"), on_bad_row="skip")
    reason = "the chat template refuses this conversation: roles must alternate user/assistant"
    assert report.skipped == [(f"{path}:2", reason)]


def test_when_every_row_is_bad(make_tokenizer, write_jsonl):
    path = write_jsonl(["{", "["])
    with pytest.raises(
        DataError, match=r"rows.jsonl: all 2 rows are bad; the first:\n  .*rows.jsonl:1: not valid JSON"
    ):
        build([Source(path)], make_tokenizer(), on_bad_row="skip")


def test_rows_without_a_trained_token_are_left_out(make_tokenizer, write_jsonl):
    silent = {"messages": [{"role": "user", "content": "q"}]}
    path = write_jsonl([talk("one"), silent, talk("two", "a very long question " * 20)])
    dataset, report = build([Source(path)], make_tokenizer(t.CHATML), max_length=60)
    assert dataset["origin"][:] == [f"{path}:1"]
    assert report.fully_masked == 2
    assert report.by_source[path].cut_off == 1
    assert report.truncated == 0


def test_a_dataset_without_a_trained_token_is_refused_by_name(make_tokenizer, write_jsonl):
    silent = {"messages": [{"role": "user", "content": "q"}]}
    path = write_jsonl([silent, talk("two", "a very long question " * 20)])
    with pytest.raises(DataError) as caught:
        build([Source(path)], make_tokenizer(t.CHATML), max_length=60)
    assert str(caught.value).startswith(
        f"{path}: has no trained token in any row (2 rows: 1 have none under train_on: assistant, "
        "1 lose theirs at max_length: 60, 0 are bad)."
    )


def test_truncated_rows_are_counted_and_short_enough(make_tokenizer, trained, write_jsonl):
    tokenizer = make_tokenizer(t.CHATML)
    path = write_jsonl([talk("one"), talk("yes " * 100)])
    dataset, report = build([Source(path)], tokenizer, max_length=70)
    assert report.truncated == 1
    assert report.truncated_share == 0.5
    assert len(dataset[1]["input_ids"]) == 70
    assert trained(tokenizer, dataset[1])[0].startswith("yes yes")
    # The truncated row has no end to train; the complete one has.
    assert report.stop_token_trained


def test_a_template_without_a_stop_token_is_warned_of(make_tokenizer, write_jsonl):
    path = write_jsonl([talk("one"), talk("two"), {"prompt": "p", "completion": "c"}])
    with pytest.warns(UserWarning, match="do not end in a trained stop token"):
        _, report = build_dataset([Source(path)], make_tokenizer(t.WITHOUT_STOP))
    assert not report.stop_token_trained
    assert report.warnings == [
        "2 of 3 complete rows do not end in a trained stop token: the model may not learn to stop, and its answers run "
        "on to the length limit, while the training loss still looks healthy. Use a chat template whose assistant turn "
        "ends in a special token such as <|im_end|>, or bring the rows as prompt and completion strings: they end in "
        "the end-of-sequence token (<|im_end|>)."
    ]


def test_rows_that_are_all_truncated_are_warned_of(make_tokenizer, write_jsonl):
    path = write_jsonl([talk("yes " * 100)])
    with pytest.warns(UserWarning, match="every row is cut off at max_length: 70, so no end of an answer is trained"):
        _, report = build_dataset([Source(path)], make_tokenizer(t.CHATML), max_length=70)
    assert not report.stop_token_trained


def test_a_stop_token_that_is_not_the_tokenizers_own_is_reported(make_tokenizer, write_jsonl):
    """A base model with a chat template learns to write <|im_end|>: the run adds it to the generation config."""
    tokenizer = make_tokenizer(t.CHATML, eos="<|endoftext|>")
    _, report = build_dataset([Source(write_jsonl([talk("one")]))], tokenizer)
    assert report.stop_token_trained
    assert report.stop_tokens == ["<|im_end|>"]


def test_wrong_options(make_tokenizer, write_jsonl):
    path = write_jsonl([{"text": "a"}])
    with pytest.raises(DataError, match="on_bad_row 'ignore' is not one of stop, skip"):
        build([Source(path)], make_tokenizer(), on_bad_row="ignore")
    with pytest.raises(DataError, match="no data source"):
        build([], make_tokenizer())
    with pytest.raises(DataError, match="no such file"):
        build([Source(path + "x.jsonl")], make_tokenizer())


def test_holding_out_keeps_repetitions_together(make_tokenizer, write_jsonl):
    path = write_jsonl([{"text": f"a{number}"} for number in range(40)])
    dataset, _ = build([Source(path, weight=2.5)], make_tokenizer())
    train, held_out = hold_out(dataset, 0.25, seed=3)
    assert len(held_out) == len(set(held_out["origin"])) == 10
    assert not set(train["origin"]) & set(held_out["origin"])
    assert len(set(train["origin"])) == 30
    assert len(train) + sum(origin in set(held_out["origin"]) for origin in dataset["origin"]) == 100
    assert hold_out(dataset, 0.25, seed=3)[1]["origin"][:] == held_out["origin"][:]
    assert hold_out(dataset, 0.25, seed=4)[1]["origin"][:] != held_out["origin"][:]
    with pytest.raises(DataError, match=r"holding out 0\.001 of 40 rows leaves one side empty"):
        hold_out(dataset, 0.001)


def test_a_share_of_a_json_array_on_one_line(make_tokenizer, tmp_path):
    """`json.dump` writes all rows on one line: each is a row of its own, and is found again by its origin."""
    path = tmp_path / "one.json"
    path.write_text(json.dumps([talk(f"a{number}") for number in range(40)]))
    dataset, _ = build([Source(str(path))], make_tokenizer(t.CHATML))
    train, held_out = hold_out(dataset, 0.25)
    assert (len(train), len(held_out)) == (30, 10)
    chosen = set(held_out["origin"])
    found = [example.messages[1]["content"] for example in iter_examples(Source(str(path)), only=chosen)]
    assert len(found) == 10
    assert [f"{path}:1 (row {int(text[1:]) + 1})" for text in found if text != "a0"] == [
        origin for origin in held_out["origin"][:] if origin != f"{path}:1"
    ]


def ids(dataset):
    return {tuple(row) for row in dataset["input_ids"][:]}


@pytest.mark.parametrize(("copies", "distinct"), [(8, 5), (2, 20), (20, 2)])
def test_copies_of_a_row_are_never_on_both_sides(make_tokenizer, write_jsonl, copies, distinct):
    rows = [talk(f"a{number % distinct}", f"q{number % distinct}") for number in range(copies * distinct)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset, report = build_dataset([Source(write_jsonl(rows), weight=2.0)], make_tokenizer(t.CHATML))
    assert report.warnings[0].startswith(f"{40 - distinct} of 40 rows are copies of earlier ones (the first: ")
    for seed in range(5):
        train, held_out = hold_out(dataset, 0.25, seed=seed)
        assert not ids(train) & ids(held_out)
        # all copies stay, each once where it is measured; the share is that of the rows, as far as they can be divided
        assert len(train) + 2 * len(held_out) == 80
        assert len(held_out) == {8: 8, 2: 10, 20: 20}[copies]
    assert hold_out(dataset, 0.25, seed=1)[1]["origin"][:] == hold_out(dataset, 0.25, seed=1)[1]["origin"][:]


def test_a_row_with_many_copies_does_not_take_the_whole_share(make_tokenizer, write_jsonl):
    rows = [{"text": "often"}] * 90 + [{"text": f"once {number}"} for number in range(10)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset, _ = build_dataset([Source(write_jsonl(rows))], make_tokenizer())
    for seed in range(5):
        train, held_out = hold_out(dataset, 0.05, seed=seed)
        assert len(held_out) == 5 and len(train) == 95
    with pytest.raises(
        DataError, match=r"holding out 0\.5 of 90 rows \(1 without their copies\) leaves one side empty"
    ):
        hold_out(dataset.select(range(90)), 0.5)


def test_the_share_without_copies_is_what_it_was(make_tokenizer, write_jsonl):
    """The choice of earlier versions, so that a run can be measured on the rows that it held out then."""
    dataset, _ = build([Source(write_jsonl([{"text": f"a{number}"} for number in range(40)]))], make_tokenizer())
    found = [int(origin.rpartition(":")[2]) for origin in hold_out(dataset, 0.2, seed=3)[1]["origin"]]
    assert found == sorted(random.Random("3:hold out").sample(range(1, 41), 8))


def test_held_out_rows_that_are_also_trained_are_counted(make_tokenizer, write_jsonl):
    tokenizer = make_tokenizer(t.CHATML)
    train, _ = build([Source(write_jsonl([talk("one"), talk("two")], "train.jsonl"))], tokenizer)
    path = write_jsonl([talk("two"), talk("three"), talk(None)], "held.jsonl")
    held_out, report = build([Source(path)], tokenizer, on_bad_row="skip")
    assert held_out_warnings(train, held_out, report) == [
        f"1 of 2 held-out rows are also trained (the first: {path}:1): measurements on them show memorisation. Remove them "
        "from one of the two.",
        "1 held-out rows are bad and left out; the first: "
        f"{path}:3: messages[1].content is null and there are no tool_calls: the assistant message says nothing",
    ]
    assert (
        held_out_warnings(held_out, train.select([0]), build([Source(path)], tokenizer, on_bad_row="skip")[1])[1:] == []
    )


def test_what_a_folder_holds_besides_is_named(make_tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    (tmp_path / "b.jsonl.gz").write_bytes(b"x")
    with pytest.warns(UserWarning, match="b.jsonl.gz: not of a type that is read"):
        _, report = build_dataset([Source(str(tmp_path))], make_tokenizer())
    assert report.warnings == [
        f"{tmp_path}: files that are not read: b.jsonl.gz: not of a type that is read (.jsonl, .json, .parquet, .csv)."
    ]
