"""How the cuda backend is found, what keeps it from working, and what it refuses."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from eaftdrope.loss.backends import cuda as backend
from eaftdrope.loss.backends.tile import LogitsTransform
from tests.loss.tile_cases import make_case

CUDA = torch.device("cuda:0")


@pytest.fixture
def nothing_built(monkeypatch, tmp_path):
    """No library in the package or the cache of the machine is seen."""
    monkeypatch.setattr(backend, "__file__", str(tmp_path / "package" / "cuda.py"))
    monkeypatch.delenv("EAFTDROPE_CUDA_LIBRARY", raising=False)
    monkeypatch.setenv("EAFTDROPE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "package").mkdir()
    (tmp_path / "cache").mkdir()
    return tmp_path


def test_other_devices_and_dtypes_have_other_backends():
    assert "not on 'cpu' tensors" in backend.unavailable(torch.device("cpu"), torch.bfloat16)
    assert "not on 'xpu' tensors" in backend.unavailable(torch.device("xpu"), torch.bfloat16)
    reason = backend.unavailable(CUDA, torch.float64)
    assert "supports float32, bfloat16, float16 logits, not torch.float64" in reason and "torch backend" in reason


def test_rocm_devices_call_themselves_cuda(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "not on ROCm devices" in backend.unavailable(CUDA, torch.bfloat16)


def test_not_built(nothing_built):
    reason = backend.unavailable(CUDA, torch.bfloat16)
    assert "not built" in reason and "python cuda/build.py" in reason
    case = make_case("any", 2, 8, torch.float32)
    with pytest.raises(RuntimeError, match=r"not built.*python cuda/build\.py"):
        backend.tile_statistics(case.logits, case.labels, case.transform, 20)


def test_where_it_is_looked_for(nothing_built, monkeypatch):
    assert backend.library_path() is None
    cached = nothing_built / "cache" / backend.LIBRARY_NAME
    cached.touch()
    assert backend.library_path() == cached
    packaged = nothing_built / "package" / backend.LIBRARY_NAME
    packaged.touch()
    assert backend.library_path() == packaged
    monkeypatch.setenv("EAFTDROPE_CUDA_LIBRARY", str(nothing_built / "named.so"))
    assert backend.library_path() == nothing_built / "named.so"
    assert "named.so, which is not a file" in backend.unavailable(CUDA, torch.bfloat16)


def test_a_file_that_is_no_library(nothing_built):
    (nothing_built / "package" / backend.LIBRARY_NAME).write_bytes(b"no library")
    assert "cannot load" in backend.unavailable(CUDA, torch.bfloat16)


def test_a_library_of_another_interface(twin, nothing_built, monkeypatch):
    monkeypatch.setattr(backend, "ABI_VERSION", 99)
    monkeypatch.setenv("EAFTDROPE_CUDA_LIBRARY", str(twin.path))
    backend._load.cache_clear()
    reason = backend.unavailable(CUDA, torch.bfloat16)
    assert "has interface 1, this version of eaftdrope needs 99" in reason and "Build it again" in reason


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (None, None),
        ("cudaErrorNoKernelImageForDevice", "has no code for cuda:0, which is sm_75; it was built for 80 90"),
        ("cudaErrorNoDevice", "no CUDA device 0 can be used: cudaErrorNoDevice"),
    ],
)
def test_what_a_device_answers(nothing_built, monkeypatch, error, expected):
    (nothing_built / "package" / backend.LIBRARY_NAME).touch()
    library = SimpleNamespace(probe=lambda index: error, architectures="80 90")
    monkeypatch.setattr(backend, "_load", lambda path: library)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    reason = backend.unavailable(CUDA, torch.bfloat16)
    assert reason is None if expected is None else expected in reason
    if error == "cudaErrorNoKernelImageForDevice":
        assert "python cuda/build.py --arch 75" in reason


def test_launches_get_the_stream_of_the_tensors_device(twin):
    """The context that yields the stream is entered with the device, once a launch."""
    seen = []
    library = backend.Library(twin.path, stream=lambda device: seen.append(device) or nullcontext(None))
    case = make_case("any", 2, 8, torch.float32)
    stats = library.tile_statistics(case.logits, case.labels, case.transform, 20)
    library.tile_gradient_(case.logits, case.labels, stats, case.weight, case.transform)
    library.tile_columns(case.logits, 1e-3)
    assert seen == [torch.device("cpu")] * 3


def test_wrong_operands_are_refused(twin):
    case = make_case("any", 2, 8, torch.float32)
    for labels in (case.labels.int(), case.labels[:1], case.labels.to("meta")):
        with pytest.raises(ValueError, match=r"labels is .* needs torch.int64 \[2\] on the same device"):
            twin.tile_statistics(case.logits, labels, case.transform, 20)
    stats = twin.tile_statistics(case.logits, case.labels, case.transform, 20)
    with pytest.raises(ValueError, match=r"weight is torch.float64"):
        twin.tile_gradient_(case.logits, case.labels, stats, case.weight.double(), case.transform)
    with pytest.raises(ValueError, match="columns 2 elements apart"):
        twin.tile_statistics(case.logits.t().contiguous().t(), case.labels, case.transform, 20)
    with pytest.raises(ValueError, match=r"a tile of torch\.float64"):
        twin.tile_statistics(case.logits.double(), case.labels, case.transform, 20)
    with pytest.raises(ValueError, match="topk is 0"):
        twin.tile_statistics(case.logits, case.labels, case.transform, 0)


def test_a_vector_with_gaps_is_read_as_it_is(twin):
    case = make_case("any", 4, 50, torch.float32)
    gaps = torch.stack([case.labels, case.labels * 0], dim=1)[:, 0]
    expected = twin.tile_statistics(case.logits, case.labels, case.transform, 20)
    assert torch.equal(twin.tile_statistics(case.logits, gaps, case.transform, 20).nll, expected.nll)


def test_the_name_of_an_error(twin):
    with pytest.raises(RuntimeError, match=r"failed to launch: cudaErrorInvalidValue \(1\).*built for host"):
        twin.tile_statistics(torch.empty(2, 0), torch.zeros(2, dtype=torch.int64), LogitsTransform(), None)
