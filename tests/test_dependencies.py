"""pyproject.toml declares what the package imports, wherever in a file, and nothing else."""

import ast
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
SETUP = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = SETUP["project"]["optional-dependencies"]
# tools beside the package
TOOLS = {"dev", "docs"}
# the module of a distribution, where it is not the distribution's own name
MODULES = {"pyyaml": "yaml"}
NOT_DECLARED = {
    "pydantic_core": "the core of pydantic, which requires one exact version of it",
    "triton": "a GPU build of torch brings its own; without one the Triton kernels are not loaded",
}
NOT_IMPORTED = {
    "deepspeed": "accelerate imports it, when a recipe asks for DeepSpeed",
}


def imported(source: str) -> set[str]:
    """Top-level names of the modules that are imported, in functions and under TYPE_CHECKING too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)


def modules(requirements: list[str]) -> set[str]:
    names = [canonicalize_name(Requirement(line).name) for line in requirements]
    return {MODULES.get(name, name.replace("-", "_")) for name in names}


def imported_below(folder: Path) -> set[str]:
    files = sorted(folder.rglob("*.py"))
    assert files
    return set().union(*(imported(path.read_text(encoding="utf-8")) for path in files)) - {"eaftdrope"}


def test_imports_are_found_wherever_they_are():
    source = "import os, numpy.linalg as la\nfrom . import x\ndef f():\n    from yaml.nodes import Node\n"
    assert imported(source) == {"numpy", "yaml"}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    lines = [line for name, extra in EXTRAS.items() if name not in TOOLS for line in extra]
    declared = modules([*SETUP["project"]["dependencies"], *lines])
    found = imported_below(ROOT / "eaftdrope")
    assert found - declared == set(NOT_DECLARED)
    assert declared - found == set(NOT_IMPORTED)


def test_the_build_declares_what_its_hook_imports():
    hook = imported((ROOT / "hatch_build.py").read_text(encoding="utf-8"))
    assert hook == modules(SETUP["build-system"]["requires"])
