"""The probe `serving` against a server that renders and tokenises as it is told to."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from eaftdrope.data import Example, render_prompt
from eaftdrope.errors import UserError
from eaftdrope.evaluate import build_probes, run_probes
from eaftdrope.evaluate.probes.serving import ServingProbe, _as_sent
from tests.evaluate.probe_options import probe_options

TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}


def row(index):
    call = {"type": "function", "id": f"c{index}", "function": {"name": "add", "arguments": {"a": index, "b": "é"}}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    return Example(messages=[{"role": "user", "content": f"Add {index}"}, answer], tools=[TOOL], origin=f"rows:{index}")


@pytest.fixture
def llama_cpp(byte_tokenizer):
    """llama_cpp(change=None): the address of a server whose prompts are those of training, put through `change`."""
    servers = []

    def start(change=lambda text: text):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path == "/apply-template":
                    messages = body["messages"]
                    for message in messages:
                        for call in message.get("tool_calls", []):
                            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
                    prompt = change(render_prompt(messages, body.get("tools"), byte_tokenizer))
                    reply = {"prompt": prompt}
                    if prompt is None:
                        return self.send_error(500, "no template")
                else:
                    assert body["add_special"] is body["parse_special"] is True
                    reply = {"tokens": byte_tokenizer(body["content"], add_special_tokens=False).input_ids}
                content = json.dumps(reply).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments):
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def build(server, rows=3, **options):
    wanted = [("serving", "target", probe_options("serving", server=server, **options))]
    (probe,) = build_probes(wanted, held_out_examples=[row(i) for i in range(rows)])
    return probe


def test_equal_tokens(llama_cpp, tiny_llama, byte_tokenizer):
    probe = build(llama_cpp(), rows=4, limit=3)
    prompts, calls = run_probes(tiny_llama, byte_tokenizer, [probe])
    assert (prompts.metric, prompts.value, prompts.n) == ("prompts served as trained", 1.0, 3)
    assert (calls.metric, calls.value, calls.n) == ("calls served as trained", 1.0, 3)


def test_a_call_that_is_rendered_differently(llama_cpp, tiny_llama, byte_tokenizer):
    """Arguments in another order of spaces: prompts are equal, calls are not."""
    with pytest.warns(UserWarning, match=r"rows:0: from token \d+ on, '0, .* instead of ' 0, "):
        prompts, calls = run_probes(
            tiny_llama, byte_tokenizer, [build(llama_cpp(lambda text: text.replace('"a": ', '"a":')))]
        )
    assert (prompts.value, calls.value) == (1.0, 0.0)


def test_tools_that_are_left_out_and_refusals(llama_cpp, tiny_llama, byte_tokenizer):
    with pytest.warns(UserWarning, match="llama.cpp feeds the model other tokens"):
        prompts, calls = run_probes(
            tiny_llama, byte_tokenizer, [build(llama_cpp(lambda text: text.replace("Adds.", "")))]
        )
    assert (prompts.value, calls.value) == (0.0, 0.0)
    with pytest.warns(UserWarning, match="llama.cpp refuses the conversation"):
        prompts, _ = run_probes(tiny_llama, byte_tokenizer, [build(llama_cpp(lambda text: None))])
    assert prompts.value == 0.0


def test_a_server_that_is_not_there(tiny_llama, byte_tokenizer):
    with pytest.raises(UserError, match=r"no server of llama.cpp at http://127.0.0.1:9 .*llama-server -m"):
        run_probes(tiny_llama, byte_tokenizer, [build("http://127.0.0.1:9/")])


def test_rows(tmp_path):
    with pytest.raises(UserError, match="needs rows whose last answer calls a function"):
        build("http://x", rows=0)
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"messages": row(1).messages, "tools": [TOOL]}) + "\n")
    assert len(build("http://x", rows=0, file=str(file)).rows) == 1
    sent = _as_sent({**row(1).answer, "weight": 0})
    assert json.loads(sent["tool_calls"][0]["function"]["arguments"]) == {"a": 1, "b": "é"} and "weight" not in sent
    assert isinstance(build("http://x"), ServingProbe)
