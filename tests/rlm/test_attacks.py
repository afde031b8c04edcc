"""The attacks on every sandbox: none reaches the host, and each ends in time, within memory, with the variables kept."""

import os
import signal
import socket
import threading
import time
from contextlib import suppress

import psutil
import pytest

from eaftdrope.rlm import Limits, bubblewrap
from eaftdrope.rlm.sandbox import Cell, Outcome
from tests.rlm.attacks import ATTACKS, CONNECTION, REACHING, SPENDING
from tests.rlm.boxes import BOXES, box_of

SECRET = "the host's secret 4711"
LIMITS = Limits(cell_seconds=0.4, memory_mb=128, seconds=60)
# Monty ends what does not look at its clock after one more second; a new worker, and its cells again. Ten times what a busy
# machine takes
MOST_SECONDS = 60
# the limit, an interpreter, and what of a message is on its way
MOST_MB = 128 + 130
MOST_HOST_MB = 450


class Watch(threading.Thread):
    """The largest memory of the processes that this one started, `others` left out, and of itself, in MB."""

    def __init__(self, others):
        super().__init__(daemon=True)
        self.here, self.others = psutil.Process(), others
        self.command = self.here.cmdline()
        self.before = self.here.memory_info().rss
        self.workers, self.host = 0.0, 0.0
        self._stop_it = threading.Event()

    def run(self):
        while not self._stop_it.wait(0.02):
            for process in set(self.here.children(recursive=True)) - self.others:
                # until it has replaced its program, a new process counts the memory of this one as its own
                with suppress(psutil.Error):
                    if process.cmdline() == self.command:
                        continue
                    self.workers = max(self.workers, process.memory_info().rss / 2**20)
            self.host = max(self.host, (self.here.memory_info().rss - self.before) / 2**20)

    def stop(self):
        self._stop_it.set()
        self.join()


@pytest.fixture
def host(tmp_path, monkeypatch):
    """What an attack reaches for: a secret, a file, an open port, this process."""
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    canary = folder / "canary"
    canary.write_text(SECRET)
    monkeypatch.setenv("EAFTDROPE_SECRET", SECRET)
    signals = []
    before = signal.signal(signal.SIGUSR1, lambda *_: signals.append(1))
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield {"CANARY": canary, "FOLDER": folder, "PORT": server.getsockname()[1], "PID": os.getpid()}, server, signals
    signal.signal(signal.SIGUSR1, before)


def attempt(box, code):
    """Run a cell; host calls are answered with an error. A wrong one may not end the host."""
    steps = box.run(code)
    try:
        next(steps)
        while True:
            steps.send(Outcome(error="ValueError", message="no model here"))
    except StopIteration as done:
        assert isinstance(done.value, Cell)
        return done.value
    finally:
        steps.close()


def got(box, name):
    try:
        return box.get(name)
    except NameError as error:
        return str(error)


def cases():
    for name in BOXES:
        for attack in ATTACKS:
            if attack in CONNECTION and name != "cpython":
                continue
            # the second layer changes nothing about how Monty counts time and memory
            slow = attack.spends and name == "monty+bubblewrap"
            yield pytest.param(name, attack, id=f"{name}-{attack.name}", marks=[pytest.mark.slow] * slow)


@pytest.mark.parametrize(("name", "attack"), cases())
def test_an_attack_is_held(host, name, attack):
    reachable, server, signals = host
    code = attack.code
    for word, value in reachable.items():
        code = code.replace(word, str(value))
    # what tests of the same process left running
    others = set(psutil.Process().children(recursive=True))
    with box_of(name, LIMITS) as box:
        box.set({"context": "abc", "answer": {"content": "", "ready": False}})
        assert attempt(box, "kept = [4, 1]\nresult = None").error is None
        watch, began = Watch(others), time.monotonic()
        watch.start()
        cell = attempt(box, code)
        result = got(box, "result")
        spent = time.monotonic() - began
        watch.stop()
        after = attempt(box, "kept.append(len(context))\nprint(kept)")
        assert (got(box, "kept"), after.output) == ([4, 1, 3], "[4, 1, 3]\n"), cell
    # nothing of the host
    assert result != "reached" and SECRET not in f"{result} {cell.output} {cell.error}", (result, cell)
    assert [path.name for path in reachable["FOLDER"].iterdir()] == ["canary"] and not signals
    with pytest.raises(BlockingIOError):
        server.accept()
    # within the limits
    assert spent < MOST_SECONDS and watch.workers < MOST_MB and watch.host < MOST_HOST_MB, (spent, vars(watch))
    assert len(cell.output) <= 2 * LIMITS.output_chars and len(cell.error or "") <= 900


def test_the_battery_is_whole():
    """The number that docs/rlm_sandbox.md states."""
    assert (len(REACHING), len(SPENDING), len(CONNECTION)) == (38, 59, 15)
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS)


@pytest.mark.parametrize(
    "name",
    ["os.system", "read a file", "write a file", "socket", "parent's maps", "signal the parent", "__subclasses__"],
)
def test_the_attacks_succeed_without_bubblewrap(host, monkeypatch, name):
    """Limits and an empty environment alone hold none of these: what holds them is bubblewrap."""
    reachable, _, _ = host
    monkeypatch.setattr(bubblewrap, "confined", lambda command, **_: list(command))
    (attack,) = [attack for attack in ATTACKS if attack.name == name]
    code = attack.code
    for word, value in reachable.items():
        code = code.replace(word, str(value))
    with box_of("cpython", LIMITS) as box:
        box.set({"context": ""})
        attempt(box, code)
        assert got(box, "result") in ("reached", SECRET)
