"""U1: does EAFT's gate behave on DroPE models as on those with rotary embedding?

A small model is pretrained with RoPE; a branch drops the rotation and is recalibrated. Both are fine-tuned on text in which
the successors of eight of the 32 symbols have swapped places, so that the base is certain of the old ones: confident
conflicts. Before: the gate of every token under both. After: what fine-tuning with and without the gate forgets.

Shapes: B sequences, T tokens, N trained tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.miniature import data
from benchmarks.miniature.train import Training, TrainingRecipe, build, model_config
from eaftdrope.drope.rope import with_rope
from eaftdrope.files import replacing
from eaftdrope.loss import eaft_loss, token_statistics
from eaftdrope.loss.gates import resolve_gate

from .lab import SEEDS, Comparison, Lab, Piece, Reading

STEPS, RECALIBRATED, BATCH, THETA = 600, 0.25, 32, 100.0
TUNED, TUNED_BATCH, RATE = 60, 16, 1e-3
TEST = 96
BASES, GATES = ("RoPE", "DroPE"), {"SFT": "none", "EAFT": "eaft"}
# a confident conflict, as in docs/glossary.md
ENTROPY, PROBABILITY = 0.5, 0.1
_SWAPPED = 8
_TUNING, _TEST = 23, 24


def lab(quick: bool) -> Lab:
    seeds, count = (SEEDS[:2], 2) if quick else (SEEDS, TEST)
    settings = {
        "steps": 8 if quick else STEPS,
        "recalibrated": RECALIBRATED,
        "tuned": 2 if quick else TUNED,
        "rate": RATE,
        "theta": THETA,
        "test": count,
        "compiled": not quick,
    }
    # the seed of the control's second model
    others = dict(zip(seeds, (*seeds[1:], seeds[0])))
    pieces = [Piece("all", seed, settings, partial(_measure, settings, seed, others[seed])) for seed in seeds]
    return Lab(
        "u1",
        "U1: EAFT's gate on DroPE models",
        f"Miniature of benchmarks/miniature, 748,160 weights, 64 tokens, theta {THETA:g}, {STEPS} steps, the last "
        f"{RECALIBRATED:.0%} without rotation; fine-tuned for {TUNED} steps at {RATE:g}.",
        "nats, share or correlation",
        "tenths of the gate",
        pieces,
        _compared(),
        {},
    )


def _compared() -> list[Comparison]:
    def of(title: str, first: str, second: str, smallest: float = 0.01) -> Comparison:
        return Comparison(title, ("all", first), ("all", second), smallest)

    found = [
        of("mean gate: DroPE minus RoPE", "gate, DroPE", "gate, RoPE"),
        of("confident conflicts: DroPE minus RoPE", "conflicts, DroPE", "conflicts, RoPE", 0.005),
        of(
            "rank correlation of the gate: RoPE with DroPE, minus RoPE with RoPE of another seed",
            "rank, RoPE and DroPE",
            "rank, two RoPE",
        ),
    ]
    found += [
        of(f"forgotten by EAFT minus by SFT: {base}", f"forgotten, {base}, EAFT", f"forgotten, {base}, SFT")
        for base in BASES
    ]
    found += [
        of(f"learned by EAFT minus by SFT: {base}", f"learned, {base}, EAFT", f"learned, {base}, SFT") for base in BASES
    ]
    return [
        *found,
        of("what EAFT saves of forgetting: DroPE minus RoPE", "saved, DroPE", "saved, RoPE"),
    ]


def base(name: str, settings: dict, seed: int, weights: Path) -> nn.Module:
    """Return the pretrained model; weights that were kept are not trained again."""
    recipe = TrainingRecipe(THETA, seed, settings["steps"], BATCH, True, settings["compiled"])
    paths = {one: weights / f"u1-{one}-{seed}.pt" for one in BASES}
    if not all(path.is_file() for path in paths.values()):
        trunk, start = Training(recipe), round(settings["steps"] * (1 - settings["recalibrated"]))
        trunk.run_to(start)
        branch = Training(recipe, dropped_at=start)
        # the optimisers' states would be shared
        branch.restore(copy.deepcopy(trunk.snapshot()))
        for one, training in zip(BASES, (trunk, branch)):
            training.run_to(settings["steps"])
            with replacing(paths[one]) as partial_file:
                torch.save(training.model.state_dict(), partial_file)
    config = model_config(recipe)
    model = build(config if name == "RoPE" else with_rope(config, "nope"), "sdpa")
    model.load_state_dict(torch.load(paths[name]))
    return model.eval()


def batch(random: np.random.Generator, count: int, swapped: bool) -> tuple[Tensor, Tensor]:
    """Return tokens `[B, T]` and the mask of filler; `swapped` exchanges the roles of eight symbols in pairs."""
    found = data.training_batch(random, count)
    tokens_BT, roles_V = found.tokens_BT, torch.arange(data.VOCABULARY)
    if swapped:
        # filler's symbols follow the first token of a sequence in the vocabulary
        first = data.BOS + 1
        roles_V[first : first + _SWAPPED] = roles_V[first : first + _SWAPPED].view(-1, 2).flip(1).flatten()
        tokens_BT = roles_V[tokens_BT]
    return tokens_BT, found.filler_BT


def tune(model: nn.Module, gate: str, steps: int, seed: int) -> nn.Module:
    """Fine-tune on swapped text, in place; return the model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    model.train()
    for step in range(steps):
        tokens_BT, filler_BT = batch(np.random.default_rng([_TUNING, seed, step]), TUNED_BATCH, True)
        labels_BT = tokens_BT.masked_fill(~filler_BT, -100)[:, 1:]
        eaft_loss(model(tokens_BT[:, :-1]).logits, labels_BT, gate).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def _measure(settings: dict, seed: int, other: int, weights: Path) -> dict[str, Reading]:
    bases = {name: base(name, settings, seed, weights) for name in BASES}
    swapped = batch(np.random.default_rng([_TEST, 1]), settings["test"], True)
    plain = batch(np.random.default_rng([_TEST, 0]), settings["test"], False)
    gates, found = {}, {}
    for name, model in bases.items():
        gates[name], conflicts_B, shares = _gates(model, *swapped)
        found[f"gate, {name}"] = Reading([float(gate_N.mean()) for gate_N in gates[name]], shares)
        found[f"conflicts, {name}"] = Reading(conflicts_B)
    second = _gates(base("RoPE", settings, other, weights), *swapped)[0]
    found["rank, RoPE and DroPE"] = Reading(_rank(gates["RoPE"], gates["DroPE"]))
    found["rank, two RoPE"] = Reading(_rank(gates["RoPE"], second))
    for name in BASES:
        before_B, domain_B = (_nll(bases[name], *text) for text in (plain, swapped))
        for arm, gate in GATES.items():
            model = tune(base(name, settings, seed, weights), gate, settings["tuned"], seed)
            found[f"forgotten, {name}, {arm}"] = Reading((_nll(model, *plain) - before_B).tolist())
            found[f"learned, {name}, {arm}"] = Reading((domain_B - _nll(model, *swapped)).tolist())
        saved = [np.array(found[f"forgotten, {name}, {arm}"].values) for arm in GATES]
        found[f"saved, {name}"] = Reading((saved[0] - saved[1]).tolist())
    return found


