"""Gates: from the statistics of a token to its weight in the loss. The only place where a gate and its options are declared.

A gate reads [`TokenStats`] and returns one weight per token, detached by the caller. docs/gates.md is generated from the
docstrings of the named gates. In them p is the probability of the label, H the entropy over the V tokens of the vocabulary,
and h = H_topK / ln k the entropy of the k most likely tokens, normalised to [0, 1].

A function of your own is a gate too: `gate=lambda stats: stats.probability * (stats.entropy > 1)`.
Recipes read names and options here (`GATE_OPTIONS`), so this module loads without torch: formulas use methods of tensors.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, ClassVar, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

    from .statistics import TokenStats

# Smallest normal float32.
_TINY = 2.0**-126


@dataclass(frozen=True)
class Gate:
    """Base class of the gates; subclass it for a gate with options of its own.

    Attributes:
        row_local (`bool`): a token's weight depends only on its own statistics, so its gradient is formed from the same
            tile of logits. A gate that compares tokens (a quantile, a mean) sets False: one more projection of the rows.
        closes (`bool`): weights of exactly 0 occur; such rows are left out of the gradient's GEMMs.
        topk (`int` or `None`): size of the top-K entropy that the gate reads, or None: it is then not computed.
    """

    name: ClassVar[str] = ""
    row_local: ClassVar[bool] = True
    closes: ClassVar[bool] = False
    topk: ClassVar[int | None] = None

    def __call__(self, stats: TokenStats) -> Tensor:
        """Return the weight of each token, `[N]`."""
        raise NotImplementedError

    @property
    def formula(self) -> str:
        """The gate and its options in one line, for logs and model cards."""
        options = ", ".join(f"{option.name}={getattr(self, option.name)}" for option in fields(self))
        return f"{self.name}({options})"


class _TopKGate(Gate):
    """A gate on the top-K entropy; its dataclass has a field `k`."""

    @property
    def topk(self) -> int:  # pyrefly: ignore[bad-override]  # an attribute of the class, or of the gate
        return self.k  # pyrefly: ignore[missing-attribute]  # a field of each subclass

    def __post_init__(self) -> None:
        _require(self.topk >= 2, f"k={self.topk}: the top-K entropy needs at least two tokens (the paper uses 20).")

    def normalised(self, stats: TokenStats) -> Tensor:
        """h = H_topK / ln K"""
        assert stats.topk_entropy is not None
        return stats.topk_entropy / math.log(self.topk)


@dataclass(frozen=True)
class EAFT(_TopKGate):
    """`h^alpha`, or `(H_topK / divisor)^alpha`: tokens where the model is certain train little, so that labels which
    contradict it do not overwrite what it knows. The paper trains all weights with AdamW at 1e-5 (cosine, 3 % warm-up),
    batch 64, 10 epochs, as the recipes for mathematics, medicine and tool use do.

    Paper: Entropy-Adaptive Fine-Tuning, arXiv 2601.02151, Eq. 2-3.
    Configurations: defaults (the paper's EAFT); alpha=2.0 (its EAFT2); alpha=3.0 (its EAFT3); divisor=3.0 (LLaMA-Factory's
    `use_eaft_loss`, bit for bit); divisor=1.0 (Axolotl's `use_eaft`, which does not divide: weights up to ln k).
    """

    name: ClassVar[str] = "eaft"
    alpha: float = 1.0
    k: int = 20
    divisor: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.alpha >= 0, f"alpha={self.alpha}: must be >= 0 (0 is plain cross-entropy).")
        _require(self.divisor is None or self.divisor > 0, f"divisor={self.divisor}: must be > 0, or None for ln K.")

    def __call__(self, stats: TokenStats) -> Tensor:
        assert stats.topk_entropy is not None
        divisor = math.log(self.k) if self.divisor is None else self.divisor
        return (stats.topk_entropy / divisor) ** self.alpha


@dataclass(frozen=True)
class EAFTVocab(Gate):
    """`(H / ln V)^alpha`: the idea of `eaft` without a top-K, in [0, 1] with nothing to set.

    Paper: none, a variant of EAFT. Configurations: defaults (entropy of the whole vocabulary).
    """

    name: ClassVar[str] = "eaft-vocab"
    alpha: float = 1.0

    def __post_init__(self) -> None:
        _require(self.alpha >= 0, f"alpha={self.alpha}: must be >= 0 (0 is plain cross-entropy).")

    def __call__(self, stats: TokenStats) -> Tensor:
        return (stats.entropy / math.log(stats.vocab_size)) ** self.alpha


@dataclass(frozen=True)
class EAFTExact(Gate):
    """`min(1, H / ln k)^alpha`: the exact entropy on the paper's scale, without a top-K.

    Paper: none, a variant of EAFT. Configurations: defaults (exact entropy over ln 20).
    """

    name: ClassVar[str] = "eaft-exact"
    alpha: float = 1.0
    k: int = 20

    def __post_init__(self) -> None:
        _require(self.alpha >= 0, f"alpha={self.alpha}: must be >= 0 (0 is plain cross-entropy).")
        _require(self.k >= 2, f"k={self.k}: ln K is the scale, so K must be at least 2.")

    def __call__(self, stats: TokenStats) -> Tensor:
        return (stats.entropy / math.log(self.k)).clamp_max(1) ** self.alpha


@dataclass(frozen=True)
class EAFTSigmoid(_TopKGate):
    """`sigmoid(slope (h - threshold))`: a soft step; tokens below the threshold hardly train, those above it in full.

    Paper: Entropy-Adaptive Fine-Tuning, arXiv 2601.02151, section 5.1.
    Configurations: defaults (the paper's EAFT_sig: slope 30, threshold 0.17).
    """

    name: ClassVar[str] = "eaft-sigmoid"
    slope: float = 30.0
    threshold: float = 0.17
    k: int = 20

    def __call__(self, stats: TokenStats) -> Tensor:
        return (self.slope * (self.normalised(stats) - self.threshold)).sigmoid()


@dataclass(frozen=True)
class EAFTMask(_TopKGate):
    """`1[h > its quantile]` over the tokens of the call: those of lowest entropy are left out, the others train in full.

    Paper: Entropy-Adaptive Fine-Tuning, arXiv 2601.02151, section 5.1.
    Configurations: defaults (the paper's Masked SFT: quantile 0.15).
    """

    name: ClassVar[str] = "eaft-mask"
    closes: ClassVar[bool] = True
    row_local: ClassVar[bool] = False
    quantile: float = 0.15
    k: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_fraction("quantile", self.quantile)

    def __call__(self, stats: TokenStats) -> Tensor:
        h = self.normalised(stats)
        return (h > h.quantile(self.quantile)).to(h.dtype)


@dataclass(frozen=True)
class ConflictMask(Gate):
    """`0 where H and p are both in their lowest quantile, else 1`, over the tokens of the call: leaves out confident
    conflicts and nothing else. In the paper's pilot, masking only these tokens nearly removed forgetting.

    Paper: Entropy-Adaptive Fine-Tuning, arXiv 2601.02151, Figure 2.
    Configurations: defaults (the paper's pilot: quantile 0.15; whether it was taken per batch is not stated there).
    """

    name: ClassVar[str] = "conflict-mask"
    closes: ClassVar[bool] = True
    row_local: ClassVar[bool] = False
    quantile: float = 0.15

    def __post_init__(self) -> None:
        _require_fraction("quantile", self.quantile)

    def __call__(self, stats: TokenStats) -> Tensor:
        low_entropy = stats.entropy <= stats.entropy.quantile(self.quantile)
        # a low probability is a high nll; the nll keeps its order where the probability has underflowed
        low_probability = stats.nll >= stats.nll.quantile(1 - self.quantile)
        return (~(low_entropy & low_probability)).to(stats.nll.dtype)


@dataclass(frozen=True)
class DFT(Gate):
    """`p`: dynamic fine-tuning; unlikely labels train little, whatever the entropy of the model.

    Paper: On the Generalization of SFT, arXiv 2508.05629.
    Configurations: defaults (the paper's DFT; equal to TRL's `loss_type="dft"`).
    """

    name: ClassVar[str] = "dft"

    def __call__(self, stats: TokenStats) -> Tensor:
        return stats.probability


@dataclass(frozen=True)
class Focal(Gate):
    """`(1 - p)^gamma`: focal loss; likely labels train little, the opposite of `dft`.

    Paper: Focal Loss for Dense Object Detection, arXiv 1708.02002.
    Configurations: defaults (the paper's gamma of 2).
    """

    name: ClassVar[str] = "focal"
    gamma: float = 2.0

    def __post_init__(self) -> None:
        _require(self.gamma >= 0, f"gamma={self.gamma}: must be >= 0.")

    def __call__(self, stats: TokenStats) -> Tensor:
        # 1 - p without cancellation
        return (-(-stats.nll).expm1()) ** self.gamma


@dataclass(frozen=True)
class TALR(Gate):
    """`max(p^(1/tau), floor)`, tau the median over the sequences of their mean cross-entropy: `dft` with an exponent that
    follows the batch, and a floor. Without sequence ids all tokens count as one sequence.

    Paper: SFT Doesn't Always Hurt General Capabilities, arXiv 2509.20758.
    Configurations: defaults (the paper's formula, floor 0.01; no official code was found).
    """

    name: ClassVar[str] = "talr"
    row_local: ClassVar[bool] = False
    floor: float = 0.01

    def __post_init__(self) -> None:
        _require_fraction("floor", self.floor)

    def __call__(self, stats: TokenStats) -> Tensor:
        if stats.sequence is None:
            tau = stats.nll.mean()
        else:
            _, inverse, counts = stats.sequence.unique(return_inverse=True, return_counts=True)
            sums = stats.nll.new_zeros(counts.shape)
            tau = (sums.index_add_(0, inverse, stats.nll) / counts).median()
        # all tokens certain and right: 0 / tau must stay 0
        tau = tau.clamp_min(_TINY)
        return (-stats.nll / tau).exp().clamp_min(self.floor)


@dataclass(frozen=True)
class MiLe(Gate):
    """`(1 + H)^gamma / its mean` over the tokens of the call: hard tokens train more; weights above 1 occur.

    Paper: MiLe Loss, arXiv 2310.19531.
    Configurations: defaults (the published code, gamma 1).
    """

    name: ClassVar[str] = "mile"
    row_local: ClassVar[bool] = False
    gamma: float = 1.0

    def __call__(self, stats: TokenStats) -> Tensor:
        weight = (1 + stats.entropy) ** self.gamma
        return weight / weight.mean()


@dataclass(frozen=True)
class ProFit(Gate):
    """`1[p > threshold]`, or `1[p <= threshold]` with `keep="lower"`: only tokens whose label is likely enough train.

    Paper: ProFit, arXiv 2601.09195.
    Configurations: defaults (the paper's threshold of 0.1); keep="lower" (the other tokens, as a control).
    """

    name: ClassVar[str] = "profit"
    closes: ClassVar[bool] = True
    threshold: float = 0.1
    keep: str = "higher"

    def __post_init__(self) -> None:
        _require_fraction("threshold", self.threshold)
        _require(self.keep in ("higher", "lower"), f"keep={self.keep!r}: must be 'higher' or 'lower'.")

    def __call__(self, stats: TokenStats) -> Tensor:
        higher = stats.probability > self.threshold
        return (higher if self.keep == "higher" else ~higher).to(stats.nll.dtype)


@dataclass(frozen=True)
class Constant(Gate):
    """`weight`, the same for every token: the scale-matched control. With the mean gate of an EAFT run it separates
    which tokens train from how much they train; `eaftdrope compare` sets it to that of the `eaft` arm.

    Paper: none, a control. Configurations: weight=0.43 (beside an EAFT run whose mean gate is 0.43).
    """

    name: ClassVar[str] = "constant"
    weight: float = 1.0

    def __post_init__(self) -> None:
        _require(self.weight >= 0, f"weight={self.weight}: must be >= 0.")

    def __call__(self, stats: TokenStats) -> Tensor:
        return stats.nll.new_full(stats.nll.shape, self.weight)


@dataclass(frozen=True)
class NoGate(Gate):
    """`1`: plain fine-tuning, with the memory and speed of the fused loss.

    Paper: none. Configurations: defaults (plain cross-entropy).
    """

    name: ClassVar[str] = "none"

    def __call__(self, stats: TokenStats) -> Tensor:
        return stats.nll.new_ones(stats.nll.shape)


@dataclass(frozen=True)
class Custom(Gate):
    """A function of [`TokenStats`] as a gate. Set `row_local=True` if a token's weight depends only on that token (no mean,
    no quantile): the operator then never projects a row twice."""

    name: ClassVar[str] = "custom"
    closes: ClassVar[bool] = True
    function: Callable[[TokenStats], Tensor]
    topk: int | None = field(default=20, kw_only=True)  # pyrefly: ignore[bad-override]  # per gate, not per class
    row_local: bool = field(default=False, kw_only=True)  # pyrefly: ignore[bad-override]

    def __call__(self, stats: TokenStats) -> Tensor:
        return self.function(stats)

    @property
    def formula(self) -> str:
        return f"custom({getattr(self.function, '__qualname__', type(self.function).__name__)})"


GateLike: TypeAlias = "str | Gate | Callable[[TokenStats], Tensor]"

_PUBLISHED = (EAFT, EAFTVocab, EAFTExact, EAFTSigmoid, EAFTMask, ConflictMask, DFT, Focal, TALR, MiLe, ProFit)

GATES: dict[str, type[Gate]] = {gate.name: gate for gate in (*_PUBLISHED, Constant, NoGate)}

GATE_OPTIONS: dict[str, dict[str, object]] = {
    name: {option.name: option.default for option in fields(gate)} for name, gate in GATES.items()
}
"""The options of each named gate, with their defaults."""

ALL_GATE_OPTIONS: tuple[str, ...] = tuple(dict.fromkeys(option for table in GATE_OPTIONS.values() for option in table))


def resolve_gate(gate: GateLike, **options: object) -> Gate:
    """Return the [`Gate`] for a name with its options, a gate object, or a function of [`TokenStats`].

    Raises:
        ValueError: an unknown name or option (with the nearest one that exists), or an option out of range.
    """
    if isinstance(gate, str):
        if gate not in GATES:
            raise ValueError(f"unknown gate {gate!r}.{nearest(gate, GATES)} Gates: {', '.join(GATES)}.")
        known = GATE_OPTIONS[gate]
        for name in options:
            if name not in known:
                listed = ", ".join(known) or "none"
                raise ValueError(f"gate {gate!r} has no option {name!r}.{nearest(name, known)} Its options: {listed}.")
        return GATES[gate](**options)
    if options:
        raise ValueError(f"options {sorted(options)} belong to a gate given by name; set them on the gate object.")
    if isinstance(gate, Gate):
        return gate
    if callable(gate):
        return Custom(gate)
    raise ValueError(f"gate must be a name, a Gate or a function of TokenStats, got {type(gate).__name__}.")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_fraction(name: str, value: float) -> None:
    _require(0 <= value <= 1, f"{name}={value}: must be between 0 and 1.")


def nearest(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean ...?" with the known word nearest to a mistyped one, or "" if none is near."""
    match = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {match[0]!r}?" if match else ""
