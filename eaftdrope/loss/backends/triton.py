"""The Triton backend: CUDA, ROCm and XPU devices, float32, bfloat16 and float16 tiles.

`triton_kernels.py` has the derivation, the byte counts and what is checked where. Nothing here waits for the device:
outputs are allocated and kernels launched, so a CUDA graph can record both functions (after one call outside of it, which
compiles).

Legend: R rows of a tile, V vocabulary, L lanes, K size of the top-K entropy.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from types import ModuleType

import torch
from torch import Tensor

from .tile import LogitsTransform, TileStats

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Lanes a thread holds, see the block rule in triton_kernels.py.
LANES_PER_THREAD = 8
# Columns of a row that one program of the gradient writes.
STRETCH = 16_384
# Beyond it the gathered lanes no longer fit the registers of a block, and torch.topk takes over.
MOST_TOPK = 128
# Rows and columns of a block of `tile_columns`: 256 bytes of a bfloat16 row side by side.
COLUMN_BLOCK = (16, 128)


def tile_statistics(logits_RV: Tensor, labels_R: Tensor, transform: LogitsTransform, topk: int | None) -> TileStats:
    """Return the statistics of every row of a tile; the tile is only read.

    Args:
        logits_RV (`Tensor` `[R, V]`, float32, bfloat16 or float16):
            Raw projections with contiguous columns. A row stride divisible by 16 keeps the loads wide.
        labels_R (`Tensor` `[R]`, int64):
            Labels in `[0, V)`.
        transform ([`LogitsTransform`]):
            Scale and softcap.
        topk (`int`, *optional*):
            K of the top-K entropy; all of V where K is larger.

    Raises:
        ValueError: a dtype or layout that the kernels do not support, a `topk` below 1.
    """
    _check(logits_RV)
    if topk is not None and topk < 1:
        raise ValueError(f"topk={topk}: the entropy of the K largest logits needs K >= 1, or None for no such entropy.")
    rows, vocab = logits_RV.shape
    nll_R, entropy_R, maximum_R, rest_R = torch.empty(4, rows, dtype=torch.float32, device=logits_RV.device)
    correct_R = torch.empty(rows, dtype=torch.bool, device=logits_RV.device)
    k = 0 if topk is None else min(topk, vocab)
    gathered = 0 if k > MOST_TOPK else k
    lanes, slots = block_lanes(vocab), next_power_of_2(gathered)
    threshold_R = torch.empty(rows, dtype=torch.float32, device=logits_RV.device)
    open_count_R = torch.empty(rows, dtype=torch.int32, device=logits_RV.device)
    open_lanes_RS = torch.empty(rows, slots, dtype=torch.int32, device=logits_RV.device)
    topk_entropy_R = None if topk is None else torch.empty(rows, dtype=torch.float32, device=logits_RV.device)
    tile = (logits_RV, logits_RV.stride(0), vocab)
    how = transform_arguments(transform)
    with _on(logits_RV.device):
        if rows:
            _kernels().row_statistics_kernel[(rows,)](
                *tile, labels_R.contiguous(), nll_R, entropy_R, maximum_R, rest_R, correct_R,
                threshold_R, open_count_R, open_lanes_RS, **how, TOPK=gathered, SLOTS=slots, LANES=lanes,
                **launch_options(lanes, logits_RV.device),
            )  # fmt: skip
        if rows and gathered:
            steps = next_power_of_2(-(-vocab // lanes))
            _kernels().topk_entropy_kernel[(rows,)](
                *tile, maximum_R, rest_R, threshold_R, open_count_R, open_lanes_RS, topk_entropy_R,
                **how, TOPK=gathered, SLOTS=slots, LANES=lanes, STEPS=steps,
                **launch_options(slots * steps, logits_RV.device),
            )  # fmt: skip
    if k > MOST_TOPK:
        topk_entropy_R = _entropy_of_many(logits_RV, transform, k)
    return TileStats(nll_R, entropy_R, topk_entropy_R, correct_R, maximum_R, rest_R)


def tile_gradient_(
    logits_RV: Tensor, labels_R: Tensor, stats: TileStats, weight_R: Tensor, transform: LogitsTransform
) -> None:
    """Overwrite the tile with the gradient of sum_t w_t nll_t with respect to its raw projections,
    `w (softmax(z) - onehot(y))` times the derivative of the transform. The tile may be a slice of the vocabulary with the
    statistics of whole rows; labels count from its start.

    Raises:
        ValueError: a dtype or layout that the kernels do not support.
    """
    _check(logits_RV)
    rows, vocab = logits_RV.shape
    if logits_RV.numel() == 0:
        return
    lanes = block_lanes(vocab)
    stretches = -(-vocab // STRETCH)
    with _on(logits_RV.device):
        _kernels().row_gradient_kernel[(rows * stretches,)](
            logits_RV, logits_RV.stride(0), vocab, labels_R.contiguous(),
            stats.nll.contiguous(), stats.maximum.contiguous(), stats.rest.contiguous(), weight_R.contiguous(),
            **transform_arguments(transform), slope=float(transform.scale), stretches=stretches, LANES=lanes, STRETCH=STRETCH,
            **launch_options(lanes, logits_RV.device),
        )  # fmt: skip


def tile_columns(grad_RV: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Return the columns of a gradient tile that matter, and the sum of each column.

    Args:
        grad_RV (`Tensor` `[R, V]`, float32, bfloat16 or float16):
            Gradient with respect to the logits.
        threshold (`float`):
            A column is kept if any absolute gradient in it reaches this.

    Returns:
        `keep` (`[V]`, bool) and `mass` (`[V]`, float32), the sum of each column in a fixed order.

    Raises:
        ValueError: a dtype or layout that the kernels do not support.
    """
    _check(grad_RV)
    rows, vocab = grad_RV.shape
    keep_V = torch.empty(vocab, dtype=torch.bool, device=grad_RV.device)
    mass_V = torch.empty(vocab, dtype=torch.float32, device=grad_RV.device)
    block_rows, block_columns = COLUMN_BLOCK
    with _on(grad_RV.device):
        if vocab:
            _kernels().column_kernel[(-(-vocab // block_columns),)](
                grad_RV, grad_RV.stride(0), rows, vocab, threshold, keep_V, mass_V,
                ROWS=block_rows, COLUMNS=block_columns, **launch_options(block_rows * block_columns, grad_RV.device),
            )  # fmt: skip
    return keep_V, mass_V


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return the reason why this backend cannot work on tensors of that device and dtype, and what to do, or None. The
    first call for a device compiles and launches a kernel there."""
    device = torch.device(device)
    if dtype not in DTYPES:
        return f"the triton backend has no kernels for {dtype}: use float32, bfloat16 or float16, or the torch backend."
    try:
        _kernels()
    except ImportError as error:
        return f"triton cannot be imported ({error}): pip install triton (Linux only), or use another backend."
    if os.environ.get("TRITON_INTERPRET") == "1":
        if device.type == "cpu":
            return None
        return "TRITON_INTERPRET=1 runs kernels on the CPU, very slowly: unset it and run again."
    if device.type not in ("cuda", "xpu"):
        return f"the triton backend runs on CUDA, ROCm and XPU devices, not on {device.type}: use another backend."
    return _launch_error(device)


@functools.cache
def _launch_error(device: torch.device) -> str | None:
    """Return the error of a kernel launch on the device, or None: no driver, no C compiler for Triton's launcher, a GPU
    that is too old. The errors come from other libraries, each with exceptions of its own."""
    try:
        tile_columns(torch.zeros(1, 16, device=device, dtype=torch.float32), 1.0)
        torch.get_device_module(device).synchronize(device)
    except Exception as error:
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        return f"triton cannot launch a kernel on {device} ({line}): fix the cause, or use another backend."
    return None


# --- launching kernels ------------------------------------------------------------------------------------------------


def block_lanes(vocab: int) -> int:
    """Return L for V: the smallest power of 2 that makes a row at most 32 steps, but from 128 to 4,096."""
    return min(max(next_power_of_2(-(-vocab // 32)), 128), 4096)


def launch_options(elements: int, device: torch.device) -> dict[str, int | bool]:
    """Return the options of a launch whose blocks have that many elements."""
    threads = min(max(elements // LANES_PER_THREAD, 1), 512)
    return {"num_warps": max(1, threads // _warp_size(device)), "enable_fp_fusion": False}


def transform_arguments(transform: LogitsTransform) -> dict[str, float | bool]:
    """Return the transform as arguments of the kernels."""
    capped = transform.softcap is not None
    return {
        "factor": float(transform.scale / transform.softcap if capped else transform.scale),
        "cap": float(transform.softcap if capped else 1.0),
        "SCALED": transform.scale != 1.0,
        "CAPPED": capped,
    }


def next_power_of_2(number: int) -> int:
    """Return the smallest power of 2 that is at least `number`; 1 for 0."""
    return 1 << max(number - 1, 0).bit_length()


@functools.cache
def _warp_size(device: torch.device) -> int:
    """Return the threads of a warp: 64 on AMD's CDNA; 32 is Triton's own choice on an XPU."""
    return torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32


@functools.cache
def _kernels() -> ModuleType:
    """Import the kernels late: importing this backend must not need triton."""
    return importlib.import_module(".triton_kernels", __package__)


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Make the tensors' device the current one, on which Triton launches."""
    return contextlib.nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def _check(tile_RV: Tensor) -> None:
    if tile_RV.dtype not in DTYPES:
        raise ValueError(
            f"a tile of {tile_RV.dtype}: the triton backend has kernels for float32, bfloat16 and float16."
        )
    if tile_RV.dim() != 2 or (tile_RV.shape[1] > 1 and tile_RV.stride(1) != 1):
        raise ValueError(
            f"a tile of shape {tuple(tile_RV.shape)} and strides {tile_RV.stride()}: expected [rows, columns] with the "
            "columns contiguous. Call .contiguous()."
        )


def _entropy_of_many(logits_RV: Tensor, transform: LogitsTransform, k: int) -> Tensor:
    """Return the top-K entropy `[R]` for a K beyond `MOST_TOPK`, which no gate has by default."""
    raw_RK = logits_RV.topk(k, dim=-1, largest=transform.scale >= 0).values.float()
    z_RK = transform.apply(raw_RK)
    gap_RK = (z_RK[:, :1] - z_RK).clamp_max(110)[:, 1:]
    mass_RK = torch.exp(-gap_RK)
    rest_R = mass_RK.sum(-1)
    return rest_R.log1p() + (mass_RK * gap_RK).sum(-1) / (1 + rest_R)
