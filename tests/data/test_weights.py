"""Weights of rows and messages, and strings that are exempt from the gate: from rows to the column `token_weights`."""

import warnings

import pytest

from eaftdrope.data import Source, build_dataset, encode, normalise, text_blocks
from eaftdrope.data.preview import make_preview, preview_text
from eaftdrope.errors import DataError
from tests.data import chat_templates as t

ASK, SAY = {"role": "user", "content": "Call it."}, {"role": "assistant", "content": "yes"}


def said(*weights, **row):
    """A conversation with a turn of each weight (None: without)."""
    turns = [ASK if turn else {**SAY, **({} if w is None else {"weight": w})} for w in weights for turn in (1, 0)]
    return {"messages": turns, **row}


def weighed(tokenizer, encoded):
    """(text, weight) of each stretch of trained tokens of one weight."""
    values = encoded.weights.values or [1.0] * len(encoded.labels)
    found = []
    for label, value in zip(encoded.labels, values, strict=True):
        if label == -100:
            found.append(None)
        elif found and found[-1] and found[-1][1] == value:
            found[-1][0].append(label)
        else:
            found.append(([label], value))
    return [(tokenizer.decode(ids), value) for ids, value in filter(None, found)]


def test_a_message_weighs_its_answer_and_its_stop_token(make_tokenizer):
    for template in (t.CHATML, t.MARKED):
        tokenizer = make_tokenizer(template)
        row = encode(normalise(said(0.25, None, 3, 0)), tokenizer)
        assert weighed(tokenizer, row) == [("yes<|im_end|>", 0.25), ("yes<|im_end|>", 1.0), ("yes<|im_end|>", 3.0)]
        assert row.trained_tokens == sum(label != -100 for label in row.labels)


def test_a_row_weighs_all_of_its_trained_tokens(make_tokenizer):
    tokenizer = make_tokenizer(t.CHATML)
    assert weighed(tokenizer, encode(normalise(said(0.5, None, weight=2)), tokenizer)) == [
        ("yes<|im_end|>", 1.0),
        ("yes<|im_end|>", 2.0),
    ]
    assert weighed(tokenizer, encode(normalise({"text": "yes", "weight": 0.5}), tokenizer)) == [("yes<|im_end|>", 0.5)]
    prompted = encode(normalise({"prompt": "yes ", "completion": "no", "loss_weight": 0.5}), tokenizer)
    assert [value for _, value in weighed(tokenizer, prompted)] == [0.5]
    whole = encode(normalise({"text": "yes yes yes", "weight": 4}), tokenizer, max_length=3)
    assert len(whole.weights.values) == len(whole.labels) == 3


def test_weights_of_one_are_no_weights(make_tokenizer):
    tokenizer = make_tokenizer(t.CHATML)
    plain = encode(normalise(said(None)), tokenizer)
    assert plain.weights.values is None
    for row in (said(1), said(1.0, weight=1), said(True), said(2, weight=0.5)):
        same = encode(normalise(row), tokenizer)
        assert same.weights.values is None and same.labels == plain.labels


def test_a_row_of_weight_zero_is_left_out(make_tokenizer, write_jsonl):
    path = write_jsonl([said(None, weight=0), said(None), said(None, sample_weight=0.0), said(0)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset, report = build_dataset([Source(path)], make_tokenizer(t.CHATML))
    assert dataset["origin"][:] == [f"{path}:2"] and dataset.column_names == ["input_ids", "labels", "origin"]
    assert report.by_source[str(path)].fully_masked == 3


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (said(-1), r"messages\[1\].weight is -1; it must be a number from 0"),
        (said(float("nan")), r"messages\[1\].weight is nan; it must be"),
        (said(1001), r"messages\[1\].weight is 1001; it must be a number from 0 \(not trained\) to 1000"),
        (said("2"), r"messages\[1\].weight is '2'; it must be"),
        (said(None, weight=-0.5), r"weight is -0.5; it must be"),
        (said(None, weight=2, loss_weight=3), "weight and loss_weight are both the weight of the row, and differ"),
        ({"messages": [{**ASK, "weight": 0.5}, SAY]}, r"messages\[0\].weight marks a user turn as trained"),
        ({"prompt": [ASK, {**SAY, "weight": 0.5}, ASK], "completion": [SAY]}, r"prompt\[1\] is marked as trained"),
        ({"messages": [ASK, {**SAY, "weight": 0.5, "train": False}]}, "disagree on whether the turn is trained"),
        ({"messages": [ASK, {**SAY, "weight": 0.5, "loss_scale": 2}]}, "disagree on whether the turn is trained"),
    ],
)
def test_refused_weights(row, reason):
    with pytest.raises(DataError, match=reason):
        normalise(row)


