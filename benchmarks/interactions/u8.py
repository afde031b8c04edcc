"""U8 (b): how much fast weights recall: planted key-value pairs, against the number of pairs and of fast weights.

A sequence is blanks, N pairs twice in random order, a gap that no window bridges, and each key once more. The value after a
queried key can only be known from what was learned: no layer of the window model reaches back over the gap, so without
learning the loss is that of a guess, ln 32.

(a), EAFT on the root of an RLM, is measured in benchmarks/rlm; (c), thoughts before a turn, in `u8c`.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Qwen3ForCausalLM

from benchmarks.ttt.toy.arms import Arm, new_model, train
from benchmarks.ttt.toy.run import with_ttt
from eaftdrope.files import replacing

from .lab import Comparison, Lab, Piece, Reading
from .toy_training import RATE, sizes

KEYS, VALUES = 128, 32
BLANK = KEYS + VALUES
PAIRS = (4, 8, 16, 32, 64)
# blanks and pairs twice; longer than the 46 tokens that three layers of window 16 reach; queries
_WRITTEN, _GAP, _QUERIED = 4 * PAIRS[-1], 48, 2 * PAIRS[-1]
LENGTH = _WRITTEN + _GAP + _QUERIED
STEPS = 300
FULL = "full attention"
FAST_BLOCKS = (1, 2, 3)
_TRAINING, _TEST = 17, 18


def sequences(random: np.random.Generator, pairs_B: np.ndarray) -> np.ndarray:
    """Return one sequence with each number of pairs, `[B, T]`."""
    found_BT = np.full((len(pairs_B), LENGTH), BLANK)
    for row_T, pairs in zip(found_BT, pairs_B):
        keys, values = random.permutation(KEYS)[:pairs], KEYS + random.integers(VALUES, size=pairs)
        order = np.concatenate([random.permutation(pairs), random.permutation(pairs)])
        row_T[_WRITTEN - 4 * pairs : _WRITTEN] = np.stack([keys[order], values[order]], 1).ravel()
        asked, start = random.permutation(pairs), _WRITTEN + _GAP
        row_T[start : start + 2 * pairs] = np.stack([keys[asked], values[asked]], 1).ravel()
    return found_BT


def training_batch(seed: int, step: int, count: int) -> np.ndarray:
    random = np.random.default_rng([_TRAINING, seed, step])
    return sequences(random, random.choice(PAIRS, size=count))


def test_batch(pairs: int, count: int) -> np.ndarray:
    return sequences(np.random.default_rng([_TEST, pairs]), np.full(count, pairs))


def arm_of(blocks: int) -> str:
    return f"TTT, {blocks} fast block" + "s" * (blocks > 1)


def lab(quick: bool) -> Lab:
    steps, seeds, count = sizes(quick)
    steps = steps if quick else STEPS
    arms = {arm_of(blocks): blocks for blocks in FAST_BLOCKS} | {FULL: 0}
    settings = {"steps": steps, "rate": RATE, "test": count, "length": LENGTH}
    pieces = [
        Piece(arm, seed, settings | {"fast_blocks": blocks}, partial(_measure, arm, blocks, seed, steps, count))
        for seed in seeds
        for arm, blocks in arms.items()
    ]
    compared = [
        Comparison(
            f"{arm_of(more)} minus 1, {pairs} pairs", (arm_of(more), _name(pairs)), (arm_of(1), _name(pairs)), 0.05
        )
        for pairs in PAIRS
        for more in FAST_BLOCKS[1:]
    ]
    compared += [
        Comparison(
            f"1 fast block, {pairs} pairs minus {PAIRS[0]}",
            (arm_of(1), _name(pairs)),
            (arm_of(1), _name(PAIRS[0])),
            0.05,
        )
        for pairs in PAIRS[1:]
    ]
    return Lab(
        "u8",
        "U8: recall of planted pairs by fast weights",
        f"Stock Qwen 3, 3 blocks, hidden 48, window and chunk 16; 13,824 fast weights per fast block; {LENGTH} tokens.",
        "nats per value",
        f"number of pairs: {', '.join(map(str, PAIRS))}",
        pieces,
        compared,
        {"guess": round(math.log(VALUES), 4)},
    )


def _name(pairs: int) -> str:
    return f"{pairs} pairs"


def _new(blocks: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    config = new_model("full").config
    config.vocab_size, config.max_position_embeddings = BLANK + 1, LENGTH
    model = Qwen3ForCausalLM._from_config(config)
    if blocks:
        with_ttt(model, Arm("", "", "ttt", ttt={"horizon": 1, "fast_blocks": blocks}), seed)
    return model.train()


def _labels(tokens_BT: Tensor) -> Tensor:
    """Values are trained; keys and blanks cannot be predicted."""
    return tokens_BT.masked_fill((tokens_BT < KEYS) | (tokens_BT == BLANK), -100)


def _measure(arm: str, blocks: int, seed: int, steps: int, count: int, weights: Path) -> dict[str, Reading]:
    model, path = _new(blocks, seed), weights / f"pairs-{blocks}-{seed}.pt"
    if path.is_file():
        model.load_state_dict(torch.load(path))
    else:

        def loss(tokens_BT: Tensor) -> Tensor:
            return model(tokens_BT, labels=_labels(tokens_BT)).loss

        train(
            model, loss, lambda: 0.0, arm=Arm(arm, "", "ttt", steps=steps, rate=RATE), seed=seed, batch=training_batch
        )
        with replacing(path) as partial_file:
            torch.save(model.state_dict(), partial_file)
    by_pairs = {_name(pairs): _recalled(model, test_batch(pairs, count)) for pairs in PAIRS}
    found = {name: Reading(nll_B.tolist()) for name, nll_B in by_pairs.items()}
    nll_PB = np.stack(list(by_pairs.values()))
    return found | {"by number of pairs": Reading(nll_PB.mean(0).tolist(), nll_PB.mean(1).tolist())}


@torch.no_grad()
def _recalled(model: nn.Module, tokens_BT: np.ndarray) -> np.ndarray:
    """The mean negative log-likelihood of the values after queried keys, per sequence."""
    ids_BT = torch.from_numpy(tokens_BT)
    labels_BT = _labels(ids_BT)
    labels_BT[:, : _WRITTEN + _GAP] = -100
    model.eval()
    nll_BT = nn.functional.cross_entropy(model(ids_BT).logits[:, :-1].mT, labels_BT[:, 1:], reduction="none")
    return (nll_BT.sum(1) / (labels_BT != -100).sum(1)).double().numpy()
