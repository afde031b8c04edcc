"""The CUDA kernels on a device. Skipped, and said so, where there is none."""

from dataclasses import replace

import pytest
import torch

from eaftdrope.loss.backends import cuda as backend
from tests.loss.cuda.replay import Record, compute
from tests.loss.cuda.toolchain import build
from tests.loss.tile_cases import (
    TileCase,
    check_gradient,
    check_sliced_gradient,
    check_statistics,
    make_case,
    tile_cases,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.version.hip is not None,
        reason="no NVIDIA GPU: the CUDA kernels were NOT run on a device",
    ),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module", autouse=True)
def library(tmp_path_factory):
    """Built for the device at hand, and found as a user's would be."""
    if build.find_nvcc() is None:
        pytest.skip("no nvcc: the CUDA kernels could not be built and were NOT run on the device")
    path = tmp_path_factory.mktemp("gpu") / build.LIBRARY_NAME
    major, minor = torch.cuda.get_device_capability()
    build.build_library(path, [f"{major}{minor}"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EAFTDROPE_CUDA_LIBRARY", str(path))
        yield backend._library()


def on_device(function):
    """The function on copies of its tensors on the device; what it writes and returns comes back."""

    def call(logits, labels, *rest):
        # with what lies between the rows, which must stay as it is
        whole = logits.as_strided((logits.shape[0], logits.stride(0)), (logits.stride(0), 1))
        copy = whole.to("cuda")
        result = function(copy[:, : logits.shape[1]], labels.cuda(), *(_moved(value, "cuda") for value in rest))
        whole.copy_(copy)
        return _moved(result, "cpu")

    return call


def _moved(value, device):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, backend.TileStats):
        return backend.TileStats(**{name: None if v is None else v.to(device) for name, v in vars(value).items()})
    return value


statistics, gradient_ = on_device(backend.tile_statistics), on_device(backend.tile_gradient_)
CASES = [pytest.param(case, id=f"{dtype}-{case}") for dtype in DTYPES for case in tile_cases(dtype)]


def test_it_is_available():
    for dtype in DTYPES:
        assert backend.unavailable(torch.device("cuda"), dtype) is None


@pytest.mark.parametrize("case", CASES)
def test_every_tile(case):
    check_statistics(statistics, case)
    check_gradient(statistics, gradient_, case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [64, 100, 257])
def test_gradient_by_slices_of_the_vocabulary(dtype, columns):
    check_sliced_gradient(statistics, gradient_, make_case("sliced", 6, 257, dtype), columns)


@pytest.mark.parametrize("k", [1, 64, 512, 513, 700])
def test_topk_around_the_threads_of_a_block(k):
    check_statistics(statistics, make_case("k", 4, 1500, torch.bfloat16, topk=k))


def test_offsets_beyond_two_to_the_31():
    stride = 2**30 + 64
    case = make_case("far", 3, 300, torch.bfloat16)
    tile = torch.empty(2 * stride + 300, dtype=torch.bfloat16, device="cuda").as_strided((3, 300), (stride, 1))
    tile.copy_(case.logits)
    stats = backend.tile_statistics(tile, case.labels.cuda(), case.transform, 20)
    assert torch.equal(stats.nll.cpu(), statistics(case.logits, case.labels, case.transform, 20).nll)


def test_repeats_are_equal_to_the_last_bit():
    case = make_case("repeat", 64, 50_257, torch.bfloat16)
    device = replace(case, logits=case.logits.cuda(), labels=case.labels.cuda(), weight=case.weight.cuda())
    first = _results(device)
    for _ in range(5):
        again = _results(device)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_captured_graph_replays_on_new_logits():
    """No allocation of ours, no wait and no other stream gets in the way of a capture."""
    old, new = (make_case("graph", 16, 5003, torch.bfloat16, seed=seed) for seed in (0, 1))
    tile, labels, weight = old.logits.cuda(), old.labels.cuda(), old.weight.cuda()

    def step():
        stats = backend.tile_statistics(tile, labels, old.transform, 20)
        backend.tile_gradient_(tile, labels, stats, weight, old.transform)
        return stats

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stats = step()
    for target, source in ((tile, new.logits), (labels, new.labels), (weight, new.weight)):
        target.copy_(source)
    graph.replay()
    expected = _results(replace(new, logits=new.logits.cuda(), labels=new.labels.cuda(), weight=new.weight.cuda()))
    assert torch.equal(stats.nll, expected["nll"]) and torch.equal(stats.topk_entropy, expected["topk_entropy"])
    assert torch.equal(tile, expected["gradient"])


def test_it_works_on_the_current_stream():
    """A launch on another stream would read the tile before the slow work in front of it is done."""
    case = make_case("stream", 8, 50_257, torch.bfloat16)
    expected = statistics(case.logits, case.labels, case.transform, 20)
    labels, stream = case.labels.cuda(), torch.cuda.Stream()
    tile, source = torch.zeros_like(case.logits, device="cuda"), case.logits.cuda()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        tile.copy_(source)
        stats = backend.tile_statistics(tile, labels, case.transform, 20)
    stream.synchronize()
    assert torch.equal(stats.nll.cpu(), expected.nll)


def _results(case: TileCase) -> dict[str, torch.Tensor]:
    return compute(backend._library(), Record(case))
