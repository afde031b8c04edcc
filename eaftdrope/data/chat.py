"""A conversation as text, written by the tokenizer's chat template, and the position of each answer in that text.

The position of an answer (character offsets [start, end) in the rendering of the whole conversation):

1. A template with `{% generation %}` markers states it (if they match the assistant turns one to one).
2. Otherwise the conversation is rendered up to the turn, with the generation prompt (as at inference), and again
   with the turn; both are prefixes of the whole rendering, and the answer is the difference.
3. If a prefix differs from the whole (some templates rewrite earlier turns: they drop old reasoning), the turn's
   content is replaced by a marker and the two renderings are compared from both ends.

The end includes the token that ends the turn (`<|im_end|>`), so that the model learns to stop; white space after it is
left out, because no model generates it. A turn that only the next one ends (GLM's `<|user|>`) gets the first token of
that. If the text of another message is inside (Gemma 4 writes a tool's result into the turn that called it, and the
turn's own text after that), the answer has several stretches.

Reasoning (`reasoning_content`) is where the template writes it (it may drop that of earlier turns), or before the answer in
<think> if the template has no support for it. A developer turn becomes a system turn if the template has no such role.
`audit.py` checks for each row that nothing else is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eaftdrope.errors import DataError

from .audit import Found, Messages, Tools, audit
from .template import (
    MARKER,
    Template,
    common_prefix,
    one_clock,
    render,
    render_quickly,
    specials_at_start,
    template_of,
    try_render,
)
from .template_limits import bounded
from .tools import as_plain_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Span:
    """An assistant turn in the rendering.

    Args:
        pieces (`tuple[tuple[int, int], ...]`): its stretches of text in order, characters [start, end) each.
        weight (`float`): the turn's weight in the loss; 0 for context, which is not trained.
        stop (`str`, *optional*): the token that ends it.
    """

    pieces: tuple[tuple[int, int], ...]
    weight: float
    stop: str | None


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, its assistant turns in order, and the paths that the template leaves out by design."""

    text: str
    spans: list[Span]
    dropped: tuple[str, ...]


