"""The rows of an optimiser step, recomputed afterwards from the seed of the epoch's order."""

from __future__ import annotations

from itertools import islice

from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from torch.utils.data import DataLoader, SequentialSampler

from .finite import listed


def rows_of_step(
    loader: DataLoader, step: int, accumulation: int, *, replicas: int = 1, batch: tuple[int, int] | None = None
) -> list[int]:
    """Return the indices of the rows of a step (counted from 1); `[]` if the order cannot be recomputed: streamed rows, or a
    sampler other than the Trainer's own.

    It draws from the loader's sampler, so training must have ended.

    Args:
        loader: the dataloader prepared by accelerate, of any process.
        accumulation: micro-batches per step.
        replicas: number of processes with different rows.
        batch: (micro-batch of the step, replica) to return only its rows.
    """
    sharded = getattr(loader, "batch_sampler", None)
    # accelerate distributes the batches over the processes in turn
    batches = getattr(sharded, "batch_sampler", sharded)
    sampler = getattr(batches, "sampler", None)
    if not isinstance(sampler, SeedableRandomSampler | SequentialSampler) or getattr(sharded, "split_batches", False):
        return []
    epoch, within = divmod(step - 1, max(-(-len(loader) // accumulation), 1))
    if isinstance(sampler, SeedableRandomSampler):
        sampler.set_epoch(epoch)
    first = within * accumulation * replicas
    found = list(islice(batches, first, first + accumulation * replicas))
    if batch is not None:
        micro_batch, replica = batch
        index = micro_batch * replicas + replica
        # the last batches of an epoch may be filled with rows of its beginning
        found = found[index : index + 1]
    return [row for rows in found for row in rows]


def describe_rows(indices: list[int], dataset: object) -> str:
    """Return the origin of the rows from the dataset's `origin` column, else their numbers; "" for no rows."""
    if not indices:
        return ""
    if isinstance(dataset, Dataset) and "origin" in dataset.column_names:
        return f"rows {listed([dataset[index]['origin'] for index in indices])}"
    return f"rows {listed([str(index) for index in indices])} of the training set, from 0"
