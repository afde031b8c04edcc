"""The base model of an anchor as the operator reads it: hidden states and a head, so that its logits exist one tile at a
time, like the model's own.

Legend: N rows, D hidden size of the base model (which may differ from the model's), V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from .backends.tile import LogitsTransform


@dataclass(frozen=True)
class BaseLogits:
    """Logits `softcap(logit_scale * (hidden @ weight.T + bias))` of the base model, of the rows of a call. They are
    constants: no gradient reaches them.

    Args:
        hidden (`Tensor` `[..., D]`): last hidden states, one per label; computed beside the model, or stored before.
        weight (`Tensor` `[V, D]`): the base model's head.
        bias (`Tensor` `[V]`, *optional*): its bias.
        logit_scale (`float`, *optional*, defaults to 1.0), softcap (`float`, *optional*): as in [`fused_linear_eaft`].
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def transform(self) -> LogitsTransform:
        return LogitsTransform(self.logit_scale, self.softcap)

    def like(self, hidden_ND: Tensor, weight_VD: Tensor, labels: Tensor) -> BaseLogits:
        """Return the rows `[N, D]` in the dtype of the model's hidden states, detached.

        Raises:
            ValueError: shapes or devices that do not match the model's.
        """
        if tuple(self.hidden.shape[:-1]) != tuple(labels.shape):
            raise ValueError(
                f"base: hidden states of shape {tuple(self.hidden.shape)} for labels of shape {tuple(labels.shape)}: "
                "expected one hidden state per label."
            )
        if self.weight.dim() != 2 or self.weight.shape[1] != self.hidden.shape[-1]:
            raise ValueError(
                f"base: weight of shape {tuple(self.weight.shape)} does not project hidden states of size "
                f"{self.hidden.shape[-1]}. A weight of size 0 is sharded (ZeRO-3): gather it first."
            )
        if self.weight.shape[0] != weight_VD.shape[0]:
            raise ValueError(
                f"base: a vocabulary of {self.weight.shape[0]} tokens, and the model has {weight_VD.shape[0]}: their "
                "distributions cannot be compared. The base must be the model before training, with the same tokens."
            )
        if self.bias is not None and tuple(self.bias.shape) != (self.weight.shape[0],):
            raise ValueError(f"base: bias of shape {tuple(self.bias.shape)}: expected [{self.weight.shape[0]}].")
        for part in (self.hidden, self.weight, self.bias):
            if part is not None and part.device != hidden_ND.device:
                raise ValueError(f"base: on {part.device}, and the model is on {hidden_ND.device}. Move it there.")
        return replace(self, hidden=self.hidden.detach().reshape(-1, self.hidden.shape[-1]).to(hidden_ND.dtype))
