"""The checks of claims: the cheap ones give the committed values, and the page has every claim."""

import json
import re

import pytest

from benchmarks.claims import arithmetic, gate_claims, position_claims
from benchmarks.claims.__main__ import RESULTS, main
from tests.docs.pages import ROOT

COMMITTED = {check["claim"]: check for check in json.loads(RESULTS.read_text())["checks"]}
CHECKS = [*gate_claims.CHECKS, position_claims.order_blindness, *arithmetic.CHECKS]
STATUSES = {
    "reproduced here",
    "reproduced in part",
    "not reproduced here",
    "needs scale",
    "the sources disagree",
}
COUNTS = {"E": 16, "T": 19, "D": 12, "R": 12, "C": 8, "U": 8}
PAGE = (ROOT / "docs/evidence.md").read_text()
TABLES = [
    [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in block.splitlines()]
    for block in re.findall(r"(?:^\|.*\n)+", PAGE, flags=re.MULTILINE)
]
ROWS = [row for table in TABLES for row in table[2:] if re.fullmatch(r"[ETDRCU]\d+", row[0])]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_check_gives_the_committed_values(check):
    found = check()
    committed = COMMITTED[found.claim]
    assert found.holds == committed["holds"] and found.statement == committed["statement"]
    if found.claim == "D11":
        # zero up to rounding, which depends on the machine
        return
    assert list(found.values) == list(committed["values"])
    for name, value in committed["values"].items():
        assert found.values[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


def test_every_check_is_committed():
    assert set(COMMITTED) == {"D5", *(check().claim for check in CHECKS)}


def test_an_unknown_claim_is_refused(monkeypatch):
    monkeypatch.setattr(position_claims, "CHECKS", ())
    with pytest.raises(SystemExit, match="no check of E99"):
        main(["E99"])


def test_every_claim_stands_once_with_a_status():
    expected = [f"{letter}{number}" for letter, count in COUNTS.items() for number in range(1, count + 1)]
    assert [row[0] for row in ROWS] == expected
    assert {row[3] for row in ROWS} <= STATUSES
    assert {row[0] for table in TABLES for row in table[2:] if len(row) == 2} == STATUSES


def test_no_cell_of_the_page_is_empty():
    for table in TABLES:
        widths = {len(row) for row in table}
        assert len(widths) == 1, f"a row of the table {table[0]} has another number of cells"
        assert all(cell for row in table for cell in row), table[0]


def test_what_is_reproduced_links_a_result():
    for row in ROWS:
        if row[3].startswith("reproduced"):
            assert re.search(r"\]\([^)]+\)", row[4]), row[0]


def test_claims_that_are_checked_state_the_command():
    with_command = {row[0] for row in ROWS if "python -m benchmarks.claims" in row[4]}
    assert with_command == set(COMMITTED)
    assert all(f"benchmarks.claims {row[0]}`" in row[4] for row in ROWS if row[0] in COMMITTED)
