"""Choosing the backend for a tensor: the fastest that works, checked on first use."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch

from ..settings import BACKENDS, check_backend_name
from . import torch as torch_backend
from .selfcheck import check

VARIABLE = "EAFTDROPE_LOSS_BACKEND"
"""Environment variable that replaces `auto`."""

# Fastest first; torch works anywhere.
_ORDER = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
_ORDER_ELSEWHERE = ("triton",)

_logger = logging.getLogger("eaftdrope")
_selected: dict[tuple[str, torch.device, torch.dtype, bool], Backend] = {}


@dataclass(frozen=True)
class Backend:
    """The functions of one backend."""

    name: str
    tile_statistics: Callable
    tile_gradient_: Callable
    anchored_statistics: Callable
    anchored_gradient_: Callable
    accumulate: Callable
    tile_columns: Callable
    gather_columns: Callable
    add_rows_: Callable
    scaled: Callable


def load_backend(name: str) -> Backend:
    """Return the functions of a backend, even if it cannot work on this machine."""
    module = _module(name)
    functions = [field for field in Backend.__dataclass_fields__ if field != "name"]
    return Backend(name, **{field: getattr(module, field, getattr(torch_backend, field)) for field in functions})


def unavailable(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return the reason why a backend cannot work on tensors of this device and dtype, or None."""
    return _module(name).unavailable(device, dtype)


def check_backend(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return what a backend computes wrongly on small tiles, an anchor's included, or None."""
    return _check(load_backend(name), device, dtype, anchored=True)


def select_backend(name: str, device: torch.device, dtype: torch.dtype, *, anchored: bool = False) -> Backend:
    """Return the backend of that name, or for `"auto"` the one in `EAFTDROPE_LOSS_BACKEND`, or the fastest that works.

    The first use of a backend on a device and dtype is checked on small tiles against float64. If `auto` chose one that
    fails the check, torch's replaces it and an error is logged; one that was requested by name is refused. With `anchored`
    its functions for an anchor are checked too.

    Raises:
        ValueError: no such backend, or the requested one cannot work on this device and dtype.
        RuntimeError: the requested backend gives wrong numbers.
    """
    check_backend_name(name)
    if name == "auto":
        name = os.environ.get(VARIABLE) or "auto"
        if name not in BACKENDS:
            raise ValueError(f"{VARIABLE}={name}: unknown loss backend. Backends: {', '.join(BACKENDS)}.")
    key = (name, device, dtype, anchored)
    if key not in _selected:
        is_auto = name == "auto"
        _selected[key] = _fastest(device, dtype, anchored) if is_auto else _requested(name, device, dtype, anchored)
    return _selected[key]


def _requested(name: str, device: torch.device, dtype: torch.dtype, anchored: bool) -> Backend:
    reason = unavailable(name, device, dtype)
    if reason is not None:
        raise ValueError(f"the loss backend {name!r} cannot work on {dtype} on {device}: {reason}")
    backend = load_backend(name)
    wrong = _check(backend, device, dtype, anchored)
    if wrong is not None:
        raise RuntimeError(
            f"the loss backend {name!r} gives wrong numbers for {dtype} on {device}: {wrong}. Use the backend 'torch', and "
            "please report this with the output of `eaftdrope doctor`."
        )
    return backend


def _fastest(device: torch.device, dtype: torch.dtype, anchored: bool) -> Backend:
    reasons = []
    for name in _ORDER.get(device.type, _ORDER_ELSEWHERE):
        reason = unavailable(name, device, dtype)
        if reason is None:
            backend = load_backend(name)
            wrong = _check(backend, device, dtype, anchored)
            if wrong is None:
                return backend
            _logger.error(
                "the loss backend %r gives WRONG NUMBERS for %s on %s and is not used: %s. Please report this with the "
                "output of `eaftdrope doctor`.", name, dtype, device, wrong
            )  # fmt: skip
        else:
            reasons.append(f"{name}: {reason}")
    if reasons and dtype != torch.float64:
        _logger.warning("loss backend torch, slower than it could be. %s", " ".join(reasons))
    return load_backend("torch")


def _check(backend: Backend, device: torch.device, dtype: torch.dtype, anchored: bool) -> str | None:
    if backend.name == "torch":
        return None
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the loss must run once before it is captured in a CUDA graph: its backend is checked on first use."
        )
    return check(backend, device, dtype, anchored=anchored)


def _module(name: str) -> ModuleType:
    return torch_backend if name == "torch" else importlib.import_module(f".{name}", __package__)
