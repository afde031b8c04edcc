"""The loss in float64 on full logits, and how far a fast path may be from it."""

import torch

from eaftdrope.loss import eaft_loss, fused_linear_eaft


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def run(hidden, weight, labels, *, bias=None, **options):
    """(loss, gradients by hidden, weight and bias) of the fused operator."""
    leaves = [None if t is None else t.clone().requires_grad_() for t in (hidden, weight, bias)]
    loss = fused_linear_eaft(leaves[0], leaves[1], labels, bias=leaves[2], **options)
    loss.backward()
    return loss.detach(), [None if leaf is None else leaf.grad for leaf in leaves]


def definition(hidden, weight, labels, gate, *, bias=None, logit_scale=1.0, softcap=None, num_items=None, **options):
    """(loss, gradients by hidden, weight and bias) of the definition in float64, from the same rounded inputs."""
    leaves = [None if t is None else t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    logits = leaves[0] @ leaves[1].T
    if bias is not None:
        logits = logits + leaves[2]
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = eaft_loss(logits, labels, gate, num_items=num_items, **options)
    loss.backward()
    return loss.detach(), [None if leaf is None else leaf.grad for leaf in leaves]


# settings of the operator that the definition has not
EXECUTION = ("tile_bytes", "recompute", "gate_threshold")


def assert_equal_to_definition(hidden, weight, labels, tolerance, gate="eaft", bias=None, **options):
    loss, gradients = run(hidden, weight, labels, bias=bias, gate=gate, **options)
    options = {name: value for name, value in options.items() if name not in EXECUTION}
    expected, expected_gradients = definition(hidden, weight, labels, gate, bias=bias, **options)
    errors = {"loss": relative_error(loss, expected)}
    for name, actual, wanted in zip(("hidden", "weight", "bias"), gradients, expected_gradients, strict=True):
        if wanted is not None:
            errors[name] = relative_error(actual, wanted)
    assert max(errors.values()) <= tolerance, errors


def make_inputs(rows, vocab, hidden_size=24, dtype=torch.float32, *, ignored=0.3, bias=False, spread=2.0, seed=0):
    """Rows whose logits have a standard deviation of about `spread`; some labels are likely, some are not."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, hidden_size, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, hidden_size, generator=generator, dtype=torch.float64) * spread / hidden_size**0.5
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    likely = torch.rand(rows, generator=generator) < 0.5
    labels[likely] = (hidden @ weight.T).argmax(-1)[likely]
    labels[torch.rand(rows, generator=generator) < ignored] = -100
    offset = torch.randn(vocab, generator=generator, dtype=torch.float64) if bias else None
    return hidden.to(dtype), weight.to(dtype), labels, None if offset is None else offset.to(dtype)
