"""A GGUF's text becomes the ids that llama.cpp makes of it, under every name of a pre-tokenizer: `make test-compat`.

The vocabulary is merged across words, digits and lines, so that a cut in another place gives other ids.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

from eaftdrope.models.gguf.patterns import PRE_TOKENIZERS
from eaftdrope.models.gguf.tokenizer import read_tokenizer
from eaftdrope.models.tokenizer_file import PROBES
from tests.models.gguf_files import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, byte_level_vocabulary, write_gguf

pytestmark = pytest.mark.slow

SPECIAL = ["<|bos|>", "<|eos|>", "<｜User｜>", "<think>"]
TEXTS = [
    *PROBES,
    "price: €5,99 £3 ½ ² Ⅳ ٣٤٥",
    "…。，、।۔، a，b。c",
    "a<｜User｜> <think>b",
    "\n\n\n",
    " \n \n ",
    "<s>[INST] hi",
    "é𝄞",
]
# Where llama.cpp has no \p{M} in a pattern that has it in tokenizer.json, and no U+2003 among its white space.
DIFFERENT = {
    **dict.fromkeys(("tekken", "gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), ("cafe\u0301", "हिन्दी")),
    **dict.fromkeys(("deepseek-llm", "deepseek-coder"), ("\u2003",)),
}


@pytest.fixture(scope="module")
def python():
    if not os.environ.get("EAFTDROPE_LLAMA_CPP"):
        pytest.skip("no environment with llama.cpp: run `make test-compat`")
    return os.environ["EAFTDROPE_LLAMA_CPP"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("ggufs")
    tokens, merges = byte_level_vocabulary(TEXTS * 3, 1100)
    types = [NORMAL] * len(tokens) + [CONTROL] * 3 + [USER_DEFINED]
    ids = {"bos_token_id": len(tokens), "eos_token_id": len(tokens) + 1}
    byte_level = {"tokens": [*tokens, *SPECIAL], "merges": merges, "types": types, **ids}
    written = [write_gguf(folder / f"{pre}.gguf", pre=pre, **byte_level) for pre in PRE_TOKENIZERS]
    written.append(write_gguf(folder / "bos.gguf", pre="qwen2", add_bos_token=True, add_eos_token=True, **byte_level))
    written.append(write_gguf(folder / "no_bos.gguf", pre="llama-bpe", add_bos_token=False, **byte_level))
    words = ["▁▁", "▁t", "▁th", "in", "ing", "llo", "Hello", "▁Hello", "▁w", "or", "ld", "12", "▁[", "▁a", "ab", "▁▁▁"]
    letters = sorted({letter for text in TEXTS for letter in text if letter.isprintable() and letter < "\u3000"})
    pieces = [*words, "▁", *(letter for letter in letters if letter not in " ▁")]
    piece_types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, CONTROL, USER_DEFINED, *[NORMAL] * len(pieces)]
    sentence = {
        "tokens": ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *SPECIAL[2:], *pieces],
        "types": piece_types,
        "scores": [0.0] * 261 + [-float(rank) for rank in range(len(pieces))],
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    written.append(write_gguf(folder / "spm.gguf", model="llama", **sentence))
    written.append(write_gguf(folder / "spm_no_space.gguf", model="llama", add_space_prefix=False, **sentence))
    written.append(
        write_gguf(folder / "spm_eos.gguf", model="llama", add_bos_token=False, add_eos_token=True, **sentence)
    )
    return written


def test_ids_are_those_of_llama_cpp(python, files, tmp_path):
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    script = Path(__file__).with_name("llama_cpp_tokens.py")
    command = [python, script, tmp_path / "texts.json", tmp_path / "ids.json", *files]
    subprocess.run(list(map(str, command)), check=True, timeout=300)
    expected = json.loads((tmp_path / "ids.json").read_text())
    assert len(expected) == len(files) == len(PRE_TOKENIZERS) + 5
    wrong = []
    for file in files:
        tokenizer, _ = read_tokenizer(file)
        for text, ids in zip(TEXTS, expected[file.stem], strict=True):
            found = [tokenizer(text, add_special_tokens=special)["input_ids"] for special in (False, True)]
            intended = any(part in text for part in DIFFERENT.get(file.stem, ()))
            if (found == ids) is intended:
                wrong.append((file.stem, text))
    assert wrong == []
