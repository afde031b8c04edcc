"""What the compiler makes of each kernel: the figures that test_compiled.py holds against budgets.json.

    python -m tests.loss.triton.compiled             # compiles everything, shows what differs from budgets.json
    python -m tests.loss.triton.compiled --update    # and writes it there: after an improvement, or a reasoned growth

What is compiled is what the backend launches: its host code runs with recorders in the place of kernels.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import torch
import triton

from eaftdrope.loss.backends import triton as backend
from eaftdrope.loss.backends import triton_kernels
from eaftdrope.loss.backends.tile import LogitsTransform, TileStats
from tests.gpuless.triton_compiler import TARGETS, Launch, compile_for, figures

BUDGETS = Path(__file__).with_name("budgets.json")
KERNELS = ("row_statistics_kernel", "topk_entropy_kernel", "row_gradient_kernel", "column_kernel")

# (V, stride): both divisible by 16; a vocabulary that is not, in rows that are; neither
LAYOUTS = {"aligned": (151_936, 151_936), "padded": (151_935, 151_936), "odd": (151_935, 151_935)}
TRANSFORMS = {
    "plain": LogitsTransform(),
    "capped": LogitsTransform(scale=1.5, softcap=30.0),
    "scaled": LogitsTransform(scale=0.5),
}


@dataclass(frozen=True)
class Variant:
    """One way to launch the kernels."""

    target: str
    dtype: str = "bfloat16"
    transform: str = "plain"
    layout: str = "padded"
    vocab: int | None = None
    topk: int | None = 20

    def __str__(self) -> str:
        vocab = "" if self.vocab is None else f"-v{self.vocab}"
        topk = "" if self.topk == 20 else f"-k{self.topk or 'none'}"
        return f"{self.target}-{self.dtype}-{self.transform}-{self.layout}{vocab}{topk}"


# What differs in one thing from what training uses.
DIFFERENCES = (
    {"dtype": "float32"},
    {"layout": "aligned"},
    {"layout": "odd"},
    {"transform": "capped"},
    {"transform": "capped", "layout": "odd"},
    {"transform": "scaled"},
    {"dtype": "float16"},
    {"vocab": 32_000, "layout": "aligned"},
    {"vocab": 1000},
    {"topk": None},
    {"topk": 128},
)
# Every target with what training uses, and each difference on an NVIDIA or an AMD target, in turn.
COVERING = [Variant(target) for target in TARGETS] + [
    Variant(("sm_90", "gfx942")[number % 2], **difference) for number, difference in enumerate(DIFFERENCES)
]
EVERYTHING = list(
    dict.fromkeys(
        COVERING
        + [Variant(target, **difference) for target in ("sm_90", "gfx942") for difference in DIFFERENCES]
        + [Variant(target, "float32") for target in TARGETS]
        + [
            Variant(target, dtype, transform, layout)
            for target in TARGETS
            for dtype in ("bfloat16", "float32")
            for transform, layout in (("plain", "aligned"), ("plain", "odd"), ("capped", "padded"))
        ]
    )
)


class _Recorder:
    """Stands for a kernel: `kernel[grid](...)` writes down the launch."""

    def __init__(self, kernel, recorded: dict[str, Launch]):
        self._kernel, self._recorded = kernel, recorded

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, **kwargs):
        self._recorded[self._kernel.__name__] = Launch.recorded(self._kernel, args, kwargs)


def launches(variant: Variant, module: ModuleType = triton_kernels, rows: int = 3, at: int = 0) -> dict[str, Launch]:
    """What the backend would launch for the variant, by kernel; `module` has the kernels. The labels and weights are
    those of `rows` rows from row `at` of a longer tensor."""
    recorded: dict[str, Launch] = {}
    vocab, stride = LAYOUTS[variant.layout]
    if variant.vocab is not None:
        vocab, stride = variant.vocab, -(-variant.vocab // 16) * 16
    tile = torch.empty(rows, stride, dtype=getattr(torch, variant.dtype))[:, :vocab]
    labels, numbers = torch.zeros(at + rows, dtype=torch.int64)[at:], torch.zeros(at + rows)[at:]
    transform = TRANSFORMS[variant.transform]
    kernels, warp_size = backend._kernels, backend._warp_size
    backend._kernels = lambda: SimpleNamespace(**{name: _Recorder(getattr(module, name), recorded) for name in KERNELS})
    backend._warp_size = lambda device: TARGETS[variant.target].warp_size
    try:
        backend.tile_statistics(tile, labels, transform, variant.topk)
        stats = TileStats(numbers, numbers, None, labels == 0, numbers, numbers)
        backend.tile_gradient_(tile, labels, stats, numbers, transform)
        backend.tile_columns(tile, 2**-12)
    finally:
        backend._kernels, backend._warp_size = kernels, warp_size
    return recorded


def measure(variant: Variant, module: ModuleType = triton_kernels) -> dict[str, dict]:
    """Figures of each kernel of the variant. Equal launches are compiled once in a process."""
    return {name: _measured(_Keyed(launch), variant.target) for name, launch in launches(variant, module).items()}


class _Keyed:
    """A launch that is equal to another which compiles to the same code."""

    def __init__(self, launch: Launch):
        self.launch, self._key = launch, launch.key()

    def __eq__(self, other):
        return self._key == other._key

    def __hash__(self):
        return hash(self._key)


@functools.cache
def _measured(keyed: _Keyed, target: str) -> dict:
    # a figure must come from this compiler, not from a cache
    with tempfile.TemporaryDirectory() as folder:
        environment = {"TRITON_ALWAYS_COMPILE": "1", "TRITON_CACHE_DIR": folder}
        with mock.patch.dict(os.environ, environment):
            return figures(compile_for(keyed.launch, target), target)


def read_budgets() -> dict:
    """{"triton": version, "figures": {variant: {kernel: figures}}}"""
    return json.loads(BUDGETS.read_text(encoding="utf-8"))


def _write(measured: dict[str, dict]) -> None:
    lines = [
        f"  {json.dumps(variant)}: {{\n"
        + ",\n".join(f"    {json.dumps(name)}: {json.dumps(found)}" for name, found in kernels.items())
        + "\n  }"
        for variant, kernels in sorted(measured.items())
    ]
    text = f'{{\n"triton": {json.dumps(triton.__version__)},\n"figures": {{\n' + ",\n".join(lines) + "\n}\n}\n"
    BUDGETS.write_text(text, encoding="utf-8")


def main() -> None:
    measured = {str(variant): measure(variant) for variant in EVERYTHING}
    known = read_budgets()["figures"] if BUDGETS.exists() else {}
    for variant, kernels in measured.items():
        for name, found in kernels.items():
            before = known.get(variant, {}).get(name)
            if found != before:
                print(f"{variant} {name}: {before} -> {found}")
    if "--update" in sys.argv[1:]:
        _write(measured)


if __name__ == "__main__":
    main()
