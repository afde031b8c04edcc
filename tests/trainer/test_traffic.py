"""The cost model of docs/distributed.md: bytes that a device receives in a step, equal to those of the collectives that torch
dispatches on two processes."""

import json
from pathlib import Path

import pytest

from tests.trainer import engines, traffic
from tests.trainer.processes import run_ranks
from tests.trainer.tiny import VOCAB, tiny_model

LAYERS, HIDDEN = 2, 64
# weights and activations in float32 here, as gradients always are
B = 4
# per row: maximum, rest, entropy and gap, and the largest logits of the gate eaft
STATISTICS = 4 + 20


@pytest.fixture(scope="module")
def collectives(tmp_path_factory):
    """The collectives of a step of each engine."""
    folder = tmp_path_factory.mktemp("traffic")
    engines.make_starts(folder)
    cases = ["ddp-untied", "tp-untied", "full-untied"]
    run_ranks(traffic.PROCESSES, Path(traffic.__file__).read_text(), folder, *cases)
    return {case.split("-")[0]: json.loads((folder / f"{case}-traffic.json").read_text()) for case in cases}


@pytest.mark.engine_table
def test_the_cost_model(collectives):
    parameters = sum(p.numel() for p in tiny_model(tie_word_embeddings=False).parameters())
    head, others = VOCAB * HIDDEN, (traffic.PROCESSES - 1) / traffic.PROCESSES
    received = {engine: sum(size for _, _, size in found) for engine, found in collectives.items()}
    assert received["ddp"] == 8 * parameters * others
    # head and final norm are gathered once: they are still there when the backward begins
    assert received["full"] == ((2 * B + 4) * parameters - B * (head + HIDDEN)) * others
    # hidden states are summed twice in a block, and their gradient once for each matrix that reads them: q, k, v, gate, up
    hidden = [(shape, size) for _, shape, size in collectives["tp"] if shape[-1] == HIDDEN and len(shape) == 3]
    tokens = hidden[0][0][0] * hidden[0][0][1]
    assert len(hidden) == 7 * LAYERS + 1
    assert sum(size for _, size in hidden) == 2 * (7 * LAYERS + 1) * B * tokens * HIDDEN * others
    # the loss: statistics of the trained rows, their part of the gradient, and a check that the ranks have the same rows
    of_loss = [
        (shape, size) for _, shape, size in collectives["tp"] if len(shape) < 3 and shape[-1] in (2, STATISTICS, HIDDEN)
    ]
    rows = sum(shape[0] for shape, _ in of_loss if shape[-1] == STATISTICS)
    loss = (
        STATISTICS * 4 * rows * (traffic.PROCESSES - 1) + 16 * (traffic.PROCESSES - 1) + 2 * B * rows * HIDDEN * others
    )
    # what is left: the gradients of the norms
    norms = 2 * (2 * LAYERS + 1) * HIDDEN * 4 * others
    assert 0 < rows < tokens
    assert received["tp"] == sum(size for _, size in hidden) + loss + norms
