"""Compiles the C++ sources beside this file, once for each content and compiler.

Standard library only: the build hook of the package runs this file by its path. (Where the cache lies is looked up when
a library is wanted.)
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent

# Multiplications and additions are fused where the code says so and nowhere else: every instruction set, and every
# place of the code, rounds alike.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-shared",
    "-pthread",
    "-ffp-contract=off",
    "-Wno-psabi",
    "-Wno-ignored-attributes",
)

# Lines of a failed compilation that go into its message.
_LAST_LINES = 6


class BuildError(RuntimeError):
    """No library: the message says why and what to do."""


def find_compiler() -> list[str]:
    """The C++ compiler as the start of a command: `$CXX`, else c++, g++ or clang++.

    Raises:
        BuildError: there is none.
    """
    chosen = shlex.split(os.environ.get("CXX", ""))
    for command in [chosen] if chosen else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    wanted = (
        f"the compiler of CXX={os.environ['CXX']!r} was not found" if chosen else "no C++ compiler (c++, g++, clang++)"
    )
    raise BuildError(f"{wanted}. Install g++ or clang++, or name one in the environment variable CXX.")


def content_hash() -> str:
    """Of all sources, the flags and the kind of machine: a library is used only where its name bears this."""
    content = hashlib.sha256("\0".join((*FLAGS, platform.system(), platform.machine())).encode())
    for path in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.inc")]):
        content.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return content.hexdigest()[:16]


def library_name() -> str:
    """File name of the library compiled from the present sources."""
    return f"eaft_cpu-{content_hash()}.so"


def compile_library(target: Path) -> None:
    """Compiles to `target`, written beside it first and renamed: another process sees all of it or nothing.

    Raises:
        BuildError: no compiler, a compilation that fails, or a folder that cannot be written.
    """
    compiler = find_compiler()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=target.parent) as folder:
            output = Path(folder) / target.name
            command = [*compiler, *FLAGS, str(SOURCES / "eaft_cpu.cpp"), "-o", str(output)]
            result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
            if result.returncode != 0 or not output.is_file():
                words = " | ".join((result.stderr or result.stdout).strip().splitlines()[-_LAST_LINES:])
                raise BuildError(
                    f"{shlex.join(compiler)} could not compile {SOURCES / 'eaft_cpu.cpp'} "
                    f"(exit status {result.returncode}): {words}. Another compiler can be named in CXX."
                )
            os.replace(output, target)
    except OSError as error:
        raise BuildError(
            f"the compiled loss cannot be written to {target.parent} ({error}). Name a folder in EAFTDROPE_CACHE."
        ) from error


def library_path() -> Path:
    """The library of the present sources: the one that was installed beside them, else one of the cache, which is
    compiled at first use.

    Raises:
        BuildError: it had to be compiled and could not be.
    """
    installed = SOURCES / library_name()
    if installed.is_file():
        return installed
    compiler = find_compiler()
    identity = f"{shutil.which(compiler[0])} {compiler} {_compiler_version(compiler)}"
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    from eaftdrope.files import cache_dir

    cached = cache_dir() / "native" / key / library_name()
    if not cached.is_file():
        compile_library(cached)
    return cached


def _compiler_version(compiler: list[str]) -> str:
    try:
        result = subprocess.run([*compiler, "--version"], capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise BuildError(f"{shlex.join(compiler)} does not run ({error}). Name another compiler in CXX.") from error
    return result.stdout