@torch.no_grad()
def _gates(model: nn.Module, tokens_BT: Tensor, filler_BT: Tensor) -> tuple[list[np.ndarray], list[float], list[float]]:
    """Return the gates of each sequence's filler, its share of confident conflicts, and the shares of gates by tenths."""
    gate, by_sequence, conflicts = resolve_gate("eaft"), [], []
    logits_BTV = model(tokens_BT[:, :-1]).logits
    for logits_TV, labels_T, kept_T in zip(logits_BTV, tokens_BT[:, 1:], filler_BT[:, 1:]):
        stats = token_statistics(logits_TV[kept_T], labels_T[kept_T], k=gate.topk)
        by_sequence.append(gate(stats).double().numpy())
        conflicts.append(((stats.entropy < ENTROPY) & (stats.probability < PROBABILITY)).double().mean().item())
    counts, _ = np.histogram(np.concatenate(by_sequence), bins=10, range=(0, 1))
    return by_sequence, conflicts, (counts / counts.sum()).tolist()


def _rank(one: list[np.ndarray], other: list[np.ndarray]) -> list[float]:
    """Spearman's correlation of two models' gates over the tokens of each sequence."""

    def ranks(values_N: np.ndarray) -> np.ndarray:
        return values_N.argsort().argsort()

    return [float(np.corrcoef(ranks(a), ranks(b))[0, 1]) for a, b in zip(one, other, strict=True)]


@torch.no_grad()
def _nll(model: nn.Module, tokens_BT: Tensor, filler_BT: Tensor) -> np.ndarray:
    """The mean negative log-likelihood of each sequence's filler, `[B]`."""
    nll_BT = nn.functional.cross_entropy(model(tokens_BT[:, :-1]).logits.mT, tokens_BT[:, 1:], reduction="none")
    kept_BT = filler_BT[:, 1:]
    return ((nll_BT * kept_BT).sum(1) / kept_BT.sum(1)).double().numpy()
