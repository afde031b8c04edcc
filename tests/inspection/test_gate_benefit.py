"""The sentence that `inspect` quotes from the study of the gate: only with its results, and the shares near the data's."""

import json

import pytest

from eaftdrope.inspection.gate_benefit import gate_benefit

STUDY = {
    "model": "A-Model",
    "arm": "eaft",
    "seeds": 3,
    "date": "2026-12-01",
    "points": [
        {"conflicts": 0.02, "facts": 0.105, "half": 0.031, "word": "worth using"},
        {"conflicts": 0.001, "facts": -0.004, "half": 0.012, "word": "no clear change"},
        {"conflicts": 0.05, "facts": 0.2, "half": 0.04, "word": "worth using"},
    ],
}
LOW = "-0.4 ± 1.2 points at 0.10 % confident conflicts (no clear change)"
MIDDLE = "+10.5 ± 3.1 points at 2.00 % confident conflicts (worth using)"
HIGH = "+20.0 ± 4.0 points at 5.00 % confident conflicts (worth using)"


@pytest.fixture
def study(tmp_path):
    file = tmp_path / "gate_benefit.json"
    file.write_text(json.dumps(STUDY), encoding="utf-8")
    return file


def test_without_results_nothing_is_claimed(tmp_path):
    assert gate_benefit(0.01, tmp_path / "gate_benefit.json") is None


@pytest.mark.parametrize(
    ("share", "where", "quoted", "left_out"),
    [
        (0.01, "1.00 % of these tokens are confident conflicts, which is between two shares", [LOW, MIDDLE], [HIGH]),
        (0.02, "which is between two shares", [MIDDLE, HIGH], [LOW]),
        (0.0004, "less than the smallest share", [LOW], [MIDDLE, HIGH]),
        (0.3, "which is the largest share that the study of the gate measured, or more", [HIGH], [LOW, MIDDLE]),
    ],
)
def test_the_measured_shares_around_it_are_quoted(study, share, where, quoted, left_out):
    sentence = gate_benefit(share, study)
    assert where in sentence and "A-Model, 3 seeds, 2026-12-01" in sentence and "the gate eaft" in sentence
    assert all(text in sentence for text in quoted) and not any(text in sentence for text in left_out)
