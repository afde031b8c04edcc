"""Blocks of text: against lists made by hand, and that nothing but the last, unfull block is lost."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eaftdrope.data import text_blocks
from eaftdrope.errors import DataError
from tests.data import chat_templates as templates

EOS = 2


def rows(*documents, labels=None):
    from datasets import Dataset

    columns = {"input_ids": list(documents), "labels": list(labels or documents)}
    return Dataset.from_dict({**columns, "origin": [f"row {n}" for n in range(len(documents))]})


def test_blocks_by_hand():
    blocks = text_blocks(rows([10, 11, 12, EOS], [20, 21], [30, 31, 32, 33, 34, EOS]), length=4, eos=EOS)
    assert blocks["input_ids"][:] == [[10, 11, 12, EOS], [20, 21, EOS, 30], [31, 32, 33, 34]]
    assert blocks["labels"][:] == blocks["input_ids"][:]
    assert blocks.column_names == ["input_ids", "labels"]


def test_boundaries_by_hand():
    """A document that goes on in the next block is a part of its own there."""
    documents = ([10, 11, 12, 13, 14, 15, 16, 17, 18, EOS], [20, EOS], [30, EOS])
    blocks = text_blocks(rows(*documents), length=4, eos=EOS, boundaries=True)
    assert blocks["input_ids"][:] == [[10, 11, 12, 13], [14, 15, 16, 17], [18, EOS, 20, EOS]]
    assert blocks["seq_lengths"][:] == [[4], [4], [2, 2]]


def test_labels_are_kept_and_the_end_is_trained_where_the_last_token_is():
    untrained = -100
    documents = ([10, 11, 12], [20, 21, 22])
    labels = ([untrained, 11, 12], [20, 21, untrained])
    blocks = text_blocks(rows(*documents, labels=labels), length=4, eos=EOS)
    assert blocks["input_ids"][:] == [[10, 11, 12, EOS], [20, 21, 22, EOS]]
    assert blocks["labels"][:] == [[untrained, 11, 12, EOS], [20, 21, untrained, untrained]]


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(3, 40), max_size=30), min_size=1, max_size=40),
    length=st.integers(2, 17),
)
def test_nothing_is_lost_but_the_last_block(documents, length):
    whole = [token for document in documents for token in [*document, EOS]]
    if len(whole) < length:
        with pytest.raises(
            DataError, match=rf"^the text has {len(whole)} tokens, not enough for one block of {length}\."
        ):
            text_blocks(rows(*documents), length=length, eos=EOS)
        return
    blocks = text_blocks(rows(*documents), length=length, eos=EOS, boundaries=True)
    joined = [token for block in blocks["input_ids"] for token in block]
    assert joined == whole[: len(whole) - len(whole) % length]
    # an end of a document is an end of a part, and parts end nowhere else but at the end of a block
    for ids, parts in zip(blocks["input_ids"], blocks["seq_lengths"], strict=True):
        ends = [sum(parts[: number + 1]) for number in range(len(parts))]
        assert ends == sorted({*(n + 1 for n, token in enumerate(ids) if token == EOS), length})


def test_a_tokenizer_without_an_end_is_refused():
    with pytest.raises(DataError, match="no end-of-sequence token, so documents cannot be told apart"):
        text_blocks(rows([1, 3]), length=2, eos=None)


# ---- from files ----


def test_text_chat_and_weights_from_files(write_jsonl, make_tokenizer):
    """A mixture: two documents of text, each taken twice, and a conversation of which the answer alone is trained."""
    from eaftdrope.data import Source, build_dataset

    tokenizer = make_tokenizer(templates.CHATML)
    text = write_jsonl([{"text": "one"}, {"text": "two two"}])
    talk = write_jsonl(
        [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]}], name="talk.jsonl"
    )
    built, _ = build_dataset([Source(text, weight=2.0), Source(talk)], tokenizer, train_on="assistant", max_length=None)
    blocks = text_blocks(built, length=8, eos=tokenizer.eos_token_id)
    decoded = tokenizer.decode([token for ids in blocks["input_ids"] for token in ids])
    end = tokenizer.eos_token
    assert decoded.startswith(f"one{end}two two{end}one{end}two two{end}<|im_start|>system\n")
    labels = [label for row in blocks["labels"] for label in row]
    trained = tokenizer.decode([label for label in labels if label != -100])
    assert trained.startswith(f"one{end}two two{end}one{end}two two{end}")
    assert "Hi" not in trained


def test_no_more_is_read_than_needed(write_jsonl, make_tokenizer):
    from eaftdrope.data import Source, build_dataset

    tokenizer = make_tokenizer()
    path = write_jsonl([{"text": f"row {n}"} for n in range(100)])
    lengths = [len(row["input_ids"]) for row in build_dataset([Source(path)], tokenizer, max_length=None)[0]]
    asked = []

    def enough(rows, tokens):
        asked.append((rows, tokens))
        return rows == 4

    # of each source
    _, report = build_dataset([Source(path), Source(path)], tokenizer, max_length=None, enough=enough)
    assert [source.rows for source in report.by_source.values()] == [4, 4]
    assert asked == 2 * [(rows, sum(lengths[:rows])) for rows in range(5)]
