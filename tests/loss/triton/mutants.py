"""The kernels with a bug planted: a copy of their source with one text replaced. The checks are proven on them.

with planted("int32 offsets of a row"):
    backend.tile_statistics(...)      # runs the wrong kernels
"""

import contextlib
import importlib.util
import tempfile
from pathlib import Path

from eaftdrope.loss.backends import triton as backend
from eaftdrope.loss.backends import triton_kernels

# name -> (text of the kernels, what stands there instead); every occurrence is replaced
PLANTED = {
    "int32 offsets of a row": ("row = tl.program_id(0).to(tl.int64)", "row = tl.program_id(0)"),
    "int32 offsets of the gradient": ("row = (program // stretches).to(tl.int64)", "row = program // stretches"),
    "int32 offsets of the columns": ("row.to(tl.int64)[:, None] * stride", "row[:, None] * stride"),
    "no mask on the last load": (
        "tl.load(row_ptr + whole + lane, mask=inside, other=0.0)",
        "tl.load(row_ptr + whole + lane)",
    ),
    "no mask on the last load of the gradient": (
        "tl.load(row_ptr + column, mask=inside, other=0.0)",
        "tl.load(row_ptr + column)",
    ),
    "no mask on the last store": (
        "tl.store(row_ptr + column, g.to(logits_ptr.dtype.element_ty), mask=inside)",
        "tl.store(row_ptr + column, g.to(logits_ptr.dtype.element_ty))",
    ),
    "one column too many": ("inside = column < vocab\n        g =", "inside = column < vocab + 1\n        g ="),
    "no mask on the rows of the columns": ("mask=(row < rows)[:, None] & inside[None, :]", "mask=inside[None, :]"),
    "a slot too far": ("+ row * SLOTS + rank - 1", "+ row * SLOTS + rank"),
    "gathers beyond the row": ("is_open[:, None] & (column < vocab)", "is_open[:, None] & (column >= 0)"),
    "reads at a label of another slice": (
        "target_column = tl.where((label >= 0) & (label < vocab), label, -1).to(tl.int32)",
        "target_column = label.to(tl.int32)\n    target += 0.0 * tl.load(row_ptr + target_column).to(tl.float32)",
    ),
    "what is masked counts as 0": ('tl.where(inside, z, float("-inf"))', "tl.where(inside, z, 0.0)"),
    "what is masked is capped": (
        'other=0.0), factor, cap, SCALED, CAPPED)\n        m, r, s = _join(m, r, s, tl.where(inside, z, float("-inf")))',
        'other=float("-inf")), factor, cap, SCALED, CAPPED)\n        m, r, s = _join(m, r, s, z)',
    ),
    "the maximum is in the sum": ("tl.sum(tl.where(holds_it, r, mass), 0)", "tl.sum(mass, 0) - 1"),
    "the maximum of each lane is left out": ("mass = share * (1 + r)", "mass = share * tl.maximum(r, 0.0)"),
    "truncated to bfloat16": (
        "g.to(logits_ptr.dtype.element_ty)",
        "((g.to(tl.int32, bitcast=True) >> 16) << 16).to(tl.float32, bitcast=True).to(logits_ptr.dtype.element_ty)",
    ),
    "p - 1 by subtraction": ("tl.where(x <= 1, -2 * sinh * _exp(-h), _exp(-x) - 1)", "_exp(-x) - 1"),
    "a NaN is dropped": ("propagate_nan=NAN_STAYS", "propagate_nan=tl.PropagateNan.NONE"),
    "an infinite gap": ("tl.minimum(tl.abs(difference), VANISHED, propagate_nan=NAN_STAYS)", "tl.abs(difference)"),
    "ties are counted once": ("copies = TOPK - tl.sum(above.to(tl.int32), 0)", "copies = 1"),
    "one open lane is forgotten": ("is_open = slot < tl.load(", "is_open = slot + 1 < tl.load("),
    "only the lane maxima": ("keys = tl.maximum(_to_key(tl.reshape(z, [SLOTS * STEPS]))", "keys = tl.maximum(_to_key("
        "tl.reshape(tl.where(z == tl.max(z, 1)[:, None], z, float('-inf')), [SLOTS * STEPS]))"),
    "every label is in the slice": ("tl.where((label >= 0) & (label < vocab), label, -1)", "(label % vocab)"),
    "no derivative of the softcap": ("return g * (slope * derivative)", "return g * slope"),
    "no derivative of the scale": ("target * slope, coefficient * slope", "target, coefficient"),
    # right, and slow: for the checks of compiled code
    "every step is masked": (
        "tl.load(row_ptr + start + lane)",
        "tl.load(row_ptr + start + lane, mask=start + lane < vocab, other=0.0)",
    ),
}  # fmt: skip

_folder = tempfile.TemporaryDirectory(prefix="mutants")
_loaded = {}


@contextlib.contextmanager
def planted(name):
    """The backend runs kernels with the bug of that name; with the right ones for `None`."""
    kernels = backend._kernels
    if name is not None:
        backend._kernels = lambda: mutant(name)
    try:
        yield
    finally:
        backend._kernels = kernels


def mutant(name):
    """The module of kernels with the bug of that name.

    Raises:
        AssertionError: the kernels no longer contain the text it replaces.
    """
    if name not in _loaded:
        source = Path(triton_kernels.__file__).read_text(encoding="utf-8")
        old, new = PLANTED[name]
        assert old in source, f"planted bug {name!r}: the kernels no longer contain {old!r}"
        # a file: the jit reads the source back from it
        path = Path(_folder.name) / f"mutant_{len(_loaded)}.py"
        path.write_text(source.replace(old, new), encoding="utf-8")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        _loaded[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(_loaded[name])
    return _loaded[name]
