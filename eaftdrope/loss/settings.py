"""The settings of the loss: one value, built once by the recipe, `EAFTConfig`, `apply_eaft` or the operator, and passed
whole down to the kernels. Loads without torch, as recipes read names and defaults here."""

from __future__ import annotations

from dataclasses import dataclass, field

from .anchor import Anchor
from .gates import EAFT, Gate

BACKENDS = ("auto", "torch", "cpu", "triton", "cuda")
TAILS = ("exact", "sparse")


def check_backend_name(name: str) -> None:
    """Raise ValueError for a name that is not in `BACKENDS`."""
    if name not in BACKENDS:
        raise ValueError(f"unknown loss backend {name!r}. Backends: {', '.join(BACKENDS)}.")


@dataclass(frozen=True)
class LossSettings:
    """Settings of the fused operator.

    Args:
        gate ([`~eaftdrope.loss.gates.Gate`], *optional*, defaults to `EAFT()`):
            Weight of a token from its statistics.
        backend (`str`, *optional*, defaults to `"auto"`):
            Implementation of the work on a tile, one of `BACKENDS`; `"auto"` is the fastest that works on the device.
        tile_bytes (`int`, *optional*):
            Memory of one tile of logits; None chooses by device and vocabulary (`compute.default_tile_bytes`).
        tail (`str`, *optional*, defaults to `"exact"`):
            `"sparse"` forms the gradients only from the columns of the vocabulary that matter (`tail.py`).
        tail_threshold (`float`, *optional*, defaults to 2^-12):
            With `tail="sparse"`, gradients with respect to a logit below this are dropped.
        gate_threshold (`float`, *optional*, defaults to 0.0):
            Rows whose gate is smaller take no part in the gradient; 0 leaves out only rows whose gate is 0.
        recompute (`bool`, *optional*, defaults to `False`):
            Form the gradient in a second pass, by slices of the vocabulary: a third more FLOPs, but no float32 sum of
            weight gradients.
        anchor ([`~eaftdrope.loss.anchor.Anchor`], *optional*):
            Divergence from the base model, added to the gated loss of every trained token.

    Raises:
        ValueError: an unknown backend or tail, a threshold out of range, or settings that exclude each other.
    """

    gate: Gate = field(default_factory=EAFT)
    backend: str = "auto"
    tile_bytes: int | None = None
    tail: str = "exact"
    tail_threshold: float = 2.0**-12
    gate_threshold: float = 0.0
    recompute: bool = False
    anchor: Anchor | None = None

    def __post_init__(self) -> None:
        assert isinstance(self.gate, Gate), "resolve_gate() makes a gate of a name or a function"
        check_backend_name(self.backend)
        if self.tail not in TAILS:
            raise ValueError(f"unknown tail {self.tail!r}. Tails: {', '.join(TAILS)}.")
        if not 0 < self.tail_threshold < 1:
            raise ValueError(f"tail_threshold={self.tail_threshold}: must be between 0 and 1 (2^-12 by default).")
        if not 0 <= self.gate_threshold < 1:
            raise ValueError(f"gate_threshold={self.gate_threshold}: must be at least 0 and below 1.")
        if self.tile_bytes is not None and self.tile_bytes < 1:
            raise ValueError(f"tile_bytes={self.tile_bytes}: must be a number of bytes.")
        if self.recompute and self.tail != "exact":
            raise ValueError("recompute forms whole slices of the gradient: it requires tail='exact'.")
        if self.anchor is not None and self.tail != "exact":
            raise ValueError(
                "tail='sparse' restores what it drops as one mean over the vocabulary, which needs gradients of one sign; "
                "those of an anchor have both. An anchor requires tail='exact'."
            )

    @property
    def dropped_below(self) -> float | None:
        """`tail_threshold` with `tail="sparse"`; None where every gradient is kept."""
        return self.tail_threshold if self.tail == "sparse" else None
