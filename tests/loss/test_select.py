"""Which backend works: the fastest that can, checked on first use; a wrong one is never used in silence."""

import logging
import types

import pytest
import torch

from eaftdrope.loss import fused_linear_eaft
from eaftdrope.loss.backends import load_backend, select, select_backend, selfcheck
from eaftdrope.loss.backends import torch as torch_backend
from tests.loss.reference import definition, make_inputs, relative_error

CPU = torch.device("cpu")


@pytest.fixture
def fresh(monkeypatch):
    """Nothing chosen yet, no variable set, and a place for made-up backends."""
    monkeypatch.setattr(select, "_selected", {})
    monkeypatch.delenv(select.VARIABLE, raising=False)
    made = {}
    real = select._module
    monkeypatch.setattr(select, "_module", lambda name: made.get(name) or real(name))
    return made


def made_up(**functions):
    """The torch backend under another name, with some functions of its own."""
    names = ("unavailable", "tile_statistics", "tile_gradient_")
    return types.SimpleNamespace(**{**{name: getattr(torch_backend, name) for name in names}, **functions})


def wrong_statistics(*args):
    stats = torch_backend.tile_statistics(*args)
    stats.entropy.mul_(1.01)
    return stats


def wrong_gradient(logits, labels, *args):
    torch_backend.tile_gradient_(logits, labels, *args)
    logits[:, -1] = 0


def raising(*args):
    raise RuntimeError("driver too old")


def nan_statistics(*args):
    stats = torch_backend.tile_statistics(*args)
    stats.nll[1] = float("nan")
    return stats


FAULTS = [
    ({"tile_statistics": wrong_statistics}, "entropy"),
    ({"tile_statistics": nan_statistics}, "nll"),
    ({"tile_gradient_": wrong_gradient}, "gradient"),
    ({"tile_statistics": raising}, "driver too old"),
]


@pytest.mark.parametrize(("functions", "named"), FAULTS)
def test_auto_leaves_a_wrong_backend_and_says_so(fresh, caplog, functions, named):
    fresh["cpu"] = made_up(**functions)
    with caplog.at_level(logging.ERROR, "eaftdrope"):
        assert select_backend("auto", CPU, torch.float32).name == "torch"
    assert "WRONG NUMBERS" in caplog.text and named in caplog.text
    caplog.clear()
    select_backend("auto", CPU, torch.float32)
    assert not caplog.text, "once is enough"


@pytest.mark.parametrize(("functions", "named"), FAULTS)
def test_a_wrong_backend_that_was_asked_for_is_refused(fresh, functions, named):
    fresh["cpu"] = made_up(**functions)
    with pytest.raises(RuntimeError, match=f"(?s)gives wrong numbers.*{named}.*Use the backend 'torch'"):
        select_backend("cpu", CPU, torch.float32)


def test_auto_takes_what_is_available(fresh, caplog):
    fresh["cpu"] = made_up()
    assert select_backend("auto", CPU, torch.float32).name == "cpu"
    fresh["cpu"] = made_up(unavailable=lambda device, dtype: "no compiler. Install one.")
    assert select_backend("auto", CPU, torch.float32).name == "cpu", "chosen once"
    with caplog.at_level(logging.WARNING, "eaftdrope"):
        assert select_backend("auto", CPU, torch.bfloat16).name == "torch"
    assert caplog.text.count("no compiler. Install one.") == 1


def test_asked_for_but_not_here(fresh):
    fresh["cpu"] = made_up(unavailable=lambda device, dtype: "no compiler. Install one.")
    with pytest.raises(ValueError, match=r"'cpu' cannot work on torch.float32 on cpu: no compiler"):
        select_backend("cpu", CPU, torch.float32)


def test_the_variable_stands_for_auto_alone(fresh, monkeypatch):
    fresh["cpu"] = made_up()
    monkeypatch.setenv(select.VARIABLE, "torch")
    assert select_backend("auto", CPU, torch.float32).name == "torch"
    assert select_backend("cpu", CPU, torch.float32).name == "cpu"
    monkeypatch.setenv(select.VARIABLE, "cpuu")
    with pytest.raises(ValueError, match="EAFTDROPE_LOSS_BACKEND=cpuu: unknown loss backend"):
        select_backend("auto", CPU, torch.float32)


def test_what_a_backend_lacks_is_torchs(fresh):
    fresh["cpu"] = made_up()
    backend = load_backend("cpu")
    assert backend.accumulate is torch_backend.accumulate and backend.name == "cpu"


# where the first call may stand: in training, in evaluation, in inference mode
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_check_knows_a_right_backend(mode):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with mode():
            assert selfcheck.check(load_backend("torch"), CPU, dtype) is None


def test_the_operator_uses_the_backend_it_was_given(fresh):
    used = []

    def counted(*args):
        used.append(len(args[0]))
        return torch_backend.tile_statistics(*args)

    fresh["cpu"] = made_up(tile_statistics=counted)
    select_backend("cpu", CPU, torch.float32)
    used.clear()
    hidden, weight, labels, _ = make_inputs(20, 50)
    loss = fused_linear_eaft(hidden, weight, labels, backend="cpu")
    assert used == [int((labels != -100).sum())]
    assert relative_error(loss, definition(hidden, weight, labels, "eaft")[0]) < 2e-6


def wrong_divergence(*args):
    stats = torch_backend.anchored_statistics(*args)
    stats.anchor.divergence.mul_(1.01)
    return stats


def wrong_pull(logits, *args):
    torch_backend.anchored_gradient_(logits, *args)
    logits[:, -1] = 0


@pytest.mark.parametrize(
    ("functions", "what"),
    [
        ({"anchored_statistics": wrong_divergence}, "divergence"),
        ({"anchored_gradient_": wrong_pull}, "anchored gradient"),
    ],
)
def test_functions_for_an_anchor_are_checked_when_one_is_used(fresh, functions, what):
    fresh["cpu"] = made_up(**functions)
    assert select_backend("cpu", CPU, torch.float32).name == "cpu"
    with pytest.raises(RuntimeError, match=f"gives wrong numbers for torch.float32 on cpu: {what} of a"):
        select_backend("cpu", CPU, torch.float32, anchored=True)
    assert select_backend("auto", CPU, torch.float32, anchored=True).name == "torch"


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_backend_without_functions_for_an_anchor_uses_those_of_torch(name):
    backend = load_backend(name)
    assert backend.anchored_statistics is torch_backend.anchored_statistics
    assert backend.anchored_gradient_ is torch_backend.anchored_gradient_
    assert backend.tile_gradient_ is not torch_backend.tile_gradient_
