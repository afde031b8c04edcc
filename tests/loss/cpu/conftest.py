"""The compiled library, one instruction set at a time."""

import pytest

from eaftdrope.loss.native import library as native

ISAS = ("portable", "avx2", "avx512", "avx512bf16")


@pytest.fixture(scope="session")
def library():
    """The library of the CPU backend, compiled where it is not yet."""
    loaded = native.load()
    if isinstance(loaded, str):
        pytest.skip(f"the C++ kernels for CPUs were NOT checked: {loaded}")
    return loaded


@pytest.fixture(params=range(len(ISAS)), ids=ISAS)
def isa(request, library):
    """The library restricted to one instruction set; every path that this machine can run."""
    in_use = library.eaft_set_isa(request.param)
    if in_use != request.param:
        pytest.skip(f"this processor has no {ISAS[request.param]}: that path of the CPU kernels was NOT checked")
    yield ISAS[request.param]
    library.eaft_set_isa(-1)
