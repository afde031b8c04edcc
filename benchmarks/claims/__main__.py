"""`python -m benchmarks.claims`: see the package's docstring."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.command import as_typed
from eaftdrope.files import write_atomically

from . import arithmetic, gate_claims, position_claims
from .check import Check

RESULTS = Path(__file__).resolve().parent / "results" / "claims.json"


def checks() -> list[Check]:
    """All checks, computed."""
    return [check() for module in (gate_claims, position_claims, arithmetic) for check in module.CHECKS]


def main(wanted: list[str]) -> None:
    torch.set_num_threads(1)
    started, found = time.process_time(), checks()
    if unknown := set(wanted) - {check.claim for check in found}:
        sys.exit(f"no check of {', '.join(sorted(unknown))}. Checks: {', '.join(check.claim for check in found)}.")
    for check in found:
        if not wanted or check.claim in wanted:
            print(f"{check.claim}  {'holds' if check.holds else 'does not hold'}: {check.statement}")
            for name, value in check.values.items():
                print(f"     {name}: {value}")
    if not wanted:
        document = {
            "command": as_typed("benchmarks.claims", sys.argv[1:]),
            "date": datetime.now(UTC).date().isoformat(),
            "torch": torch.__version__,
            "cpu_seconds": round(time.process_time() - started, 1),
            "checks": [asdict(check) for check in found],
        }
        write_atomically(RESULTS, json.dumps(document, indent=1) + "\n")
        print(f"written  {RESULTS.name}")


if __name__ == "__main__":
    main(sys.argv[1:])
