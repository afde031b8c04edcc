"""Capabilities of a tokenizer's chat template, found by rendering a canary through it, never by its name.

Templates silently drop what they do not support: SmolLM2's drops tools and calls, those of vision models a content that is a
plain string, Gemma 4's the reasoning of a turn that does not call. The canary decides the form in which the template
receives a conversation; `audit.py` checks row by row whether the template then wrote all of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from eaftdrope.errors import ChatTemplateError, DataError, TemplateLimitError

from .template_limits import bounded, named

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Private-use characters: no template reads them, no real text begins or ends with them.
MARKER = "\ue0f0turn\ue0f1"
# Replaces "</think>" in a template that cuts off what is in front of that.
_CLOSE_THOUGHT = "\ue0f2"
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# The inline form of reasoning: (white space and <think>, the thought, </think> and white space, the answer).
THOUGHT = re.compile(r"\A(\s*(?:<think>)?\s*)(.*?)(\s*</think>\s*)(.*)\Z", re.DOTALL)
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_CANARY_TOOL = {
    "type": "function",
    "function": {
        "name": "canary_tool",
        "description": "canary description",
        "parameters": {"type": "object", "properties": {"canary_argument": {"type": "string", "description": "x"}}},
    },
}
_ASK = {"role": "user", "content": "canary question"}


@dataclass(frozen=True)
class Template:
    """The capabilities of one chat template.

    Args:
        source (`str`): the template itself.
        is_tool_use (`bool`): it is the one of several named templates for conversations with tools: it receives an empty
            list if the row has no definitions.
        has_tools (`bool`): tools, calls and results all appear in the rendering: the template's own way is used.
        arguments_as_text (`bool`): the template reads a call's `arguments` as a JSON string, not as an object.
        content_as_parts (`bool`): it reads content as a list of parts, `[{"type": "text", "text": ...}]`.
        has_system_role (`bool`): a system turn appears in the rendering.
        has_developer_role (`bool`): so does a developer turn.
        reasoning_key (`str`, *optional*): the key under which the reasoning of a turn without calls appears.
        reasoning_key_beside_calls (`str`, *optional*): the same for a turn that calls.
        cuts_thoughts (`bool`): it drops the part of a content in front of `</think>`.
        has_markers (`bool`): it has `{% generation %}` blocks.
        stop (`str`, *optional*): the special token right after an answer, such as `<|im_end|>`.
        stop_run (`str`): that and those right after it (Cohere's turns end in two); "" if there is no stop.
        stop_between (`str`): the end of an answer that is not the last turn, if that is another token (gpt-oss); else "".
        stop_is_next_turn (`bool`): the turns of GLM have no end of their own: they are stopped by the special token that
            the next turn begins with, which is `stop` here.
        stop_after_call (`str`): that token after a turn that calls; "" unless `stop_is_next_turn`.
        after_stop (`str`): the text that the template writes after the stop of the last turn, such as a line break.
        prompt_differs (`str`): the end of the generation prompt, if answered conversations do not begin with it; else "".
        specials (`tuple[str, ...]`): the text of every special token, longest first.
    """

    source: str
    is_tool_use: bool
    has_tools: bool
    arguments_as_text: bool
    content_as_parts: bool
    has_system_role: bool
    has_developer_role: bool
    reasoning_key: str | None
    reasoning_key_beside_calls: str | None
    cuts_thoughts: bool
    has_markers: bool
    stop: str | None
    stop_run: str
    stop_between: str
    stop_is_next_turn: bool
    stop_after_call: str
    after_stop: str
    prompt_differs: str
    specials: tuple[str, ...]

    def shaped(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return `message` with reasoning, content and arguments in the form that this template reads."""
        if message["role"] == "assistant":
            message = self._with_reasoning(message)
        if self.arguments_as_text and message.get("tool_calls"):
            calls = [
                {**call, "function": {**call["function"], "arguments": _json(call["function"]["arguments"])}}
                for call in message["tool_calls"]
            ]
            message = {**message, "tool_calls": calls}
        return _in_parts(message) if self.content_as_parts else message

    def _with_reasoning(self, message: dict[str, Any]) -> dict[str, Any]:
        """Put reasoning under the key that the template reads for such a turn; without one, in <think> before the content."""
        key = self.reasoning_key_beside_calls if message.get("tool_calls") else self.reasoning_key
        thought, content = message.get("reasoning_content"), message["content"]
        if not thought and key and self.cuts_thoughts and (found := THOUGHT.match(content)):
            thought, content = found[2], found[4]
        if thought:
            message = {name: value for name, value in message.items() if name != "reasoning_content"}
            if key:
                return {**message, "content": content, key: thought}
            content = f"<think>\n{thought.strip()}\n</think>\n\n{content}"
        if self.cuts_thoughts:
            content = content.replace("</think>", _CLOSE_THOUGHT)
        return {**message, "content": content}

    def stop_at_end(self, text: str) -> str:
        """Return the special token that `text` ends in, or ""."""
        return next((special for special in self.specials if text.endswith(special)), "")


_known: WeakKeyDictionary[Any, dict[tuple[str, bool, str | None], Template]] = WeakKeyDictionary()


def template_of(tokenizer: PreTrainedTokenizerBase, *, tools: bool = False) -> Template:
    """Return the capabilities of the tokenizer's chat template (found once per tokenizer and template).

    Of several named templates, `tool_use` is tested with `tools` (a conversation with tools, calls or results), and `default`
    otherwise.

    Raises:
        ChatTemplateError: the tokenizer has no chat template, or the template drops the assistant's text.
    """
    if not tokenizer.chat_template:
        raise ChatTemplateError(
            f"the tokenizer {named(tokenizer)} has no chat template, so a conversation cannot be written as text. Use the "
            "tokenizer of an instruct model, set tokenizer.chat_template, or bring the data as prompt and completion "
            "strings (format prompt_completion)."
        )
    try:
        source = tokenizer.get_chat_template(tools=[] if tools else None)
    except ValueError as error:
        raise ChatTemplateError(f"the tokenizer {named(tokenizer)}: {error}") from error
    is_tool_use = tools and isinstance(tokenizer.chat_template, dict) and "tool_use" in tokenizer.chat_template
    templates = _known.setdefault(tokenizer, {})
    key = (source, is_tool_use, tokenizer.eos_token)
    if key not in templates:
        templates[key] = _Canary(tokenizer, source, is_tool_use).template()
    return templates[key]


def render(
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    messages: list[dict[str, Any]],
    *,
    tools: list[dict[str, Any]] | None = None,
    add_generation_prompt: bool = False,
) -> str:
    """Render the conversation through the chat template `source`, as text.

    Raises:
        DataError: the template refuses it or fails on it; the message has the template's own words.
    """
    try:
        with bounded(tokenizer):
            text = tokenizer.apply_chat_template(
                messages, chat_template=source, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
            )
    # A template is a program that came with the model: it may raise anything (ZeroDivisionError, RecursionError, ...).
    except Exception as error:
        raise _refusal(error, tokenizer) from error
    assert isinstance(text, str)
    return text.replace(_CLOSE_THOUGHT, "</think>")


def _refusal(error: Exception, tokenizer: PreTrainedTokenizerBase) -> DataError:
    from jinja2 import TemplateError

    if isinstance(error, TemplateLimitError):
        raise error
    if isinstance(error, TemplateError):
        return DataError(f"the chat template refuses this conversation: {error}")
    what = f"the chat template of {named(tokenizer)} fails on this conversation"
    return DataError(f"{what} ({type(error).__name__}: {error})")


def render_quickly(tokenizer: PreTrainedTokenizerBase, source: str, messages: list[dict[str, Any]], tools: Any) -> str:
    """Render without the copies and checks of `apply_chat_template`, for text that is compared with its result.

    Raises:
        DataError: as `render`.
    """
    if any(key in message for message in messages for key in _REASONING_KEYS):
        # apply_chat_template copies the reasoning to the other keys
        return render(tokenizer, source, messages, tools=tools)
    from transformers.utils.chat_template_utils import _compile_jinja_template

    given = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": False}
    try:
        with bounded(tokenizer):
            text = _compile_jinja_template(source).render(**given, **tokenizer.special_tokens_map)
    except Exception as error:
        raise _refusal(error, tokenizer) from error
    return text.replace(_CLOSE_THOUGHT, "</think>")


def try_render(tokenizer: PreTrainedTokenizerBase, source: str, messages: list[dict[str, Any]], **options: Any) -> str:
    """Render, or return "" if the template refuses the conversation."""
    try:
        return render(tokenizer, source, messages, **options)
    except DataError:
        return ""


@contextmanager
def one_clock(source: str) -> Iterator[None]:
    """Fix the time of day that the template reads: renderings of one row must not differ in anything else."""
    if "strftime_now" not in source:
        yield
        return
    from transformers.utils.chat_template_utils import _compile_jinja_template

    names = _compile_jinja_template(source).globals
    now = datetime.now()
    names["strftime_now"] = lambda format: now.strftime(format)
    try:
        yield
    finally:
        names.pop("strftime_now", None)


# --- the canary -------------------------------------------------------------------------------------------------------


class _Canary:
    """Made-up conversations rendered through one template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: str, is_tool_use: bool) -> None:
        self.tokenizer = tokenizer
        self.source = source
        self.no_tools: list[dict[str, Any]] | None = [] if is_tool_use else None
        self.in_parts = False

    def template(self) -> Template:
        """Find all capabilities.

        Raises:
            ChatTemplateError: the template drops the assistant's text, or refuses one question and one answer.
        """
        with one_clock(self.source):
            answered = self._answered()
            specials = _specials(self.tokenizer)
            before, _, tail = answered.partition(MARKER)
            run = specials_at_start(tail, specials, self.tokenizer.eos_token)
            between = self._between(specials)
            begins = between[:1] if not run else []
            begins = [token for token in begins if token != self.tokenizer.bos_token]
            has_tools, as_text = self._tool_support()
            prompt = self._text(_ASK, add_generation_prompt=True)
            return Template(
                source=self.source,
                is_tool_use=self.no_tools is not None,
                has_tools=has_tools,
                arguments_as_text=as_text,
                content_as_parts=self.in_parts,
                has_system_role=self._has_role("system"),
                has_developer_role=self._has_role("developer"),
                reasoning_key=self._reasoning_key({}),
                reasoning_key_beside_calls=(
                    self._reasoning_key({"content": "", "tool_calls": _calls(as_text)}) if has_tools else None
                ),
                cuts_thoughts=self._cuts_thoughts(),
                has_markers=bool(_GENERATION.search(self.source)),
                stop=next(iter(run or begins), None),
                stop_run="".join(run or begins),
                # A single token between an answer and the next turn is the head of that turn, not the answer's end.
                stop_between=between[0] if run and len(between) > 1 and between[: len(run)] != run else "",
                stop_is_next_turn=bool(begins),
                stop_after_call=self._after_call(as_text, specials) if begins and has_tools else "",
                after_stop=tail.lstrip().removeprefix("".join(run)) if run else "",
                prompt_differs="" if before.startswith(prompt) else prompt[common_prefix(prompt, before) :],
                specials=specials,
            )

    def _text(self, *messages: dict[str, Any], **options: Any) -> str:
        talk = [_in_parts(message) for message in messages] if self.in_parts else list(messages)
        return try_render(self.tokenizer, self.source, talk, **{"tools": self.no_tools, **options})

    def _answered(self) -> str:
        """Render a question with the marker as its answer, and find out whether content must be in parts."""
        talk = [_ASK, {"role": "assistant", "content": MARKER}]
        reason = ""
        try:
            text = render(self.tokenizer, self.source, talk, tools=self.no_tools)
        except DataError as error:
            text, reason = "", f": {error}"
        if MARKER in text and _ASK["content"] in text:
            return text
        self.in_parts = True
        text = self._text(*talk)
        if MARKER not in text:
            raise ChatTemplateError(
                f"the chat template of {named(self.tokenizer)} drops the text of the assistant, or refuses a conversation "
                f"of one question and one answer{reason.rstrip('.')}. Set another tokenizer.chat_template, or bring the "
                "data as prompt and completion strings."
            )
        return text

    def _between(self, specials: tuple[str, ...]) -> list[str]:
        """Return the special tokens between an answer and the user's next question, if that text begins with one."""
        text = self._text(_ASK, {"role": "assistant", "content": MARKER}, _ASK)
        gap = text.partition(MARKER)[2].partition(_ASK["content"])[0]
        if not specials or not specials_at_start(gap, specials):
            return []
        return re.findall("|".join(map(re.escape, specials)), gap)

    def _has_role(self, role: str) -> bool:
        return "canary role" in self._text({"role": role, "content": "canary role"}, _ASK)

    def _reasoning_key(self, more: dict[str, Any]) -> str | None:
        """Return the key under which the last turn's reasoning is read."""
        answer = {"role": "assistant", "content": "canary answer", **more}
        tools = [_CANARY_TOOL] if more else self.no_tools
        for key in _REASONING_KEYS:
            if "canary reasoning" in self._text(_ASK, {**answer, key: "canary reasoning"}, tools=tools):
                return key
        return None

    def _cuts_thoughts(self) -> bool:
        content = "<think>\ncanary reasoning\n</think>\n\ncanary answer"
        text = self._text(_ASK, {"role": "assistant", "content": content})
        return "canary answer" in text and "canary reasoning" not in text

    def _tool_support(self) -> tuple[bool, bool]:
        """Return whether tools, calls and results all appear, and whether arguments must be text."""
        for as_text in (False, True):
            # The result does not have the call's name: a dropped call must not be found in its result.
            result = {"role": "tool", "content": "canary result", "tool_call_id": "canary000"}
            call = {"role": "assistant", "content": "", "tool_calls": _calls(as_text)}
            text = self._text(
                _ASK, call, result, {"role": "assistant", "content": "canary answer"}, tools=[_CANARY_TOOL]
            )
            called = text.partition("canary_call")[2].partition("canary result")[0]
            all_there = all(word in text for word in ("canary_tool", "canary_call", "canary value", "canary result"))
            # `{'key': 'value'}` is Python's form of an object: the template expects a string. `{\"key\"` is a string that
            # was written as JSON again: the template expects an object.
            if all_there and "'canary_argument'" not in called and '\\"canary_argument' not in called:
                return True, as_text
        return False, False

    def _after_call(self, as_text: bool, specials: tuple[str, ...]) -> str:
        """Return the special token that a result begins with right after the turn that calls, or ""."""
        talk = [_ASK, {"role": "assistant", "content": "", "tool_calls": _calls(as_text)}]
        called = self._text(*talk, tools=[_CANARY_TOOL])
        result = {"role": "tool", "content": "canary result", "tool_call_id": "canary000"}
        rest = self._text(*talk, result, tools=[_CANARY_TOOL]).removeprefix(called)
        return next(iter(specials_at_start(rest, specials)), "")


def _calls(as_text: bool) -> list[dict[str, Any]]:
    arguments: Any = {"canary_argument": "canary value"}
    function = {"name": "canary_call", "arguments": _json(arguments) if as_text else arguments}
    return [{"id": "canary000", "type": "function", "function": function}]


def specials_at_start(tail: str, specials: tuple[str, ...], eos: str | None = None) -> list[str]:
    """Return the special tokens that `tail` begins with, up to the end-of-sequence token if it is among them."""
    run: list[str] = []
    while eos not in run and (found := next((special for special in specials if tail.startswith(special)), None)):
        run.append(found)
        tail = tail.removeprefix(found)
    return run


def _specials(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    # Longest first: one special token's text may begin another's.
    return tuple(sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True))


def _in_parts(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def common_prefix(a: str, b: str) -> int:
    """Return the number of characters that two strings have in common at their start."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low
