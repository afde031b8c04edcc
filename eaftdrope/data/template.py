"""What a tokenizer's chat template can do, found by rendering a canary through it, never by its name.

Templates silently drop what they do not know: SmolLM2's drops tools and calls, gpt-oss's every call but the first, those of
vision models a content that is a plain string. What is dropped here would be missing from the training rows.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from eaftdrope.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Private-use characters: no template looks at them, no sane text begins or ends with them.
MARKER = "\ue0f0turn\ue0f1"
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
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
    """What one tokenizer's chat template can do.

    Args:
        has_tools (`bool`): tools, calls and results all appear in the rendering: the template's own way is used.
        has_parallel_calls (`bool`): so does a second call in one turn.
        arguments_as_text (`bool`): the template wants a call's `arguments` as a JSON string, not as an object.
        content_as_parts (`bool`): it wants content as a list of parts, `[{"type": "text", "text": ...}]`.
        has_system_role (`bool`): a system turn appears in the rendering.
        has_reasoning (`bool`): so does the `reasoning_content` of the last turn.
        has_markers (`bool`): it has `{% generation %}` blocks.
        stop (`str`, *optional*): the special token right after an answer, such as `<|im_end|>`.
        stop_run (`str`): that and those that follow it at once (Cohere's turns end in two); "" if there is none.
        stop_is_next_turn (`bool`): the turns of GLM have no end of their own: what stops them, in the stop's place here,
            is the special token that the user's next turn begins with.
        after_stop (`str`): what the template writes behind the stop of the last turn, such as a line break.
        prompt_differs (`str`): how the generation prompt ends, if answered conversations do not begin with it; else "".
        specials (`tuple[str, ...]`): the text of every special token, longest first.
    """

    has_tools: bool
    has_parallel_calls: bool
    arguments_as_text: bool
    content_as_parts: bool
    has_system_role: bool
    has_reasoning: bool
    has_markers: bool
    stop: str | None
    stop_run: str
    stop_is_next_turn: bool
    after_stop: str
    prompt_differs: str
    specials: tuple[str, ...]

    def shaped(self, message: dict[str, Any]) -> dict[str, Any]:
        """`message` with reasoning, content and arguments in the form this template takes."""
        if message.get("reasoning_content") and not self.has_reasoning:
            thought = f"<think>\n{message['reasoning_content'].strip()}\n</think>\n\n"
            message = {**message, "content": thought + message["content"]}
        if self.arguments_as_text and message.get("tool_calls"):
            calls = [
                {**call, "function": {**call["function"], "arguments": _json(call["function"]["arguments"])}}
                for call in message["tool_calls"]
            ]
            message = {**message, "tool_calls": calls}
        return _in_parts(message) if self.content_as_parts else message

    def stop_at_end(self, text: str) -> str:
        """The special token that `text` ends in, or ""."""
        return next((special for special in self.specials if text.endswith(special)), "")


_known: WeakKeyDictionary[Any, tuple[Any, Template]] = WeakKeyDictionary()


def template_of(tokenizer: PreTrainedTokenizerBase) -> Template:
    """What the tokenizer's chat template can do (found once for each tokenizer and template).

    Raises:
        DataError: the tokenizer has no chat template, or the template drops what the assistant says.
    """
    state = (tokenizer.chat_template, tokenizer.eos_token)
    known = _known.get(tokenizer)
    if known is None or known[0] != state:
        known = _known[tokenizer] = (state, _inspect(tokenizer))
    return known[1]


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    *,
    tools: list[dict[str, Any]] | None = None,
    add_generation_prompt: bool = False,
) -> str:
    """The conversation through the chat template, as text.

    Raises:
        DataError: the template refuses it; the text carries the template's own words.
    """
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise DataError(f"the chat template refuses this conversation: {error}") from error


def try_render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **options: Any) -> str:
    """The same, or "" where the template refuses the conversation."""
    try:
        return render(tokenizer, messages, **options)
    except DataError:
        return ""


# --- the canary -------------------------------------------------------------------------------------------------------


def _inspect(tokenizer: PreTrainedTokenizerBase) -> Template:
    name = repr(tokenizer.name_or_path or type(tokenizer).__name__)
    if not tokenizer.chat_template:
        raise DataError(
            f"the tokenizer {name} has no chat template, so a conversation cannot be written as text. Use the tokenizer "
            "of an instruct model, set tokenizer.chat_template, or bring the data as prompt and completion strings "
            "(format prompt_completion)."
        )
    answered, in_parts = _answered(tokenizer)
    if MARKER not in answered:
        raise DataError(
            f"the chat template of {name} drops what the assistant says, or refuses a conversation of one question and "
            "one answer. Set another tokenizer.chat_template, or bring the data as prompt and completion strings."
        )
    specials = _specials(tokenizer)
    ask = _in_parts(_ASK) if in_parts else _ASK
    system = {"role": "system", "content": "canary system"}
    has_tools, has_parallel, as_text = _tool_support(tokenizer, in_parts)
    before, _, tail = answered.rpartition(MARKER)
    run = _stop_run(tail.lstrip(), specials, tokenizer.eos_token)
    begins = [] if run else _next_turn(tokenizer, in_parts, specials)
    prompt = try_render(tokenizer, [ask], add_generation_prompt=True)
    return Template(
        has_tools=has_tools,
        has_parallel_calls=has_parallel,
        arguments_as_text=as_text,
        content_as_parts=in_parts,
        has_system_role="canary system" in try_render(tokenizer, [_in_parts(system) if in_parts else system, ask]),
        has_reasoning=_writes_reasoning(tokenizer, ask, in_parts),
        has_markers=bool(_GENERATION.search(tokenizer.get_chat_template())),
        stop=next(iter(run or begins), None),
        stop_run="".join(run or begins),
        stop_is_next_turn=bool(begins),
        after_stop=tail.lstrip().removeprefix("".join(run)) if run else "",
        prompt_differs="" if before.startswith(prompt) else prompt[len(_common(prompt, before)) :],
        specials=specials,
    )


def _answered(tokenizer: PreTrainedTokenizerBase) -> tuple[str, bool]:
    """(a question and the marker as its answer, whether content had to come in parts)."""
    talk = [_ASK, {"role": "assistant", "content": MARKER}]
    plain = try_render(tokenizer, talk)
    if MARKER in plain and _ASK["content"] in plain:
        return plain, False
    return try_render(tokenizer, [_in_parts(message) for message in talk]), True


def _stop_run(tail: str, specials: tuple[str, ...], eos: str | None) -> list[str]:
    """The special tokens that `tail` begins with, up to the end-of-sequence token if it is among them."""
    run: list[str] = []
    while eos not in run and (found := next((special for special in specials if tail.startswith(special)), None)):
        run.append(found)
        tail = tail.removeprefix(found)
    return run


def _next_turn(tokenizer: PreTrainedTokenizerBase, in_parts: bool, specials: tuple[str, ...]) -> list[str]:
    """The special token right after an answer, if the user speaks again; none if that begins every sequence."""
    talk = [_ASK, {"role": "assistant", "content": MARKER}, _ASK]
    text = try_render(tokenizer, [_in_parts(message) for message in talk] if in_parts else talk)
    return [token for token in _stop_run(text.partition(MARKER)[2], specials, None)[:1] if token != tokenizer.bos_token]


def _writes_reasoning(tokenizer: PreTrainedTokenizerBase, ask: dict[str, Any], in_parts: bool) -> bool:
    answer: dict[str, Any] = {"role": "assistant", "content": "canary answer"}
    answer = {**(_in_parts(answer) if in_parts else answer), "reasoning_content": "canary reasoning"}
    return "canary reasoning" in try_render(tokenizer, [ask, answer])


def _specials(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    # Longest first: one special token's text may begin another's.
    return tuple(sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True))


def _tool_support(tokenizer: PreTrainedTokenizerBase, in_parts: bool) -> tuple[bool, bool, bool]:
    """(whether tools, calls and results all appear, also two calls in a turn, whether arguments must be text)."""
    for as_text in (False, True):
        text = _with_calls(tokenizer, in_parts, as_text, ["canary_call"])
        called = text.partition("canary_call")[2].partition("canary result")[0]
        all_there = all(word in text for word in ("canary_tool", "canary_call", "canary value", "canary result"))
        # `{'key': 'value'}` is Python's way to print an object: the template meant a string. `{\"key\"` is a string
        # that was written as JSON once more: the template meant an object.
        if all_there and "'canary_argument'" not in called and '\\"canary_argument' not in called:
            both = _with_calls(tokenizer, in_parts, as_text, ["canary_call", "canary_second"])
            return True, "canary_second" in both, as_text
    return False, False, False


def _with_calls(tokenizer: PreTrainedTokenizerBase, in_parts: bool, as_text: bool, names: list[str]) -> str:
    arguments: Any = {"canary_argument": "canary value"}
    calls = [
        {
            "id": f"canary00{number}",
            "type": "function",
            "function": {"name": name, "arguments": _json(arguments) if as_text else arguments},
        }
        for number, name in enumerate(names)
    ]
    # The results do not carry the calls' names: a call that is dropped must not be found in its result.
    results = [{"role": "tool", "content": "canary result", "tool_call_id": call["id"]} for call in calls]
    talk = [
        _ASK,
        {"role": "assistant", "content": "", "tool_calls": calls},
        *results,
        {"role": "assistant", "content": "canary answer"},
    ]
    return try_render(tokenizer, [_in_parts(m) for m in talk] if in_parts else talk, tools=[_CANARY_TOOL])


def _in_parts(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _common(a: str, b: str) -> str:
    return a[: common_prefix(a, b)]


def common_prefix(a: str, b: str) -> int:
    """How many characters two strings begin with in common."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low
