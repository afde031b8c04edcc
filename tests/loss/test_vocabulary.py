"""A head sharded by vocabulary: the merge of its parts, and the loss over processes, against the whole head in float64."""

import math

import pytest
import torch

from eaftdrope.loss import Anchor, VocabularyShard, anchor_divergence, token_statistics
from eaftdrope.loss.backends import load_backend
from eaftdrope.loss.backends.tile import PLAIN, BaseTile, LogitsTransform
from eaftdrope.loss.vocabulary import merge_statistics, shard_statistics
from tests.loss.tile_cases import check_statistics, tile_cases
from tests.trainer.processes import run_ranks

TORCH, CPU = load_backend("torch"), load_backend("cpu")
INF = float("inf")


def merged(backend, sizes, logits, labels, transform, topk, base=None):
    """The statistics of whole rows from those of shards of the given sizes."""
    parts, start = [], 0
    for size in sizes:
        columns = slice(start, start + size)
        of_base = base and BaseTile(base.logits[:, columns], base.transform, base.forward, base.mask_target)
        parts.append(shard_statistics(backend, logits[:, columns], labels - start, transform, topk, of_base))
        start += size
    assert start == logits.shape[1]
    return merge_statistics(torch.stack(parts), topk, start, base and base.forward)


def thirds(vocab):
    """Three shards of different sizes, the last of one token."""
    first = max(1, (vocab - 1) // 3)
    return [first, vocab - 1 - first, 1] if vocab > 2 else [1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", [TORCH, CPU], ids=["torch", "cpu"])
def test_every_tile_in_shards(backend, dtype):
    for case in tile_cases(dtype):
        if case.logits.shape[1] > 5000:
            continue
        sizes = thirds(case.logits.shape[1])
        check_statistics(lambda *tile, sizes=sizes: merged(backend, sizes, *tile), case)


def rows_of(vocab=12, masked=()):
    """Float64 logits with a row for each label, a row of ties, and columns of -inf."""
    z = 3 * torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z[1] = 0.5
    # the favourite is 40 nats ahead, in the first shard and in the last
    z[2, 0], z[3, vocab - 1] = 40, 40
    z[:, list(masked)] = -INF
    return z, torch.arange(vocab)


# a label at both sides of every boundary, also impossible ones; shards that are -inf throughout; K above the size of a shard
@pytest.mark.parametrize("sizes", [(12,), (6, 6), (5, 5, 2), (1, 10, 1), (4, 4, 4)], ids=str)
@pytest.mark.parametrize("masked", [(), (0,), (5, 6), (8, 9, 10, 11), tuple(range(10))], ids=str)
@pytest.mark.parametrize("transform", [PLAIN, LogitsTransform(0.7, 5.0), LogitsTransform(-1.5)], ids=str)
def test_the_merge_in_float64(sizes, masked, transform):
    raw, labels = rows_of(masked=masked)
    if transform != PLAIN:
        # a softcap maps -inf to a finite logit, a negative scale to +inf
        raw = raw.nan_to_num(neginf=-20)
    for topk in (None, 2, 5, 20):
        found = merged(TORCH, sizes, raw, labels, transform, topk)
        expected = token_statistics(transform.apply(raw), labels, k=topk)
        for name in ("nll", "entropy", "topk_entropy"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-12, atol=1e-14)
        assert torch.equal(found.correct, expected.correct)
        single = merged(CPU, sizes, raw.float(), labels, transform, topk)
        for name in ("nll", "entropy", "topk_entropy"):
            torch.testing.assert_close(getattr(single, name), _float(getattr(expected, name)), rtol=1e-5, atol=3e-6)
        assert torch.equal(single.correct, expected.correct)
        assert (found.entropy >= 0).all() and (found.nll >= 0).all()


def _float(value):
    return None if value is None else value.float()


def test_a_sure_row_keeps_its_digits():
    """Entropies far below the rounding of 1: the favourite is in the last shard."""
    gap = torch.tensor([[20.0], [60.0], [90.0]], dtype=torch.float64)
    raw = torch.cat([torch.zeros(3, 6, dtype=torch.float64), gap], 1)
    rest = 6 * torch.exp(-gap[:, 0])
    expected = rest.log1p() + rest * gap[:, 0] / (1 + rest)
    for z in (raw, raw.float()):
        found = merged(TORCH, (2, 4, 1), z, torch.full((3,), 6), PLAIN, None)
        torch.testing.assert_close(
            found.entropy.double(), expected, rtol=1e-6 if z.dtype == torch.float32 else 1e-12, atol=0
        )
        assert found.correct.all()


@pytest.mark.parametrize("value", [math.nan, INF])
def test_a_logit_that_is_not_finite_shows_in_every_statistic(value):
    raw, labels = rows_of()
    raw[:, 7] = value
    for found in (merged(TORCH, (5, 5, 2), raw, labels, PLAIN, 3), TORCH.tile_statistics(raw, labels, PLAIN, 3)):
        assert not found.nll.isfinite().any()
        assert found.entropy.isnan().all() and found.topk_entropy.isnan().all()


@pytest.mark.parametrize("forward", [True, False], ids=["forward", "reverse"])
@pytest.mark.parametrize("mask_target", [True, False], ids=["masked", "plain"])
# columns, or a shard, that only the base, only the model, or both exclude
@pytest.mark.parametrize("columns", [slice(6, 7), slice(5, 10)], ids=["column", "shard"])
@pytest.mark.parametrize("excluded", ["none", "both", "base", "model"])
def test_the_anchor_in_shards(forward, mask_target, excluded, columns):
    raw, labels = rows_of()
    labels = labels % 3
    base = raw + torch.randn(raw.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for part, name in ((raw, "model"), (base, "base")):
        if excluded in ("both", name):
            part[:, columns] = -INF
    anchor = Anchor(1.0, "forward" if forward else "reverse", mask_target)
    expected = anchor_divergence(raw, base, labels, anchor)
    assert expected.isinf().all() == ((excluded == "base" and not forward) or (excluded == "model" and forward))
    # with the label masked, the first shards of the last division may hold nothing else
    for sizes in ((6, 6), (5, 5, 2), (1, 1, 10)):
        for backend, tolerance in ((TORCH, 1e-12), (CPU, 1e-5)):
            wide = tolerance == 1e-12
            z, b = (raw, base) if wide else (raw.float(), base.float())
            found = merged(backend, sizes, z, labels, PLAIN, None, BaseTile(b, PLAIN, forward, mask_target))
            torch.testing.assert_close(found.anchor.divergence.double(), expected, rtol=tolerance, atol=tolerance)


def test_shards_are_consecutive_and_not_empty():
    shard = VocabularyShard((4, 4, 2), 2)
    assert (shard.vocab, shard.start, shard.columns) == (10, 8, slice(8, 10))
    with pytest.raises(ValueError, match="4 tokens over 3 ranks leaves rank 2 without a token"):
        VocabularyShard((2, 2, 0), 1)
    with pytest.raises(ValueError, match=r"weight has 3 tokens, and the part of rank 2 has 2 of 10"):
        shard.check_part(torch.zeros(3, 5))


WORKER = """
import sys
import torch
import torch.distributed as dist
from eaftdrope.loss import Anchor, BaseLogits, VocabularyShard, fused_linear_eaft, gates
from tests.forked import end_together
from tests.loss.reference import definition, make_inputs, relative_error

dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
sent = {"gathered": 0, "reduced": 0}
gather, reduce = dist.all_gather, dist.all_reduce

def counted_gather(parts, value, group=None):
    sent["gathered"] += value.nbytes * (ranks - 1)
    return gather(parts, value, group=group)

def counted_reduce(value, group=None):
    sent["reduced"] += value.nbytes
    return reduce(value, group=group)

dist.all_gather, dist.all_reduce = counted_gather, counted_reduce

def same(value):
    found = [torch.empty_like(value) for _ in range(ranks)]
    gather(found, value)
    assert all(torch.equal(found[0], other) for other in found)

def check(vocab, gate, *, rows=40, bias=False, dtype=torch.float64, tolerance=1e-12, anchored=None, weights=False, **how):
    hidden, weight, labels, offset = make_inputs(rows, vocab, dtype=dtype, bias=bias)
    shard = VocabularyShard.chunked(vocab)
    # both sides of each boundary
    edges = [shard.sizes[0] - 1, shard.sizes[0], vocab - 1, 0]
    labels[: len(edges)] = torch.tensor(edges)
    if offset is not None:
        # columns of each shard that the model excludes
        excluded = torch.tensor([1, shard.sizes[0] + 1])
        offset[excluded] = -torch.inf
        labels[torch.isin(labels, excluded)] = 0
    told = {"softcap": how.pop("softcap", None), "logit_scale": how.pop("logit_scale", 1.0)}
    if weights:
        told["token_weights"] = torch.linspace(-1, 1, rows, dtype=torch.float64).round(decimals=1)
    base = None
    if anchored is not None:
        other, head, _, _ = make_inputs(rows, vocab, dtype=dtype, seed=1)
        told["anchor"] = anchored
        base = BaseLogits(other, head[shard.columns])
    leaves = [hidden.clone().requires_grad_(), weight[shard.columns].clone().requires_grad_()]
    own_bias = None if offset is None else offset[shard.columns].clone().requires_grad_()
    sent.update(gathered=0, reduced=0)
    loss, details = fused_linear_eaft(
        *leaves, labels, gate=gate, bias=own_bias, base=base, shard=shard, return_details=True, **told, **how
    )
    counts = dict(sent)
    loss.backward()
    stated = {"base_logits": other.double() @ head.double().T} if anchored is not None else {}
    expected, (dx, dw, db) = definition(hidden, weight, labels, gate, bias=offset, **told, **stated)
    name = (vocab, gate, told, how)
    errors = {
        "loss": relative_error(loss, expected),
        "hidden": relative_error(leaves[0].grad, dx),
        "weight": relative_error(leaves[1].grad, dw[shard.columns]),
    }
    if own_bias is not None:
        errors["bias"] = relative_error(own_bias.grad, db[shard.columns])
    assert max(errors.values()) <= tolerance, (name, errors)
    stats = details.stats
    for value in (loss.detach(), leaves[0].grad, details.weight, stats.nll, stats.entropy, stats.correct.byte()):
        same(value)
    # 4 + K numbers per row (5 more with an anchor), 16 bytes per call; the gradient of the trained rows
    trained = int((labels != -100).sum())
    numbers = 4 + (gates.resolve_gate(gate).topk or 0) + (5 if anchored is not None else 0)
    assert counts["gathered"] == (ranks - 1) * (trained * numbers * stats.nll.itemsize + 16), (name, counts)
    assert counts["reduced"] == trained * hidden.shape[1] * hidden.itemsize, (name, counts)

exec(sys.argv[1])
end_together()
"""

CASES = """
for vocab in (64, 67, 5):
    for gate in ("eaft", "eaft-vocab", "dft", "none"):
        check(vocab, gate)
# gates that compare tokens, and close some: two passes; tiles of three rows, of which four would fit the smaller part
few = dict(tile_bytes=33 * 8 * 4)
for gate in ("eaft-mask", "talr", "mile", "conflict-mask", "profit"):
    check(67, gate, **few)
check(67, "eaft", recompute=True, **few)
check(67, "eaft", weights=True, **few)
check(67, "eaft-sigmoid", bias=True, softcap=4.0, logit_scale=0.7)
check(67, "eaft", bias=True, **few)
check(67, gates.EAFT(k=50), **few)
for direction in ("forward", "reverse"):
    for mask in (False, True):
        check(67, "eaft", anchored=Anchor(0.3, direction, mask), **few)
check(67, "eaft-mask", anchored=Anchor(0.3), **few)
# what the backends of low precision add is the rounding of their products
check(67, "eaft", dtype=torch.float32, tolerance=3e-6, backend="cpu")
check(67, "eaft", dtype=torch.float32, tolerance=3e-6, backend="torch")
check(67, "eaft", dtype=torch.float32, tolerance=3e-6, backend="cpu", anchored=Anchor(0.3, "reverse", True))
# a threshold that drops nothing measurable, and one that drops half of the columns
check(67, "eaft", tail="sparse", tail_threshold=1e-14, tolerance=1e-9)
check(67, "eaft-mask", tail="sparse", tail_threshold=1e-14, tolerance=1e-9, **few)
# with the dropped part of a row restored from the wrong sum it would be 6e-2
check(2000, "eaft", tail="sparse", tail_threshold=1e-3, tolerance=2e-2)
"""

REFUSED = """
hidden, weight, labels, _ = make_inputs(10, 20)
shard = VocabularyShard.chunked(20)
nothing = fused_linear_eaft(hidden.requires_grad_(), weight[shard.columns], torch.full_like(labels, -100), shard=shard)
nothing.backward()
assert nothing == 0 and not hidden.grad.any()
# the same labels at other rows are other rows
labels[:] = 3
labels[rank] = -100
try:
    fused_linear_eaft(hidden, weight[shard.columns], labels, shard=shard)
except ValueError as error:
    assert "must have the same rows" in str(error) and "trained rows by rank: 9, 9" in str(error), error
else:
    raise AssertionError("not refused")
"""


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_loss_over_processes(ranks):
    run_ranks(ranks, WORKER, CASES if ranks == 2 else CASES.split("# what the backends")[0])


@pytest.mark.slow
def test_ranks_with_other_rows_are_refused():
    run_ranks(2, WORKER, REFUSED)
