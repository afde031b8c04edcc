"""The methods that are measured. Each is a loss with a backward: the gated loss or plain cross-entropy.

`gate` is the gate of [`eaftdrope.loss`] whose value and gradients the method must reproduce, which the tests check.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from eaftdrope.loss import fused_linear_eaft
from eaftdrope.loss.backends import BACKENDS, unavailable

from . import peers

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

# one more than the number of tiles whose weight gradients are summed in bfloat16
MANY_TILES = 5


def always(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


@dataclass(frozen=True)
class Method:
    """A method. `computes` is its description in the table; `family` is "ours" or "peer".

    `loss(hidden [N, D], weight [V, D], labels [N])` is the mean over the labels that are not -100, and `unavailable`
    returns the reason why it cannot run on a device and dtype, or None. `exact` is False if the gradient is an
    approximation by design. `backend` is that of [`fused_linear_eaft`], None for a peer.
    """

    name: str
    family: str
    gate: str
    computes: str
    loss: Loss
    unavailable: Callable[[torch.device, torch.dtype], str | None] = always
    exact: bool = True
    backend: str | None = None


def methods() -> dict[str, Method]:
    """Return the methods by name, ours first, in the order of the table."""
    return {method.name: method for method in (*_ours(), *_peers())}


def _ours() -> list[Method]:
    """Return one method per backend, then variants of gate, tail and weight-gradient sum on the best of them."""
    by_backend = [
        _own(name, "top-20 gate", unavailable=partial(unavailable, name), backend=name)
        for name in BACKENDS
        if name != "auto"
    ]
    return [
        *by_backend,
        _own("exact-gate", "exact-entropy gate", gate="eaft-exact"),
        _own("no-gate", "plain CE", gate="none"),
        _own("sparse-tail", "top-20 gate, sparse tail of the gradient", exact=False, tail="sparse"),
        _own("gate-threshold", "top-20 gate, rows below 0.001 give no gradient", exact=False, gate_threshold=1e-3),
        _own("recompute", "top-20 gate, logits formed twice", recompute=True),
        replace(
            _own("many-tiles", f"top-20 gate, {MANY_TILES} tiles, dW summed in float32", unavailable=_not_in_float32),
            loss=many_tiles,
        ),
    ]


def _own(name: str, computes: str, *, gate: str = "eaft", exact: bool = True, unavailable=always, **options) -> Method:
    loss = partial(fused_linear_eaft, gate=gate, **options)
    return Method(f"eaftdrope-{name}", "ours", gate, computes, loss, unavailable, exact, options.get("backend", "auto"))


def _peers() -> list[Method]:
    return [
        Method("llamafactory", "peer", "eaft", "top-20 gate on full float32 logits", peers.full_logits_eaft),
        Method("trl", "peer", "eaft-exact", "TRL fused head + exact-entropy gate", peers.trl_fused_head),
        Method(
            "liger-scaled",
            "peer",
            "eaft-exact",
            "Liger scaled CE + exact-entropy gate",
            peers.liger_scaled,
            partial(_package_missing, "liger_kernel", "liger-kernel"),
        ),
        Method("full-logits-ce", "peer", "none", "plain CE on full float32 logits", peers.full_logits_cross_entropy),
        Method("liger", "peer", "none", "plain CE, Liger FLCE", peers.liger_fused_linear, _liger_unavailable),
        Method(
            "cce",
            "peer",
            "none",
            "plain CE, cut-cross-entropy",
            peers.cut_cross_entropy,
            partial(_package_missing, "cut_cross_entropy", "cut-cross-entropy"),
        ),
        Method(
            "torch-linear",
            "peer",
            "none",
            "plain CE, F.linear_cross_entropy, tuned",
            peers.torch_linear_tuned,
            _torch_linear_unavailable,
        ),
        Method(
            "torch-linear-default",
            "peer",
            "none",
            "plain CE, F.linear_cross_entropy, default options",
            peers.torch_linear_default,
            _torch_linear_unavailable,
        ),
    ]


def many_tiles(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    rows = -(-int((labels != -100).sum()) // MANY_TILES)
    return fused_linear_eaft(hidden, weight, labels, tile_bytes=rows * weight.shape[0] * weight.element_size())


def _not_in_float32(device: torch.device, dtype: torch.dtype) -> str | None:
    return "in float32 the weight gradient is always a float32 sum" if dtype == torch.float32 else None


def _package_missing(module: str, package: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if importlib.util.find_spec(module) is None:
        return f"not installed: pip install {package}"
    return None


def _liger_unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type == "cpu":
        return "its kernel is Triton, which needs a GPU"
    return _package_missing("liger_kernel", "liger-kernel", device, dtype)


def _torch_linear_unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    if torch.__version__ < (2, 13):
        return f"needs torch 2.13, this is {torch.__version__}"
    return None
