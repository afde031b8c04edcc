"""Runs a script in two processes, or more, that talk through gloo."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def end_together() -> None:
    """The last line of a script: both ranks meet, then end without tearing gloo down. Its threads can outlive the
    interpreter, and then the process dies of `terminate called without an active exception` after all its work."""
    import torch.distributed as dist

    # the other rank may be gone already; its own work decides about its exit code
    with contextlib.suppress(RuntimeError):
        dist.barrier()
    sys.stdout.flush()
    os._exit(0)


def run_two(folder: Path, script: str, *arguments: object) -> None:
    """Runs `script` (source text) with `arguments` as two ranks; its errors become the assertion's text."""
    run_ranks(2, folder, script, *arguments)


def run_ranks(count: int, folder: Path, script: str, *arguments: object) -> None:
    """`run_two` with `count` ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = folder / "worker.py"
    path.write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, str(path), *map(str, arguments)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"},
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=300)
        assert worker.returncode == 0, errors[-3000:]
