"""The stage ttt: make the model learn as it reads (TTT-E2E), and meta-train it on long text or conversations."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from transformers import PretrainedConfig

from eaftdrope.errors import UserError
from eaftdrope.files import read_lines
from eaftdrope.loss.gates import resolve_gate
from eaftdrope.recipe.data_section import Data
from eaftdrope.recipe.schema import Model
from eaftdrope.recipe.stage_sections import TextData
from eaftdrope.recipe.training_sections import Lora, Loss, Train
from eaftdrope.recipe.ttt_section import MetaTraining
from eaftdrope.report.positions import position_markdown
from eaftdrope.ttt.meta_training import sharding_refused

from ..machine import sharding_engine
from ..settings import TrainingSettings
from .training import Prepared, TrainingStage

_CARD = """\
## Learning as it reads

The fast MLPs of the last blocks take a step of gradient descent after every {chunk:,} tokens that the model reads, so memory
and time per token do not grow with the length of the text. What was read longer ago than {window} is remembered as a summary
is: it cannot be recalled word for word. The model was trained to learn; used without it, it may be worse than before. A
saved state contains what was read, and is as private as the text.

{positions}"""


@dataclass(frozen=True)
class TTTStage(TrainingStage):
    """Train with the sections below `ttt`."""

    name = "ttt"

    @property
    def section(self) -> MetaTraining:
        assert self.record.ttt is not None, "a recipe with the stage ttt has that section"
        return self.record.ttt

    @property
    def model(self) -> Model:
        # the fast MLPs are copies of the model's own, which 4 bits rule out
        return super().model.model_copy(update={"quantization": "none"})

    @property
    def data(self) -> Data | TextData:
        return self.section.data.resolved()

    @property
    def loss(self) -> Loss:
        return self.section.loss

    @property
    def train(self) -> Train:
        return self.section.train

    @property
    def lora(self) -> Lora | None:
        return self.section.lora

    @property
    def merge(self) -> bool:
        return self.record.output.merge

    @property
    def learns(self) -> bool:
        return True

    def settings(self, config: PretrainedConfig) -> TrainingSettings:
        section = self.section
        return TrainingSettings(
            model=self.model,
            data=self.data,
            loss=section.loss,
            train=section.train,
            probes=section.probes,
            max_length=section.data.max_length,
            folder=str(self.folder.path),
            lora=section.lora,
            merge=self.merge,
            report_to=tuple(self.record.output.report_to),
            ttt=section.config(),
            stage=self.name,
        )

    def prepare(self, console: Console) -> Prepared:
        """See `Stage.prepare`.

        Raises:
            UserError: the weights would be sharded, or no row is longer than a chunk.
        """
        if engine := sharding_engine():
            raise UserError(sharding_refused(engine))
        prepared = super().prepare(console)
        longest, chunk = prepared.data.longest, self.section.chunk
        if longest <= chunk:
            raise UserError(
                f"the longest row has {longest:,} tokens and a chunk has {chunk:,}, so nothing learned would ever be used. "
                "Set ttt.data.sequences=blocks, which joins rows, or a smaller ttt.chunk."
            )
        return prepared

    def method(self, settings: TrainingSettings) -> str:
        section, lora, data = self.section, self.lora, self.section.data
        order = "first order" if section.horizon == 1 else f"the meta-gradient over {section.horizon} chunks"
        tuned = f"LoRA (r = {lora.r}, alpha = {lora.alpha:g}) for the slow weights" if lora else "all weights trained"
        formula = resolve_gate(self.loss.gate, **self.loss.gate_kwargs()).formula
        weighted = (
            "plain cross-entropy" if self.loss.gate == "none" else f"cross-entropy weighted by the gate {formula}"
        )
        rows = "blocks of text" if data.sequences == "blocks" else "rows"
        return (
            f"Test-time training (TTT-E2E, arXiv 2512.23675): {tuned}, by {order}, with {weighted} on {rows} of "
            f"{'' if data.sequences == 'blocks' else 'at most '}{data.max_length:,} tokens; {self._reading()}"
        )

    def _reading(self) -> str:
        section = self.section
        window = "the model's own window" if section.window is None else f"a window of {section.window:,} tokens"
        sink = f" and the first {section.sink}" if section.window is not None and section.sink else ""
        gate = "" if section.inner_gate == "none" else f", inner gate {section.inner_gate}"
        return f"{window}{sink}, chunks of {section.chunk:,}, inner rate {section.lr:g}{gate}, layout {section.layout}"

    def card_tags(self) -> list[str]:
        return ["ttt", *([] if self.loss.gate == "none" else super().card_tags())]

    def card_sections(self) -> list[str]:
        window = "its window" if self.section.window is None else f"{self.section.window:,} tokens"
        positions = position_markdown(read_lines(self.folder.path / "metrics.jsonl"))
        return [_CARD.format(chunk=self.section.chunk, window=window, positions=positions)]