def test_marks_and_weights_of_one_turn(make_tokenizer):
    for row in ({**SAY, "train": True, "weight": 0.5}, {**SAY, "weight": 0.5, "masked": False}):
        assert normalise({"messages": [ASK, row]}).messages[1]["weight"] == 0.5
    with pytest.raises(DataError, match="train_on: all trains every token alike"):
        encode(normalise(said(0.5)), make_tokenizer(t.CHATML), train_on="all")
    # a measurement in words is reported as not read
    example = normalise(said(None, weight="70 kg"))
    assert example.weight == 1.0 and "weight" in example.fields_ignored


CALL = 'x = callname("Is it?")\nprint(callname(x))'


@pytest.mark.parametrize("kind", ["byte", "byte-whole", "metaspace"])
def test_tokens_of_exempt_strings(make_tokenizer, kind):
    """With and without a space before it: every token that covers a character of it, and no other."""
    tokenizer = make_tokenizer(t.CHATML, kind=kind)
    row = {"messages": [{**ASK, "content": "callname"}, {**SAY, "content": CALL}]}
    encoded = encode(normalise(row), tokenizer, exempt=["callname", "<|im_end|>"])
    assert encoded.input_ids == encode(normalise(row), tokenizer).input_ids
    exempt = [text for text, value in weighed(tokenizer, encoded) if value == -1.0]
    assert len(exempt) == 3 and exempt[-1] == "<|im_end|>"
    assert all("callname" in text and len(text) <= len(" callname(") for text in exempt[:2])
    assert sum(encoded.weights.exempt.values()) == sum(value == -1.0 for value in encoded.weights.values)
    # the question has it too, and is not trained
    assert all(value == 1.0 for value, label in zip(encoded.weights.values, encoded.labels) if label == -100)


def test_exempt_in_rows_of_strings(make_tokenizer):
    """The end-of-sequence token is added without text of its own."""
    tokenizer = make_tokenizer()
    end = tokenizer.eos_token
    for row in ({"text": "yes no"}, {"prompt": "yes", "completion": " no"}, {"text": f"yes no{end}"}):
        encoded = encode(normalise({**row, "weight": 2}), tokenizer, exempt=[end])
        assert encoded.input_ids == encode(normalise(row), tokenizer).input_ids
        trained = [value for value, label in zip(encoded.weights.values, encoded.labels) if label != -100]
        assert trained == [2.0] * (len(trained) - 1) + [-2.0]


def test_the_column_exists_only_where_a_token_has_a_weight(make_tokenizer, write_jsonl):
    tokenizer = make_tokenizer(t.CHATML)
    path = write_jsonl([said(None), said(0.5), said(None)])
    dataset, report = build_dataset([Source(path)], tokenizer)
    assert dataset["token_weights"][0] == [1.0] * len(dataset["input_ids"][0])
    assert set(dataset["token_weights"][1]) == {1.0, 0.5}
    weights = report.weights
    assert (weights.rows, weights.smallest, weights.largest) == (1, 0.5, 1.0)
    trained = sum(label != -100 for label in dataset["labels"][0])
    assert weights.mean == pytest.approx((2 * trained + 0.5 * trained) / (3 * trained))
    assert not report.warnings or all("weights" not in text for text in report.warnings)


def test_warnings(make_tokenizer, write_jsonl):
    path = write_jsonl([{"text": "yes no", "weight": 70.5}, {"text": "no", "weight": 62}])
    with pytest.warns(UserWarning, match=r"the weights of rows and messages have a mean of 6\d"):
        build_dataset([Source(path)], make_tokenizer())
    with pytest.warns(UserWarning, match=r"loss.exempt: 'calname' occurs in no trained text"):
        build_dataset([Source(write_jsonl([{"text": CALL}]))], make_tokenizer(), exempt=["calname"])
    with pytest.raises(DataError, match="an exempt string is empty"):
        encode(normalise({"text": "a"}), make_tokenizer(), exempt=[""])


def test_blocks_of_text_keep_the_weights(make_tokenizer, write_jsonl):
    tokenizer = make_tokenizer()
    rows = write_jsonl([{"text": "yes no yes"}, {"text": "no yes no yes", "weight": 0.5}])
    built, _ = build_dataset([Source(rows)], tokenizer, max_length=None)
    blocks = text_blocks(built, length=5, eos=tokenizer.eos_token_id)
    flat = [value for block in blocks["token_weights"] for value in block]
    first = len(built["input_ids"][0])
    assert set(flat[:first]) == {1.0} and set(flat[first:]) == {0.5} and len(flat) > first
    assert [len(block) for block in blocks["token_weights"]] == [5] * len(blocks)


def test_preview_shows_weights_and_exemptions(make_tokenizer, write_jsonl):
    path = write_jsonl([said(None, 0.5), {"messages": [ASK, {**SAY, "content": CALL}]}])
    preview = make_preview([Source(path)], make_tokenizer(t.CHATML), rows=2, exempt=["callname"])
    text = str(preview_text(preview, marks=True))
    assert ", weights 0.5 to 1\n" in text and " exempt from the gate\n" in text
    assert "weights of trained tokens: 0.5 to 1, mean 0.9" in text
    assert f"tokens exempt from the gate: 'callname' {preview.rows[1].exempt}" in text
