"""What a repair does to a trained model; see repair.py. Free of torch, so that a command can check it at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from eaftdrope.errors import UserError

SMALLEST = 4
"""Fewest singular values that `denoise` has a threshold for; the median of fewer estimates no noise."""


@dataclass(frozen=True)
class Repair:
    """What is done to a trained model; the default is nothing.

    Attributes:
        share: position between the base model (0) and the trained one (1).
        denoise: remove the noise from the spectrum of each change.
        restore: modules that get the base model's weights: a name (`q_proj`) or a part of a path (`layers.0.self_attn`).
    """

    share: float = 1.0
    denoise: bool = False
    restore: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self != NOTHING

    @property
    def options(self) -> list[str]:
        """The same as options of `eaftdrope merge`."""
        words = ["--denoise"] if self.denoise else []
        words += ["--restore", ",".join(self.restore)] if self.restore else []
        return words + (["--share", f"{self.share:.4g}"] if self.share != 1 else [])

    def restores(self, tensor: str) -> bool:
        """Return whether a tensor, by its name in the model, belongs to a restored module."""
        return any(_is_in(module, tensor) for module in self.restore)


NOTHING = Repair()


def check_repair(repair: Repair) -> None:
    """Check the share.

    Raises:
        UserError: it is out of range.
    """
    if not 0 <= repair.share <= 1:
        raise UserError(f"share {repair.share:g} is not between 0 (the base model) and 1 (the trained one).")


def check_restored(repair: Repair, tensors: Iterable[str], what: str) -> None:
    """Check that every restored module exists.

    Args:
        tensors: names of the tensors that may be restored.
        what: what has these tensors, for the message.

    Raises:
        UserError: a name belongs to no tensor; it suggests the nearest one.
    """
    tensors = list(tensors)
    for module in repair.restore:
        if any(_is_in(module, tensor) for tensor in tensors):
            continue
        known = {part: None for tensor in tensors for part in tensor.split(".")[:-1] if not part.isdigit()}
        near = difflib.get_close_matches(module, known, n=2, cutoff=0.5)
        hint = f" Did you mean {' or '.join(f'`{name}`' for name in near)}?" if near else ""
        raise UserError(f"restore {module}: {what} has no such module.{hint} Modules: {', '.join(known)}.")


def _is_in(module: str, tensor: str) -> bool:
    return f".{module}." in f".{tensor}."
