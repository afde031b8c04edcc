"""Workloads: the head of a model, a number of tokens, a dtype, and the trained tensors. Does not import torch.

Legend: N tokens (rows), D hidden size, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from eaftdrope.errors import UserError
from eaftdrope.recipe.suggest import did_you_mean


@dataclass(frozen=True)
class Shape:
    """The head of a model and the number of tokens of a step."""

    name: str
    title: str
    hidden_size: int
    vocabulary: int
    rows: int


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("smollm2", "SmolLM2-135M", 576, 49_152, 2048),
        Shape("qwen", "Qwen2.5-0.5B", 896, 151_936, 2048),
        Shape("llama3", "Llama-3.2-1B", 2048, 128_256, 2048),
        Shape("gemma", "Gemma-3-270m", 640, 262_144, 1024),
    )
}
DEFAULT_ROWS = 2048
DTYPES = ("bfloat16", "float32")
LOGITS = {
    "random": "hidden states and head drawn at random: half of the rows diffuse, a quarter confident of their label, a "
    "quarter of another token",
    "real": "hidden states and head of SmolLM2-135M-Instruct over text",
}
TRAINS = {
    "all": "every label counts, the head is trained",
    "half-ignored": "half of the labels are ignored, in spans of 32 rows, as in prompts",
    "frozen-head": "the head is frozen (LoRA): no weight gradient, and a floor of two products instead of three",
}
# the only shape whose model is available as a pip package
REAL_SHAPE = "smollm2"
QUICK_ROWS = 256

# oneDNN's names for ONEDNN_MAX_CPU_ISA, weakest first
ISAS = (
    "SSE41",
    "AVX",
    "AVX2",
    "AVX2_VNNI",
    "AVX2_VNNI_2",
    "AVX512_CORE",
    "AVX512_CORE_VNNI",
    "AVX512_CORE_BF16",
    "AVX512_CORE_FP16",
    "AVX512_CORE_AMX",
    "AVX512_CORE_AMX_FP16",
    "DEFAULT",
)


@dataclass(frozen=True)
class Case:
    """One workload; every method is measured on it."""

    shape: str
    title: str
    rows: int
    hidden_size: int
    vocabulary: int
    dtype: str
    logits: str = "random"
    trains: str = "all"

    @property
    def inputs(self) -> str:
        """Identifier of the inputs and their float64 gradients, which cases share."""
        labels = "half-ignored" if self.trains == "half-ignored" else "all"
        return f"{self.shape}-{self.rows}-{self.dtype}-{self.logits}-{labels}"

    @property
    def products(self) -> int:
        """Number of matrix products of `2 N D V` operations that every step needs."""
        return 2 if self.trains == "frozen-head" else 3

    def __str__(self) -> str:
        extra = "".join(f", {word}" for word in (self.logits, self.trains) if word not in ("random", "all"))
        return f"{self.title} {self.rows} x {self.hidden_size} x {self.vocabulary} {self.dtype}{extra}"


def parse_shapes(text: str) -> list[Shape]:
    """Parse `smollm2,qwen`, or sizes as `DxV`. Raises UserError with the nearest name."""
    shapes = []
    for word in split(text, "--shape"):
        if sizes := re.fullmatch(r"(\d+)x(\d+)", word):
            hidden_size, vocabulary = map(int, sizes.groups())
            if min(hidden_size, vocabulary) < 1:
                raise UserError(f"--shape {word}: sizes must be at least 1.")
            shapes.append(Shape(word, word, hidden_size, vocabulary, DEFAULT_ROWS))
        elif word in SHAPES:
            shapes.append(SHAPES[word])
        else:
            raise UserError(
                f"--shape {word}: no such shape.{did_you_mean(word, SHAPES)} Shapes: {', '.join(SHAPES)}, or sizes as "
                "HIDDENxVOCABULARY, such as 896x151936."
            )
    return shapes


def choose(text: str, known: Sequence[str], option: str) -> list[str]:
    """Split `text` at commas and check every word. Raises UserError with the nearest known word."""
    words = split(text, option)
    for word in words:
        if word not in known:
            raise UserError(f"{option} {word}: unknown.{did_you_mean(word, known)} Known: {', '.join(known)}.")
    return words


def split(text: str, option: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise UserError(f"{option} is empty. Pass values separated by commas.")
    return list(dict.fromkeys(words))


def make_cases(
    shapes: Sequence[Shape],
    dtypes: Sequence[str],
    logits: Sequence[str],
    trains: Sequence[str] | None = None,
    rows: int | None = None,
) -> list[Case]:
    """Return the cases, with those of the same inputs next to each other.

    Without `trains`, every shape is measured with all tensors trained, and the first shape in the other ways too.
    Real logits exist for one shape only; those of the others are random.
    """
    cases = []
    for dtype in dtypes:
        for shape in shapes:
            for kind in logits:
                if kind == "real" and shape.name != REAL_SHAPE:
                    continue
                varied = shape is shapes[0] and kind == logits[0]
                chosen = trains or (list(TRAINS) if varied else ["all"])
                # next to `all`, with which the frozen head shares its inputs
                for way in sorted(chosen, key=lambda name: name == "half-ignored"):
                    sizes = (rows or shape.rows, shape.hidden_size, shape.vocabulary)
                    cases.append(Case(shape.name, shape.title, *sizes, dtype, kind, way))
    if not cases:
        raise UserError(f"real logits exist for --shape {REAL_SHAPE} only. Use it, or --logits random.")
    return cases


def as_json(case: Case) -> dict:
    return asdict(case)
