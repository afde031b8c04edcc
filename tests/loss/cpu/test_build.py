"""How the library comes to be: compiled once, by whoever is first, for the sources there are; or a clear reason."""

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import pytest

from eaftdrope.loss.native import build as product
from tests.loss.cpu.test_memory import need_compiler

ROOT = Path(__file__).parents[3]
# A compiler of a few lines: it notes that it ran, and writes its output in two halves.
COMPILER = """#!/bin/sh
if [ "$1" = --version ]; then echo stand-in 1.0; exit; fi
echo ran >> "$COMPILER_LOG"
for word; do output=$word; done
printf first- > "$output"; sleep 0.5; printf second >> "$output"
"""
BROKEN = """#!/bin/sh
if [ "$1" = --version ]; then echo stand-in 1.0; exit; fi
echo "eaft_cpu.cpp:1: error: the stand-in dislikes this program" >&2
exit 3
"""
LOAD_PATH = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("build", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.library_path())
"""


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A copy of the sources, an empty cache, and the stand-in for a compiler."""
    folder = tmp_path / "native"
    shutil.copytree(product.SOURCES, folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    monkeypatch.setenv("EAFTDROPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COMPILER_LOG", str(tmp_path / "log"))
    use_compiler(tmp_path, monkeypatch, COMPILER)
    return folder


def use_compiler(folder: Path, monkeypatch, script: str) -> Path:
    path = folder / "stand-in-c++"
    path.write_text(script, encoding="utf-8")
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    return path


def load_build(folder: Path):
    spec = importlib.util.spec_from_file_location("build_of_a_copy", folder / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def times_compiled(tmp_path: Path) -> int:
    log = tmp_path / "log"
    return len(log.read_text().split()) if log.exists() else 0


def test_it_is_compiled_once_into_the_cache(sources, tmp_path):
    build = load_build(sources)
    first = build.library_path()
    assert first.is_relative_to(tmp_path / "cache" / "native") and first.read_text() == "first-second"
    assert build.library_path() == first and load_build(sources).library_path() == first
    assert times_compiled(tmp_path) == 1
    # nothing half-made is left behind
    assert [path.name for path in first.parent.iterdir()] == [first.name]


def test_a_change_of_the_sources_is_compiled_anew(sources, tmp_path):
    build = load_build(sources)
    first = build.library_path()
    for name in ("eaft_cpu.cpp", "tile_kernels.inc", "isa_avx512.inc"):
        with open(sources / name, "a", encoding="utf-8") as file:
            file.write("// changed\n")
        changed = build.library_path()
        assert changed != first and changed.is_file(), name
        first = changed
    assert times_compiled(tmp_path) == 4


def test_another_compiler_compiles_anew(sources, tmp_path, monkeypatch):
    build = load_build(sources)
    first = build.library_path()
    use_compiler(tmp_path, monkeypatch, COMPILER.replace("1.0", "2.0"))
    assert build.library_path() != first
    assert times_compiled(tmp_path) == 2


def test_an_installed_library_is_used_while_it_matches_the_sources(sources, tmp_path):
    build = load_build(sources)
    installed = sources / build.library_name()
    installed.write_text("installed")
    assert build.library_path() == installed and times_compiled(tmp_path) == 0
    with open(sources / "eaft_cpu.cpp", "a", encoding="utf-8") as file:
        file.write("// changed\n")
    rebuilt = build.library_path()
    assert rebuilt != installed and rebuilt.read_text() == "first-second"


def test_two_processes_at_once(sources, tmp_path):
    """Both may compile; neither ever sees half a library."""
    command = [sys.executable, "-c", LOAD_PATH, str(sources / "build.py")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    seen = set()
    while any(process.poll() is None for process in both):
        for path in (tmp_path / "cache").glob("native/*/eaft_cpu-*.so"):
            seen.add(path.read_text())
        time.sleep(0.02)
    paths = {process.communicate()[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert len(paths) == 1 and Path(paths.pop()).read_text() == "first-second"
    assert seen <= {"first-second"}


def test_without_a_compiler(sources, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match=r"CXX='no-such-compiler' was not found\. Install g\+\+"):
        load_build(sources).library_path()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        RuntimeError, match=r"no C\+\+ compiler \(c\+\+, g\+\+, clang\+\+\)\. Install g\+\+ or clang\+\+"
    ):
        load_build(sources).library_path()


def test_a_compiler_that_fails_is_quoted(sources, tmp_path, monkeypatch):
    compiler = use_compiler(tmp_path, monkeypatch, BROKEN)
    with pytest.raises(RuntimeError, match="error: the stand-in dislikes this program") as raised:
        load_build(sources).library_path()
    message = str(raised.value)
    assert str(compiler) in message and "exit status 3" in message and "CXX" in message and "\n" not in message
    assert not list((tmp_path / "cache").glob("native/*/*"))


def test_a_cache_that_cannot_be_written(sources, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EAFTDROPE_CACHE", str(tmp_path / "file"))
    with pytest.raises(RuntimeError, match=r"cannot be written to .*file.*Set EAFTDROPE_CACHE to another folder"):
        load_build(sources).library_path()


UNAVAILABLE = """
import torch
from eaftdrope.loss.backends import cpu
reason = cpu.unavailable(torch.device("cpu"), torch.bfloat16)
assert reason == cpu.unavailable(torch.device("cpu"), torch.float32)
print(reason)
try:
    cpu.tile_columns(torch.zeros(1, 1), 1.0)
except RuntimeError as error:
    assert str(error) == reason
"""


@pytest.mark.parametrize("script", [None, BROKEN, COMPILER], ids=["none", "broken", "makes-no-library"])
def test_the_backend_says_why_it_is_unavailable(tmp_path, monkeypatch, script):
    """One line, whatever goes wrong, from a copy of the package in which nothing is compiled."""
    shutil.copytree(ROOT / "eaftdrope", tmp_path / "eaftdrope", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    environment = {**os.environ, "EAFTDROPE_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path)}
    environment["COMPILER_LOG"] = str(tmp_path / "log")
    environment["CXX"] = "no-such-compiler" if script is None else str(use_compiler(tmp_path, monkeypatch, script))
    result = subprocess.run(
        [sys.executable, "-c", UNAVAILABLE], env=environment, capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert result.returncode == 0, result.stderr
    reason = result.stdout.strip()
    expected = {
        None: "the compiler of CXX='no-such-compiler' was not found",
        BROKEN: "the stand-in dislikes this program",
        COMPILER: "the CPU kernels of the loss do not load",
    }
    assert expected[script] in reason and "\n" not in reason
    assert any(word in reason for word in ("Install g++", "Set CXX", "Delete"))


# --- packages ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path, sources):
    """What a wheel is made of, but no more of the package than its native part."""
    folder = tmp_path / "project"
    native = folder / "eaftdrope" / "loss" / "native"
    native.parent.mkdir(parents=True)
    shutil.move(sources, native)
    (folder / "eaftdrope" / "__init__.py").write_text("")
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    for other in wheel["force-include"]:
        (folder / other).mkdir(parents=True)
        (folder / other / "file").write_text("")
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    return folder


def hatchling(project: Path, *arguments: str) -> str:
    """What the build says; the artifacts are in dist/."""
    command = [sys.executable, "-m", "hatchling", "build", *arguments]
    result = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def tags(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
        return archive.read(name).decode()


def test_the_wheel_has_the_library_and_names_its_platform(project):
    hatchling(project, "-t", "wheel")
    (wheel,) = (project / "dist").glob("*.whl")
    library = load_build(project / "eaftdrope" / "loss" / "native").library_name()
    assert f"eaftdrope/loss/native/{library}" in contents(wheel)
    assert {f"eaftdrope/loss/native/{name}" for name in ("build.py", "eaft_cpu.cpp", "tile_kernels.inc")} <= contents(
        wheel
    )
    python, abi, platform = wheel.stem.split("-")[-3:]
    assert (python, abi) == ("py3", "none") and platform != "any" and "manylinux" not in platform
    assert "Root-Is-Purelib: false" in tags(wheel) and f"Tag: py3-none-{platform}\n" in tags(wheel)
    # nothing is left in the tree
    assert not list(project.rglob("*.so"))


def test_the_wheel_without_a_compiler_is_pure_and_says_so(project, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    said = hatchling(project, "-t", "wheel")
    assert "built without its CPU kernels (compiled at first use): the compiler of CXX='no-such-compiler'" in said
    (wheel,) = (project / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl") and "Root-Is-Purelib: true" in tags(wheel)
    assert not [name for name in contents(wheel) if name.endswith(".so")]
    assert "eaftdrope/loss/native/eaft_cpu.cpp" in contents(wheel)


def test_a_failing_compiler_does_not_stop_the_package(project, tmp_path, monkeypatch):
    use_compiler(tmp_path, monkeypatch, BROKEN)
    assert "error: the stand-in dislikes this program" in hatchling(project, "-t", "wheel")
    (wheel,) = (project / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")


def test_the_source_archive_can_build_the_wheel(project, tmp_path):
    hatchling(project, "-t", "sdist")
    (archive,) = (project / "dist").glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert (unpacked / "hatch_build.py").is_file() and (unpacked / "eaftdrope/loss/native/isa_avx2.inc").is_file()
    assert not list(unpacked.rglob("*.so"))
    hatchling(unpacked, "-t", "wheel")
    (wheel,) = (unpacked / "dist").glob("*.whl")
    assert [name for name in contents(wheel) if name.endswith(".so")]


# the hook alone: a whole editable build needs one more package
EDITABLE = """
from hatch_build import NativeBuildHook
from hatchling.bridge.app import Application
hook = NativeBuildHook(".", {}, None, None, "dist", "wheel", Application())
hook.initialize("editable", {"force_include": {}})
hook.finalize("editable", {}, "")
"""


def test_an_editable_install_compiles_in_place_and_clears_what_is_stale(project, tmp_path):
    native = project / "eaftdrope" / "loss" / "native"
    stale = native / "eaft_cpu-0123456789abcdef.so"
    stale.write_text("stale")
    for _ in range(2):
        subprocess.run([sys.executable, "-c", EDITABLE], cwd=project, check=True)
    build = load_build(native)
    assert [path.name for path in native.glob("*.so")] == [build.library_name()]
    assert build.library_path() == native / build.library_name()
    # the second build found it compiled
    assert times_compiled(tmp_path) == 1


@pytest.mark.slow
def test_the_library_of_a_wheel_loads(project, tmp_path, monkeypatch):
    monkeypatch.delenv("CXX")
    need_compiler()
    hatchling(project, "-t", "wheel")
    (wheel,) = (project / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    (library,) = (tmp_path / "installed").rglob("*.so")
    assert ctypes.CDLL(str(library)).eaft_isa() >= 0
