"""Runs the cells of a notebook without Jupyter: Python, and lines that begin with `!` as shell commands.

python -m tests.examples.notebook        runs examples/quickstart.ipynb and stores its outputs in it
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

NOTEBOOK = Path(__file__).parents[2] / "examples/quickstart.ipynb"
_END = "=== end of the cell ==="
_HEAD = """
import subprocess, sys
def shell(command):
    done = subprocess.run(command, shell=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    sys.stdout.write(done.stdout)
    if done.returncode:
        raise SystemExit(f"{command} ended with {done.returncode}")
"""


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run(notebook: dict, folder: Path) -> list[str]:
    """What each code cell prints, run one after the other in one process in `folder`.

    Raises:
        AssertionError: a cell failed; with what it printed last.
    """
    sources = ["".join(cell["source"]) for cell in code_cells(notebook)]
    python = [
        re.sub(r"^!(.*)$", lambda line: f"shell({line.group(1)!r})", text, flags=re.MULTILINE) for text in sources
    ]
    script = _HEAD + "".join(f"{cell}\nprint({_END!r}, flush=True)\n" for cell in python)
    # the verbs of this environment, as in a notebook whose kernel it is
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env=os.environ | {"PATH": path, "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout.split(f"{_END}\n")[:-1]


def main() -> None:
    notebook = json.loads(NOTEBOOK.read_text())
    with tempfile.TemporaryDirectory() as folder:
        for number, (cell, text) in enumerate(zip(code_cells(notebook), run(notebook, Path(folder))), start=1):
            lines = text.replace(folder, ".").splitlines(keepends=True)
            cell["execution_count"] = number
            cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": lines}] if lines else []
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
