"""`EAFTConfig`: TRL's `SFTConfig` with a gate."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl import SFTConfig

from ..errors import UserError
from ..loss.backends import select_backend
from ..loss.gates import resolve_gate


@dataclass
class EAFTConfig(SFTConfig):
    r"""
    Configuration of [`EAFTTrainer`]. Everything of [`~trl.SFTConfig`] applies; below is what is added.

    Parameters:
        gate (`str`, *optional*, defaults to `"eaft"`):
            Name of the gate, one of `eaft`, `eaft-vocab`, `eaft-exact`, `eaft-sigmoid`, `eaft-mask`, `conflict-mask`,
            `dft`, `focal`, `talr`, `mile`, `profit`, `constant` and `none` (plain cross-entropy on the same kernel).
        gate_kwargs (`dict` or `str`, *optional*):
            Options of the gate, e.g. `{"alpha": 0.5, "k": 20, "divisor": 3.0}` for `eaft`.
        loss_backend (`str`, *optional*, defaults to `"auto"`):
            Backend of the fused operator: `"auto"` or `"torch"`.
        loss_tile_bytes (`int`, *optional*):
            Memory of one tile of logits in bytes; defaults to 160 MiB on a CPU, 512 MiB elsewhere.

    Raises:
        UserError: options that exclude each other (`label_smoothing_factor`, `loss_type="dft"`, Liger's fused
            cross-entropy), before anything is loaded.
        ValueError: an unknown gate, gate option or backend.
    """

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "gate_kwargs"]

    gate: str = field(default="eaft", metadata={"help": "Gate that weights each token's cross-entropy."})
    gate_kwargs: dict[str, Any] | str | None = field(default=None, metadata={"help": "Options of the gate."})
    loss_backend: str = field(default="auto", metadata={"help": "Backend of the fused operator: auto or torch."})
    loss_tile_bytes: int | None = field(default=None, metadata={"help": "Memory of one tile of logits, in bytes."})

    def __post_init__(self):
        super().__post_init__()
        resolve_gate(self.gate, **(self.gate_kwargs or {}))
        select_backend(self.loss_backend)
        if self.label_smoothing_factor:
            raise UserError(
                f"label_smoothing_factor={self.label_smoothing_factor} can not be combined with a gate: smoothing pulls "
                "towards every token, which is the pull the gate switches off. Set it to 0."
            )
        if self.loss_type == "dft":
            raise UserError("loss_type='dft' is a gate here: leave loss_type alone and set gate='dft'.")
        if self.use_liger_kernel and (self.liger_kernel_config or {}).get("fused_linear_cross_entropy"):
            raise UserError(
                "Liger's fused_linear_cross_entropy would replace the gated loss by plain cross-entropy. Set "
                "liger_kernel_config={'fused_linear_cross_entropy': False}; its other kernels stay."
            )
