"""The loss with a head that is sharded by vocabulary over a process group; no rank holds the whole head.

Every rank has the same rows and its own columns. For a tile of rows the backend computes four numbers per row of the shard:
the maximum m, the rest s (sum_v e^(z_v - m) = 1 + s), the entropy H, and the gap g = m - z_y of the label (inf where another
rank has it). A gate that reads the top-K entropy adds the K largest logits. After one all-gather of these 4 + K numbers every
rank merges them in the order of the ranks, so the statistics are equal to the bit on all ranks:

    m       max_r m_r, held by the rank o (the first, if several hold it)         d_r = m - m_r >= 0
    s       s_o + sum_{r != o} e^-d_r (1 + s_r)              the maximum stays out of the sum, as in a whole row
    pi_r    e^-d_r (1 + s_r) / (1 + s)                       probability of the shard
    H       log1p(s) + sum_r pi_r (d_r + H_r - log1p(s_r))   every term >= 0
    nll     log1p(s) + min_r (d_r + g_r)                     correct if that minimum is 0
    top-K   the K largest of the P K

and for an anchor, with first and second distribution as in `anchor.py` and their own maxima and rests (5 more numbers),

    D       sum_r pi_r (log pi_r - log pi'_r + D_r)          pi of the first, pi' of the second

The gradient of the columns then needs nothing from other ranks, and neither does that of the weight. The gradient of the
hidden states is the sum of those of the ranks: one all-reduce per call, of the trained rows, in their dtype. A rank
receives, with b bytes per statistic and P ranks, b (4 + K) (P - 1) per trained row, and for the gradient
2 (P - 1) / P times its size; 16 (P - 1) per call are spent on a check that the ranks have the same rows.

A sparse tail restores what it drops shard by shard: P rank-1 terms instead of one.

Legend: P ranks, R rows of a tile, N rows of the call, V columns of a rank's shard, D hidden size, K largest logits.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import torch
import torch.distributed as dist
from torch import Tensor

from .backends import Backend
from .backends.tile import AnchorStats, BaseTile, LogitsTransform, TileStats
from .rows import TrainedRows

_ANCHOR = tuple(field.name for field in fields(AnchorStats))


@dataclass(frozen=True)
class VocabularyShard:
    """The part of a head `[V, D]` that a rank holds: consecutive tokens, in the order of the ranks.

    Args:
        sizes (`tuple[int, ...]`): tokens of each rank of the group.
        rank (`int`): this rank in the group.
        group (`ProcessGroup`, *optional*): the ranks that share the head; None for all processes.

    Raises:
        ValueError: a rank without a token.
    """

    sizes: tuple[int, ...]
    rank: int
    group: dist.ProcessGroup | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if min(self.sizes) < 1:
            raise ValueError(
                f"a vocabulary of {self.vocab:,} tokens over {len(self.sizes)} ranks leaves rank {self.sizes.index(0)} "
                "without a token. Share the head between fewer ranks."
            )

    @classmethod
    def chunked(cls, vocab: int, group: dist.ProcessGroup | None = None) -> VocabularyShard:
        """Return this rank's part of a vocabulary divided as `torch.chunk` and DTensor's `Shard(0)` divide it: equal parts,
        the last ones smaller."""
        ranks = dist.get_world_size(group)
        size = -(-vocab // ranks)
        sizes = tuple(min(size, max(0, vocab - rank * size)) for rank in range(ranks))
        return cls(sizes, dist.get_rank(group), group)

    @property
    def vocab(self) -> int:
        """Tokens of all ranks."""
        return sum(self.sizes)

    @property
    def start(self) -> int:
        """The first token of this rank."""
        return sum(self.sizes[: self.rank])

    @property
    def columns(self) -> slice:
        """The tokens of this rank."""
        return slice(self.start, self.start + self.sizes[self.rank])

    def check_part(self, weight: Tensor) -> None:
        """Raise ValueError for a weight of another size than this rank's part."""
        if weight.shape[0] != self.sizes[self.rank]:
            raise ValueError(
                f"weight has {weight.shape[0]:,} tokens, and the part of rank {self.rank} has {self.sizes[self.rank]:,} of "
                f"{self.vocab:,}: pass the part, weight[shard.columns]."
            )

    def check_rows(self, rows: TrainedRows) -> None:
        """Raise ValueError on every rank if the ranks have different rows; they would merge unrelated ones."""
        if rows.is_static:
            raise RuntimeError(
                "the loss of a head that is sharded by vocabulary cannot be captured in a CUDA graph: the ranks have to "
                "compare their rows first."
            )
        labels_T = rows.labels
        index_T = torch.arange(len(labels_T), device=labels_T.device) if rows.index is None else rows.index
        check = ((labels_T + 1) * (index_T + 1)).sum()
        own = torch.stack([check.new_tensor(len(labels_T)), check])
        found = self._gathered(own).tolist()
        if any(other != found[0] for other in found):
            counts = ", ".join(f"{count:,}" for count, _ in found)
            raise ValueError(
                "the ranks that share a head must have the same rows, in one order; theirs have different labels (trained "
                f"rows by rank: {counts}). Give every rank of a tensor-parallel group the same batch."
            )

    def tile_statistics(
        self,
        backend: Backend,
        logits_RV: Tensor,
        labels_R: Tensor,
        transform: LogitsTransform,
        topk: int | None,
        base: BaseTile | None,
    ) -> TileStats:
        """Return the statistics of whole rows from this rank's columns; labels count from its first token."""
        part_RC = shard_statistics(backend, logits_RV, labels_R, transform, topk, base)
        parts_PRC = self._gathered(part_RC)
        return merge_statistics(parts_PRC, topk, self.vocab, None if base is None else base.forward)

    def add_parts_(self, gradient_ND: Tensor, rows: TrainedRows) -> None:
        """Sum the ranks' parts of the gradient with respect to the hidden states, in place."""
        if rows.count == 0:
            return
        part_TD = gradient_ND if rows.index is None else gradient_ND[rows.index]
        dist.all_reduce(part_TD, group=self.group)
        if rows.index is not None:
            gradient_ND[rows.index] = part_TD

    def _gathered(self, value: Tensor) -> Tensor:
        parts = value.new_empty(len(self.sizes), *value.shape)
        # a call without a trained row has nothing to send, on any rank
        if value.numel():
            dist.all_gather(list(parts), value, group=self.group)
        return parts


