"""What the Triton backend says about where it can not work; how it launches. No GPU and no interpreter needed."""

import sys

import pytest
import torch

from eaftdrope.loss.backends import triton as backend
from eaftdrope.loss.backends.tile import LogitsTransform
from tests.loss.tile_cases import make_case

PLAIN = LogitsTransform()


def test_dtypes_without_kernels():
    for dtype in (torch.float64, torch.int64):
        assert f"no kernels for {dtype}" in backend.unavailable(torch.device("cpu"), dtype)


def test_a_cpu_is_refused():
    pytest.importorskip("triton")
    reason = backend.unavailable(torch.device("cpu"), torch.float32)
    assert "not on cpu" in reason and "\n" not in reason


def test_no_triton(monkeypatch):
    backend._kernels.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "eaftdrope.loss.backends.triton_kernels", raising=False)
    assert "pip install triton" in backend.unavailable(torch.device("cuda"), torch.float32)


def test_the_interpreter_is_for_the_cpu_alone(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.unavailable(torch.device("cpu"), torch.bfloat16) is None
    assert "unset it" in backend.unavailable(torch.device("cuda"), torch.bfloat16)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a device")
@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_no_device(device):
    pytest.importorskip("triton")
    reason = backend.unavailable(torch.device(device), torch.bfloat16)
    assert f"cannot launch a kernel on {device}" in reason and "\n" not in reason


def test_a_tile_it_has_no_kernels_for():
    case = make_case("refused", 3, 40, torch.float64)
    with pytest.raises(ValueError, match="float64"):
        backend.tile_statistics(case.logits, case.labels, PLAIN, 20)
    with pytest.raises(ValueError, match="columns contiguous"):
        backend.tile_columns(torch.zeros(40, 3).t(), 1.0)


@pytest.mark.parametrize(
    ("vocab", "lanes"),
    [
        (1, 128),
        (4096, 128),
        (4097, 256),
        (32_000, 1024),
        (50_257, 2048),
        (131_072, 4096),
        (151_936, 4096),
        (10**6, 4096),
    ],
)
def test_lanes(vocab, lanes):
    assert backend.block_lanes(vocab) == lanes


def test_launch_options():
    cpu = torch.device("cpu")
    assert [backend.launch_options(elements, cpu)["num_warps"] for elements in (1, 128, 2048, 4096, 10**6)] == [
        1, 1, 8, 16, 16
    ]  # fmt: skip
    assert backend.launch_options(1, cpu)["enable_fp_fusion"] is False


@pytest.mark.parametrize(("number", "power"), [(0, 1), (1, 1), (2, 2), (3, 4), (20, 32), (32, 32), (33, 64)])
def test_next_power_of_2(number, power):
    assert backend.next_power_of_2(number) == power
