"""Compilers for the tests of the CUDA kernels, and kernels with a bug planted in them."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CUDA = HERE.parents[2] / "cuda"


def _load_build():
    spec = importlib.util.spec_from_file_location("eaft_cuda_build", CUDA / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = _load_build()


def need_host_compiler() -> None:
    """Skips, and says so, where the host twin cannot be built."""
    if shutil.which("g++") is None or build.find_headers() is None:
        pytest.skip("no g++ or no CUDA headers: the CUDA kernels were NOT run on the CPU, their numerics NOT checked")


def need_nvcc() -> None:
    """Skips, and says so, where the kernels cannot be compiled for every default architecture."""
    nvcc = build.find_nvcc()
    missing = [tool for tool, found in (("nvcc", nvcc), ("g++", shutil.which("g++"))) if found is None]
    if not missing:
        known = build.supported_architectures(nvcc)
        missing = [f"sm_{name} in {nvcc}" for name in build.DEFAULT_ARCHITECTURES if name not in known]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: that the CUDA kernels compile, and their registers, were NOT checked")


def compile_driver(output: Path, *flags: str, sources: Path = CUDA) -> Path:
    """driver.cpp over the host twin of the kernels in `sources`."""
    command = ["g++", "-std=c++17", "-fno-strict-aliasing", *flags, f"-I{build.find_headers()}", f"-I{sources}"]
    done = subprocess.run([*command, "-o", output, HERE / "driver.cpp"], capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return output


def plant(folder: Path, right: str, wrong: str, *, times: int = 1) -> Path:
    """A copy of the sources with `right` replaced by `wrong`; `right` must stand there exactly `times` times."""
    sources = Path(shutil.copytree(CUDA, folder / "cuda", ignore=shutil.ignore_patterns("*.so", "__pycache__")))
    kernels = sources / "eaft_tile.cuh"
    text = kernels.read_text(encoding="utf-8")
    assert text.count(right) == times, (
        f"the planted bug no longer fits: {right!r} stands there {text.count(right)} times"
    )
    kernels.write_text(text.replace(right, wrong), encoding="utf-8")
    return sources
