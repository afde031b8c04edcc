"""Other engines of recursive language models beside ours: `rlms` (the authors' own) and `dspy.RLM`.

Each runs in an environment of its own, with its own defaults, against the same scripted server, which counts the calls. All
are given the same Python in the form that they expect. Wall seconds are compared with limits only.

    python -m venv RLMS && RLMS/bin/pip install rlms==0.1.3
    python -m venv DSPY && DSPY/bin/pip install 'dspy[deno]==3.4.1'
    python -m benchmarks.rlm peers --rlms RLMS/bin/python --dspy DSPY/bin/python --out FILE
"""

from __future__ import annotations

import datetime
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.command import as_typed, child_environment
from eaftdrope.run.machine import cpu_name

from .contestants import LIMITS
from .scripted_server import TOKENS, ScriptedServer

_HERE = Path(__file__).resolve().parent
CONTEXT_CHARS = 1_000_000
SUB_CALLS = 20
# some need 3 of them to begin, on a machine that is busy
SECONDS = 5.0
# from the reply of the root: what does not end by itself is killed then
PATIENCE = 30.0
# calls of the run that is killed, and when it is
KILLED_CALLS, KILLED_AT = 100, 70
SECRET = "4711-0815"

# {} is where the answer goes; each engine has its own way to finish
_LOOP = (
    "made = 0\nfor number in range({count}):\n    try:\n        llm_query(f'part {{number}}')\n        made += 1\n"
    + ("    except Exception:\n        pass\n")
)
FINISHES = {
    "eaftdrope": "answer['content'] = str({0})\nanswer['ready'] = True",
    "rlms": "answer['content'] = str({0})\nanswer['ready'] = True",
    "dspy": "SUBMIT(str({0}))",
}
REPLIES = {
    "eaftdrope": "```repl\n{}\n```",
    "rlms": "```repl\n{}\n```",
    "dspy": "[[ ## reasoning ## ]]\nScripted.\n\n[[ ## code ## ]]\n```python\n{}\n```\n\n[[ ## completed ## ]]",
}


@dataclass(frozen=True)
class PeerTask:
    """What an engine is to run.

    Args:
        code: what the root writes, without its finish.
        answer: the expression that it finishes with.
        sub_calls, tokens, seconds: the limits, or None.
        reply_seconds: of a sub-call.
        patience: seconds after the root's reply, when it is killed.
    """

    code: str
    answer: str
    sub_calls: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    reply_seconds: float = 0.0
    patience: float = 10 * PATIENCE


TASKS = {
    "result": PeerTask(
        "place = context.find('magic number')\npart = context[place:place + 40]\n"
        "notes = llm_query_batched([part + str(i) for i in range(10)])",
        "notes[9]",
    ),
    "calls": PeerTask(_LOOP.format(count=200), "made", sub_calls=SUB_CALLS),
    "tokens": PeerTask(_LOOP.format(count=200), "made", tokens=SUB_CALLS * TOKENS),
    "seconds": PeerTask(_LOOP.format(count=100), "made", seconds=SECONDS, reply_seconds=0.2),
    "endless": PeerTask("while True:\n    pass", "0", seconds=SECONDS, patience=PATIENCE),
    "file": PeerTask("text = open({secret!r}).read()", "text"),
    "environment": PeerTask("import os\ntext = os.environ['EAFTDROPE_SECRET']", "text"),
}
KILLED = {
    "one by one": PeerTask(
        f"notes = [llm_query(f'part {{i}}') for i in range({KILLED_CALLS})]", "notes", reply_seconds=0.02
    ),
    "one batch": PeerTask(
        f"notes = llm_query_batched([f'part {{i}}' for i in range({KILLED_CALLS})])", "notes", reply_seconds=0.1
    ),
}
_FACTS = """
import importlib.metadata as m, json, re, sys
def needed(name, extras, found):
    try: d = m.distribution(name)
    except m.PackageNotFoundError: return found
    key = re.sub(r"[-_.]+", "-", d.metadata["Name"]).lower()
    if (key, extras) in found: return found
    found.add((key, extras))
    from packaging.requirements import Requirement
    for line in d.requires or []:
        r = Requirement(line)
        if r.marker is None or any(r.marker.evaluate({"extra": e}) for e in ("", *extras)):
            needed(r.name, tuple(sorted(r.extras)), found)
    return found
names = {name for name, _ in needed(sys.argv[1], tuple(sys.argv[2:]), set())}
def size(d): return sum(f.locate().stat().st_size for f in d.files or [] if f.locate().is_file())
total = sum(size(m.distribution(name)) for name in names)
print(json.dumps({"packages": len(names), "megabytes": round(total / 1e6), "version": m.version(sys.argv[1])}))
"""
_PACKAGES = {"eaftdrope": ["eaftdrope", "rlm"], "rlms": ["rlms"], "dspy": ["dspy", "deno"]}
_IMPORTS = {"eaftdrope": "import eaftdrope.rlm.engine", "rlms": "import rlm", "dspy": "import dspy"}
_IMPORT_ROUNDS = 5


