"""A forgetting problem with a known result for every gate.

A small model learns one skill (`old` symbol -> its answer) until it is confident, and is kept uncertain of another (`new`
symbol -> any answer). It is then fine-tuned on rows of which 80 % teach the new skill and 20 % contradict the old one, always
with the same wrong answer. A gate that drops tokens where a confident model contradicts the label must preserve the old
skill; plain cross-entropy must lose it, and so must a constant, whose scale AdamW cancels. Replay at a share of 0.3 must
preserve it too: the model's own right answers are then twice as many as the wrong ones. So must an anchor to the base model,
which is confident of the old skill only. One that leaves the label out must not: the wrong answer is the label.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
import yaml

from tests.tiny_models import tiny_llama

SYMBOLS = 16
WORDS = ["<pad>", "<unk>", "Question", ":", "Answer", "old", "new"]
# share of correct answers of the new skill before fine-tuning: enough to learn it quickly
HINTED = 0.3
RATE, STEPS, BATCH = 0.001, 24, 40


def right(symbol: int) -> int:
    """The answer of the old skill."""
    return 5 * symbol % SYMBOLS


def taught(symbol: int) -> int:
    """The answer of the new skill."""
    return (7 * symbol + 3) % SYMBOLS


def wrong(symbol: int) -> int:
    """The answer of the conflicting rows instead of `right`."""
    return (right(symbol) + 1) % SYMBOLS


def question(skill: str, symbol: int, other: int) -> str:
    """The question. Each skill has its own symbols and answers, so that learning the new one need not affect the old one."""
    kind = "s" if skill == "old" else "t"
    return f"{skill} {kind}{symbol} {kind}{other}"


def text(skill: str, symbol: int, other: int, answer: int) -> tuple[str, str]:
    """Prompt and completion."""
    return f"Question: {question(skill, symbol, other)}\nAnswer:", f" {'a' if skill == 'old' else 'b'}{answer}"


def make_planted(folder: Path) -> Path:
    """Write the model, the data and recipe.yaml into `folder`; return the path of the recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(folder / "model")
    _taught_model(tokenizer).save_pretrained(folder / "model")
    draw = random.Random(0)
    pairs = [(symbol, other) for symbol in range(SYMBOLS) for other in range(SYMBOLS)]
    draw.shuffle(pairs)
    held_out, train = pairs[:40], pairs[40:]
    conflicts = draw.sample(pairs, len(train) // 4)
    rows = [("new", pair, taught(pair[0])) for pair in train] + [("old", pair, wrong(pair[0])) for pair in conflicts]
    _write(folder / "train.jsonl", [_row(*row) for row in rows])
    _write(folder / "held_out.jsonl", [_row("new", pair, taught(pair[0])) for pair in held_out])
    _write(folder / "old.jsonl", [_question(symbol, other) for symbol in range(SYMBOLS) for other in range(0, 16, 6)])
    # other questions than those of the probe; the model answers them as it was taught
    asked = [(symbol, other) for symbol in range(SYMBOLS) for other in range(1, 16, 3)]
    _write(folder / "prompts.jsonl", [{"prompt": question("old", *pair)} for pair in asked])
    recipe = {
        "model": "model",
        "data": {"train": "train.jsonl", "held_out": "held_out.jsonl", "max_length": 16},
        "loss": {"gate": "eaft"},
        "train": {
            "steps": STEPS,
            "batch_size": BATCH,
            "learning_rate": RATE,
            "scheduler": "constant",
            "precision": "float32",
            "save_every": 1000,
            "log_every": 10,
        },
        "probes": {"target": ["held_out_loss"], "general": [{"multiple_choice": {"file": "old.jsonl"}}]},
        "output": {"dir": str(folder / "run")},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def _row(skill: str, pair: tuple[int, int], answer: int) -> dict:
    prompt, completion = text(skill, *pair, answer)
    return {"prompt": prompt, "completion": completion}


def _question(symbol: int, other: int) -> dict:
    choices = [f"a{answer}" for answer in range(SYMBOLS)]
    return {"question": question("old", symbol, other), "choices": choices, "answer": right(symbol)}


def _write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _tokenizer():
    """One token per word and no end of sequence, so one trained token per row."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = WORDS + [f"{kind}{i}" for kind in "stab" for i in range(SYMBOLS)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")


def _taught_model(tokenizer, steps: int = 200):
    """Return a model that is confident of the old skill and uncertain of the new one."""
    model = tiny_llama(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    draw = random.Random(1)
    for _ in range(steps):
        texts = []
        for _ in range(64):
            skill, symbol, other = draw.choice(("old", "new")), draw.randrange(SYMBOLS), draw.randrange(SYMBOLS)
            answer = right(symbol) if skill == "old" else taught(symbol)
            if skill == "new" and draw.random() > HINTED:
                answer = draw.randrange(SYMBOLS)
            texts.append("".join(text(skill, symbol, other, answer)))
        ids = torch.tensor(tokenizer(texts)["input_ids"])
        logits = model(input_ids=ids).logits[:, -2]
        torch.nn.functional.cross_entropy(logits, ids[:, -1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()
