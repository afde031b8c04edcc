"""The tokenizer that a GGUF file describes: its vocabulary and merges, with the pre-tokenizer that the file states.

- byte-level (`gpt2`): built here, split as `tokenizer.ggml.pre` states; an unknown name is refused
- SentencePiece (`llama`): merges as transformers recovers them from the scores; a space is put in front of the text and of
  what follows a special token, unless `add_space_prefix` is false, as in llama.cpp and in Llama 2's tokenizer.json
- any other: as transformers reads it

A GGUF does not state Unicode normalisation, and none is applied. The class is `PreTrainedTokenizerFast` in each case:
under the name of a model family, transformers replaces the pre-tokenizer by that of the family when it reads the files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from eaftdrope.errors import UserError

from .patterns import PRE_TOKENIZERS, Cut

# of `tokenizer.ggml.token_type`
_CONTROL, _USER_DEFINED = 3, 4
_NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
# transformers has builders of its own for these SentencePiece families
_OWN_SENTENCEPIECE = ("gemma", "gemma2", "gemma3")


def read_tokenizer(gguf: Path) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """Return the tokenizer of a GGUF file, and the ids that end a turn (end of sequence, and end of turn if different).

    Raises:
        UserError: the file's pre-tokenizer is unknown or not stated.
    """
    fields = _fields(gguf)
    kind = fields["tokenizer.ggml.model"]
    bos = kind == "llama"
    if kind == "gpt2":
        cut = _cut(gguf, fields)
        backend, bos = _byte_level(fields, cut), cut.bos
    else:
        backend = _as_transformers_reads_it(gguf)
        if kind == "llama" and fields["general.architecture"] not in _OWN_SENTENCEPIECE:
            _put_spaces(backend, prefix=fields.get("tokenizer.ggml.add_space_prefix", True))
    tokens = fields["tokenizer.ggml.tokens"]
    ids = {name: fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in _NAMED.items()}
    named = {name: tokens[index] for name, index in ids.items() if index is not None}
    template = _template(fields)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        # written into the files, so that they are read as they were built
        add_bos_token=bool(fields.get("tokenizer.ggml.add_bos_token", bos)) and "bos_token" in named,
        add_eos_token=bool(fields.get("tokenizer.ggml.add_eos_token", False)) and "eos_token" in named,
        clean_up_tokenization_spaces=False,
        **{"bos_token": None, "eos_token": None, "unk_token": None, "pad_token": None, **named},
        **({"chat_template": template} if template else {}),
    )
    ends = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    return tokenizer, list(dict.fromkeys(index for index in ends if index is not None))


def _fields(gguf: Path) -> dict[str, Any]:
    """Read the file's metadata of its architecture and its tokenizer."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    wanted = ("general.architecture", "tokenizer.")
    return {name: field.contents() for name, field in reader.fields.items() if name.startswith(wanted)}


def _template(fields: dict[str, Any]) -> str | dict[str, str] | None:
    """Return the chat template, or all of them by name if the file has several."""
    prefix = "tokenizer.chat_template."
    default = fields.get("tokenizer.chat_template")
    named = {name.removeprefix(prefix): text for name, text in fields.items() if name.startswith(prefix)}
    return {"default": default, **named} if named and default else default


def _cut(gguf: Path, fields: dict[str, Any]) -> Cut:
    name = fields.get("tokenizer.ggml.pre")
    if name in PRE_TOKENIZERS:
        return PRE_TOKENIZERS[name]
    stated = "does not state its pre-tokenizer" if name is None else f"has the unknown pre-tokenizer {name!r}"
    raise UserError(
        f"{gguf.name} {stated} (tokenizer.ggml.pre): without it, text would be split into other tokens than those that "
        "the model was trained on. Use the folder or hub id that the file was made from (safetensors with tokenizer.json), "
        "or a GGUF file that a recent llama.cpp made."
    )


def _byte_level(fields: dict[str, Any], cut: Cut) -> Tokenizer:
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=cut.whole_words))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in cut.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = fields.get("tokenizer.ggml.token_type", [])
    for kind, add in ((_CONTROL, tokenizer.add_special_tokens), (_USER_DEFINED, tokenizer.add_tokens)):
        add([AddedToken(t, normalized=False, special=kind == _CONTROL) for t, own in zip(tokens, types) if own == kind])
    return tokenizer


def _as_transformers_reads_it(gguf: Path) -> Tokenizer:
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    assert isinstance(tokenizer, PreTrainedTokenizerFast), "transformers builds a fast tokenizer from a GGUF file"
    return tokenizer.backend_tokenizer


def _put_spaces(tokenizer: Tokenizer, *, prefix: bool) -> None:
    """Replace spaces by SentencePiece's letter for them; with `prefix`, put one in front of the text."""
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = None
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
