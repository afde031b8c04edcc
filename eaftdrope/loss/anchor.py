"""The anchor: a divergence from the base model, added to the gated loss of every trained token.

    q_t, p_t     base and model over the vocabulary; with `mask_target` without the label y_t, both renormalised
    forward      D_t = KL(q_t || p_t) = sum_v q_t[v] (log q_t[v] - log p_t[v])     the base comes first
    reverse      D_t = KL(p_t || q_t) = sum_v p_t[v] (log p_t[v] - log q_t[v])     the model comes first
    loss         sum_t (w_t nll_t + kl D_t) / num_items

The gate does not weight the anchor: a token whose label is not trained is the one to be kept as the base has it. The base
is a constant. `definition.anchor_divergence` is the formula in code, against which every backend is tested.

Like the gates, this module loads without torch, as recipes read names and defaults here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from .gates import nearest

DIRECTIONS = ("forward", "reverse")


@dataclass(frozen=True)
class Anchor:
    """Weight and kind of the divergence.

    Args:
        kl (`float`, *optional*, defaults to 0.1):
            Factor on the divergence, which is in nats.
        direction (`str`, *optional*, defaults to `"forward"`):
            `"forward"` is KL(base || model), `"reverse"` is KL(model || base).
        mask_target (`bool`, *optional*, defaults to `False`):
            Leave the label out of both distributions and renormalise them.

    Raises:
        ValueError: a factor that is not above 0, an unknown direction.
    """

    kl: float = 0.1
    direction: str = "forward"
    mask_target: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.kl < float("inf"):
            raise ValueError(f"anchor: kl={self.kl} must be above 0; for no anchor leave it out.")
        if self.direction not in DIRECTIONS:
            hint = nearest(self.direction, DIRECTIONS)
            raise ValueError(
                f"anchor: unknown direction {self.direction!r}.{hint} forward is KL(base || model), reverse is "
                "KL(model || base)."
            )

    @property
    def formula(self) -> str:
        """The anchor in one line, for logs and model cards."""
        first, second = ("base", "model") if self.direction == "forward" else ("model", "base")
        masked = ", without the label" if self.mask_target else ""
        return f"{self.kl:g} KL({first} || {second}){masked}"


@dataclass(frozen=True)
class Preset:
    """A published loss as a gate and an anchor.

    Args:
        gate: name of the gate, with its defaults.
        anchor ([`Anchor`]): the anchor.
        paper: where it is from, and where these values are from.
    """

    gate: str
    anchor: Anchor
    paper: str = field(compare=False)


PRESETS = {
    "sft-kl": Preset(
        "none",
        Anchor(kl=0.5, direction="reverse"),
        "plain fine-tuning with a KL penalty: the SFT-KL baseline of arXiv 2601.02151 (weight 0.5)",
    ),
    "asft": Preset(
        "dft",
        Anchor(kl=0.1, direction="forward"),
        "Anchored Supervised Fine-Tuning, arXiv 2509.23753: DFT and a KL penalty of 0.05 to 0.1 (0.1 in its code and in "
        "LLaMA-Factory's `use_asft_loss`, which put the base first)",
    ),
    "mask-target": Preset(
        "none",
        Anchor(kl=0.1, direction="forward", mask_target=True),
        "Mask the Target, arXiv 2605.29498: KL over the vocabulary without the label (weight and direction are this "
        "package's: the abstract states neither)",
    ),
}


def resolve_anchor(anchor: Anchor | Mapping[str, object] | None) -> Anchor | None:
    """Return the [`Anchor`] for an anchor, its options as a mapping, or None.

    Raises:
        ValueError: an unknown option (with the nearest one that exists), or a value out of range or of the wrong type.
    """
    if anchor is None or isinstance(anchor, Anchor):
        return anchor
    if not isinstance(anchor, Mapping):
        raise ValueError(f"anchor: expected an Anchor or its options, such as {{'kl': 0.1}}, got {anchor!r}.")
    types = {"kl": (int, float), "direction": str, "mask_target": bool}
    for name, value in anchor.items():
        if name not in types:
            known = ", ".join(option.name for option in fields(Anchor))
            raise ValueError(f"anchor: no option {name!r}.{nearest(name, types)} Its options: {known}.")
        if not isinstance(value, types[name]) or (name == "kl" and isinstance(value, bool)):
            raise ValueError(f"anchor: {name}={value!r} is of the wrong type ({type(value).__name__}).")
    return Anchor(**anchor)  # pyrefly: ignore[bad-argument-type]  # checked above
