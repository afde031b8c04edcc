"""Processes that start in a moment: forked from a server that has torch, transformers and trl loaded, which takes each fresh
process five CPU seconds. For what a test wants of a process (its exit code, its output, its death, its rank); a test of the
start itself, such as what `--help` imports, starts a fresh one."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# imported once in each process that runs tests; a test sees to it that each can be
PRELOADED = (
    "datasets",
    "matplotlib.pyplot",
    "peft.tuners.lora.model",
    "rich.live",
    "rich.progress",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "transformers.models.llama.modeling_llama",
    "trl.trainer.sft_trainer",
    "typer.main",
    "eaftdrope.data",
    "eaftdrope.evaluate",
    "eaftdrope.run.train",
    "eaftdrope.report.card",
    "eaftdrope.report.page",
    "eaftdrope.trainer.callbacks.metrics",
    "eaftdrope.checkpoints.merge",
    "eaftdrope.trainer.callbacks.progress",
    "eaftdrope.trainer.trainer",
)
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(list(PRELOADED))


class Ended(NamedTuple):
    """A finished process. `code` is negative for a signal."""

    code: int
    out: str
    err: str


def start(work: Callable, *arguments: object, out: Path, err: Path | None = None, **environment: str):
    """The process of `work(*arguments)`, a function that can be imported. What it writes goes to files (`err` with `out`
    where it is not given), and its environment is this one's with `environment`."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    child = (work, arguments, str(out), str(err or out), os.getcwd(), {**os.environ, **environment})
    process = _context.Process(target=_in_the_child, args=child)
    process.start()
    return process


def run(work: Callable, *arguments: object, **environment: str) -> Ended:
    """`work(*arguments)` in a process of its own, to its end."""
    return run_ranks(1, work, *arguments, **environment)[0]


def run_ranks(count: int, work: Callable, *arguments: object, **environment: str) -> list[Ended]:
    """`work(*arguments)` in each of `count` processes, which find each other as those of `torchrun` do."""
    with tempfile.TemporaryDirectory() as folder:
        places = [(Path(folder) / f"out-{rank}", Path(folder) / f"err-{rank}") for rank in range(count)]
        together = _rendezvous(count) if count > 1 else {}
        processes = []
        for rank, (out, err) in enumerate(places):
            ours = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
            processes.append(start(work, *arguments, out=out, err=err, **together, **ours, **environment))
        for process in processes:
            process.join(300)
        hanging = [process for process in processes if process.exitcode is None]
        for process in hanging:
            process.kill()
        texts = [[file.read_text(encoding="utf-8") for file in place] for place in places]
        assert not hanging, f"{len(hanging)} of {count} processes hang: {texts}"
        return [Ended(process.exitcode, *text) for process, text in zip(processes, texts)]


def run_source(text: str, *arguments: object, **environment: str) -> Ended:
    """A program, given as its text, with its arguments in sys.argv."""
    return run(program, text, *map(str, arguments), **environment)


def program(text: str, *arguments: str) -> None:
    """The work of `run_source`."""
    sys.argv = ["program", *arguments]
    exec(compile(text, "program", "exec"), {"__name__": "__main__"})


def command_line(*arguments: str) -> None:
    """The work that is `eaftdrope ...`."""
    from eaftdrope.cli import main

    main([str(argument) for argument in arguments])


def end_together() -> None:
    """The last line of a rank: all meet, then end without tearing gloo down. Its threads can outlive the interpreter, and
    then the process dies of `terminate called without an active exception` after all its work."""
    import torch.distributed as dist

    # another rank may be gone already; its own work decides about its exit code
    with contextlib.suppress(RuntimeError):
        dist.barrier()
    sys.stdout.flush()
    os._exit(0)


def _rendezvous(count: int) -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    sizes = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", **sizes}


def _in_the_child(work, arguments, out, err, cwd, environment):
    import torch

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, place in {1: out, 2: err}.items():
        descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOCTTY)
        os.dup2(descriptor, number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, "utf-8", closefd=False) for number in (1, 2))
    torch.set_num_threads(1)
    # the Trainer collects garbage once, which takes long among a million objects of the libraries
    gc.freeze()
    work(*arguments)
