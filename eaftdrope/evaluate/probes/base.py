"""The interface of a probe, and the held-out data that probes of the target are built from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self, runtime_checkable

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from eaftdrope.data import Example

    from ..likelihood import Progress
    from ..scores import Score


class HeldOut(NamedTuple):
    """Held-out rows: as examples, and encoded (columns `input_ids`, `labels`); None if there are no such rows."""

    examples: list[Example] | None = None
    dataset: Dataset | None = None


class Probe(Protocol):
    """A measurement of a model.

    `group` is "target" or "general".
    """

    @property
    def name(self) -> str: ...

    @property
    def group(self) -> str: ...

    @classmethod
    def from_options(cls, options: dict[str, Any], held_out: HeldOut, *, name: str, group: str) -> Self:
        """Build the probe from all of its recipe options.

        Raises:
            UserError: it needs held-out data that does not exist, or its file cannot be used.
        """
        ...

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_tokens: int = 2048,
        progress: Progress | None = None,
    ) -> list[Score]:
        """Measure a model in evaluation mode without changing it; `progress(done, total)` is called as it advances."""
        ...


@runtime_checkable
class CheapProbe(Probe, Protocol):
    """A probe that never generates and draws no random number: cheap enough to run during training."""

    def subset(self, limit: int) -> Self:
        """Return the same probe on at most `limit` of its rows, windows, questions or prompts."""
        ...
