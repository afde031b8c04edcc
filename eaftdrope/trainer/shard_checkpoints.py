"""Checkpoints of a model that transformers shards while it loads it (`DistributedConfig`), which the Trainer cannot resume.

The weights are gathered into the files of stock transformers, and the optimiser's state into one file, by the names of the
parameters. Neither depends on the number of processes that wrote it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

OPTIMIZER_FILE, SCHEDULER_FILE = "optimizer_gathered.pt", "scheduler.pt"


def sharded_at_load(model: object) -> bool:
    """True if transformers sharded the model while it loaded it: tensor parallelism, or its own FSDP2."""
    return bool(getattr(model, "is_distributed_loading_by_transformers", False))


def save_optimizer(model: PreTrainedModel, optimizer: torch.optim.Optimizer, folder: Path, *, writes: bool) -> None:
    """Gather the state of the optimiser; for every process, of which one writes."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_optimizer_state_dict(model, _unwrapped(optimizer), options=options)
    if writes:
        torch.save(state, folder / OPTIMIZER_FILE)


def load_optimizer(model: PreTrainedModel, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Give every process its part of a gathered state."""
    state = torch.load(folder / OPTIMIZER_FILE, map_location="cpu", mmap=True, weights_only=True)
    if state["state"]:
        set_optimizer_state_dict(model, _unwrapped(optimizer), state, options=StateDictOptions(full_state_dict=True))
        return
    # torch does not load what has no tensors; plain SGD has only its learning rate and other options
    for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
        group.update({key: value for key, value in saved.items() if key != "params"})


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Copy the weights of a checkpoint into the model's shards.

    A second model is loaded for that, sharded alike: transformers converts names and shapes while it loads.
    """
    config = model.config.distributed_config
    loaded = type(model).from_pretrained(folder, dtype=model.dtype, distributed_config=config)
    found = dict(loaded.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _local(parameter).copy_(_local(found[name]))


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimiser without accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