def shard_statistics(
    backend: Backend,
    logits_RV: Tensor,
    labels_R: Tensor,
    transform: LogitsTransform,
    topk: int | None,
    base: BaseTile | None = None,
) -> Tensor:
    """Return what a shard adds to the statistics of its rows, `[R, 4 + K]`, or `[R, 9 + K]` with a base: maximum, rest,
    entropy and gap, then those of the anchor, then the K largest logits. Labels count from the shard's first token.

    The backend computes all but the largest logits: those come from torch on every device.
    """
    vocab = logits_RV.shape[1]
    inside_R = (labels_R >= 0) & (labels_R < vocab)
    if base is None:
        stats = backend.tile_statistics(logits_RV, labels_R.clamp(0, vocab - 1), transform, None)
    else:
        stats = backend.anchored_statistics(logits_RV, labels_R, transform, None, base)
    # above 0 unless the label is a maximum, so that rounding makes no wrong label correct
    wrong_R = (stats.nll - stats.rest.log1p()).clamp_min(torch.finfo(stats.nll.dtype).tiny)
    gap_R = torch.where(inside_R, torch.where(stats.correct, 0, wrong_R), float("inf"))
    columns = [stats.maximum, stats.rest, stats.entropy, gap_R]
    if stats.anchor is not None:
        columns += [getattr(stats.anchor, name) for name in _ANCHOR]
    part_RC = torch.stack(columns, 1)
    if topk is None:
        return part_RC
    return torch.cat([part_RC, _largest(logits_RV, transform, topk).to(part_RC.dtype)], 1)


