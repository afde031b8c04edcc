"""A served model against a stub of a server: what it sends, what it refuses, and a run that a failed call ends."""

import contextlib
import json
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from eaftdrope.errors import UserError
from eaftdrope.rlm import RLM, Limits
from eaftdrope.rlm.models import ScriptedModel
from eaftdrope.rlm.served import ServedModel

LISTED = {
    "vllm": {"id": "vllm", "max_model_len": 4096},
    "llama": {"id": "llama", "meta": {"n_ctx": 2048, "n_ctx_train": 8192}},
    "other": {"id": "other", "object": "model"},
}


def completion(text, **changes):
    message = {"role": "assistant", "content": text}
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    choices = [{"index": 0, "finish_reason": "stop", "message": message}]
    return {
        "id": "1",
        "created": 1,
        "model": "m",
        "system_fingerprint": "",
        "choices": choices,
        "usage": usage,
        **changes,
    }


class Stub:
    """A server; `reply(body)` returns a status and what to send. `most` is the number of requests that it had at once."""

    def __init__(self):
        self.seen, self.headers, self.most, self._now = [], [], 0, 0
        self.reply = lambda body: (200, completion(body["messages"][-1]["content"].upper()))
        self.listing = 200, {"object": "list", "data": list(LISTED.values())}
        self._lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                stub.headers.append(dict(self.headers))
                self._send(*(stub.listing if self.path == "/v1/models" else (404, {})))

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with stub._lock:
                    stub.seen.append(body)
                    stub.headers.append(dict(self.headers))
                    stub._now += 1
                    stub.most = max(stub.most, stub._now)
                status, value = stub.reply(body) if self.path == "/v1/chat/completions" else (404, {})
                with stub._lock:
                    stub._now -= 1
                self._send(status, value)

            def _send(self, status, value):
                content = value if isinstance(value, bytes) else json.dumps(value).encode()
                # the client may have given up
                with contextlib.suppress(ConnectionError):
                    self.send_response(status)
                    self.send_header("Content-Type", "text/html" if isinstance(value, bytes) else "application/json")
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    server = Stub()
    yield server
    server.close()


def asked(text):
    return [{"role": "user", "content": text}]


def test_a_batch_is_answered_in_order_and_a_few_at_once(stub):
    gate = threading.Barrier(3)

    def reply(body):
        # as many as are allowed meet here, and no one else
        gate.wait(30)
        return 200, completion(body["messages"][-1]["content"].upper())

    stub.reply = reply
    model = ServedModel(stub.url, "m", window=100, parallel=3)
    replies = model.generate([asked(f"text {number}") for number in range(9)], 5)
    assert [reply.text for reply in replies] == [f"TEXT {number}" for number in range(9)]
    assert {(reply.tokens_in, reply.tokens_out) for reply in replies} == {(7, 3)} and stub.most == 3
    sent = {name: value for name, value in stub.seen[0].items() if name != "messages"}
    assert sent == {"model": "m", "max_tokens": 5, "temperature": 0.0, "seed": 0, "stream": False}


@pytest.mark.parametrize(("key", "sent"), [(None, "Bearer none"), ("abc", "Bearer abc")])
def test_no_token_of_the_hub_is_sent(stub, key, sent, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    ServedModel(stub.url, "vllm", api_key=key).generate([asked("x")], 5)
    found = [{name.lower(): value for name, value in headers.items()} for headers in stub.headers]
    assert [headers["authorization"] for headers in found] == [sent, sent]
    assert "hf_secret" not in str(found)


@pytest.mark.parametrize(("name", "window"), [("vllm", 4096), ("llama", 2048)])
@pytest.mark.parametrize("path", ["", "/"])
def test_the_window_is_the_one_that_the_server_states(stub, name, window, path):
    assert ServedModel(stub.url + path, name).window == window
    assert ServedModel(stub.url.removesuffix("/v1"), name).window == window
    assert ServedModel(stub.url, name, window=99).window == 99


def test_a_window_that_is_not_stated_is_required(stub):
    for name, lists in (("other", ""), ("wrong", " It lists llama, other, vllm.")):
        with pytest.raises(UserError) as refused:
            ServedModel(stub.url, name)
        assert str(refused.value) == (
            f"{stub.url} states no window for {name}.{lists} State the window, its context in tokens."
        )
    for stub.listing in ((500, b"Internal Server Error"), (200, {"data": None}), (200, [])):
        with pytest.raises(UserError, match="states no window for vllm"):
            ServedModel(stub.url, "vllm")


def test_the_length_of_a_prompt_is_estimated(stub):
    model = ServedModel(stub.url, "m", window=100)
    model.check(asked("x" * 270), 10)
    with pytest.raises(ValueError, match="the prompt has 91 tokens; 90 fit"):
        model.check(asked("x" * 273), 10)
    # a character of Chinese is about a token
    with pytest.raises(ValueError, match="the prompt has 91 tokens; 90 fit"):
        model.check(asked("字" * 91), 10)


@pytest.mark.parametrize(
    ("status", "value", "message"),
    [
        (400, {"error": {"message": "exceeds 2048"}}, r'HTTP 400: {"error": .*exceeds 2048.* state its window'),
        (401, {"error": "no key"}, r"HTTP 401: .*no key.* It needs a key"),
        (404, {"detail": "no such model"}, r"HTTP 404: .*no such model.* Check the address"),
        (429, {}, r"HTTP 429.* run again: a run with a journal resumes"),
        (503, b"<html>busy</html>", r"HTTP 503: <html>busy</html>.* run again"),
        (200, b"<html>It works</html>", "sent a reply that is not a chat completion"),
        (200, [1], "sent a reply that is not a chat completion"),
        (200, completion("x", usage=None), "without `usage`.* a limit of tokens would not hold"),
        (200, completion("x", choices=[]), "replied without a message"),
        (200, {}, "replied without a message"),
    ],
)
def test_what_goes_wrong_is_stated(stub, status, value, message):
    stub.reply = lambda _: (status, value)
    with pytest.raises(UserError, match=f"m at {stub.url} .*{message}"):
        ServedModel(stub.url, "m", window=100).generate([asked("x")], 5)


def test_a_reply_without_text_is_empty(stub):
    stub.reply = lambda _: (200, completion(None))
    assert ServedModel(stub.url, "m", window=100).generate([asked("x")], 5)[0].text == ""


def test_no_server_no_network_no_answer(stub, monkeypatch):
    url, model = stub.url, ServedModel(stub.url, "m", window=100, timeout=0.2)
    wait = threading.Event()

    def late(_):
        wait.wait(30)
        return 200, completion("late")

    stub.reply = late
    with pytest.raises(
        UserError, match=r"did not answer within 0.2 s\. Allow more seconds or fewer tokens\. Then run ag"
    ):
        model.generate([asked("x")], 5)
    wait.set()
    stub.close()
    with pytest.raises(UserError, match=rf"m at {url} cannot be reached \(.*refused\)\. Start the server or correct"):
        model.generate([asked("x")], 5)
    with pytest.raises(UserError, match=rf"vllm at {url} cannot be reached"):
        ServedModel(url, "vllm")
    with pytest.raises(UserError, match=r"'localhost:8000' is not the address of a server\. Write http://HOST:PORT/v1"):
        ServedModel("localhost:8000", "m")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=rf"HF_HUB_OFFLINE is set, .*{url} included\. Unset it"):
        model.generate([asked("x")], 5)


