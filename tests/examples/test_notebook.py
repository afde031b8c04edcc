"""The notebook runs from its first cell to its last, and shows what it states."""

import json
import re

import pytest

from tests.clock import seconds_of_children
from tests.examples.notebook import NOTEBOOK, code_cells, run

BOOK = json.loads(NOTEBOOK.read_text())


def _printed(cells: list[dict]) -> list[str]:
    return ["".join(text for output in cell["outputs"] for text in output["text"]) for cell in cells]


def _check(gate: str, recipe: str, training: str) -> None:
    *_, last = gate.splitlines()
    probability, entropy, weight = (float(word) for word in last.split()[-3:])
    assert probability < 0.1 and entropy < 0.5 and weight < 0.05, "a confident conflict that hardly trains"
    assert "train: facts.jsonl" in recipe
    assert re.search(r"held-out loss ↓ .* better", training)
    assert re.search(r"perplexity ↓ .*", training) and re.search(r"multiple choice ↑ .*", training)


def test_the_notebook_is_well_formed_and_its_outputs_are_stored():
    assert (BOOK["nbformat"], BOOK["nbformat_minor"]) == (4, 5)
    names = [cell["id"] for cell in BOOK["cells"]]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[\w-]{1,64}", name) for name in names)
    first = BOOK["cells"][0]
    assert first["cell_type"] == "markdown" and first["source"][0].startswith("# ")
    assert [cell["execution_count"] for cell in code_cells(BOOK)] == [1, 2, 3]
    _check(*_printed(code_cells(BOOK)))


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    before = seconds_of_children()
    _check(*run(BOOK, tmp_path))
    # CPU time, which does not depend on what else the machine does: 44 seconds with other work beside it
    assert seconds_of_children() - before < 80
