"""An OpenAI-compatible server with two scripted models: `root` replies with one text, `sub` with its prompt in capitals.

It counts what it is asked, so the figures of every engine come from the same place.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKENS = 10
"""Of every call, in `usage`: as many read as written."""


class ScriptedServer:
    """A server on a free port of this machine; a context manager.

    Args:
        reply: of the model `root`, to whatever it is asked.
        seconds: of a reply of the model `sub`.

    Attributes:
        calls: per model, answered ones.
        prompts: how often the model `sub` has answered each prompt.
    """

    def __init__(self, reply: str, *, seconds: float = 0.0) -> None:
        self.calls: Counter[str] = Counter()
        self.prompts: Counter[str] = Counter()
        self._reply, self._seconds, self._lock = reply, seconds, threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                content = json.dumps(server._completion(body)).encode()
                # an engine that was killed does not read it
                with contextlib.suppress(ConnectionError):
                    self.send_response(200)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        # an engine that is killed leaves requests unfinished
        self._server.handle_error = lambda *_: None
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> ScriptedServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _completion(self, body: dict[str, Any]) -> dict[str, Any]:
        model, prompt = body["model"], body["messages"][-1]["content"]
        if model == "sub":
            time.sleep(self._seconds)
        text = self._reply if model == "root" else prompt.upper()
        with self._lock:
            self.calls[model] += 1
            if model == "sub":
                self.prompts[prompt] += 1
        half = TOKENS // 2
        return {
            "id": "scripted",
            "object": "chat.completion",
            "created": 1,
            "model": model,
            "system_fingerprint": "",
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
            "usage": {"prompt_tokens": half, "completion_tokens": half, "total_tokens": TOKENS},
        }