def test_a_run_whose_server_fails_once_is_resumed(stub, tmp_path):
    """Calls that were answered before are not made again, and the failure is no text in the data."""
    failing = {"text 40": 503}

    def reply(body):
        text = body["messages"][-1]["content"]
        return (failing.pop(text), {"error": "busy"}) if text in failing else (200, completion(text.upper()))

    stub.reply = reply
    root = [
        "```repl\nreplies = llm_query_batched(context)\n```",
        "```repl\nanswer = {'content': ' '.join(replies), 'ready': True}\n```",
    ]

    def complete():
        rlm = RLM(
            ScriptedModel(lambda messages: root[len(messages) // 2 - 1]),
            ServedModel(stub.url, "m", window=1000, parallel=1),
            limits=Limits(sub_calls=50),
        )
        return rlm.complete([f"text {number}" for number in range(45)], "?", journal=tmp_path / "run.jsonl")

    with pytest.raises(UserError, match=r"HTTP 503.*busy.*run again"):
        complete()
    assert [body["messages"][-1]["content"] for body in stub.seen] == [f"text {number}" for number in range(41)]
    stub.seen.clear()
    result = complete()
    assert result.answer == " ".join(f"TEXT {number}" for number in range(45))
    assert [body["messages"][-1]["content"] for body in stub.seen] == [f"text {number}" for number in range(40, 45)]
    # one of them of the root
    assert (result.usage["sub_calls"], result.usage["replayed"]) == (45, 41)
    # of the root two calls, which count four characters per token
    texts = [message["content"] for message in result.messages]
    of_root = sum(map(len, texts[:2])) // 4 + sum(map(len, texts[:4])) // 4 + len(texts[2]) // 4 + len(texts[4]) // 4
    assert result.usage["tokens"] == 45 * 10 + of_root


def test_what_was_asked_at_the_same_time_as_a_failure_is_kept(stub):
    """The reply that comes after the failure of another request was paid, and arrives."""
    failed = threading.Event()

    def reply(body):
        if body["messages"][-1]["content"] == "bad":
            return 503, {}
        failed.wait(30)
        return 200, completion("late")

    stub.reply = reply
    model, got = ServedModel(stub.url, "m", window=100, parallel=2), []
    # after the failure has arrived; before it, the reply would be kept in any case
    threading.Timer(0.3, failed.set).start()
    with pytest.raises(UserError, match="HTTP 503"):
        for index, answer in model.generate_each([asked("good"), asked("bad"), asked("never")], 5):
            got.append((index, answer.text))
    assert got == [(0, "late")] and len(stub.seen) == 2


def test_nothing_is_sent_after_a_failure(stub):
    stub.reply = lambda _: (503, {})
    with pytest.raises(UserError, match="HTTP 503"):
        ServedModel(stub.url, "m", window=100, parallel=1).generate([asked(str(number)) for number in range(20)], 5)
    assert len(stub.seen) == 1


INTERRUPTED = """
import sys
from eaftdrope.rlm.served import ServedModel
model = ServedModel(sys.argv[1], "m", window=100)
print("begins", flush=True)
try:
    model.generate([[{"role": "user", "content": str(number)}] for number in range(20)], 5)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_ends_the_program_while_requests_hang(stub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    hang, eight = threading.Event(), threading.Event()

    def reply(_):
        if len(stub.seen) == 8:
            eight.set()
        hang.wait(60)
        return 200, completion("late")

    stub.reply = reply
    process = subprocess.Popen([sys.executable, "-c", INTERRUPTED, stub.url], stdout=subprocess.PIPE, text=True)
    assert eight.wait(60)
    process.send_signal(signal.SIGINT)
    # the server hangs on: the program ends before it answers
    output, _ = process.communicate(timeout=30)
    assert not hang.is_set() and (process.returncode, output) == (0, "begins\ninterrupted\n") and len(stub.seen) == 8
    hang.set()
