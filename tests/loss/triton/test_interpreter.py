"""Runs interpreter_cases.py and guard_cases.py: TRITON_INTERPRET is read when triton is imported, so they need
a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
NO_CACHE = ("-p", "no:cacheprovider")
CASES = [Path(__file__).with_name(name) for name in ("interpreter_cases.py", "guard_cases.py")]


@pytest.mark.parametrize(
    "marked",
    [
        pytest.param("not exhaustive", id="kernels"),
        pytest.param("exhaustive", id="planted bugs", marks=pytest.mark.exhaustive),
    ],
)
def test_in_the_interpreter(marked):
    """Values against float64, borders, offsets beyond 2^31, accesses out of bounds; and planted bugs, which must show."""
    pytest.importorskip("triton", reason="triton is not installed: its kernels were NOT run in the interpreter")
    done = subprocess.run(
        # a crash is what some cases wait for, and needs no traceback of the interpreter
        [sys.executable, "-m", "pytest", "-m", marked, "-v", "--tb=short", "-p", "no:faulthandler", *NO_CACHE, *CASES],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0, f"the cases ended with {done.returncode}; their output is above"
    assert " passed" in done.stdout and " failed" not in done.stdout
