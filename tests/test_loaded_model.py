"""Tokens that a model has no row for are named before anything is trained on them."""

import pytest
from datasets import Dataset

from eaftdrope.errors import DataError
from eaftdrope.loaded_model import check_token_ids
from tests.tiny_models import byte_tokenizer

WAY_OUT = (
    "and the model's embedding has 260 rows (vocab_size of its config.json): the tokenizer has more tokens than the model. "
    "Use the tokenizer that belongs to the model, or save the model with "
    "model.resize_token_embeddings(len(tokenizer)) first."
)


@pytest.fixture
def larger():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|new|>"], special_tokens=True)
    assert len(tokenizer) == 261
    return tokenizer


def test_the_first_row_with_such_a_token_is_named(larger):
    rows = [{"input_ids": [1, 259], "origin": f"a.jsonl:{number}"} for number in range(25_000)]
    check_token_ids(Dataset.from_list(rows), 260, larger)
    rows[20_001]["input_ids"] = [5, 260, 260]
    rows[24_000]["input_ids"] = [260]
    with pytest.raises(DataError) as caught:
        check_token_ids(Dataset.from_list(rows), 260, larger)
    assert str(caught.value) == f"a.jsonl:20001 holds token 260 ('<|new|>'), {WAY_OUT}"
    check_token_ids(Dataset.from_list(rows), 261, larger)


def test_rows_of_a_script(larger):
    with pytest.raises(DataError, match=r"^row 1 holds token 300, and the model's embedding has 260 rows"):
        check_token_ids(Dataset.from_list([{"input_ids": [1]}, {"input_ids": [300]}]), 260, None)


def test_the_token_that_batches_are_padded_with(larger):
    larger.pad_token = "<|new|>"
    with pytest.raises(DataError) as caught:
        check_token_ids(Dataset.from_list([{"input_ids": [1]}]), 260, larger)
    assert str(caught.value) == f"batches are padded with token 260 ('<|new|>'), {WAY_OUT}"
