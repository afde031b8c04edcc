"""SmolLM2-135M-Instruct as the subject of the study: its weights, its rows, and what measures it."""

from __future__ import annotations

import random
from functools import cached_property

from eaftdrope.evaluate.likelihood import TokenRow
from eaftdrope.evaluate.probes.perplexity import PerplexityProbe
from eaftdrope.evaluate.texts import shipped_text
from eaftdrope.models import load_model, load_tokenizer

from . import plan
from .plan import DoseCell
from .schemas import calls
from .selection import read_facts
from .subjects import Measured, Subject
from .texts import completion_row, labelled_facts, split_facts, split_notes

MODEL = "package:smollm2-135m-instruct"
TEXT_TOKENS = 2048


class SmolLM2:
    """What SmolLM2 is trained on and measured with. Facts and notes are the same for all seeds."""

    @cached_property
    def tokenizer(self):
        return load_tokenizer(MODEL)

    def subject(self) -> Subject:
        # the embedding, which is the head too, stays: a fifth of the weights, and of the memory of a training
        return Subject(lambda: load_model(MODEL), self.rows, self.measured(), lambda name: "embed" not in name)

    def measured(self) -> Measured:
        training = plan.TRAININGS[plan.SMOLLM2]
        _, held_out = split_notes(training.skill, training.held_out)
        _, facts = split_facts(read_facts(), training.planted)
        return Measured(
            [completion_row(self.tokenizer, *note) for note in held_out],
            [completion_row(self.tokenizer, fact.prompt, f" {fact.answer}") for fact in facts],
            PerplexityProbe([shipped_text()], TEXT_TOKENS).windows(self.tokenizer),
        )

    def rows(self, cell: DoseCell) -> list[TokenRow]:
        training = plan.TRAININGS[cell.model]
        skill, _ = split_notes(training.skill, training.held_out)
        if cell.kind == "schema":
            other = calls(training.planted, cell.contradicted, cell.seed)
        else:
            planted, _ = split_facts(read_facts(), training.planted)
            other = labelled_facts(planted, cell.contradicted, cell.kind, cell.seed)
        rows = [completion_row(self.tokenizer, *pair) for pair in (*skill, *other)]
        return random.Random(cell.seed).sample(rows, len(rows))
