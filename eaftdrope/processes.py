"""The processes of a distributed run, as torchrun and accelerate describe them in the environment.

The answers are known before `torch.distributed` is initialised, and without importing torch: a plan or a folder needs
them long before the Trainer does.
"""

from __future__ import annotations

import os


def process_count() -> int:
    """Return the number of processes of this run (`WORLD_SIZE`); 1 outside of a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def restart_count() -> int:
    """Return how often torchrun has restarted the processes of this run (`TORCHELASTIC_RESTART_COUNT`)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def process_rank() -> int:
    """Return the number of this process (`RANK`), from 0; 0 outside of a launcher."""
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    """Return True in the one process that prints and writes (`RANK` 0), and outside of a launcher."""
    return process_rank() == 0


def is_local_main_process() -> bool:
    """Return True in the first process of each machine (`LOCAL_RANK` 0; `RANK` where a launcher sets only that)."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0"))) == 0
