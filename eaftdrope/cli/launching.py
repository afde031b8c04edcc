"""`--launch N`: N processes of the same command on this machine, by torch's launcher."""

from __future__ import annotations

import os
import signal
import sys

from eaftdrope.errors import UserError
from eaftdrope.processes import process_count

from .terminal import echo

# torch's launcher sends its processes a signal and kills them after so many seconds: a step and a checkpoint must fit
_SHUTDOWN_SECONDS = 600
_LOST = 3


def is_launcher(count: int) -> bool:
    """True in the command that starts the processes; False in each of them.

    Raises:
        UserError: another launcher has started another number.
    """
    if "WORLD_SIZE" not in os.environ:
        return True
    if process_count() != count:
        raise UserError(
            f"--launch {count}: a launcher has started {process_count()} processes already. Leave --launch out there."
        )
    return False


def start_processes(count: int, arguments: list[str]) -> None:
    """Run `eaftdrope` with these arguments in `count` processes, and end with their exit code.

    The first process that ends with an error decides. Ctrl-C and SIGTERM reach every process, which saves and ends.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # as many threads as torchrun gives, unless there are cores for more
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id="eaftdrope",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
        shutdown_timeout=_SHUTDOWN_SECONDS,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "eaftdrope", *arguments)
    except SignalException as stop:
        raise SystemExit(128 + stop.sigval) from None
    except ChildFailedError as failed:
        rank, first = failed.get_first_failure()
        if first.exitcode >= 0:
            raise SystemExit(first.exitcode) from None
        name = signal.Signals(-first.exitcode).name
        echo(f"rank {rank} (pid {first.pid}) was ended by {name}. The same command resumes the run.", err=True)
        raise SystemExit(_LOST) from None
