"""The matrix products of the loss: in which precision, and into which output.

A CPU without instructions for bfloat16 or float16 multiplies such matrices 7 to 90 times slower than float32 ones with
torch (one core of an AMD EPYC with AVX2, 512 rows, a hidden size of 896). Such operands are widened to float32 block by
block, and the product is rounded once.

Legend: R rows, K the dimension summed over, C columns, B columns of a block.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

# Size of the largest widened block, in bytes: a few of them fit a CPU's cache.
_BLOCK_BYTES = 2**23

# A product that sums over the vocabulary is padded to this many rows: the matrix-vector kernels that libraries use for
# fewer rows add in one running sum (relative error 1e-5 over 262,144 tokens, 7e-7 from here on).
_FEW_ROWS = 16


def multiply_into(
    out_RC: Tensor, left_RK: Tensor, right_KC: Tensor, *, bias_C: Tensor | None = None, add: bool = False
) -> None:
    """Compute `out = left @ right + bias`, or `out += left @ right`; for widened operands `out` may be float32."""
    if is_widened(left_RK):
        _multiply_widened(out_RC, left_RK, right_KC, bias_C, add)
    elif add:
        out_RC.addmm_(left_RK, right_KC)
    elif bias_C is not None:
        torch.addmm(bias_C, left_RK, right_KC, out=out_RC)
    else:
        torch.mm(left_RK, right_KC, out=out_RC)


def multiply(left_RK: Tensor, right_KC: Tensor) -> Tensor:
    """Return `left @ right`, accurate enough for a sum over the vocabulary for any number of rows."""
    rows = len(left_RK)
    if rows < _FEW_ROWS:
        padding = left_RK.new_zeros(_FEW_ROWS - rows, left_RK.shape[1])
        left_RK = torch.cat([left_RK, padding])
    out_RC = left_RK.new_empty(len(left_RK), right_KC.shape[1])
    multiply_into(out_RC, left_RK, right_KC)
    return out_RC[:rows]


def multiply_for_sum(left_RK: Tensor, right_KC: Tensor) -> Tensor:
    """Return a product to be added to a float32 sum, in float32 where the device supports that. A float16 product must not
    be rounded: it can leave the range of float16 within a single tile."""
    if left_RK.is_cuda:
        return torch.mm(left_RK, right_KC, out_dtype=torch.float32)
    if is_widened(left_RK):
        out_RC = left_RK.new_empty(left_RK.shape[0], right_KC.shape[1], dtype=torch.float32)
        multiply_into(out_RC, left_RK, right_KC)
        return out_RC
    if left_RK.dtype == torch.float16:
        return torch.mm(left_RK.float(), right_KC.float())
    return torch.mm(left_RK, right_KC)


def is_widened(operand: Tensor) -> bool:
    """True if products of such tensors are formed in float32, because the CPU has no instructions for them."""
    if operand.device.type != "cpu" or operand.dtype not in (torch.bfloat16, torch.float16):
        return False
    return not has_instructions(operand.dtype)


@cache
def has_instructions(dtype: torch.dtype) -> bool:
    """True if the CPU multiplies matrices of bfloat16 or float16 fast.

    The answer is torch's own: where it is positive torch uses oneDNN's product; a build without oneDNN has no fast one.
    """
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    supported = getattr(torch.ops.mkldnn, name, None)
    return supported is not None and supported()


def _multiply_widened(out_RC: Tensor, left_RK: Tensor, right_KC: Tensor, bias_C: Tensor | None, add: bool) -> None:
    """Multiply by blocks of the longest of the three sides, so that an operand of the head's size is never widened whole."""
    rows, inner, columns = *left_RK.shape, right_KC.shape[1]
    longest = max(rows, inner, columns)
    block = max(1, _BLOCK_BYTES // (4 * max(1, sorted((rows, inner, columns))[1])))
    blocks = [slice(start, start + block) for start in range(0, longest, block)]
    if longest == inner:
        sum_RC = torch.zeros(rows, columns)
        for part in blocks:
            sum_RC.addmm_(left_RK[:, part].float(), right_KC[part].float())
        _store(out_RC, sum_RC, bias_C, add)
    elif longest == columns:
        left_RK = left_RK.float()
        for part in blocks:
            bias_B = None if bias_C is None else bias_C[part]
            _store(out_RC[:, part], left_RK @ right_KC[:, part].float(), bias_B, add)
    else:
        right_KC = right_KC.float()
        for part in blocks:
            _store(out_RC[part], left_RK[part].float() @ right_KC, bias_C, add)


def _store(out: Tensor, product: Tensor, bias_C: Tensor | None, add: bool) -> None:
    if bias_C is not None:
        product += bias_C
    if add:
        product += out
    out.copy_(product)
