"""A conversation as text through the tokenizer's chat template, and where in that text each answer stands.

Where an answer stands (character offsets [start, end) in the rendering of the whole conversation):

1. A template with `{% generation %}` markers says so itself (if they stand one to one for the assistant turns).
2. Otherwise the conversation is rendered up to the turn, with the generation prompt (what a model is given at inference),
   and again with the turn; both are prefixes of the whole rendering, and the answer is the difference.
3. Where a prefix differs from the whole (some templates rewrite earlier turns: they drop old reasoning), the turn's
   content is replaced by a marker and the two renderings are compared from both ends.

The end includes the token that ends the turn (`<|im_end|>`), so that the model learns to stop; white space after it is
left out, because no model gets to generate it. Turns that only the next one ends (GLM's `<|user|>`) are given its first
token.

Reasoning (`reasoning_content`) goes where the template writes it, which may drop that of earlier turns; before the answer,
in <think>, if the template knows nothing of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eaftdrope.data.template import MARKER, Template, common_prefix, render, template_of, try_render
from eaftdrope.data.tools import as_plain_messages
from eaftdrope.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Span:
    """An assistant turn in the rendering: characters [start, end), whether it is to be trained, and its stop token."""

    start: int
    end: int
    trained: bool
    stop: str | None


def render_prompt(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, tokenizer: PreTrainedTokenizerBase
) -> str:
    """The text a model is given before its next answer: the text that training rows have before that answer.

    (For all templates but those with `Template.prompt_differs`, of which `build_dataset` warns.) Tokenise it with
    `add_special_tokens=False`: the template has written them.

    Raises:
        DataError: no chat template, or it refuses the conversation.
    """
    messages, tools = _prepare(messages, tools, template_of(tokenizer))
    return render(tokenizer, messages, tools=tools, add_generation_prompt=True)


def render_conversation(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[Span]]:
    """The whole conversation as text, and its assistant turns in order.

    Raises:
        DataError: no chat template, it refuses the conversation, or an answer cannot be found in the rendering.
    """
    talk = _Talk(tokenizer, messages, tools)
    spans = talk.marked_spans() if talk.template.has_markers else None
    return talk.text, [talk.found_span(index) for index in talk.turns] if spans is None else spans


def _prepare(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, template: Template
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Messages and tools as this template takes them."""
    uses_tools = bool(tools) or any(message.get("tool_calls") or message["role"] == "tool" for message in messages)
    if uses_tools and not template.has_tools:
        messages, tools = as_plain_messages(messages, tools, has_system_role=template.has_system_role), None
    elif not template.has_parallel_calls and any(len(message.get("tool_calls", ())) > 1 for message in messages):
        raise DataError(
            "the chat template writes only one call in a turn, and this conversation has a turn with more. Give each "
            "call a turn of its own, or set a chat template that can."
        )
    return [template.shaped(message) for message in messages], tools or None


class _Talk:
    """One conversation, its rendering, and what the template can do."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template_of(tokenizer)
        self.messages, self.tools = _prepare(messages, tools, self.template)
        self.rendered = self.text = render(tokenizer, self.messages, tools=self.tools)
        if self.template.stop_is_next_turn and self.messages[-1]["role"] == "assistant":
            # what the model itself says to end its turn, and what a longer conversation has there
            self.text += self.template.stop_run
        self.turns = [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]

    def marked_spans(self) -> list[Span] | None:
        """Spans of the template's own `{% generation %}` blocks; None if they do not stand one to one for the turns."""
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered, marked = render_jinja_template(
            conversations=[self.messages],
            tools=self.tools,
            chat_template=self.tokenizer.get_chat_template(tools=self.tools),
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        blocks = [(start, end) for start, end in marked[0] if end > start]
        if rendered[0] != self.rendered or len(blocks) != len(self.turns):
            return None
        return [self._span(index, start, end) for index, (start, end) in zip(self.turns, blocks)]

    def found_span(self, index: int) -> Span:
        """The span of assistant turn `index`, by rules 2 and 3."""
        start = end = None
        if index:
            prompt = self._try(self.messages[:index], add_generation_prompt=True)
            start = len(prompt) if prompt and self.text.startswith(prompt) else None
        if index == len(self.messages) - 1:
            # A template may write more behind the last turn (a generation prompt that nobody asked for).
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
        """Characters of the rendering that stand for message `index`: those that change when its content does."""
        text = self.text
        marker = self.template.shaped({"role": "assistant", "content": MARKER})
        changed = self._try([*self.messages[:index], marker, *self.messages[index + 1 :]])
        same_before = common_prefix(text, changed)
        same_after = common_prefix(text[same_before:][::-1], changed[same_before:][::-1])
        if not changed[: len(changed) - same_after].endswith(MARKER):
            raise DataError(
                f"cannot find where the answer of message {index} stands in the chat template's rendering, so it cannot "
                "be masked. Use a template with {% generation %} markers, or bring the data as prompt and completion "
                "strings."
            )
        return same_before, len(text) - same_after

    def _span(self, index: int, start: int, end: int) -> Span:
        """The span with its stop token, without white space behind it.

        The stop token is the special token that the span ends in, or the template's own stop right behind the span (a
        template's markers may leave it out).
        """
        template = self.template
        inside = self.text[start:end].rstrip()
        behind = self.text[end:].lstrip()
        stop = template.stop_at_end(inside)
        if stop:
            end = start + len(inside)
        elif template.stop_run and behind.startswith(template.stop_run):
            end = len(self.text) - len(behind) + len(template.stop_run)
            stop = template.stop_at_end(template.stop_run)
        return Span(start, end, self.messages[index].get("weight", 1) != 0, stop or None)

    def _try(self, messages: list[dict[str, Any]], **options: Any) -> str:
        return try_render(self.tokenizer, messages, tools=self.tools, **options)
