"""What is loaded gives the tokens of its own tokenizer.json, also where a class of transformers has its own idea."""

import json
import warnings

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from eaftdrope.errors import UserError
from eaftdrope.models import load_tokenizer
from tests.models.gguf_files import byte_level_vocabulary

TEXT = "x =  12\n\n34"
MINE = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(r"\p{N}"), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
)


@pytest.fixture(scope="module")
def core():
    tokens, merges = byte_level_vocabulary([TEXT, "a  b", "12 34"] * 3, 300)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return vocabulary, [tuple(merge.split(" ")) for merge in merges]


@pytest.fixture
def save(core, tmp_path):
    """Write a folder with a tokenizer.json, a configuration of the tokenizer and one of the model."""

    def save(pre_tokenizer=MINE, model_type="llama", post_processor=None, **config):
        made = Tokenizer(models.BPE(vocab=core[0], merges=core[1]))
        made.pre_tokenizer, made.decoder = pre_tokenizer, decoders.ByteLevel()
        made.add_special_tokens([AddedToken("<|end|>", special=True), AddedToken("<pad>", special=True)])
        if post_processor is not None:
            made.post_processor = post_processor
        made.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        config = {"eos_token": "<|end|>", "pad_token": "<pad>", "model_max_length": 77} | config
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return tmp_path, made

    return save


CLASSES = [
    "GPT2Tokenizer",
    "GPT2TokenizerFast",
    "GPTNeoXTokenizerFast",
    "CohereTokenizerFast",
    "CodeLlamaTokenizerFast",
    "GemmaTokenizerFast",
    "LlamaTokenizerFast",
    "Qwen2TokenizerFast",
    "PreTrainedTokenizerFast",
]


@pytest.mark.parametrize("name", CLASSES)
def test_the_file_counts_whatever_the_class(save, tmp_path, name):
    from transformers import AutoTokenizer

    folder, own = save(tokenizer_class=name, chat_template="T", padding_side="left")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = load_tokenizer(str(folder))
    for text in (TEXT, "a  b", "\t\tif", "<|end|>12"):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == own.encode(text).ids
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template) == ("<|end|>", "<pad>", "T")
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("left", 77)
    # what is saved is read alike by stock transformers
    saved = tmp_path / "saved"
    tokenizer.save_pretrained(saved)
    (saved / "config.json").write_text((folder / "config.json").read_text())
    assert AutoTokenizer.from_pretrained(saved)(TEXT)["input_ids"] == own.encode(TEXT).ids


def test_the_difference_is_named(save):
    folder, _ = save(tokenizer_class="GPT2Tokenizer")
    with pytest.warns(UserWarning) as caught:
        load_tokenizer(str(folder))
    (text,) = [str(warning.message) for warning in caught if "tokenizer.json" in str(warning.message)]
    assert text == (
        f"{folder}: transformers reads this tokenizer as GPT2Tokenizer, which does not give the tokens of its "
        "tokenizer.json: in 'x =  12', ['Ġ', '=', 'ĠĠ', '1', '2'] becomes ['Ġ', '=', 'Ġ', 'Ġ', '12']. "
        "tokenizer.json is used, and saved results load as it states."
    )


def test_a_class_that_agrees_is_kept(save):
    folder, _ = save(pre_tokenizers.ByteLevel(add_prefix_space=False), "gpt2", tokenizer_class="GPT2Tokenizer")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert type(load_tokenizer(str(folder))).__name__ == "GPT2Tokenizer"


def test_the_special_tokens_around_a_text_are_those_of_the_file(save):
    around = processors.TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", 270)])
    folder, own = save(tokenizer_class="GPT2Tokenizer", post_processor=around)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = load_tokenizer(str(folder))
    assert tokenizer(TEXT)["input_ids"] == own.encode(TEXT).ids
    assert tokenizer(TEXT)["input_ids"][0] == 270


def test_tokens_that_only_the_configuration_has_are_no_difference(save):
    added = {"272": {"content": "<|new|>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}}
    folder, _ = save(tokenizer_class="PreTrainedTokenizerFast", added_tokens_decoder=added)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_tokenizer(str(folder)).convert_tokens_to_ids("<|new|>") == 272


def test_files_that_contradict_each_other_are_refused(save, monkeypatch):
    """Where even the file without the class gives other tokens."""
    import eaftdrope.models.tokenizer_file as product

    folder, _ = save(tokenizer_class="PreTrainedTokenizerFast")
    monkeypatch.setattr(product, "first_difference", lambda tokenizer, file: "in 'a', ['a'] becomes ['b'].")
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(folder))
    assert str(caught.value) == (
        f"the tokenizer of '{folder}' does not give the tokens of its own tokenizer.json: in 'a', ['a'] becomes ['b']. "
        "Make tokenizer_config.json agree with tokenizer.json (`add_prefix_space`, added tokens), or remove one of them."
    )


@pytest.mark.parametrize("legacy", [True, False])
def test_sentencepiece_spaces_are_those_of_the_file(tmp_path, legacy):
    """Llama 2's file puts a space behind special tokens and in front of spaces; its class in transformers 5 does not."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁▁", "▁a"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    own = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[("▁", "▁"), ("▁", "a")], unk_token="<unk>", byte_fallback=True)
    )
    if legacy:
        own.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        own.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    own.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens[:3]])
    own.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.tokenize("<s>a") == (["<s>", "▁a"] if legacy else ["<s>", "a"])
    assert tokenizer.tokenize("  a") == (["▁▁", "▁a"] if legacy else ["▁▁", "a"])
