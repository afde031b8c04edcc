r"""Pre-tokenizers of byte-level GGUF files: the patterns that split text under each name of `tokenizer.ggml.pre`.

A file has only the name; the patterns are in the programs that read it. transformers 5.23 has some of them and
splits text by GPT-2's pattern under every other name. Patterns here are those of the tokenizer.json that a name was given
for, where llama.cpp's comments have them, and else llama.cpp's own (src/llama-vocab.cpp);
`tests/compat/test_llama_cpp_tokens.py` compares the ids with llama.cpp's.
"""

from __future__ import annotations

from typing import NamedTuple

_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_MARK = r"[^\r\n\p{L}\p{N}]?"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_ASCII_MARKS = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
_HAN_KANA = "[一-龥\u3040-ゟ゠-ヿ]+"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _words(
    digits: str, *, contraction: str = _CONTRACTION + "|", letters: str = r"\p{L}", other: str = r"\p{L}"
) -> str:
    """Return the pattern of Llama 3 and Qwen 2, which differ in how many digits stay together."""
    return rf"{contraction}{_MARK}{letters}+|{digits}| ?[^\s{other}\p{{N}}]+[\r\n]*|{_SPACES}"


def _cased(digits: str, contraction: str = "") -> str:
    """Return the pattern of Tekken and GPT-4o: a word is split where upper case follows lower case."""
    return (
        rf"{_MARK}{_UPPER}*{_LOWER}+{contraction}|{_MARK}{_UPPER}+{_LOWER}*{contraction}"
        rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


_LLAMA3, _QWEN2 = _words(r"\p{N}{1,3}"), _words(r"\p{N}")
_GPT4O = _cased(r"\p{N}{1,3}", _CONTRACTION + "?")
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    _HAN_KANA,
    rf"{_ASCII_MARKS}|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
)
# Letters that have case, as the tokenizer.json of DeepSeek LLM lists them. The escapes are letters that look like others.
_CASED_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝ"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec"
    "\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134"
    "\u2139\u213c-\u213f\u2145-\u2149\u214eↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_CJK = "[一-龥ࠀ-一가-\ud7ff]+"


class Cut(NamedTuple):
    """A pre-tokenizer: each pattern in turn isolates its matches within the pieces of those before it.

    Attributes:
        patterns (`tuple[str, ...]`): regular expressions.
        whole_words (`bool`): a piece that is in the vocabulary is one token, whatever the merges give.
        bos (`bool`): add a beginning-of-sequence token if the file does not state it.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    bos: bool = False


def _by_name() -> dict[str, Cut]:
    digits_first = (r"\p{N}", _GPT2)
    groups = {
        "gpt-2 phi-2 mpt olmo jais trillion granite-docling exaone4 a.x-4.0 gigachat mellum": Cut((_GPT2,)),
        "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2": Cut(digits_first),
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2": Cut((_LLAMA3,), True, True),
        "dbrx smaug-bpe chatglm-bpe glm4": Cut((_LLAMA3,)),
        "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2": Cut((_QWEN2,)),
        "qwen35": Cut((_words(r"\p{N}", letters=r"[\p{L}\p{M}]", other=r"\p{L}\p{M}"),)),
        "ufakzeka": Cut((_words(r"\p{N}", contraction=""),)),
        "minicpm5": Cut((r"\p{N}{1,3}", _words(r"\p{N}+")), True),
        "laguna": Cut((r"[^\n]+|[\n]+", _QWEN2)),
        "deepseek-llm": Cut(
            ("[\r\n]", rf"\s?[{_CASED_LETTERS}]+", "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+", r"\s+$", _CJK, r"\p{N}+")
        ),
        "deepseek-coder": Cut(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")),
        "deepseek-v3 hunyuan-dense joyai-llm hy_v4": Cut(_DEEPSEEK3),
        "falcon": Cut((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
        "default": Cut((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
        "bloom poro-chat gpt3-finnish": Cut((_BLOOM,)),
        "viking": Cut((_BLOOM, r"\p{N}")),
        "tekken": Cut((_cased(r"\p{N}"),), True, True),
        "gpt-4o llama4 kanana2 talkie minimax-m2": Cut((_GPT4O,)),
        "superbpe": Cut((r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
        "bailingmoe bailingmoe2 llada-moe": Cut(
            (rf"'(?i:[sdmt]|ll|ve|re)|{_MARK}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",)
        ),
        "seed-coder": Cut((rf"{_CONTRACTION}|{_MARK}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",)),
        "jais-2": Cut(
            (
                rf"{_CONTRACTION}|{_MARK}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|"
                + "|".join(rf"\s{{{count}}}(?!\S)" for count in (512, 256, 128, 64, 32, 16, 8, 4, "1,2"))
                + r"|\s{1}",
            )
        ),
        "exaone-moe": Cut(
            (
                rf"{_CONTRACTION}|{_MARK}(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
            )
        ),
    }
    return {name: cut for names, cut in groups.items() for name in names.split()}


PRE_TOKENIZERS = _by_name()