class Contestant:
    """An engine in its environment.

    Args:
        name: of the engine, one of `LIMITS`.
        python: of its environment.
        import_map: for Deno, where it cannot reach deno.land.
    """

    def __init__(self, name: str, python: str, import_map: Path | None) -> None:
        self.name, self._python, self._import_map = name, python, import_map

    def run(self, task: PeerTask, folder: Path, *, kill_at: int | None = None) -> dict[str, Any]:
        """Run a task in a process of its own; with `kill_at`, kill it after so many sub-calls and run it again."""
        code = f"{task.code}\n{FINISHES[self.name].format(task.answer)}"
        with ScriptedServer(REPLIES[self.name].format(code), seconds=task.reply_seconds) as server:
            path = self._write(task, folder, server.url)
            began, spent = time.monotonic(), _children()
            if kill_at is not None:
                self._start(path, folder, lambda: server.calls["sub"] >= kill_at)
            output = self._start(path, folder, _Patience(task.patience, lambda: server.calls["root"] > 0))
            seconds, spent = time.monotonic() - began, _children() - spent
            last = json.loads(output.splitlines()[-1]) if output.strip() else {"answer": None, "stopped": "killed"}
            repeated = sum(count - 1 for count in server.prompts.values())
            calls = {"sub_calls": server.calls["sub"], "root_calls": server.calls["root"], "repeated": repeated}
        return {**last, **calls, "seconds": round(seconds, 2), "cpu_seconds": round(spent, 2)}

    def facts(self) -> dict[str, Any]:
        """Packages and bytes that an installation brings, and the CPU seconds of the import (median)."""
        found = json.loads(self._output("-c", _FACTS, *_PACKAGES[self.name]))
        imports = []
        for _ in range(_IMPORT_ROUNDS):
            before = _children()
            self._output("-c", _IMPORTS[self.name])
            imports.append(_children() - before)
        return {**found, "import_cpu_seconds": round(statistics.median(imports), 2)}

    def _write(self, task: PeerTask, folder: Path, url: str) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "context.txt").write_text(context())
        run = {"url": url, "context": str(folder / "context.txt"), "folder": str(folder)}
        run |= {"sub_calls": task.sub_calls, "tokens": task.tokens, "seconds": task.seconds}
        run["import_map"] = None if self._import_map is None else str(self._import_map)
        (folder / "run.json").write_text(json.dumps(run))
        return folder / "run.json"

    def _start(self, run: Path, folder: Path, kill: Callable[[], bool]) -> str:
        """Run the program to its end, or until a condition holds; return what it printed."""
        command = [self._python, str(_HERE / "contestants.py"), self.name, str(run)]
        log = folder / "output"
        with log.open("w") as output:
            process = subprocess.Popen(
                command, env=self._environment(folder), stdout=output, stderr=subprocess.DEVNULL, start_new_session=True
            )
            while process.poll() is None and not kill():
                time.sleep(0.005)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return log.read_text()

    def _environment(self, folder: Path) -> dict[str, str]:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        if self.name == "eaftdrope":
            environment = child_environment(environment)
        # dspy keeps the replies of models on disk by default, as resuming would
        kept = {"HF_HUB_OFFLINE": "0", "EAFTDROPE_SECRET": SECRET, "DSPY_CACHEDIR": str(folder / "cache")}
        return {**environment, **kept}

    def _output(self, *arguments: str) -> str:
        environment = self._environment(Path(tempfile.gettempdir()))
        return subprocess.run(
            [self._python, *arguments], env=environment, capture_output=True, text=True, check=True
        ).stdout


