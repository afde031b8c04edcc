"""Which backend works on a tensor: the fastest that can, checked on first use."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import torch as torch_backend

BACKENDS = ("auto", "torch", "cpu", "triton", "cuda")

VARIABLE = "EAFTDROPE_LOSS_BACKEND"
"""Environment variable that stands for `auto`."""

# Fastest first; torch works anywhere.
_ORDER = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
_ORDER_ELSEWHERE = ("triton",)

_logger = logging.getLogger("eaftdrope")
_chosen: dict[tuple[str, torch.device, torch.dtype], Backend] = {}


@dataclass(frozen=True)
class Backend:
    """The functions of one backend."""

    name: str
    tile_statistics: Callable
    tile_gradient_: Callable
    accumulate: Callable
    tile_columns: Callable
    gather_columns: Callable
    add_rows_: Callable
    scaled: Callable


def check_backend_name(name: str) -> None:
    """Raises ValueError for a name that is not in `BACKENDS`."""
    if name not in BACKENDS:
        raise ValueError(f"unknown loss backend {name!r}. Backends: {', '.join(BACKENDS)}.")


def load_backend(name: str) -> Backend:
    """The functions of the backend of that name, whether it can work here or not."""
    module = _module(name)
    functions = [field for field in Backend.__dataclass_fields__ if field != "name"]
    return Backend(name, **{field: getattr(module, field, getattr(torch_backend, field)) for field in functions})


def unavailable(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the backend of that name can not work on tensors of this device and dtype, or None."""
    return _module(name).unavailable(device, dtype)


def check_backend(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """What the backend of that name gets wrong on small tiles, or None."""
    return _fault(load_backend(name), device, dtype)


def select_backend(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend of that name, or for `"auto"` the one in `EAFTDROPE_LOSS_BACKEND`, or the fastest that works here.

    A backend's first use on a device and dtype is checked on small tiles against float64. One that `auto` took and that
    disagrees is replaced by torch's, and the log says so; one that was asked for by name is refused.

    Raises:
        ValueError: no such backend, or one that was asked for can not work here.
        RuntimeError: a backend that was asked for gives wrong numbers.
    """
    check_backend_name(name)
    if name == "auto":
        name = os.environ.get(VARIABLE) or "auto"
        if name not in BACKENDS:
            raise ValueError(f"{VARIABLE}={name}: unknown loss backend. Backends: {', '.join(BACKENDS)}.")
    key = (name, device, dtype)
    if key not in _chosen:
        _chosen[key] = _fastest(device, dtype) if name == "auto" else _asked_for(name, device, dtype)
    return _chosen[key]


def _asked_for(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    reason = unavailable(name, device, dtype)
    if reason is not None:
        raise ValueError(f"the loss backend {name!r} can not work on {dtype} on {device}: {reason}")
    backend = load_backend(name)
    fault = _fault(backend, device, dtype)
    if fault is not None:
        raise RuntimeError(
            f"the loss backend {name!r} gives wrong numbers for {dtype} on {device}: {fault}. Use the backend 'torch', and "
            "please report this with the output of `eaftdrope doctor`."
        )
    return backend


def _fastest(device: torch.device, dtype: torch.dtype) -> Backend:
    reasons = []
    for name in _ORDER.get(device.type, _ORDER_ELSEWHERE):
        reason = unavailable(name, device, dtype)
        if reason is None:
            backend = load_backend(name)
            fault = _fault(backend, device, dtype)
            if fault is None:
                return backend
            _logger.error(
                "the loss backend %r gives WRONG NUMBERS for %s on %s and is not used: %s. Please report this with the "
                "output of `eaftdrope doctor`.", name, dtype, device, fault
            )  # fmt: skip
        else:
            reasons.append(f"{name}: {reason}")
    if reasons and dtype != torch.float64:
        _logger.warning("loss backend torch, slower than it could be. %s", " ".join(reasons))
    return load_backend("torch")


def _fault(backend: Backend, device: torch.device, dtype: torch.dtype) -> str | None:
    if backend.name == "torch":
        return None
    from .selfcheck import fault

    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the loss must run once before it is captured in a CUDA graph: its backend is checked on first use."
        )
    return fault(backend, device, dtype)


def _module(name: str):
    return torch_backend if name == "torch" else importlib.import_module(f".{name}", __package__)
