"""An `Example` as token ids and labels.

The text is tokenised once, whole, so the ids are those that a model sees at inference; character offsets decide which of
them are trained. A token that covers a trained character is trained, also if it begins before the answer (`" yes"` after
`"Answer:"`) or covers one of several bytes of a character.

| `train_on`       | messages                                           | prompt and completion | text       |
|------------------|----------------------------------------------------|-----------------------|------------|
| `assistant`      | every assistant turn whose weight is not 0         | the completion        | everything |
| `last_assistant` | the last assistant turn, if its weight is not 0    | the completion        | everything |
| `completion`     | the assistant turns after the last user turn       | the completion        | everything |
| `all`            | everything                                         | everything            | everything |

`weights.py` has the weights of the trained tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from eaftdrope.errors import DataError

from .chat import render_conversation, render_prompt
from .formats import Example
from .weights import Extent, TokenWeights, check_exempt, weigh_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAIN_ON = ("assistant", "last_assistant", "completion", "all")
IGNORED = -100
_NO_SPAN = (sys.maxsize, sys.maxsize)


@dataclass(frozen=True)
class Encoded:
    """One row, ready for a causal language model.

    Args:
        input_ids (`list[int]`): at most `max_length` ids; the rest is cut off.
        labels (`list[int]`): the id if the token is trained, else -100. Same length, not shifted.
        truncated (`bool`): the end was cut off.
        stop (`str`, *optional*): the token at the end of the last trained answer, if it is among the trained ones.
        is_conversation (`bool`): the chat template wrote it.
        dropped (`tuple[str, ...]`): paths that the template leaves out by design, `messages[1].reasoning_content`: the
            reasoning of earlier turns, which the model does not see at inference either.
        weights ([`TokenWeights`]): of the tokens.
    """

    input_ids: list[int]
    labels: list[int]
    truncated: bool
    stop: str | None
    is_conversation: bool
    dropped: tuple[str, ...] = ()
    weights: TokenWeights = field(default_factory=TokenWeights)

    @property
    def trained_tokens(self) -> int:
        """Number of labels that count in the loss: the first token is predicted from nothing, so its label never does."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True)
class _Tokens:
    """A whole row: its text, its ids, their labels, the characters that each covers, the pieces of its text that have a
    weight of their own (begin, end, weight), and position and text of the last trained answer's stop token."""

    text: str
    input_ids: list[int]
    labels: list[int]
    extents: list[Extent]
    pieces: list[tuple[int, int, float]]
    stop_at: int | None = None
    stop: str | None = None


def encode(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    *,
    train_on: str = "assistant",
    max_length: int | None = 1024,
    exempt: Sequence[str] = (),
) -> Encoded:
    """Encode `example` as ids and labels; the table above lists what is trained. `exempt` are strings whose tokens are
    exempt from the gate.

    A prompt-completion or text example ends in the tokenizer's end-of-sequence token, which is trained.

    Raises:
        LostTextError: the chat template leaves out something that the row has.
        DataError: the chat template refuses the conversation, an answer cannot be found in it, the text cannot be
            tokenised, or the tokenizer is a slow one.
    """
    if train_on not in TRAIN_ON:
        raise DataError(f"train_on {train_on!r} is not one of {', '.join(TRAIN_ON)}.")
    check_exempt(exempt)
    dropped: tuple[str, ...] = ()
    if example.messages is not None:
        row, dropped = _encode_messages(example, tokenizer, train_on)
    else:
        row = _encode_text(example, tokenizer, train_on, needs_extents=bool(exempt))
    input_ids, labels = row.input_ids, row.labels if example.weight else [IGNORED] * len(row.labels)
    truncated = max_length is not None and len(input_ids) > max_length
    if truncated:
        input_ids, labels = input_ids[:max_length], labels[:max_length]
    stop_kept = row.stop_at is not None and row.stop_at < len(labels) and labels[row.stop_at] != IGNORED
    weights = weigh_tokens(
        labels, row.extents, row.text, weight=example.weight, pieces=row.pieces, exempt=list(dict.fromkeys(exempt))
    )
    stop = row.stop if stop_kept else None
    return Encoded(input_ids, labels, truncated, stop, example.messages is not None, dropped, weights)


