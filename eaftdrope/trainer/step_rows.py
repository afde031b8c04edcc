"""The rows of an optimiser step, found again afterwards: the order of an epoch follows from its seed."""

from __future__ import annotations

from itertools import islice

from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from torch.utils.data import DataLoader, SequentialSampler

from .finite import listed


def rows_of_step(
    loader: DataLoader, step: int, accumulation: int, *, replicas: int = 1, batch: tuple[int, int] | None = None
) -> list[int]:
    """Indices of the rows that a step (counted from 1) was trained on; `[]` where the order cannot be drawn again: rows that
    are streamed, or a sampler other than the Trainer's own.

    Draws from the loader's sampler, so it is for a training that has ended.

    Args:
        loader: as prepared by accelerate, of any one process.
        replicas: processes that have different rows.
        batch: the micro-batch of the step and the replica, to name those rows only.
    """
    sharded = getattr(loader, "batch_sampler", None)
    # accelerate deals the batches out to the processes in turn
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
        place = micro_batch * replicas + replica
        # the last batches of an epoch may be made of rows of its beginning
        found = found[place : place + 1]
    return [row for rows in found for row in rows]


def rows_in_words(indices: list[int], dataset: Dataset | None) -> str:
    """Where the rows are from, as the dataset's `origin` column has it, else their numbers; "" for none."""
    if not indices:
        return ""
    if isinstance(dataset, Dataset) and "origin" in dataset.column_names:
        return f"rows {listed([dataset[index]['origin'] for index in indices])}"
    return f"rows {listed([str(index) for index in indices])} of the training set, from 0"
