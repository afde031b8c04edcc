"""U5 on natural text: what the gate in the inner loss does to planted contradictions of what the model holds.

A passage of a novel has the same false sentence three times near its beginning, and the beginning of that sentence once
more at its end, where no window sees the mentions. Only what was learned can make the planted word likelier there.

Legend: T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import eaftdrope.evaluate
from benchmarks.ttt.smollm2.models import autocast, reading_config
from benchmarks.ttt.smollm2.plan import CHUNK, MODEL, ORIGINAL, WINDOW
from eaftdrope.models import load_model, load_tokenizer
from eaftdrope.ttt import apply_ttt

from .lab import SEEDS, Comparison, Lab, Piece, Reading
from .toy_training import INNER_GATES

RATE = 0.3
OFF = "TTT off"
PLANTED, TRUE, TEXT = "planted word at its return", "true word at its return", "the novel, after the mentions"
# chunks of the novel: one mention in the middle of each of the first three, the return after the last
MENTIONS, NOVEL = 3, 6
PER_SEED = 6
# beginning, true word, planted word
FACTS = (
    ("The capital of France is", " Paris", " Berlin"),
    ("The sun rises in the", " east", " west"),
    ("The opposite of hot is", " cold", " green"),
    ("The colour of snow is", " white", " red"),
    ("Cows eat", " grass", " iron"),
    ("The first month of the year is", " January", " August"),
    ("Water freezes into", " ice", " gold"),
    ("A year has twelve", " months", " Sundays"),
    ("Fish live in the", " water", " sand"),
    ("The mother of a lamb is a", " sheep", " wolf"),
    ("Bread is made of", " flour", " stone"),
    ("The king lives in a", " castle", " bottle"),
    ("Two and two are", " four", " nine"),
    ("Birds fly with their", " wings", " teeth"),
    ("The moon shines at", " night", " noon"),
    ("Honey is made by", " bees", " goats"),
    ("The Thames flows through", " London", " Moscow"),
    ("The heart pumps", " blood", " sugar"),
)


def lab(quick: bool) -> Lab:
    seeds, count = (SEEDS[:2], 1) if quick else (SEEDS, PER_SEED)
    arms = (OFF, *INNER_GATES)
    chunks = MENTIONS + 1 if quick else NOVEL
    settings = {"model": MODEL, "rate": RATE, "facts": count, "chunks": chunks}
    pieces = [
        Piece(arm, seed, settings | {"first": number * count}, partial(_measure, arm, number * count, count, chunks))
        for number, seed in enumerate(seeds)
        for arm in arms
    ]
    compared = [
        Comparison(f"none minus TTT off: {name}", ("none", name), (OFF, name), 0.01) for name in (PLANTED, TEXT)
    ]
    compared += [
        Comparison(f"{gate} minus none: {name}", (gate, name), ("none", name), 0.01)
        for name in (PLANTED, TRUE, TEXT)
        for gate in ("eaft", "complement")
    ]
    return Lab(
        "u5_text",
        "U5 on natural text: the gate in the inner loss, and planted contradictions",
        f"SmolLM2-135M-Instruct, naive TTT (prime, rate {RATE}), window {WINDOW}, chunk {CHUNK}; {len(FACTS)} sentences in "
        f"passages of {NOVEL * CHUNK} tokens of News from Nowhere, in three groups instead of seeds.",
        "nats",
        f"chunk of {CHUNK}",
        pieces,
        compared,
        {},
    )


@cache
def _tokenizer() -> Any:
    return load_tokenizer(MODEL)


@cache
def _novel() -> list[int]:
    folder = Path(eaftdrope.evaluate.__file__).parent
    return _ids((folder / "assets/news_from_nowhere.txt").read_text(encoding="utf-8"))


def _ids(text: str) -> list[int]:
    return _tokenizer()(text, add_special_tokens=False).input_ids


def passage(index: int, chunks: int) -> tuple[list[int], int, int]:
    """Return (tokens up to the return of sentence `index`, first token of the planted word, first token of the true one)."""
    beginning, true, planted = FACTS[index]
    start = index * (len(_novel()) - NOVEL * CHUNK) // len(FACTS)
    hay = torch.tensor(_novel()[start : start + chunks * CHUNK])
    parts = [hay[: CHUNK // 2], *hay[CHUNK // 2 :].split(CHUNK)]
    found = []
    for number, part in enumerate(parts):
        found += [*part.tolist(), *(_ids(f"\n{beginning}{planted}.\n") if number < MENTIONS else [])]
    return [*found, *_ids(f"\n{beginning}")], _ids(planted)[0], _ids(true)[0]


@cache
def _model() -> nn.Module:
    return apply_ttt(load_model(MODEL, dtype="float32").eval(), reading_config(ORIGINAL, "prime", RATE))


def _measure(arm: str, first: int, count: int, chunks: int, weights: Path) -> dict[str, Reading]:
    model = _model()
    changes = {"lr": 0.0, "inner_gate": "none"} if arm == OFF else {"lr": RATE, "inner_gate": INNER_GATES[arm]}
    model.ttt.config = replace(model.ttt.config, **changes)
    found: dict[str, list[float]] = {PLANTED: [], TRUE: [], TEXT: []}
    curves = []
    for index in range(first, first + count):
        tokens, planted, true = passage(index, chunks)
        nll_TV = _nll(model, tokens)
        found[PLANTED].append(float(nll_TV[-1, planted]))
        found[TRUE].append(float(nll_TV[-1, true]))
        nll_T = nll_TV[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
        found[TEXT].append(float(nll_T[MENTIONS * CHUNK + CHUNK // 2 :].mean()))
        curves.append([float(part.mean()) for part in nll_T[: chunks * CHUNK].split(CHUNK)])
    curve = np.mean(curves, axis=0).tolist()
    return {name: Reading(values, curve if name == TEXT else ()) for name, values in found.items()}


@torch.no_grad()
def _nll(model: nn.Module, tokens: list[int]) -> Tensor:
    """The negative log-likelihood of each token of the vocabulary after each token of a text, `[T, V]`."""
    with autocast():
        hidden_TD = model.base_model(torch.tensor([tokens])).last_hidden_state[0]
    # logits in bfloat16 would round a hundredth of a nat away
    return -model.get_output_embeddings()(hidden_TD.float()).log_softmax(-1)