def render_prompt(messages: Messages, tools: Tools, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text that a model receives before its next answer: the same that training rows have before that answer.

    (For all templates except those with `Template.prompt_differs`, of which `build_dataset` warns.) Tokenise it with
    `add_special_tokens=False`: the template has written them.

    Raises:
        DataError: no chat template, or it refuses the conversation.
    """
    template = _template_for(messages, tools, tokenizer)
    messages, tools = _prepare(messages, tools, template)
    return render(tokenizer, template.source, messages, tools=tools, add_generation_prompt=True)


def render_conversation(messages: Messages, tools: Tools, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """Return the whole conversation as text, with its assistant turns in order.

    Raises:
        LostTextError: the template leaves out something that the conversation has.
        DataError: no chat template, it refuses the conversation, or an answer cannot be found in the rendering.
    """
    template = _template_for(messages, tools, tokenizer)
    with one_clock(template.source):
        talk = _Talk(tokenizer, template, messages, tools)
        spans = talk.marked_spans() if template.has_markers else None
        if spans is None:
            spans = [talk.found_span(index) for index in talk.turns]
        return Rendered(talk.text, spans, talk.found.dropped)


def _template_for(messages: Messages, tools: Tools, tokenizer: PreTrainedTokenizerBase) -> Template:
    """Return the template for this conversation: of several named ones `tool_use`, if it writes tools and the row has any."""
    template = template_of(tokenizer, tools=_uses_tools(messages, tools))
    return template if template.has_tools else template_of(tokenizer)


def _uses_tools(messages: Messages, tools: Tools) -> bool:
    return bool(tools) or any(message.get("tool_calls") or message["role"] == "tool" for message in messages)


def _prepare(messages: Messages, tools: Tools, template: Template) -> tuple[Messages, Tools]:
    """Return messages and tools in the form that this template reads."""
    if not template.has_developer_role:
        messages = _developer_as_system(messages)
    if not template.has_tools and _uses_tools(messages, tools):
        messages, tools = as_plain_messages(messages, tools, has_system_role=template.has_system_role), None
    return [template.shaped(message) for message in messages], tools or ([] if template.is_tool_use else None)


def _developer_as_system(messages: Messages) -> Messages:
    """Turn developer turns into system turns; one right after a system turn joins it (templates read only the first)."""
    changed: Messages = []
    for message in messages:
        if message["role"] == "developer":
            if changed and changed[-1]["role"] == "system":
                text = "\n\n".join(filter(None, (changed[-1]["content"], message["content"])))
                changed[-1] = {**changed[-1], "content": text}
                continue
            message = {**message, "role": "system"}
        changed.append(message)
    return changed


class _Talk:
    """One conversation with its template and its rendering."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: Template, messages: Messages, tools: Tools
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.row = messages
        self.messages, self.tools = _prepare(messages, tools, template)
        try:
            self.rendered = self.text = self._write(self.messages, self.tools)
        except DataError as error:
            if any(len(message.get("tool_calls", ())) > 1 for message in self.messages):
                raise DataError(
                    f"{error} (a turn has several calls; if that is it, give each a turn of its own)"
                ) from error
            raise

        def write(messages: Messages, tools: Tools) -> str:
            return render_quickly(tokenizer, template.source, *_prepare(messages, tools, template))

        self.found: Found = audit(messages, tools, self.text, write, template.source)
        if self.found.dropped:
            self._leave_out(messages, tools)
        last = self.messages[-1]
        if template.stop_is_next_turn and last["role"] == "assistant":
            # what the model itself generates to end its turn, and what a longer conversation has there
            self.text += template.stop_after_call if last.get("tool_calls") else template.stop_run
        self.turns = [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]
        # Tool results may have been joined to one turn, assistant turns stay as they are: their indices in the row.
        self.row_index = dict(
            zip(self.turns, (i for i, message in enumerate(messages) if message["role"] == "assistant"))
        )

    def _leave_out(self, messages: Messages, tools: Tools) -> None:
        """Leave out the reasoning that the template leaves out too: more prefixes then match the rendering."""
        bare = [
            {name: value for name, value in message.items() if name != "reasoning_content"}
            if f"messages[{index}].reasoning_content" in self.found.dropped
            else message
            for index, message in enumerate(messages)
        ]
        prepared = _prepare(bare, tools, self.template)
        if self._write(*prepared) == self.rendered:
            self.messages, self.tools = prepared

    def marked_spans(self) -> list[Span] | None:
        """Return the spans of the template's own `{% generation %}` blocks; None if they do not match the turns."""
        from transformers.utils.chat_template_utils import render_jinja_template

        with bounded(self.tokenizer):
            rendered, marked = render_jinja_template(
                conversations=[self.messages],
                tools=self.tools,
                chat_template=self.template.source,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        blocks = [(start, end) for start, end in marked[0] if end > start]
        if rendered[0] != self.rendered or len(blocks) != len(self.turns):
            return None
        return [self._span(index, start, end) for index, (start, end) in zip(self.turns, blocks)]

    def found_span(self, index: int) -> Span:
        """Find the span of assistant turn `index`, by rules 2 and 3."""
        start = end = None
        if index:
            prompt = self._try(self.messages[:index], add_generation_prompt=True)
            start = len(prompt) if prompt and self.text.startswith(prompt) else None
        if index == len(self.messages) - 1:
            # A template may write more after the last turn (a generation prompt that was not requested).
            end = len(self.text.removesuffix(self.template.after_stop))
        else:
            so_far = self._try(self.messages[: index + 1])
            end = len(so_far) if so_far and self.text.startswith(so_far) else None
        if start is None or end is None or end <= start:
            inner_start, inner_end = self._compared(index)
            start = inner_start if start is None or start > inner_start else start
            end = inner_end if end is None or end < inner_end else end
        return self._span(index, start, end)

    def _compared(self, index: int) -> tuple[int, int]:
        """Return the characters of the rendering that belong to message `index`: those that change with its content."""
        text = self.rendered
        marker = self.template.shaped({"role": "assistant", "content": MARKER})
        changed = self._try([*self.messages[:index], marker, *self.messages[index + 1 :]])
        same_before = common_prefix(text, changed)
        same_after = common_prefix(text[same_before:][::-1], changed[same_before:][::-1])
        if not changed[: len(changed) - same_after].endswith(MARKER):
            raise DataError(
                f"cannot find the answer of message {index} in the chat template's rendering, so it cannot "
                "be masked. Use a template with {% generation %} markers, or bring the data as prompt and completion "
                "strings."
            )
        return same_before, len(text) - same_after

    def _span(self, index: int, start: int, end: int) -> Span:
        """Return the span with its stop token, without white space after it and without the values of other messages inside.

        The stop token is the special token that the span ends in, or the template's own stop right behind the span (a
        template's markers may leave it out).
        """
        inside = self.text[start:end].rstrip()
        behind = self.text[end:].lstrip()
        stop = self.template.stop_at_end(inside)
        run = self._stop_behind(behind)
        if stop and not (run and self.template.stop_is_next_turn):
            end = start + len(inside)
        elif run:
            end = len(self.text) - len(behind) + len(run)
            stop = self.template.stop_at_end(run)
        return Span(self._pieces(index, start, end), self.messages[index].get("weight", 1), stop or None)

    def _stop_behind(self, behind: str) -> str:
        """Return what ends a turn at the beginning of `behind`, the text after it; or ""."""
        template = self.template
        if template.stop_is_next_turn:
            return next(iter(specials_at_start(behind, template.specials)), "")
        return next((run for run in (template.stop_run, template.stop_between) if run and behind.startswith(run)), "")

    def _pieces(self, index: int, start: int, end: int) -> tuple[tuple[int, int], ...]:
        """Return [start, end) without the stretches that contain other messages' values."""
        own = self.row_index[index]
        if self.found.places is None:
            behind = self.row[own + 1] if own + 1 < len(self.row) else {"role": ""}
            if behind["role"] == "tool" and behind["content"].strip() in self.text[start:end]:
                raise DataError(
                    f"cannot separate the tool's result from the rest of turn {own}, into which the chat template writes it. "
                    "Leave private-use characters out of the row, or use another template."
                )
            return ((start, end),)
        places = [place for place in self.found.places if start <= place.start < end]
        if all(place.message == own for place in places):
            return ((start, end),)
        # The part that is the same when nothing follows yet is the model's own.
        alone = common_prefix(self.text, self._try(self.messages[: index + 1]))
        pieces = []
        reached = begin = start
        for place in places:
            if place.message == own:
                begin = place.start if begin is None else begin
                reached = max(reached, place.end)
            elif begin is not None:
                pieces.append((begin, min(max(reached, alone), place.start)))
                begin = None
        if begin is not None:
            pieces.append((begin, end))
        return tuple((start, end) for start, end in pieces if end > start)

    def _write(self, messages: Messages, tools: Tools) -> str:
        return render(self.tokenizer, self.template.source, messages, tools=tools)

    def _try(self, messages: Messages, **options: Any) -> str:
        return try_render(self.tokenizer, self.template.source, messages, tools=self.tools, **options)
