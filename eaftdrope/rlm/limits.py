"""What a run may use, and the count of what it has used. One budget serves a run and all its children."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, fields


@dataclass(frozen=True)
class Limits:
    """Limits of a run, its children included. They hold where a model is called, so no code can evade them.

    Args:
        iterations (`int`, *optional*, defaults to 20): replies of the root, and of each child.
        depth (`int`, *optional*, defaults to 1): levels of REPLs; 1: sub-calls are plain calls.
        sub_calls (`int`, *optional*, defaults to 200): calls of the sub-model. A batch that does not fit is not begun.
        tokens (`int`, *optional*, defaults to 2,000,000): tokens read and written by all models. The call or slice of a
            batch that passes the limit is the last.
        seconds (`float`, *optional*, defaults to 600): wall-clock time, counted again from 0 when a run is resumed.
        cell_seconds (`float`, *optional*, defaults to 10): computing time of one block of code, calls of models excluded; at
            most `seconds`.
        output_chars (`int`, *optional*, defaults to 2,000): characters of a reply's output that the root is shown.
        preview_chars (`int`, *optional*, defaults to 200): characters of the context that the first prompt shows.
        memory_mb (`int`, *optional*, defaults to 512): memory of the REPL.
        root_tokens (`int`, *optional*, defaults to 512): new tokens of a reply of the root.
        sub_tokens (`int`, *optional*, defaults to 256): new tokens of a reply of the sub-model.

    Raises:
        ValueError: a limit that is not positive and finite (`preview_chars` and `sub_calls` may be 0).
    """

    iterations: int = 20
    depth: int = 1
    sub_calls: int = 200
    tokens: int = 2_000_000
    seconds: float = 600.0
    cell_seconds: float = 10.0
    output_chars: int = 2_000
    preview_chars: int = 200
    memory_mb: int = 512
    root_tokens: int = 512
    sub_tokens: int = 256

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            if not math.isfinite(value):
                raise ValueError(f"{option.name}={value}: must be finite.")
            if value < 0 or (value == 0 and option.name not in ("preview_chars", "sub_calls")):
                raise ValueError(f"{option.name}={value}: must be positive.")


class LimitReached(Exception):
    """A limit of the run is reached. Code in the REPL never sees it: its cell is abandoned."""


@dataclass
class Budget:
    """What a run has used."""

    limits: Limits
    started: float = field(default_factory=time.monotonic)
    sub_calls: int = 0
    tokens: int = 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def check_calls(self, count: int) -> None:
        """
        Raises:
            LimitReached: not all of these calls fit.
        """
        if self.sub_calls + count > self.limits.sub_calls:
            raise LimitReached(f"sub_calls: {self.sub_calls} + {count} would pass {self.limits.sub_calls}")

    def reserve_calls(self, count: int) -> None:
        """Count calls before they are made.

        Raises:
            LimitReached: not all of them fit.
        """
        self.check_calls(count)
        self.sub_calls += count

    def check(self) -> None:
        """
        Raises:
            LimitReached: tokens or time are used up.
        """
        if self.tokens >= self.limits.tokens:
            raise LimitReached(f"tokens: {self.tokens} of {self.limits.tokens} used")
        if self.seconds >= self.limits.seconds:
            raise LimitReached(f"seconds: {self.limits.seconds:g} have passed")
