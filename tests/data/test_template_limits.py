"""Templates that loop or grow without end are stopped, with what is wrong; ordinary ones are left alone."""

import threading
import time

import pytest

from eaftdrope.data import Source, build_dataset, template_limits
from eaftdrope.errors import TemplateLimitError
from tests.tiny_models import byte_tokenizer

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
ROW = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}\n'


@pytest.fixture(autouse=True)
def low(monkeypatch):
    monkeypatch.setattr(template_limits, "SECONDS", 0.3)
    monkeypatch.setattr(template_limits, "BYTES", 300 << 20)


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


@pytest.mark.parametrize(
    ("attack", "reason"),
    [
        (LOOP, "takes more than 0.3 seconds"),
        ("{{ 'a' * 10 ** 10 }}", "needs more than 300 MB"),
        ("{{ 'x' | center(10 ** 10) }}", "needs more than 300 MB"),
        (
            "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
            "needs more than 300 MB",
        ),
    ],
)
@pytest.mark.parametrize("bad_row", ["stop", "skip"])
def test_a_bomb(tmp_path, tokenizer, attack, reason, bad_row):
    """Also where bad rows are skipped: the next one would take as long."""
    file = tmp_path / "rows.jsonl"
    file.write_text(ROW * 3)
    # only what follows a certain text, so that the made-up conversations pass
    tokenizer.chat_template = tokenizer.chat_template + "{% if messages[0].content == 'Hi' %}" + attack + "{% endif %}"
    with pytest.raises(TemplateLimitError) as caught:
        build_dataset([Source(str(file))], tokenizer, on_bad_row=bad_row)
    assert str(caught.value) == f"the chat template of 'TokenizersBackend' {reason} to render."


def test_afterwards_nothing_is_limited(tokenizer):
    """Neither the memory of the process nor the time of its thread."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    with pytest.raises(TemplateLimitError), template_limits.bounded(tokenizer):
        raise MemoryError
    with template_limits.bounded(tokenizer):
        pass
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    spent = time.thread_time()
    while time.thread_time() - spent < 0.7:
        sum(range(1000))


def test_waiting_is_not_running(tokenizer):
    """The time is the thread's own: a machine with other work changes nothing."""
    pause = threading.Event()
    with template_limits.bounded(tokenizer):
        pause.wait(0.7)
