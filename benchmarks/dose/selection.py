"""The facts that SmolLM2-135M-Instruct is sure of, kept in `facts.json`: made once, by `python -m benchmarks.dose select`.

A fact is kept if every token of its answer is the model's first choice at an entropy below 0.5 nats: the entropy of a
confident conflict, which any other answer then is. A fact is not kept if its relation has too few of them.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eaftdrope.evaluate.likelihood import batches
from eaftdrope.files import write_atomically
from eaftdrope.inspection.tokens import measure_tokens
from eaftdrope.loss import CONFLICT_ENTROPY
from eaftdrope.loss.gates import NoGate

from .candidates import Fact
from .texts import completion_row

FILE = Path(__file__).parent / "facts.json"
# of a relation
LEAST = 6


@torch.no_grad()
def sure_facts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: list[Fact],
    *,
    least: int = LEAST,
    batch_tokens: int = 1024,
) -> list[Fact]:
    """Return the facts that a model is sure of, in order."""
    rows = [completion_row(tokenizer, fact.prompt, f" {fact.answer}") for fact in facts]
    sure = set()
    for batch in batches([len(row.input_ids) for row in rows], batch_tokens):
        tokens = measure_tokens(model, [rows[i] for i in batch], NoGate())
        is_sure = tokens.stats.correct & (tokens.stats.entropy < CONFLICT_ENTROPY)
        sure |= {i for place, i in enumerate(batch) if bool(is_sure[tokens.row == place].all())}
    count = Counter(facts[i].relation for i in sure)
    return [fact for i, fact in enumerate(facts) if i in sure and count[fact.relation] >= least]


def write_facts(facts: list[Fact], file: Path = FILE) -> Path:
    """Write one fact per line."""
    lines = ",\n".join(json.dumps(list(fact), ensure_ascii=False) for fact in facts)
    return write_atomically(file, f"[\n{lines}\n]\n")


def read_facts(file: Path = FILE) -> list[Fact]:
    """The selected facts."""
    return [Fact(*entry) for entry in json.loads(file.read_text(encoding="utf-8"))]
