"""Compiling the C++ sources beside this file, once for each content and compiler.

Standard library only, because the build hook of the package runs this file by its path; only `library_path` imports the
cache folder.
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

# Multiplications and additions are fused only where the code does so explicitly: every instruction set, and every part of
# the code, rounds alike.
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

# Lines of a failed compilation that its message quotes.
_LAST_LINES = 6


class BuildError(RuntimeError):
    """The library cannot be built; the message has the reason and what to do."""


def find_compiler() -> list[str]:
    """Return the C++ compiler as the start of a command: `$CXX`, else c++, g++ or clang++.

    Raises:
        BuildError: no compiler was found.
    """
    chosen = shlex.split(os.environ.get("CXX", ""))
    for command in [chosen] if chosen else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    wanted = (
        f"the compiler of CXX={os.environ['CXX']!r} was not found" if chosen else "no C++ compiler (c++, g++, clang++)"
    )
    raise BuildError(f"{wanted}. Install g++ or clang++, or set the environment variable CXX.")


def content_hash() -> str:
    """Return a hash of the sources, the flags and the architecture; a library is used only if its name has this hash."""
    content = hashlib.sha256("\0".join((*FLAGS, platform.system(), platform.machine())).encode())
    for path in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.inc")]):
        content.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return content.hexdigest()[:16]


def library_name() -> str:
    """Return the file name of the library compiled from the present sources."""
    return f"eaft_cpu-{content_hash()}.so"


def compile_library(target: Path) -> None:
    """Compile to `target`, written beside it first and renamed: another process sees the whole file or none.

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
                    f"(exit status {result.returncode}): {words}. Set CXX to use another compiler."
                )
            os.replace(output, target)
    except OSError as error:
        raise BuildError(
            f"the compiled loss cannot be written to {target.parent} ({error}). Set EAFTDROPE_CACHE to another folder."
        ) from error


def library_path() -> Path:
    """Return the library of the present sources: the one installed beside them, else one in the cache, compiled at first
    use.

    Raises:
        BuildError: it had to be compiled, and that failed.
    """
    installed = SOURCES / library_name()
    if installed.is_file():
        return installed
    compiler = find_compiler()
    identity = f"{shutil.which(compiler[0])} {compiler} {_compiler_version(compiler)}"
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    from eaftdrope.files import cache_dir  # see the module docstring

    cached = cache_dir() / "native" / key / library_name()
    if not cached.is_file():
        compile_library(cached)
    return cached


def _compiler_version(compiler: list[str]) -> str:
    try:
        result = subprocess.run([*compiler, "--version"], capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise BuildError(f"{shlex.join(compiler)} does not run ({error}). Set CXX to another compiler.") from error
    return result.stdout
