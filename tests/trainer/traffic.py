"""The bytes that a rank receives in the collectives of a step, counted where torch dispatches them.

    python -m tests.trainer.traffic FOLDER CASE ...

writes FOLDER/CASE-traffic.json: name, shape and bytes received of each collective of one training step, on rank 0.
"""

import json
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.forked import end_together
from tests.trainer import engines

PROCESSES = 2
_OTHERS = (PROCESSES - 1) / PROCESSES
# Collective -> bytes received per byte of its first tensor, by a ring: a reduction to all moves a tensor twice, less the
# process's own part. That tensor is the whole one, or the part of one process.
RECEIVED = {
    "all_reduce": 2 * _OTHERS,
    "allreduce": 2 * _OTHERS,
    "allgather": PROCESSES - 1,
    "allgather_base": _OTHERS,
    "all_gather_into_tensor": PROCESSES - 1,
    "reduce_scatter_base": PROCESSES - 1,
    "reduce_scatter_tensor": _OTHERS,
}


class Collectives(TorchDispatchMode):
    """Keeps the name, shape and bytes received of every collective that moves weights, gradients or hidden states."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, _, name = str(function).partition(".")
        name = name.split(".")[0].strip("_")
        if namespace in ("c10d", "_c10d_functional") and name in RECEIVED:
            first = next(leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor))
            size = first.numel() * first.element_size() * RECEIVED[name]
            self.found.append((name, list(first.shape), size))
        return function(*args, **(kwargs or {}))


def count(folder: Path, case: str) -> None:
    trainer = engines.make_trainer(folder, *case.split("-"), max_steps=2)
    step, collectives = trainer.training_step, Collectives()

    def counted(*args, **kwargs):
        # of the last step: the first one arranges the buckets of DDP
        if trainer.state.global_step == 0:
            return step(*args, **kwargs)
        with collectives:
            return step(*args, **kwargs)

    trainer.training_step = counted
    trainer.train()
    if trainer.accelerator.is_main_process:
        (folder / f"{case}-traffic.json").write_text(json.dumps(collectives.found))


if __name__ == "__main__":
    engines.main(Path(sys.argv[1]), sys.argv[2:], count)
    end_together()
