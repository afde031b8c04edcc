"""The losses of other projects, each by the call that its users make; hidden `[N, D]`, weight `[V, D]`, labels `[N]`.

- `methods` states whether a loss is gated or plain.
- The three on full logits are written from their formulas, as in the training loop of a framework.
- All divide by the number of labels that are not ignored.

Legend: N tokens, D hidden size, V vocabulary, T trained rows.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

TOP_K = 20


def full_logits_eaft(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    """As LLaMA-Factory's `eaft_loss_func`: float32 logits of all positions, top-20 entropy of the trained ones. (It
    divides by 3.0; ln 20 = 2.9957 here, so that the value can be compared.)"""
    logits_NV = F.linear(hidden_ND, weight_VD).float()
    nll_N = F.cross_entropy(logits_NV, labels_N, ignore_index=-100, reduction="none")
    trained_N = labels_N != -100
    with torch.no_grad():
        top_TK = logits_NV[trained_N].topk(TOP_K, dim=-1).values
        log_probs_TK = top_TK - top_TK.logsumexp(-1, keepdim=True)
        entropy_T = -(log_probs_TK.exp() * log_probs_TK).sum(-1)
    return (nll_N[trained_N] * (entropy_T / math.log(TOP_K))).sum() / trained_N.sum()


def full_logits_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    """As transformers' `ForCausalLMLoss`: float32 logits, then `F.cross_entropy`."""
    return F.cross_entropy(F.linear(hidden_ND, weight_VD).float(), labels_N)


class _HeadOnly(torch.nn.Module):
    """A model for TRL's fused head, whose backbone returns the hidden states that it receives."""

    def __init__(self, weight_VD: Tensor):
        super().__init__()
        from transformers import PretrainedConfig

        self.config = PretrainedConfig()
        self._head = SimpleNamespace(weight=weight_VD, bias=None)

    def forward(self, hidden=None):
        raise AssertionError("only the fused head is called")

    @staticmethod
    def base_model(hidden, use_cache):
        return SimpleNamespace(last_hidden_state=hidden)

    def get_output_embeddings(self):
        return self._head


def trl_fused_head(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    """The loss of TRL's SFTTrainer, with the gate in the place of its line for DFT."""
    from trl.trainer.utils import add_fused_lm_head

    model = _HeadOnly(weight_VD)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    outputs = model(hidden=hidden_ND[None], shift_labels=labels_N[None], fused_lm_head=True)
    per_token_loss = -outputs.log_probs * (outputs.entropy.detach() / math.log(TOP_K)).clamp(0, 1)
    return per_token_loss.sum() / outputs.label_mask.sum().clamp(min=1)


def liger_fused_linear(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight_VD, hidden_ND, labels_N)


def liger_scaled(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    """Return per-token loss and entropy from one call; the entropy has the dtype of the hidden states."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    nll_N, entropy_N = LigerFusedLinearScaledCrossEntropyFunction.apply(
        hidden_ND, weight_VD, labels_N, 1.0, -100, 1, True
    )
    weight_N = (entropy_N.detach().float() / math.log(TOP_K)).clamp(0, 1)
    return (nll_N * weight_N).sum() / (labels_N != -100).sum()


def cut_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    """Use its Triton kernels on a device, and its compiled full-logits form on a CPU, where the kernels cannot run."""
    from cut_cross_entropy import linear_cross_entropy

    impl = "torch_compile" if hidden_ND.device.type == "cpu" else "cce"
    return linear_cross_entropy(hidden_ND, weight_VD, labels_N, impl=impl)


def torch_linear_default(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    return F.linear_cross_entropy(hidden_ND, weight_VD, labels_N, options=torch.nn.LinearCrossEntropyOptions())


def torch_linear_tuned(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    """Use the fastest known options. On a CPU in bfloat16 they also sum the loss in bfloat16."""
    if hidden_ND.device.type != "cpu":
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=2048)
    elif hidden_ND.dtype == torch.bfloat16:
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=256, acc_policy="accurate")
    else:
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=256, acc_policy="compact")
    return F.linear_cross_entropy(hidden_ND, weight_VD, labels_N, options=options)