def encode_prompt(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that a model receives to produce the example's last answer or completion: the start of the training row.

    Raises:
        DataError: as `encode`, or the example is a text, which has no prompt.
    """
    if example.messages is not None:
        text = render_prompt(example.prompt_messages, example.tools, tokenizer)
        return _tokenise(tokenizer, text, add_special_tokens=False)[0]
    if example.prompt is None:
        raise DataError(f"{example.origin or 'the example'}: a text has no prompt.")
    ids, _ = _tokenise(tokenizer, example.prompt, add_special_tokens=True)
    ids = ids[_doubled_start(ids, example.prompt, tokenizer) :]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _encode_messages(
    example: Example, tokenizer: PreTrainedTokenizerBase, train_on: str
) -> tuple[_Tokens, tuple[str, ...]]:
    """Return a conversation, and what the template leaves out of it."""
    messages = example.messages
    assert messages is not None
    rendered = render_conversation(messages, example.tools, tokenizer)
    text, spans = rendered.text, rendered.spans
    input_ids, extents = _tokenise(tokenizer, text, add_special_tokens=False)
    if train_on == "last_assistant":
        spans = spans[-1:]
    elif train_on == "completion":
        roles = [message["role"] for message in messages]
        last_user = len(roles) - roles[::-1].index("user") if "user" in roles else 0
        spans = spans[len(spans) - roles[last_user:].count("assistant") :]
    chosen = spans if train_on == "all" else [span for span in spans if span.weight]
    if train_on == "all":
        _refuse_weights(messages)
    pieces = [(*piece, span.weight) for span in chosen for piece in span.pieces if span.weight]
    trained = [(0, len(text))] if train_on == "all" else [piece for span in chosen for piece in span.pieces]
    labels = _labels(input_ids, extents, trained)
    last = chosen[-1] if chosen else None
    row = _Tokens(text, input_ids, labels, extents, pieces)
    if last is None or last.stop is None:
        return row, rendered.dropped
    stop_end = last.pieces[-1][1]
    stop_at = next(position for position, (_, end) in enumerate(extents) if end >= stop_end)
    return replace(row, stop_at=stop_at, stop=last.stop), rendered.dropped


def _refuse_weights(messages: list[dict[str, Any]]) -> None:
    for index, message in enumerate(messages):
        if message.get("weight", 1) not in (0, 1):
            raise DataError(
                f"messages[{index}] has weight {message['weight']:g}, and train_on: all trains every token alike. Use "
                "train_on: assistant, or leave the weight out"
            )


def _encode_text(
    example: Example, tokenizer: PreTrainedTokenizerBase, train_on: str, *, needs_extents: bool
) -> _Tokens:
    """Return a row of strings.

    If the text itself begins or ends with the token that the tokenizer would add, only one is kept; white space after a
    text's own end-of-sequence token is left out, because no model generates it.
    """
    prompt = example.prompt or ""
    rest = example.completion if example.text is None else example.text
    assert rest is not None
    text = prompt + rest
    everything = train_on == "all" or example.text is not None
    end = getattr(tokenizer, "eos_token", None)
    has_end = end is not None and len(stripped := text.rstrip()) > len(prompt) and stripped.endswith(end)
    text = stripped if has_end else text
    input_ids, extents = _tokenise(tokenizer, text, add_special_tokens=True, offsets=needs_extents or not everything)
    labels = list(input_ids) if everything else _labels(input_ids, extents, [(len(prompt), len(text))])
    eos = tokenizer.eos_token_id
    doubled = _doubled_start(input_ids, text, tokenizer)
    input_ids, labels, extents = input_ids[doubled:], labels[doubled:], extents[doubled:]
    if eos is None:
        return _Tokens(text, input_ids, labels, extents, [])
    if has_end and input_ids[-2:] == [eos, eos]:
        input_ids, labels = input_ids[:-1], labels[:-1]
    if input_ids and input_ids[-1] == eos:
        labels[-1] = eos
    else:
        input_ids, labels = [*input_ids, eos], [*labels, eos]
    if extents and not has_end:
        # the token that was added has its characters at the end of the text
        extents = [*extents[: len(input_ids) - 1], (len(text), len(text) + len(end))]
        text += end
    return _Tokens(text, input_ids, labels, extents, [], len(labels) - 1, end)


def _doubled_start(input_ids: list[int], text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return 1 if the tokenizer put its first token in front of a text that begins with it, else 0."""
    bos, begins = tokenizer.bos_token, 0
    while bos and text.startswith(bos, begins * len(bos)):
        begins += 1
    return int(begins > 0 and input_ids[: begins + 1] == [tokenizer.bos_token_id] * (begins + 1))


def _labels(input_ids: list[int], extents: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[int]:
    """Return the ids of the tokens that cover a character of a span, else -100; spans are in order and do not overlap."""
    labels = [IGNORED] * len(input_ids)
    rest = iter(spans)
    span_start, span_end = next(rest, _NO_SPAN)
    for position, (begin, end) in enumerate(extents):
        while span_end <= begin:
            span_start, span_end = next(rest, _NO_SPAN)
        if span_start < end and end > 0:
            labels[position] = input_ids[position]
    return labels


def _tokenise(
    tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool, offsets: bool = True
) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the ids of `text`, and the characters [begin, end) that each token covers.

    A token added in front covers (0, 0) or less. Without `offsets`, which cost more than half of the time, no characters are
    returned.

    A token covers the characters from the end of the previous one (or from its own last character, if several tokens share
    one character) to its own end; a special token that swallows white space around it (`rstrip`, `lstrip`) covers its own
    text only.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text holds half a character (a lone surrogate, {text[error.start]!r}), which cannot be tokenised. "
            "Repair the row: it was cut in the middle of an emoji or wrongly decoded."
        ) from error
    if not tokenizer.is_fast:
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__!r} gives no character offsets (a slow "
            "tokenizer), so the answers cannot be separated from the rest. Load its fast version (a folder or repository "
            "with tokenizer.json), or convert it once with transformers' convert_slow_tokenizer."
        )
    encoding = tokenizer(
        text, add_special_tokens=add_special_tokens, return_offsets_mapping=offsets, truncation=False, verbose=False
    )
    input_ids = encoding["input_ids"]
    if not offsets:
        return input_ids, []
    swallowing = _swallowing(tokenizer)
    extents: list[tuple[int, int]] = []
    before = 0
    for token, (begin, end) in zip(input_ids, encoding["offset_mapping"]):
        if token in swallowing and (own := text.find(swallowing[token], begin, end)) >= 0:
            begin, end = own, own + len(swallowing[token])
            extents.append((max(before, begin), end))
        else:
            # Some tokenizers give white space and added tokens an empty span; they end at its position.
            end = max(begin, end, before)
            extents.append((min(before, end - 1), end))
        before = end
    return input_ids, extents


_known_swallowing: WeakKeyDictionary[Any, tuple[int, dict[int, str]]] = WeakKeyDictionary()


def _swallowing(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return ids and texts of the added tokens that include the white space beside them in their offsets."""
    size = len(tokenizer)
    known = _known_swallowing.get(tokenizer)
    if known is None or known[0] != size:
        added = tokenizer.added_tokens_decoder.items()
        known = (size, {number: token.content for number, token in added if token.rstrip or token.lstrip})
        _known_swallowing[tokenizer] = known
    return known[1]