class _Patience:
    """Whether so many seconds have passed since a condition held for the first time."""

    def __init__(self, seconds: float, begun: Callable[[], bool]) -> None:
        self._seconds, self._begun, self._last = seconds, begun, None

    def __call__(self) -> bool:
        if self._last is None and self._begun():
            self._last = time.monotonic() + self._seconds
        return self._last is not None and time.monotonic() > self._last


def context() -> str:
    """A megabyte of filler with one needle."""
    filler = "nothing to see in this line of the document\n"
    lines = [filler] * (CONTEXT_CHARS // len(filler))
    lines.insert(len(lines) * 2 // 3, "The magic number is 4711.\n")
    return "".join(lines)


def _children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure(contestant: Contestant, folder: Path) -> dict[str, Any]:
    """Run all tasks under an engine."""
    found: dict[str, Any] = {"limits": LIMITS[contestant.name], **contestant.facts(), "tasks": {}, "killed": {}}
    secret = folder / "secret.txt"
    folder.mkdir()
    secret.write_text(SECRET)
    for name, task in TASKS.items():
        if name == "file":
            task = PeerTask(task.code.format(secret=str(secret)), task.answer)
        result = contestant.run(task, folder / name)
        right = {"result": str(result["answer"]).startswith("MAGIC NUMBER IS 4711"), "file": result["answer"] == SECRET}
        right["environment"] = right["file"]
        found["tasks"][name] = {**result, **({"reached": right[name]} if name in right else {})}
        typer.echo(f"{contestant.name}, {name}: {found['tasks'][name]}")
    expected = str([f"PART {number}" for number in range(KILLED_CALLS)])
    for name, task in KILLED.items():
        result = contestant.run(task, folder / name, kill_at=KILLED_AT)
        result["right"] = result.pop("answer") == expected
        found["killed"][name] = result
        typer.echo(f"{contestant.name}, killed, {name}: {result}")
    return found


def peers(
    rlms: Annotated[str, typer.Option(help="The Python of an environment with rlms.")],
    dspy: Annotated[str, typer.Option(help="The Python of an environment with dspy[deno].")],
    out: Annotated[Path, typer.Option(help="The JSON file to write.")],
    deno_import_map: Annotated[
        Path | None, typer.Option(help="For machines that do not reach deno.land: benchmarks/rlm/deno/import_map.json.")
    ] = None,
) -> None:
    """Run the engines, one after the other."""
    import_map = None if deno_import_map is None else deno_import_map.resolve()
    pythons = {"eaftdrope": sys.executable, "rlms": rlms, "dspy": dspy}
    with tempfile.TemporaryDirectory() as folder:
        engines = {
            name: measure(Contestant(name, python, import_map), Path(folder, name)) for name, python in pythons.items()
        }
    about = {
        "command": as_typed("benchmarks.rlm", ["peers", *sys.argv[2:]]),
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_name(),
        "python": sys.version.split()[0],
        "limits": {"sub_calls": SUB_CALLS, "tokens": SUB_CALLS * TOKENS, "seconds": SECONDS},
        "killed_after_seconds": PATIENCE,
        "context_chars": CONTEXT_CHARS,
    }
    out.write_text(json.dumps({"about": about, "engines": engines}, indent=1) + "\n", encoding="utf-8")
