"""Tokenizers made on the spot, a few hundred tokens each."""

import json

import pytest

from tests.data.chat_templates import SPECIALS

_CORPUS = [
    "Hello there, how are you? The answer is yes and the other answer is no. Paris is the capital of France. "
    "user assistant system tool function name arguments What is the weather in Paris? It is sunny today. 4 and 5 make 9.\n"
] * 3


def _byte_level(trim_offsets):
    """Byte-level BPE: an emoji is several tokens, a leading space belongs to the word."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


def _metaspace():
    """SentencePiece's way: "▁" for a space, one put in front of the text, and an unknown token for what is not covered."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIALS, show_progress=False)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


_KINDS = {"byte": lambda: _byte_level(True), "byte-whole": lambda: _byte_level(False), "metaspace": _metaspace}


@pytest.fixture(scope="session")
def make_tokenizer():
    """make_tokenizer(template=None, kind="byte", eos="<|im_end|>"): a fast tokenizer of transformers."""
    from transformers import PreTrainedTokenizerFast

    made = {kind: make().to_str() for kind, make in _KINDS.items()}

    def make(template=None, kind="byte", eos="<|im_end|>"):
        from tokenizers import Tokenizer

        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(made[kind]), eos_token=eos, bos_token="<s>", pad_token="<|endoftext|>"
        )
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture
def trained():
    """trained(tokenizer, encoded or row): the stretches of trained tokens, decoded."""

    def stretches(tokenizer, row):
        input_ids, labels = (row["input_ids"], row["labels"]) if isinstance(row, dict) else (row.input_ids, row.labels)
        assert len(input_ids) == len(labels)
        found, run = [], []
        for token, label in [*zip(input_ids, labels), (None, -100)]:
            assert label in (-100, token)
            if label == -100 and run:
                found.append(tokenizer.decode(run))
                run = []
            elif label != -100:
                run.append(token)
        return found

    return stretches


@pytest.fixture
def write_jsonl(tmp_path):
    """write_jsonl(rows, name="rows.jsonl"): the path of a file with one row per line; a string is written as it is."""

    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(path)

    return write