def merge_statistics(parts_PRC: Tensor, topk: int | None, vocab: int, forward: bool | None = None) -> TileStats:
    """Return the statistics of whole rows from those of their shards (`shard_statistics`), in the order of the ranks.

    Args:
        vocab (`int`): tokens of all shards.
        forward (`bool`, *optional*): the direction of an anchor; None without one.
    """
    maximum_PR, rest_PR, entropy_PR, gap_PR = parts_PRC[..., :4].unbind(-1)
    whole = _Normaliser.merged(maximum_PR, rest_PR)
    log_rest_R = whole.rest.log1p()
    # mean gap of a shard's tokens to its maximum; rounding can push it below zero
    spread_PR = whole.gap + (entropy_PR - rest_PR.log1p()).clamp_min(0)
    label_R = torch.where(whole.empty, float("inf"), whole.gap + gap_PR).amin(0)
    stats = TileStats(
        nll=log_rest_R + label_R,
        entropy=log_rest_R + torch.where(whole.empty, 0, whole.share * spread_PR).sum(0),
        topk_entropy=None,
        correct=label_R == 0,
        maximum=whole.maximum,
        rest=whole.rest,
    )
    further = 4
    if forward is not None:
        further += len(_ANCHOR)
        stats = replace(stats, anchor=_merged_anchor(parts_PRC[..., 4:further], forward))
    if topk is not None:
        entropy_R = _topk_entropy(parts_PRC[..., further:], min(topk, vocab))
        # a logit of +inf shows: it must not close the gate
        stats = replace(stats, topk_entropy=torch.where(stats.entropy.isnan(), stats.entropy, entropy_R))
    return stats


@dataclass(frozen=True)
class _Normaliser:
    """Sum of exponentials of whole rows, `[R]`, and what each shard has of it, `[P, R]`: the gap of its maximum, its share
    and the logarithm of that. A shard that holds only logits of -inf is empty: it has a share of 0."""

    maximum: Tensor
    rest: Tensor
    gap: Tensor
    share: Tensor
    log_share: Tensor
    empty: Tensor

    @staticmethod
    def merged(maximum_PR: Tensor, rest_PR: Tensor) -> _Normaliser:
        # of such a shard a backend has a maximum of -inf, or the lowest number and a rest of -1
        empty_PR = (maximum_PR == float("-inf")) | (rest_PR == -1)
        maximum_PR = maximum_PR.masked_fill(empty_PR, float("-inf"))
        maximum_R = maximum_PR.amax(0)
        gap_PR = maximum_R - maximum_PR
        mass_PR = torch.where(empty_PR, 0, torch.exp(-gap_PR) * (1 + rest_PR))
        owner_1R = (maximum_PR == maximum_R).to(torch.int8).argmax(0, keepdim=True)
        owns_PR = torch.zeros_like(empty_PR).scatter_(0, owner_1R, True)
        rest_R = torch.where(owns_PR, rest_PR, mass_PR).sum(0)
        log_share_PR = torch.where(empty_PR, float("-inf"), rest_PR.log1p() - gap_PR - rest_R.log1p())
        return _Normaliser(maximum_R, rest_R, gap_PR, mass_PR / (1 + rest_R), log_share_PR, empty_PR)


def _merged_anchor(parts_PR5: Tensor, forward: bool) -> AnchorStats:
    part = AnchorStats(*parts_PR5.unbind(-1))
    model = _Normaliser.merged(part.maximum, part.rest)
    base = _Normaliser.merged(part.base_maximum, part.base_rest)
    first, second = (base, model) if forward else (model, base)
    within_PR = torch.where(second.empty, float("inf"), first.log_share - second.log_share + part.divergence)
    # what the first distribution excludes adds nothing: 0 * inf would be NaN
    divergence_R = torch.where(first.share == 0, 0, first.share * within_PR).sum(0)
    return AnchorStats(
        # rounding can push it below zero
        divergence=divergence_R.clamp_min(0),
        maximum=model.maximum,
        rest=model.rest,
        base_maximum=base.maximum,
        base_rest=base.rest,
    )


def _largest(logits_RV: Tensor, transform: LogitsTransform, k: int) -> Tensor:
    """The K largest logits of each row, `[R, K]`; -inf where a shard has fewer columns."""
    count = min(k, logits_RV.shape[1])
    raw_RK = logits_RV.topk(count, largest=transform.scale >= 0).values
    wide = torch.promote_types(raw_RK.dtype, torch.float32)
    return torch.nn.functional.pad(transform.apply(raw_RK.to(wide)), (0, k - count), value=float("-inf"))


def _topk_entropy(largest_PRK: Tensor, k: int) -> Tensor:
    """Entropy of the K largest logits of all shards, renormalised among themselves."""
    top_RK = largest_PRK.transpose(0, 1).flatten(1).topk(k).values
    gap_RK = top_RK[:, :1] - top_RK[:, 1:]
    exp_RK = torch.exp(-gap_RK)
    rest_R = exp_RK.sum(-1)
    # a logit of -inf adds nothing
    spread_R = torch.where(exp_RK == 0, 0, exp_RK * gap_RK).sum(-1)
    return rest_R.log1p() + spread_R / (1 + rest_R)
