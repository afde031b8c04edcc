"""Makes the Triton interpreter honest about bfloat16.

As it comes, TRITON_INTERPRET=1 does bfloat16 arithmetic, comparisons, tl.sum and tl.dot on the raw 16 bits (silently
wrong), truncates float32 -> bfloat16 instead of rounding to nearest even, and never fires tl.device_assert. `install()`:

- casts and stores to bfloat16 round to nearest even;
- bfloat16 operators, tl.sum and tl.dot are computed in float32 (operator results rounded back to bfloat16);
- tl.device_assert raises AssertionError;
- int32 overflow in a kernel raises (the interpreter's own debug checks are switched on).

Set TRITON_INTERPRET=1 before Triton is imported and call `install()` before the first launch. It replaces private names of
triton.runtime.interpreter, so Triton is pinned and `check()` is a test: an upgrade cannot disarm it in silence. Still
wrong or missing afterwards: atomic_add on bfloat16 raises, fp8 casts are off by one in places, libdevice raises.
"""

import dataclasses
import os

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

_installed = False


def bits_to_float(bits):
    """uint16 bfloat16 bits -> float32 values."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float_to_bits(values):
    """float32 values -> uint16 bfloat16 bits, rounded to nearest even; NaN becomes the quiet NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def install():
    """Patches the interpreter; a second call does nothing."""
    global _installed
    if _installed:
        return
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("set TRITON_INTERPRET=1 before importing triton")
    _patch_casts()
    _patch_operators()
    shared = interpreter.interpreter_builder
    shared.options = dataclasses.replace(shared.options, debug=True)
    _installed = True


def _is_bf16(handle):
    return handle.dtype.scalar == tl.bfloat16


def _as_float(handle):
    return interpreter.TensorHandle(bits_to_float(handle.data), tl.float32) if _is_bf16(handle) else handle


def _as_bf16(values):
    return interpreter.TensorHandle(float_to_bits(values), tl.bfloat16)


def _patch_casts():
    builder = interpreter.InterpreterBuilder
    convert_float, cast_impl = interpreter._convert_float, builder.cast_impl

    def new_convert_float(values, source, target, rounding_mode):
        if source == tl.bfloat16 and target == tl.float32:
            return bits_to_float(values.view(np.uint16)).view(np.uint32)
        if source == tl.float32 and target == tl.bfloat16:
            return float_to_bits(values.view(np.float32)).view(np.uint16)
        return convert_float(values, source, target, rounding_mode)

    def new_cast_impl(self, source, target):
        to_bf16 = target.scalar == tl.bfloat16
        if _is_bf16(source) and not to_bf16:
            return cast_impl(self, _as_float(source), target)
        if to_bf16 and not _is_bf16(source):
            return _as_bf16(source.data.astype(np.float32))
        return cast_impl(self, source, target)

    interpreter._convert_float = new_convert_float
    builder.cast_impl = new_cast_impl


def _patch_operators():
    builder, handle, reduce_ops = interpreter.InterpreterBuilder, interpreter.TensorHandle, interpreter.ReduceOps
    binary_op, unary_op = builder.binary_op, builder.unary_op
    create_dot, reduce_sum = builder.create_dot, reduce_ops.sum

    def new_binary_op(self, left, right, op):
        if not (_is_bf16(left) and _is_bf16(right)):
            return binary_op(self, left, right, op)
        result = op(_as_float(left).data, _as_float(right).data)
        return handle(result, tl.int1) if result.dtype == np.bool_ else _as_bf16(result)

    def new_unary_op(self, operand, op):
        return _as_bf16(op(_as_float(operand).data)) if _is_bf16(operand) else unary_op(self, operand, op)

    def new_create_dot(self, a, b, accumulator, input_precision, max_imprecise):
        return create_dot(self, _as_float(a), _as_float(b), accumulator, input_precision, max_imprecise)

    def new_sum(self, tensor):
        if tensor.dtype.scalar != tl.bfloat16:
            return reduce_sum(self, tensor)
        total = np.sum(bits_to_float(tensor.handle.data), axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(total, tl.float32)

    def new_create_assert(self, condition, message):
        assert np.all(condition.data if isinstance(condition, handle) else condition), f"{message}"

    builder.binary_op = new_binary_op
    builder.unary_op = new_unary_op
    builder.create_dot = new_create_dot
    builder.create_assert = new_create_assert
    reduce_ops.sum = new_sum


# --- canaries ---------------------------------------------------------------------------------------------------------


@triton.jit
def _elementwise(a, b, total, less, sum_out, rounded, n: tl.constexpr):
    i = tl.arange(0, n)
    x, y = tl.load(a + i), tl.load(b + i)
    tl.store(total + i, x + y)
    tl.store(less + i, (x < y).to(tl.int32))
    tl.store(sum_out, tl.sum(x, 0))
    tl.store(rounded + i, (x.to(tl.float32) * 1.0078125).to(tl.bfloat16))


@triton.jit
def _dot(a, b, o, n: tl.constexpr):
    i, j = tl.arange(0, n)[:, None], tl.arange(0, n)[None, :]
    tl.store(o + i * n + j, tl.dot(tl.load(a + i * n + j), tl.load(b + i * n + j)))


@triton.jit
def _asserts(a):
    tl.device_assert(tl.load(a) == 1.0, "not one")


@triton.jit
def _overflows(a):
    tl.store(a, (tl.program_id(0) + 70000) * tl.load(a))


def _raises(kernel, argument):
    try:
        kernel[(1,)](argument)
    # an AssertionError, wrapped by the interpreter
    except Exception:
        return True
    return False


def check():
    """Canaries, by name: True where the interpreter agrees with torch. All are wrong without `install()`."""
    torch.manual_seed(0)
    n = 32
    a, b = torch.randn(n).bfloat16(), torch.randn(n).bfloat16()
    total, rounded, less = torch.empty_like(a), torch.empty_like(a), torch.empty(n, dtype=torch.int32)
    sum_out = torch.empty(1)
    _elementwise[(1,)](a, b, total, less, sum_out, rounded, n)
    m1, m2, product = torch.randn(n, n).bfloat16(), torch.randn(n, n).bfloat16(), torch.empty(n, n)
    _dot[(1,)](m1, m2, product, n)
    large, one = torch.tensor([50257], dtype=torch.int32), torch.tensor([1], dtype=torch.int32)
    return {
        "add": torch.equal(total, a + b),
        "compare": torch.equal(less.bool(), a < b),
        "sum": bool((sum_out - a.float().sum()).abs() < 1e-5),
        "round to nearest even": torch.equal(rounded, (a.float() * 1.0078125).bfloat16()),
        "dot": bool((product - m1.float() @ m2.float()).abs().max() < 1e-4),
        "device_assert fires": _raises(_asserts, torch.zeros(1)) and not _raises(_asserts, torch.ones(1)),
        "int32 overflow raises": _raises(_overflows, large) and not _raises(_overflows, one),
    }
