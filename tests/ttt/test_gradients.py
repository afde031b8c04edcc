"""The gradient through the updates: finite differences and the definition, in float64."""

import itertools

import pytest
import torch

from tests.ttt.definition import read_row
from tests.ttt.tiny import (
    CHUNK,
    WINDOWS,
    assert_same_gradients,
    gradients,
    nll_of,
    random_ids,
    tiny,
)

# a part of the model -> the parameters whose names contain one of these
PARTS = {
    "primes": ("ttt.primes.0.down", "ttt.primes.0.up", "ttt.primes.1.gate"),
    "norms": ("norm",),
    "attention": ("self_attn.",),
    "MLPs": (".mlp.",),
    "embeddings": ("embed_tokens",),
    "head": ("lm_head",),
}
# largest |error| of a four-point difference, relative to the derivative
RELATIVE = 2e-8


def loss_of(model, ids):
    return nll_of(model(ids).logits, ids).mean()


def derivatives(model, ids, part, step=5e-5):
    """The derivative along a random direction of a part's parameters: by the gradient, and by four-point differences."""
    chosen = [p for name, p in model.named_parameters() if any(piece in name for piece in PARTS[part])]
    assert chosen
    torch.manual_seed(3)
    directions = [torch.randn_like(parameter) for parameter in chosen]
    model.zero_grad()
    loss_of(model, ids).backward()
    by_gradient = sum((p.grad * d).sum().item() for p, d in zip(chosen, directions))
    start, values = [p.detach().clone() for p in chosen], {}
    with torch.no_grad():
        for factor in (-2, -1, 1, 2):
            for parameter, old, direction in zip(chosen, start, directions):
                parameter.copy_(old + factor * step * direction)
            values[factor] = loss_of(model, ids).item()
        for parameter, old in zip(chosen, start):
            parameter.copy_(old)
    return by_gradient, (8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * step)


# (window, kind, layout, chunks read, clip): a gradient norm of 1.0 is clipped at .05 and not at 1000
CASES = [
    ("sink", "qwen3", "prime", 3, 0.05),
    ("sink", "llama", "prime", 2, 1000.0),
    ("stock", "qwen3", "prime", 3, 1000.0),
    ("stock", "llama", "prime", 2, 0.05),
    ("sink", "qwen3", "in_place", 3, 0.05),
    ("stock", "llama", "in_place", 2, 1000.0),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_finite_differences_over_two_and_three_chunks(case):
    window, kind, layout, chunks, clip = case
    # a rate at which the updates matter whether or not they are clipped
    model = WINDOWS[window](kind, layout=layout, clip=clip, lr=1.0 if clip < 1 else 0.2)
    # the last chunk has one token: the loss of the token after it is the only one that the last update changes
    ids = random_ids(length=CHUNK * chunks + 2)
    for part in PARTS:
        if part == "primes" and layout == "in_place":
            continue
        by_gradient, by_difference = derivatives(model, ids, part)
        assert abs(by_gradient - by_difference) <= RELATIVE * abs(by_difference), part


@pytest.mark.parametrize("layout", ["prime", "in_place"])
@pytest.mark.parametrize("clip", [0.05, 1000.0])
def test_the_gradient_of_every_parameter_is_that_of_the_definition(layout, clip):
    model = tiny(layout=layout, clip=clip, lr=1.0 if clip < 1 else 0.2)
    ids = random_ids(1)
    actual = gradients(model, loss_of(model, ids))
    logits, _ = read_row(model, ids[0])
    assert_same_gradients(actual, gradients(model, nll_of(logits[None], ids).mean()), 1e-11)


def test_every_parameter_has_a_gradient():
    model = tiny()
    found = gradients(model, loss_of(model, random_ids()))
    missing = [name for name, _ in model.named_parameters() if name not in found or not found[name].any()]
    assert missing == []


@pytest.mark.parametrize("layout", ["prime", "in_place"])
@pytest.mark.parametrize("window", WINDOWS)
def test_first_order_is_the_gradient_with_the_updates_frozen(layout, window):
    ids = random_ids(1)
    model = WINDOWS[window](layout=layout, horizon=1)
    actual = gradients(model, loss_of(model, ids))
    _, deltas = read_row(model, ids[0])
    constants = [[step.detach() for step in delta] for delta in deltas]
    logits, _ = read_row(model, ids[0], frozen=constants)
    assert_same_gradients(actual, gradients(model, nll_of(logits[None], ids).mean()), 1e-11)


@pytest.mark.parametrize(("window", "layout"), [("sink", "prime"), ("stock", "in_place")])
@pytest.mark.parametrize("horizon", [1, 2, None])
def test_checkpointing_through_time_changes_no_gradient(horizon, layout, window):
    """No bit in first order; in second order a parameter's terms are added chunk by chunk, and sums round differently."""
    ids = random_ids()
    plain, checkpointed = (WINDOWS[window](layout=layout, horizon=horizon, checkpoint=flag) for flag in (False, True))
    expected = gradients(plain, loss_of(plain, ids))
    found = gradients(checkpointed, loss_of(checkpointed, ids))
    assert_same_gradients(found, expected, 0 if horizon == 1 else 1e-14)


def test_a_horizon_of_all_chunks_is_no_horizon_bit_for_bit():
    ids = random_ids()
    found = {}
    for horizon in (None, 5, 9, 1, 2):
        model = tiny(horizon=horizon)
        found[horizon] = gradients(model, loss_of(model, ids))
    for horizon in (5, 9):
        assert_same_gradients(found[horizon], found[None], 0)
    flat = {horizon: torch.cat([g.flatten() for g in found[horizon].values()]) for horizon in found}
    for one, other in itertools.combinations((1, 2, None), 2):
        assert not torch.equal(flat[one], flat[other])
    # a shorter horizon is an approximation of a longer one
    cosine = {h: torch.cosine_similarity(flat[h], flat[None], dim=0).item() for h in (1, 2)}
    assert 0.5 < cosine[1] < cosine[2] < 1


def test_no_loss_depends_on_the_horizon():
    ids = random_ids()
    values = [loss_of(tiny(horizon=horizon), ids).item() for horizon in (1, 2, None)]
    assert values[0] == values[1] == pytest.approx(values[2], rel=1e-13)


def test_accumulated_gradients_are_those_of_the_sum():
    model, ids = tiny(horizon=1), random_ids()
    model.zero_grad()
    for row in ids[:, None]:
        (loss_of(model, row) / 2).backward()
    accumulated = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert_same_gradients(accumulated, gradients(model, loss_of(model, ids)), 1e-11)
