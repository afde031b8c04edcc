"""The host twin and the fat library, each built once a run."""

from contextlib import nullcontext

import pytest

from eaftdrope.loss.backends.cuda import Library
from tests.loss.cuda.toolchain import build, need_host_compiler, need_nvcc


@pytest.fixture(scope="session")
def twin(tmp_path_factory) -> Library:
    """The kernels as host code behind the loader of the product; tensors are on the CPU."""
    need_host_compiler()
    path = tmp_path_factory.mktemp("twin") / "libeaft_twin.so"
    build.build_host_twin(path)
    return Library(path, stream=lambda device: nullcontext(None))


@pytest.fixture(
    scope="session",
    params=[
        pytest.param(("90", "120"), id="two architectures"),
        pytest.param(build.DEFAULT_ARCHITECTURES, id="every architecture", marks=pytest.mark.exhaustive),
    ],
)
def fat_library(request, tmp_path_factory):
    """(path, what ptxas reported, architectures) of the library for two of the default architectures, and for all."""
    need_nvcc()
    path = tmp_path_factory.mktemp("fat") / build.LIBRARY_NAME
    return path, build.build_library(path, request.param), request.param
