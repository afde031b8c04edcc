"""The settings of test-time training. Loads without torch, as recipes read names and defaults here."""

from __future__ import annotations

from dataclasses import dataclass

from eaftdrope.loss.gates import resolve_gate

LAYOUTS = ("prime", "in_place")


@dataclass(frozen=True)
class TTTConfig:
    """Settings of a model that learns as it reads.

    Args:
        window (`int` or `None`, *optional*, defaults to 1024):
            Tokens that attention sees, the token itself included. None: the attention of the model's own configuration
            (a window in every layer after [`sliding`]).
        sink (`int`, *optional*, defaults to 4):
            First tokens that stay in view beside the window. A model pretrained with full attention loses most of what a
            window costs it by losing these tokens. 0 where `window` is None.
        chunk (`int`, *optional*, defaults to 512):
            Tokens that are learned at once; at most `window`.
        fast_blocks (`int` or `None`, *optional*):
            The last blocks, whose MLPs learn. None: the last quarter, as in the paper.
        layout (`str`, *optional*, defaults to `"prime"`):
            `"prime"` adds an MLP in series before the block's own, and only that one learns; `"in_place"` lets the block's
            own MLP learn, without new parameters.
        lr (`float`, *optional*, defaults to 0.3):
            Learning rate of the inner steps. 0 switches learning off: the model is then the window model. The paper's
            rate, for models meta-trained at length, is 1.0.
        clip (`float`, *optional*, defaults to 1.0):
            Largest norm of a row's gradient over all fast weights.
        horizon (`int` or `None`, *optional*, defaults to 1):
            Chunks that the gradient of the training loss spans through the inner steps. 1 is first order; None is all of
            them, the paper's meta-gradient.
        checkpoint (`bool`, *optional*, defaults to `False`):
            Recompute each chunk in the backward pass: less memory, more time.
        inner_gate (`str`, *optional*, defaults to `"none"`):
            Gate that weights the tokens of the inner loss, by its name in [`eaftdrope.loss.gates`].
        warmup (`int`, *optional*, defaults to 0):
            Chunks over which the inner rate rises to `lr`: chunk i has the rate `lr * min(1, (i + 1) / (warmup + 1))`.

    Raises:
        ValueError: a value out of range, settings that exclude each other, or an unknown layout or gate.
    """

    window: int | None = 1024
    sink: int = 4
    chunk: int = 512
    fast_blocks: int | None = None
    layout: str = "prime"
    lr: float = 0.3
    clip: float = 1.0
    horizon: int | None = 1
    checkpoint: bool = False
    inner_gate: str = "none"
    warmup: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("window", 1),
            ("sink", 0),
            ("chunk", 1),
            ("fast_blocks", 1),
            ("horizon", 1),
            ("warmup", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value}: must be at least {least}.")
        if self.window is None:
            # the model's own window has no sink
            object.__setattr__(self, "sink", 0)
        elif self.chunk > self.window:
            raise ValueError(
                f"chunk={self.chunk} with window={self.window}: tokens of a chunk must see each other, so a chunk cannot be "
                "larger than the window."
            )
        if self.layout not in LAYOUTS:
            raise ValueError(f"unknown layout {self.layout!r}. Layouts: {', '.join(LAYOUTS)}.")
        if not 0 <= self.lr < float("inf"):
            raise ValueError(f"lr={self.lr}: must be a number of at least 0.")
        if not 0 <= self.clip < float("inf"):
            raise ValueError(f"clip={self.clip}: must be a number of at least 0.")
        gate = resolve_gate(self.inner_gate)
        if not gate.row_local:
            raise ValueError(
                f"inner_gate={self.inner_gate!r} weights a token by its neighbours, so a row would learn from the other rows "
                "of its batch. Use a gate that reads only the token itself, such as 'eaft'."
            )

    def rate(self, index: int) -> float:
        """The learning rate of chunk `index` of a sequence."""
        return self.lr * min(1.0, (index + 1) / (self.warmup + 1))
