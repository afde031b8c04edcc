"""Build libeaft_cuda.so, the library of the cuda backend, with nvcc; neither torch nor a GPU is needed.

    python cuda/build.py                      # every architecture in DEFAULT_ARCHITECTURES, into the package
    python -m eaftdrope._cuda.build           # the same for an installed wheel
    python cuda/build.py --arch 90            # one architecture: faster to build, smaller
    python cuda/build.py --cache              # into the cache folder (eaftdrope/files.py)
    python cuda/build.py --output lib.so      # elsewhere; set EAFTDROPE_CUDA_LIBRARY=lib.so to load it
    python cuda/build.py --host --output t.so # the host twin, for tests: g++ and the CUDA headers only

nvcc is searched for in $CUDA_HOME, $CUDA_PATH, PATH, /usr/local/cuda and the packages nvidia-cuda-nvcc +
nvidia-cuda-cccl of this Python.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "eaft_tile.cu"
TWIN = HERE / "host" / "twin.cpp"
LIBRARY_NAME = "libeaft_cuda.so"
# in a wheel these files are eaftdrope/_cuda
PACKAGE = (HERE.parent if HERE.name == "_cuda" else HERE.parent / "eaftdrope") / "loss" / "backends"

# Ampere, Hopper, Blackwell, consumer Blackwell. Code for 80 runs on 86 to 89, code for 100 on 103.
DEFAULT_ARCHITECTURES = ("80", "90", "100", "120")

NVCC_FLAGS = [
    "-O3",
    "-std=c++17",
    # flush denormals to 0, so that exp2f is one instruction
    "-ftz=true",
    "-Xcompiler=-fPIC",
    "-Xptxas=-v",
    "--threads=0",
    "-shared",
]
HOST_FLAGS = ["-std=c++17", "-fno-strict-aliasing", "-fPIC", "-shared"]


class BuildError(Exception):
    """The library cannot be built; the message states the reason and the remedy."""


def find_nvcc() -> Path | None:
    """Return the first nvcc found, or None."""
    candidates = [root / "bin" / "nvcc" for root in _toolkits()]
    on_path = shutil.which("nvcc")
    if on_path and not (os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")):
        candidates.insert(0, Path(on_path))
    return next((path for path in candidates if path.is_file()), None)


def find_headers() -> Path | None:
    """Return the folder with cuda_runtime_api.h and cuda_bf16.h for the host twin, or None."""
    folders = [root / "include" for root in _toolkits()]
    return next((folder for folder in folders if (folder / "cuda_bf16.h").is_file()), None)


def supported_architectures(nvcc: Path) -> list[str]:
    """Return the architectures of this nvcc: `["75", "80", ...]`."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    return [name.removeprefix("compute_") for name in listed.split()]


def build_library(output: Path, architectures: Sequence[str] = DEFAULT_ARCHITECTURES) -> str:
    """Compile the library: machine code for each architecture, and PTX of the newest for later ones.

    Returns:
        The report of ptxas on each kernel: registers, spills, shared memory.

    Raises:
        BuildError: nvcc is missing, does not support an architecture, or failed.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError(
            "no nvcc in CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda. Install the CUDA toolkit, or in this Python: "
            "pip install nvidia-cuda-nvcc nvidia-cuda-cccl"
        )
    known = supported_architectures(nvcc)
    unknown = [name for name in architectures if name.rstrip("af") not in known]
    if unknown or not architectures:
        raise BuildError(
            f"{nvcc} does not compile for {', '.join(unknown) or 'no architecture'}; it supports {', '.join(known)}. "
            "Choose architectures with --arch, or install a newer toolkit."
        )
    ordered = sorted(architectures, key=lambda name: int(name.rstrip("af")))
    targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in ordered]
    targets.append(f"-gencode=arch=compute_{ordered[-1]},code=compute_{ordered[-1]}")
    label = f'-DEAFT_ARCHITECTURES="{" ".join(ordered)}"'
    return _compile([nvcc, *NVCC_FLAGS, *targets, label, SOURCE], output)


def build_host_twin(output: Path, flags: Sequence[str] = ("-O2",)) -> None:
    """Compile the host twin: the same symbols and sources, run on the CPU.

    Raises:
        BuildError: g++ or the CUDA headers are missing, or the compiler failed.
    """
    headers, compiler = find_headers(), shutil.which("g++")
    if headers is None or compiler is None:
        missing = "g++" if compiler is None else "CUDA headers (cuda_bf16.h) in CUDA_HOME, /usr/local/cuda or a package"
        raise BuildError(f"no {missing}: the host twin cannot be built.")
    _compile([compiler, *HOST_FLAGS, *flags, f"-I{headers}", TWIN], output)


def _compile(command: Sequence[str | Path], output: Path) -> str:
    """Run a compiler, write its output atomically, and return its messages."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{os.getpid()}-{output.name}")
    try:
        done = subprocess.run([*command, "-o", partial], capture_output=True, text=True)
        if done.returncode:
            raise BuildError(f"{' '.join(map(str, command))}\nfailed:\n{done.stdout}{done.stderr}")
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)
    return done.stdout + done.stderr


def _toolkits() -> Iterator[Path]:
    """Yield folders that may contain a CUDA toolkit, in order of preference."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            yield Path(os.environ[name])
    on_path = shutil.which("nvcc")
    if on_path:
        yield Path(on_path).resolve().parent.parent
    yield Path("/usr/local/cuda")
    package = importlib.util.find_spec("nvidia")
    for folder in package.submodule_search_locations if package else ():
        yield from sorted(Path(folder).glob("cu[0-9]*"), reverse=True)


def _output(options: argparse.Namespace) -> Path:
    if options.output:
        return options.output
    if options.cache:
        # works without an installed package
        sys.path.insert(0, str(PACKAGE.parents[2]))
        from eaftdrope.files import cache_dir

        return cache_dir() / LIBRARY_NAME
    return PACKAGE / LIBRARY_NAME


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=DEFAULT_ARCHITECTURES, help="compute capabilities: 80 90 100a ...")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--output", type=Path, help="file to write")
    where.add_argument("--cache", action="store_true", help="write to the cache folder")
    parser.add_argument("--host", action="store_true", help="build the host twin (needs --output)")
    options = parser.parse_args()
    if options.host and not options.output:
        parser.error("the host twin is not a backend: pass its path with --output")
    output = _output(options)
    try:
        if options.host:
            build_host_twin(output)
        else:
            build_library(output, options.arch)
    except BuildError as error:
        sys.exit(f"error: {error}")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
