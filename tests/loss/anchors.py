"""Models and their bases for the anchor, and its float64 truth."""

import torch

from eaftdrope.loss import Anchor, BaseLogits, eaft_loss, fused_linear_eaft
from tests.loss.reference import EXECUTION, make_inputs, relative_error

ANCHORS = [
    Anchor(kl=0.1),
    Anchor(kl=0.5, direction="reverse"),
    Anchor(kl=2.0, mask_target=True),
    Anchor(kl=0.3, direction="reverse", mask_target=True),
]


def anchor_id(anchor: Anchor) -> str:
    return anchor.direction + ("-masked" if anchor.mask_target else "")


def make_base(rows, vocab, hidden_size=24, dtype=torch.float32, *, bias=False, spread=2.0, seed=7, **transform):
    """A base model with other hidden states and another head than `make_inputs`; its hidden size may differ."""
    hidden, weight, _, offset = make_inputs(rows, vocab, hidden_size, dtype, bias=bias, spread=spread, seed=seed)
    return BaseLogits(hidden, weight, offset, **transform)


def run_anchored(hidden, weight, labels, *, bias=None, **options):
    """(loss, gradients by hidden, weight and bias, details) of the fused operator."""
    leaves = [None if t is None else t.clone().requires_grad_() for t in (hidden, weight, bias)]
    loss, details = fused_linear_eaft(*leaves[:2], labels, bias=leaves[2], return_details=True, **options)
    loss.backward()
    return loss.detach(), [None if leaf is None else leaf.grad for leaf in leaves], details


def base_logits(base: BaseLogits) -> torch.Tensor:
    """The base model's logits in float64."""
    logits = base.hidden.double() @ base.weight.double().T
    return base.transform.apply(logits if base.bias is None else logits + base.bias.double())


def anchored_definition(
    hidden, weight, labels, gate, anchor, base, *, bias=None, logit_scale=1.0, softcap=None, **options
):
    """(loss, gradients by hidden, weight and bias) of the definition in float64, by autograd on full logits."""
    leaves = [None if t is None else t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    logits = leaves[0] @ leaves[1].T
    logits = (logits if bias is None else logits + leaves[2]) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = eaft_loss(logits, labels, gate, anchor=anchor, base_logits=base_logits(base), **options)
    loss.backward()
    return loss.detach(), [None if leaf is None else leaf.grad for leaf in leaves]


def assert_anchored(hidden, weight, labels, tolerance, anchor, base, gate="eaft", bias=None, **options):
    loss, gradients, _ = run_anchored(hidden, weight, labels, bias=bias, gate=gate, anchor=anchor, base=base, **options)
    options = {name: value for name, value in options.items() if name not in (*EXECUTION, "backend")}
    expected, wanted = anchored_definition(hidden, weight, labels, gate, anchor, base, bias=bias, **options)
    errors = {"loss": relative_error(loss, expected)}
    for name, actual, truth in zip(("hidden", "weight", "bias"), gradients, wanted, strict=True):
        if truth is not None:
            errors[name] = relative_error(actual, truth)
    assert max(errors.values()) <= tolerance, errors
