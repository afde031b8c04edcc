"""The probe `serving` against llama.cpp itself: `make test-compat`.

The GGUF has the vocabulary of a byte-level tokenizer and the template of Qwen 2.5, which writes tools and calls as Hermes
does. Served with that template every token is the trained one; with another template the probe finds the difference.
"""

import os
import subprocess
from pathlib import Path

import pytest

from eaftdrope.data import Example
from eaftdrope.evaluate.probes.serving import ServingProbe
from eaftdrope.models.gguf.tokenizer import read_tokenizer
from tests.data.conversations import CARRIED
from tests.models.gguf_files import CONTROL, NORMAL, USER_DEFINED, byte_level_vocabulary, write_gguf

pytestmark = pytest.mark.slow

QWEN = (CARRIED / "qwen2_5.jinja").read_text(encoding="utf-8")
TEXT = "What is the weather in Paris? get_weather city Zürich unit 25 call tool function name arguments result done"


@pytest.fixture(scope="module")
def python():
    if not os.environ.get("EAFTDROPE_LLAMA_CPP"):
        pytest.skip("no environment with llama.cpp: run `make test-compat`")
    return os.environ["EAFTDROPE_LLAMA_CPP"]


def gguf(path: Path, template: str) -> Path:
    tokens, merges = byte_level_vocabulary([TEXT] * 3, 500)
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"]
    types = [NORMAL] * len(tokens) + [CONTROL] * 3 + [USER_DEFINED] * 2
    ids = {"bos_token_id": len(tokens), "eos_token_id": len(tokens) + 2, "add_bos_token": False}
    vocabulary = {"tokens": [*tokens, *specials], "merges": merges, "types": types, "pre": "qwen2", **ids}
    return write_gguf(path, chat_template=template, **vocabulary)


@pytest.fixture
def serve(python):
    """serve(file): the address of a server of llama.cpp."""
    running = []

    def start(file: Path) -> str:
        command = [python, str(Path(__file__).with_name("llama_cpp_templates.py")), str(file)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        running.append(process)
        line = next((line for line in process.stdout if line.startswith("http")), "")
        assert line, "the server did not start"
        return line.strip()

    yield start
    for process in running:
        process.stdin.close()
        process.wait(30)


def rows(count: int) -> list[Example]:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
    function = {"name": "get_weather", "description": "The weather of a city.", "parameters": parameters}
    found = []
    for index in range(count):
        arguments = {"city": ["Paris", "Zürich", 'Q"uoted'][index % 3], "days": index}
        call = {"type": "function", "id": f"c{index}", "function": {"name": "get_weather", "arguments": arguments}}
        messages = [
            {"role": "user", "content": f"What is the weather in Paris in {index} days?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        found.append(Example(messages=messages, tools=[{"type": "function", "function": function}]))
    return found


def test_tokens_of_calls_are_those_of_training(serve, tmp_path):
    file = gguf(tmp_path / "same.gguf", QWEN)
    tokenizer, _ = read_tokenizer(file)
    tokenizer.chat_template = QWEN
    prompts, calls = ServingProbe(rows(12), serve(file)).run(None, tokenizer)
    assert (prompts.value, calls.value) == (1.0, 1.0)


def test_another_template_is_found(serve, tmp_path):
    """The served template writes a call without the line break after its tag."""
    file = gguf(tmp_path / "other.gguf", QWEN.replace("<tool_call>\\n", "<tool_call>"))
    tokenizer, _ = read_tokenizer(file)
    tokenizer.chat_template = QWEN
    with pytest.warns(UserWarning, match="llama.cpp feeds the model other tokens than those of training"):
        _, calls = ServingProbe(rows(2), serve(file)).run(None, tokenizer)
    assert calls.value == 0.0
