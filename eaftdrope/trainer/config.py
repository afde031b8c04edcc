"""`EAFTConfig`: TRL's `SFTConfig` with a gate."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl import SFTConfig

from eaftdrope.errors import UserError
from eaftdrope.loss.anchor import resolve_anchor
from eaftdrope.loss.gates import resolve_gate
from eaftdrope.loss.settings import LossSettings


@dataclass
class EAFTConfig(SFTConfig):
    r"""
    Configuration of [`EAFTTrainer`]: every argument of [`~trl.SFTConfig`], and these.

    Parameters:
        gate (`str`, *optional*, defaults to `"eaft"`):
            Name of the gate, one of `eaft`, `eaft-vocab`, `eaft-exact`, `eaft-sigmoid`, `eaft-mask`, `conflict-mask`,
            `dft`, `focal`, `talr`, `mile`, `profit`, `constant` and `none` (plain cross-entropy on the same kernel).
        gate_kwargs (`dict` or `str`, *optional*):
            Options of the gate, e.g. `{"alpha": 0.5, "k": 20, "divisor": 3.0}` for `eaft`.
        loss_backend (`str`, *optional*, defaults to `"auto"`):
            Backend of the fused operator: `"auto"`, `"cpu"`, `"triton"`, `"cuda"` or `"torch"`.
        loss_tile_bytes (`int`, *optional*):
            Memory of one tile of logits in bytes; defaults to 160 MiB on a CPU, 512 MiB elsewhere, more for
            vocabularies above 160,000 tokens.
        loss_tail (`str`, *optional*, defaults to `"exact"`):
            `"sparse"` forms the gradients from the columns of the vocabulary that matter.
        loss_tail_threshold (`float`, *optional*, defaults to 2^-12):
            Gradients with respect to a logit, gate included, that `"sparse"` drops.
        loss_gate_threshold (`float`, *optional*, defaults to 0.0):
            Tokens whose gate is smaller take no part in the gradient; logged as `eaft/closed_share`.
        loss_recompute (`bool`, *optional*, defaults to `False`):
            Recompute the logits for the backward pass: a third more work, less memory.
        loss_exempt (`list[str]`, *optional*):
            Strings whose tokens keep a gate of 1, such as names that the base model does not have and the stop token:
            `["llm_query", "<|im_end|>"]`. They are found in the decoded rows, with or without a space before them.
        anchor (`dict` or `str`, *optional*):
            Divergence from the base model, added to the loss of every trained token: `{"kl": 0.1, "direction": "forward",
            "mask_target": True}` (see [`~eaftdrope.loss.Anchor`]). The base is the model with its adapters off, or the
            trainer's `base_model`. Logged as `eaft/anchor_kl`, the mean per token in nats.

    Raises:
        UserError: options that are incompatible with the gated loss (`label_smoothing_factor`, `loss_type="dft"`,
            Liger's fused cross-entropy).
        ValueError: an unknown gate, gate option, backend, tail or option of the anchor.
    """

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "gate_kwargs", "anchor"]

    gate: str = field(default="eaft", metadata={"help": "Gate that weights each token's cross-entropy."})
    gate_kwargs: dict[str, Any] | str | None = field(default=None, metadata={"help": "Options of the gate."})
    loss_backend: str = field(default="auto", metadata={"help": "Backend of the fused operator."})
    loss_tile_bytes: int | None = field(default=None, metadata={"help": "Memory of one tile of logits, in bytes."})
    loss_tail: str = field(
        default="exact", metadata={"help": "exact, or sparse: gradients of the columns that matter."}
    )
    loss_tail_threshold: float = field(
        default=LossSettings.tail_threshold, metadata={"help": "Gradients that a sparse tail drops."}
    )
    loss_gate_threshold: float = field(default=0.0, metadata={"help": "Smallest gate that reaches the gradient."})
    loss_recompute: bool = field(default=False, metadata={"help": "Recompute the logits for the backward pass."})
    loss_exempt: list[str] | None = field(default=None, metadata={"help": "Strings whose tokens keep a gate of 1."})
    anchor: dict[str, Any] | str | None = field(default=None, metadata={"help": "Divergence from the base model."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.loss_settings()
        self._check_exempt()
        if self.label_smoothing_factor:
            if self.gate == "none":
                raise UserError(
                    f"label_smoothing_factor={self.label_smoothing_factor} is not supported: smoothing needs the logits of "
                    "every token, which the fused loss does not build. Set it to 0, or use TRL's SFTTrainer for plain "
                    "cross-entropy with smoothing."
                )
            raise UserError(
                f"label_smoothing_factor={self.label_smoothing_factor} is not supported with a gate: smoothing pulls towards "
                "every token, which is the pull the gate switches off. Set it to 0."
            )
        if self.loss_type == "dft":
            raise UserError("loss_type='dft' is a gate here: leave loss_type alone and set gate='dft'.")
        if self.use_liger_kernel and (self.liger_kernel_config or {}).get("fused_linear_cross_entropy"):
            raise UserError(
                "Liger's fused_linear_cross_entropy would replace the gated loss by plain cross-entropy. Set "
                "liger_kernel_config={'fused_linear_cross_entropy': False}; its other kernels stay."
            )

    def _check_exempt(self) -> None:
        if not all(isinstance(string, str) and string for string in self.loss_exempt or []):
            raise UserError(f"loss_exempt={self.loss_exempt!r}: expected strings that are not empty.")
        # TRL also declares a string, which it never is here
        options = self.dataset_kwargs if isinstance(self.dataset_kwargs, dict) else {}
        if self.loss_exempt and options.get("skip_prepare_dataset"):
            raise UserError(
                "loss_exempt is applied when the trainer prepares the rows, and dataset_kwargs skips that. Bring rows with a "
                "column token_weights: -1 for an exempt token, 1 for any other."
            )

    def loss_settings(self) -> LossSettings:
        """Return the settings of the fused operator.

        Raises:
            ValueError: an unknown gate, gate option, backend, tail or option of the anchor, or a value out of range.
        """
        # a JSON string was parsed by TrainingArguments
        assert not isinstance(self.gate_kwargs, str) and not isinstance(self.anchor, str)
        names = ("backend", "tile_bytes", "tail", "tail_threshold", "gate_threshold", "recompute")
        options = {name: getattr(self, f"loss_{name}") for name in names}
        gate, anchor = resolve_gate(self.gate, **(self.gate_kwargs or {})), resolve_anchor(self.anchor)
        return LossSettings(gate, **options, anchor=anchor)
