"""Which conflicts are kept, and the order of rows, by hand."""

import numpy as np
import torch

from eaftdrope.evaluate.likelihood import TokenRow
from eaftdrope.inspection.text import copy_key, in_context, shown
from eaftdrope.inspection.tokens import Tokens
from eaftdrope.inspection.worst import REASONS, RowFigures, WorstConflicts
from eaftdrope.loss import TokenStats
from tests.tiny_models import byte_tokenizer


def tokens_of(*rows):
    """Tokens of rows given as lists of (probability, entropy)."""
    flat = [(number, *pair) for number, row in enumerate(rows) for pair in row]
    row, probability, entropy = (torch.tensor(column) for column in zip(*flat))
    stats = TokenStats(-probability.log(), entropy, None, probability > 0.5, 100)
    conflicts = stats.conflict.nonzero().squeeze(1)
    place = torch.cat([torch.arange(1, len(one) + 1) for one in rows])
    return Tokens(
        stats, torch.ones_like(entropy), torch.ones_like(entropy), row, place + 10, place, conflicts,
        conflicts + 50, torch.full((len(conflicts),), 0.9),
    )  # fmt: skip


def test_the_worst_conflicts_are_kept():
    worst = WorstConflicts(2)
    worst.add(tokens_of([(0.05, 0.1), (0.9, 0.1)], [(0.001, 0.2)]), [4, 5])
    worst.add(tokens_of([(0.02, 0.3), (0.02, 2.0), (0.001, 0.1)]), [9])
    assert worst.seen == 4
    # at the same nll, the lower entropy is worse
    assert [(found.row, found.position, found.predicted) for found in worst.worst_first()] == [(9, 13, 52), (5, 11, 52)]
    assert [round(found.entropy, 6) for found in worst.worst_first()] == [0.1, 0.2]


def test_order_of_rows():
    figures = RowFigures(7)
    fine = [(0.9, 0.1)] * 4
    figures.add(
        tokens_of(fine, [(0.001, 0.1), *fine[1:]], [(0.05, 3.0)] * 4, fine, fine, fine, [(0.05, 0.1), *fine[1:]]),
        list(range(7)),
        [1, 2, 3, 4, 5, 4, 6],
    )
    assert figures.duplicates().tolist() == [0, 0, 0, 1, 0, 1, 0]
    order, reasons = figures.ranked()
    # row 1 has the most nats of conflict, row 2 the highest loss, row 3 is the first of two copies; then row 6
    assert order.tolist()[:4] == [1, 2, 3, 6]
    assert [REASONS[reason] for reason in reasons[:4]] == ["conflicts", "loss", "copies", "conflicts"]
    assert sorted(order.tolist()) == list(range(7))
    assert figures.conflicts.tolist() == [0, 1, 0, 0, 0, 0, 1] and figures.tokens.tolist() == [4] * 7
    # 40 bytes of figures a row
    assert sum(array.nbytes for array in vars(figures).values()) == 7 * 40
    assert isinstance(order, np.ndarray)


def row_of(prompt, answer, tokenizer):
    prompt, answer = tokenizer(prompt).input_ids, tokenizer(answer).input_ids
    return TokenRow([*prompt, *answer], [-100] * len(prompt) + answer)


def test_what_is_a_copy():
    tokenizer = byte_tokenizer()
    long = "Consult the references below for further details, please."
    assert len(long) > 40

    def key(prompt, answer):
        return copy_key(row_of(prompt, answer, tokenizer), tokenizer)

    assert key("a?", long) == key("b?", long.upper().replace(",", " -"))
    assert key("a?", long) != key("a?", long.replace("below", "above"))
    # a short answer is repeated by right
    assert key("a?", "Yes.") != key("b?", "Yes.")
    assert key("Is it? ", "Yes.") == key("is  it ", "YES")


def test_a_token_in_its_context():
    tokenizer = byte_tokenizer()
    row = row_of("The sky is ", "blue, they say.", tokenizer)
    found = in_context(row, 11, tokenizer("g").input_ids[0], tokenizer)
    assert found == {"before": "The sky is ", "label": "b", "predicted": "g", "after": "lue, they say."}
    long = row_of("x" * 700, "y", tokenizer)
    assert shown(long, tokenizer) == "x" * 600 + " ..."
