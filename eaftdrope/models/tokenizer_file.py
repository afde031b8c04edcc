"""Tokenizers that split text as their own tokenizer.json does.

Some tokenizer classes of transformers build their pre-tokenizer themselves and override the one in the file. So the loaded
tokenizer is compared with the file on test strings; where they differ, the file counts.
"""

from __future__ import annotations

import warnings
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import cached_file

from eaftdrope.errors import UserError

# Strings on which pre-tokenizers, normalisers and byte fallback differ.
PROBES = (
    "Hello world, hello World.",
    "x =  12",
    "tips:\n\n1. Sleep\n\n2. Eat 12345 apples",
    "   leading  and   trailing   ",
    "\tif x:\n\t\treturn 1\n",
    "    def f(self):\n        return 123456\n\n\n",
    "line\r\n\r\nend",
    "I'll we've I'LL don't DON'T 'sup it's",
    "camelCaseWord HTTPServer snake_case_word parseJSON2XML",
    "3.14159 1,000,000 2024-11-28 1234567",
    "!!! ??? ... --- === <<>> $100 +5% a^b ~x |y| `z` @user #tag",
    "http://example.org/a/b?c=d&e=f \"quoted\" 'quoted' (a) [b] {c}",
    "naïve café cafe\u0301 Ünïcödé ﬁne ① ½",
    "中文字符和English混合123 日本語テスト 한국어",
    "العربية हिन्दी ไทย Ελληνικά Русский",
    "😀🎉👩\u200d👩\u200d👧 ok",
    "foo\u00a0bar\u2003baz\u200bend",
    "",
)
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def load_tokenizer_files(
    path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or hub id, so that it gives the ids of its tokenizer.json (if it has one).

    Raises:
        UserError: the class and the file give different ids, also when the file is loaded without the class.
        OSError, ValueError: the files cannot be read or fetched.
    """
    tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    assert tokenizer is not None
    file = _tokenizer_json(path, revision)
    if file is None or not isinstance(tokenizer, PreTrainedTokenizerFast):
        return tokenizer
    difference = first_difference(tokenizer, file)
    if difference is None:
        return tokenizer
    # without the class: the file as it is, with the settings of tokenizer_config.json
    plain = PreTrainedTokenizerFast.from_pretrained(path, revision=revision or "main")
    remaining = first_difference(plain, file)
    if remaining is not None:
        raise UserError(
            f"the tokenizer of {path!r} does not give the tokens of its own tokenizer.json: {remaining} Make "
            "tokenizer_config.json agree with tokenizer.json (`add_prefix_space`, added tokens), or remove one of them."
        )
    _complete(plain, tokenizer)
    warnings.warn(
        f"{path}: transformers reads this tokenizer as {type(tokenizer).__name__}, which does not give the tokens of its "
        f"tokenizer.json: {difference} tokenizer.json is used, and saved results load as it states.",
        UserWarning,
        stacklevel=3,
    )
    return plain


def first_difference(tokenizer: PreTrainedTokenizerBase, file: Path) -> str | None:
    """Return a sentence about the first string that `tokenizer` and its tokenizer.json split differently, or None.

    The special tokens around a text are compared only if tokenizer_config.json does not state them.
    """
    own = Tokenizer.from_file(str(file))
    own.no_truncation()
    own.no_padding()
    # tokens that tokenizer_config.json adds
    own.add_tokens(
        [token for token in tokenizer.added_tokens_decoder.values() if own.token_to_id(token.content) is None]
    )
    stated = {"add_bos_token", "add_eos_token"} & set(tokenizer.init_kwargs)
    special = [f"a{token.content}b" for token in own.get_added_tokens_decoder().values()]
    for text in (*PROBES, *special):
        for around in (False,) if stated else (False, True):
            expected = own.encode(text, add_special_tokens=around)
            try:
                found = tokenizer(text, add_special_tokens=around, truncation=False, padding=False)["input_ids"]
            # tokenizers raises no narrower class, for a byte without a token for example
            except Exception as error:
                return f"{text!r} cannot be tokenised ({error})."
            if found != expected.ids:
                return _difference(
                    text, [str(tokenizer.convert_ids_to_tokens(index)) for index in found], expected.tokens
                )
    return None


def _difference(text: str, found: list[str], expected: list[str]) -> str:
    """Return the first position where they differ, with two tokens before it and four from it on."""
    part = next(
        (n for n, pair in enumerate(zip(found, expected)) if pair[0] != pair[1]), min(len(found), len(expected))
    )
    found, expected = ((tokens[max(0, part - 2) : part + 4]) for tokens in (found, expected))
    return f"in {text!r}, {expected} becomes {found}."


def _tokenizer_json(path: str, revision: str | None) -> Path | None:
    file = cached_file(path, "tokenizer.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    return None if file is None else Path(file)


def _complete(tokenizer: PreTrainedTokenizerBase, loaded: PreTrainedTokenizerBase) -> None:
    """Copy what the class of `loaded` states and the files do not."""
    for name in _NAMED:
        token = getattr(loaded, name)
        if (
            getattr(tokenizer, name) is None
            and token is not None
            and tokenizer.convert_tokens_to_ids(token) is not None
        ):
            setattr(tokenizer, name, token)
    tokenizer.padding_side, tokenizer.truncation_side = loaded.padding_side, loaded.truncation_side
    tokenizer.model_max_length = loaded.model_max_length
    if tokenizer.chat_template is None:
        tokenizer.chat_template = loaded.chat_template
