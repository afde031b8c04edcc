"""A model behind an OpenAI-compatible server (`transformers serve`, llama.cpp, vLLM), through huggingface_hub's client."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from eaftdrope.errors import UserError

from .models import Message, Reply, check_fits, in_order

# a server that computes elsewhere lists its models at once
_LISTING_SECONDS = 30.0
# sent where there is no key: without one, the client would send the user's token of the Hugging Face Hub
_NO_KEY = "none"
_ERROR_CHARS = 500
_RESUME = "Then run again: a run with a journal resumes."
_REMEDIES = {
    400: "If a prompt is too long for it, state its window.",
    401: "It needs a key.",
    403: "It needs another key.",
    404: "Check the address, which ends in /v1, and the name of the model.",
}

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class ServedModel:
    """A chat model behind an OpenAI-compatible server: greedy, with a fixed seed.

    A request that fails ends the run, which its journal resumes; nothing is sent twice here.

    Args:
        base_url: address of the server, such as http://localhost:8000/v1.
        model: its name there, and in a journal.
        window: its context in tokens; None: as the server states it.
        api_key: if the server needs one.
        parallel: requests at once.
        timeout: seconds for a request.

    Raises:
        UserError: the server cannot be reached, or it states no window.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        window: int | None = None,
        api_key: str | None = None,
        parallel: int = 8,
        timeout: float = 600.0,
    ) -> None:
        from huggingface_hub import InferenceClient

        if not base_url.startswith(("http://", "https://")):
            raise UserError(f"{base_url!r} is not the address of a server. Write http://HOST:PORT/v1.")
        self.name, self._url, self._key = model, base_url.rstrip("/"), api_key or _NO_KEY
        self._parallel, self._timeout = parallel, timeout
        self._client = InferenceClient(base_url=base_url, api_key=self._key, timeout=timeout)
        self.window = window or self._stated_window()

    def generate(self, batch: Sequence[list[Message]], max_tokens: int) -> list[Reply]:
        return in_order(self.generate_each(batch, max_tokens))

    def generate_each(self, batch: Sequence[list[Message]], max_tokens: int) -> Iterator[tuple[int, Reply]]:
        """
        Raises:
            UserError: a request failed; those that had not begun are not sent.
        """
        return _in_threads(lambda messages: self._answer(messages, max_tokens), batch, self._parallel)

    def check(self, messages: list[Message], max_tokens: int) -> None:
        """Estimated, with three bytes of UTF-8 per token: only the server has the tokenizer.

        Raises:
            ValueError: the conversation and its reply are unlikely to fit.
        """
        size = sum(len(message["content"].encode("utf-8", "surrogatepass")) for message in messages)
        check_fits(size // 3, max_tokens, self.window)

    def _answer(self, messages: list[Message], max_tokens: int) -> Reply:
        began = time.perf_counter()
        done = self._sent(
            lambda: self._client.chat_completion(
                messages, model=self.name, max_tokens=max_tokens, temperature=0.0, seed=0
            )
        )
        try:
            text, usage = done.choices[0].message.content, done.usage
            used = int(usage.prompt_tokens), int(usage.completion_tokens)
        except (AttributeError, IndexError, TypeError):
            raise UserError(
                f"{self.name} at {self._url} replied without a message or without `usage`, the count of its tokens, so a "
                "limit of tokens would not hold. Use a server that counts them."
            ) from None
        return Reply(text or "", *used, time.perf_counter() - began)

    def _sent(self, request: Callable[[], Any]) -> Any:
        """The reply to a request.

        Raises:
            UserError: it failed.
        """
        from huggingface_hub.errors import HfHubHTTPError, InferenceTimeoutError, OfflineModeIsEnabled

        # the base of all errors of the HTTP library, which is another one in older versions of the client
        from huggingface_hub.errors import HTTPError as AnyHTTPError

        where = f"{self.name} at {self._url}"
        try:
            return request()
        except OfflineModeIsEnabled:
            raise UserError(
                f"HF_HUB_OFFLINE is set, and with it huggingface_hub reaches no server, {self._url} included. Unset it."
            ) from None
        except InferenceTimeoutError:
            raise UserError(
                f"{where} did not answer within {self._timeout:g} s. Allow more seconds or fewer tokens. {_RESUME}"
            ) from None
        except HfHubHTTPError as error:
            remedy = _REMEDIES.get(error.response.status_code, _RESUME)
            raise UserError(f"{where} refused a request ({_described(error.response)}). {remedy}") from None
        except AnyHTTPError as error:
            raise UserError(
                f"{where} cannot be reached ({str(error) or type(error).__name__}). Start the server or correct the "
                f"address. {_RESUME}"
            ) from None
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{where} sent a reply that is not a chat completion ({error!r}).") from None

    def _stated_window(self) -> int:
        """The context that the server states for the model: vLLM as `max_model_len`, llama.cpp as `meta.n_ctx`.

        Raises:
            UserError: it states none.
        """
        from huggingface_hub.utils import get_session

        base = self._url if self._url.endswith("/v1") else f"{self._url}/v1"
        headers = {"Authorization": f"Bearer {self._key}"}
        reply = self._sent(lambda: get_session().get(f"{base}/models", headers=headers, timeout=_LISTING_SECONDS))
        try:
            listed = {entry["id"]: entry for entry in reply.json()["data"]}
        except (ValueError, KeyError, TypeError):
            listed = {}
        entry = listed.get(self.name, {})
        window = entry.get("max_model_len") or (entry.get("meta") or {}).get("n_ctx")
        if not window:
            models = f" It lists {', '.join(sorted(listed)[:5])}." if listed and not entry else ""
            raise UserError(
                f"{self._url} states no window for {self.name}.{models} State the window, its context in tokens."
            )
        return int(window)


def _described(response: Any) -> str:
    """The status of a refused request and what the server wrote, on one line."""
    text = " ".join(response.text.split())[:_ERROR_CHARS]
    return f"HTTP {response.status_code}: {text}" if text else f"HTTP {response.status_code}"


def _in_threads(
    function: Callable[[_Item], _Result], items: Sequence[_Item], count: int
) -> Iterator[tuple[int, _Result]]:
    """Apply a function in threads, and yield (index, result) as they come.

    After an error no other item is begun; what has begun is waited for, then the error is raised. Ctrl-C waits for nothing:
    the threads hold up neither the caller nor the end of the program.
    """
    waiting: SimpleQueue[tuple[int, _Item]] = SimpleQueue()
    done: SimpleQueue[tuple[int, Any, BaseException | None, int]] = SimpleQueue()

    def work() -> None:
        for index, item in _taken(waiting):
            try:
                done.put((index, function(item), None, 0))
            except BaseException as error:
                done.put((index, None, error, len(list(_taken(waiting)))))

    for numbered in enumerate(items):
        waiting.put(numbered)
    for _ in range(min(count, len(items))):
        threading.Thread(target=work, daemon=True).start()
    left, first = len(items), None
    try:
        while left:
            index, result, error, dropped = done.get()
            left -= 1 + dropped
            first = first or error
            if error is None:
                yield index, result
        if first is not None:
            raise first
    finally:
        deque(_taken(waiting), maxlen=0)


def _taken(queue: SimpleQueue[_Item]) -> Iterator[_Item]:
    """What is in a queue, taken out one by one."""
    with contextlib.suppress(Empty):
        while True:
            yield queue.get_nowait()
