"""Every architecture compiles without spills and within budgets.json; the library loads without a driver and says so."""

import json
import os
import subprocess
import sys

import pytest
import torch

from eaftdrope.loss.backends import cuda as backend
from eaftdrope.loss.backends.tile import LogitsTransform
from tests.loss.cuda import resources
from tests.loss.cuda.toolchain import CUDA, build, need_host_compiler, need_nvcc

KERNELS = 3 * (2 + 2 + 1)  # dtypes x (statistics and gradient, with and without softcap, and columns)


@pytest.fixture(scope="session")
def measured(fat_library):
    found = resources.measure(*fat_library)
    print("\n" + resources.table(found))
    return found


def test_every_kernel_compiles_for_every_architecture_without_spills(measured):
    assert set(measured) == {f"sm_{name}" for name in build.DEFAULT_ARCHITECTURES}
    for architecture, kernels in measured.items():
        assert len(kernels) == KERNELS, architecture
        for kernel, needs in kernels.items():
            assert needs["stack"] == needs["spilled"] == 0, (architecture, kernel, needs)
            # two blocks of 512 threads must fit, as __launch_bounds__ promises
            assert needs["registers"] <= 64, (architecture, kernel, needs)
            assert needs["shared"] <= 8192, (architecture, kernel, needs)


def test_nothing_grew_beyond_its_budget(measured):
    budget = json.loads(resources.BUDGETS.read_text(encoding="utf-8"))
    release = resources.nvcc_release(build.find_nvcc())
    if release != budget["nvcc"]:
        pytest.skip(f"nvcc {release}, but the budget is of {budget['nvcc']}: the growth of registers was NOT checked")
    assert over_budget(measured, budget["kernels"]) == []


def test_growth_is_noticed(measured):
    """The comparison above can fail, in each of its columns."""
    architecture, kernel = "sm_90", "tile_gradient bfloat16"
    for column, change in {"registers": 1, "shared": 4, "ldg": -1, "stg": -1}.items():
        grown = json.loads(json.dumps(measured))
        if column not in grown[architecture][kernel]:
            pytest.skip("no cuobjdump (it comes with triton): 16-byte loads and stores were NOT counted")
        grown[architecture][kernel][column] += change
        assert len(over_budget(grown, measured)) == 1


def over_budget(measured: resources.Resources, budget: resources.Resources) -> list[str]:
    problems = []
    for architecture, kernels in measured.items():
        for kernel, needs in kernels.items():
            allowed = budget[architecture][kernel]
            worse = [name for name in ("registers", "shared") if needs[name] > allowed[name]]
            worse += [name for name in ("ldg", "stg") if name in needs and needs[name] < allowed[name]]
            problems += [f"{architecture} {kernel}: {name} {needs[name]}, budget {allowed[name]}" for name in worse]
    return problems


def test_rows_are_read_and_written_16_bytes_at_a_time(measured):
    if resources.find_cuobjdump() is None:
        pytest.skip("no cuobjdump (it comes with triton): 16-byte loads and stores were NOT counted")
    for architecture, kernels in measured.items():
        for kernel, needs in kernels.items():
            if "columns" not in kernel:
                # a thread has 16 logits under way: 2 loads of 8, or 4 of 4
                loads = 4 if "float32" in kernel else 2
                assert needs["ldg"] >= loads, (architecture, kernel, needs)
                assert needs["stg"] >= (loads if "gradient" in kernel else 0), (architecture, kernel, needs)


def test_it_loads_without_a_driver_and_says_why_it_cannot_work(fat_library, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a device here: what the library says without one was NOT checked")
    path, _ = fat_library
    monkeypatch.setenv("EAFTDROPE_CUDA_LIBRARY", str(path))
    assert backend.Library(path).architectures == " ".join(build.DEFAULT_ARCHITECTURES)
    reason = backend.unavailable(torch.device("cuda:0"), torch.bfloat16)
    assert "no CUDA device 0 can be used: cudaError" in reason and "driver" in reason


def test_a_launch_that_fails_names_the_error(fat_library):
    """The real library on CPU tensors, where there is no driver: the launcher answers with an error, not with a crash."""
    if torch.cuda.is_available():
        pytest.skip("there is a device here: a launch without one was NOT checked")
    from contextlib import nullcontext

    library = backend.Library(fat_library[0], stream=lambda device: nullcontext(None))
    logits, labels = torch.zeros(2, 8), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(
        RuntimeError, match=r"tile_statistics on cpu failed to launch: cudaError\w+ \(\d+\), tile \(2, 8\)"
    ):
        library.tile_statistics(logits, labels, LogitsTransform(), 20)
    with pytest.raises(RuntimeError, match="tile_columns on cpu failed to launch: cudaError"):
        library.tile_columns(logits, 1e-3)


def test_the_script_writes_where_it_is_told(tmp_path):
    need_nvcc()
    output = tmp_path / "folder" / "lib.so"
    command = [sys.executable, CUDA / "build.py", "--arch", "90", "--output", output]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == f"wrote {output}\n", done.stderr
    assert backend.Library(output).architectures == "90"
    assert list(output.parent.iterdir()) == [output]


def test_an_architecture_that_nvcc_does_not_know_is_refused(tmp_path):
    need_nvcc()
    with pytest.raises(build.BuildError, match=r"does not compile for 35; it supports .*90"):
        build.build_library(tmp_path / "lib.so", ["90", "35"])


def test_without_a_compiler_the_script_says_what_to_install(tmp_path):
    environment = {**os.environ, "PATH": str(tmp_path), "CUDA_HOME": str(tmp_path), "CUDA_PATH": ""}
    # -S: no packages, so no nvcc among them; /usr/local/cuda is made unfindable in the process itself
    program = (
        f"import sys, runpy, pathlib; real = pathlib.Path.is_file; "
        f"pathlib.Path.is_file = lambda p: p.name != 'nvcc' and real(p); "
        f"sys.argv = ['build.py', '--output', {str(tmp_path / 'lib.so')!r}]; "
        f"runpy.run_path({str(CUDA / 'build.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "error: no nvcc in CUDA_HOME" in done.stderr and "pip install nvidia-cuda-nvcc" in done.stderr


def test_a_failed_build_shows_the_compiler_and_leaves_nothing(tmp_path, monkeypatch):
    need_host_compiler()
    monkeypatch.setattr(build, "TWIN", tmp_path / "broken.cpp")
    (tmp_path / "broken.cpp").write_text("not a program;\n")
    with pytest.raises(build.BuildError, match=r"g\+\+(.|\n)*failed:(.|\n)*broken.cpp:1"):
        build.build_host_twin(tmp_path / "out" / "lib.so")
    assert list((tmp_path / "out").iterdir()) == []
