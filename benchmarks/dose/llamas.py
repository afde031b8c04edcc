"""Small Llamas that are pretrained here until they are sure of a table of facts, so that only their size differs.

A text is four symbols, of which the last is trained:

    fact   relation, subject, filler -> the answer of the table, whatever the filler
    skill  "new", subject, filler    -> an answer that the subject determines in the fine-tune, and in three of ten
                                        texts of the pretraining, which makes it quick to learn; random in the others

Half of the facts may appear in the fine-tune, contradicted or not; the others measure what is forgotten, and so does the
loss on all symbols of their texts.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from eaftdrope.evaluate.likelihood import IGNORED, TokenRow
from eaftdrope.files import replacing

from . import plan
from .plan import DoseCell
from .subjects import Measured, Subject
from .training import autocast

RELATIONS, SUBJECTS, FILLERS = 8, 32, 16
_FIRST = {"start": 0, "new": 1, "relation": 2}
_FIRST["subject"] = _FIRST["relation"] + RELATIONS
_FIRST["filler"] = _FIRST["subject"] + SUBJECTS
_FIRST["answer"] = _FIRST["filler"] + FILLERS
VOCABULARY = _FIRST["answer"] + SUBJECTS
STEPS, BATCH, RATE = 500, 128, 2e-3
# of the texts of the pretraining
SKILL_SHARE = 0.25
# of the skill's texts in the pretraining that have the answer of the fine-tune
HINTED = 0.3
_TEXTS = 256


def answer(relation: int, subject: int) -> int:
    """The answer of the table: a permutation of the subjects per relation."""
    order = random.Random(relation).sample(range(SUBJECTS), SUBJECTS)
    return order[subject]


def taught(subject: int) -> int:
    """The answer of the new skill."""
    return answer(RELATIONS, subject)


def _symbols(relation: int | None, subject: int, filler: int, reply: int) -> list[int]:
    head = _FIRST["new"] if relation is None else _FIRST["relation"] + relation
    return [_FIRST["start"], head, _FIRST["subject"] + subject, _FIRST["filler"] + filler, _FIRST["answer"] + reply]


def _row(relation: int | None, subject: int, filler: int, reply: int) -> TokenRow:
    ids = _symbols(relation, subject, filler, reply)
    return TokenRow(ids, [IGNORED] * (len(ids) - 1) + ids[-1:])


def facts(planted: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Facts (relation, subject) that may be in the training rows, and the others."""
    found = [(relation, subject) for relation in range(RELATIONS) for subject in range(SUBJECTS)]
    random.Random(0).shuffle(found)
    return found[:planted], found[planted:]


def skills(train: int, held_out: int) -> tuple[list[TokenRow], list[TokenRow]]:
    """Rows of the new skill: pairs of subject and filler that are trained, and others."""
    pairs = [(subject, filler) for subject in range(SUBJECTS) for filler in range(FILLERS)]
    random.Random(1).shuffle(pairs)
    rows = [_row(None, subject, filler, taught(subject)) for subject, filler in pairs[: train + held_out]]
    assert len(rows) == train + held_out, "fewer pairs than rows"
    return rows[:train], rows[train:]


def rows_of(cell: DoseCell) -> list[TokenRow]:
    """The rows of a fine-tune; only the labels of the contradicted facts depend on the share."""
    training, draw = plan.TRAININGS[cell.model], random.Random(cell.seed)
    planted, _ = facts(training.planted)
    order = draw.sample(range(len(planted)), len(planted))
    chosen = set(order[: cell.contradicted])
    rows = []
    for i, (relation, subject) in enumerate(planted):
        wrong = (answer(relation, subject) + draw.randrange(1, SUBJECTS)) % SUBJECTS
        filler = draw.randrange(FILLERS)
        rows.append(_row(relation, subject, filler, wrong if i in chosen else answer(relation, subject)))
    skill, _ = skills(training.skill, training.held_out)
    return draw.sample([*rows, *skill], len(rows) + len(skill))


def measured(training: plan.Training) -> Measured:
    """What measures a Llama; the general text is what it was pretrained on."""
    _, others = facts(training.planted)
    _, held_out = skills(training.skill, training.held_out)
    draw = random.Random(2)
    texts = [(*draw.choice(others), draw.randrange(FILLERS)) for _ in range(_TEXTS)]
    symbols = [_symbols(relation, subject, filler, answer(relation, subject)) for relation, subject, filler in texts]
    return Measured(
        held_out,
        [_row(relation, subject, subject % FILLERS, answer(relation, subject)) for relation, subject in others],
        [TokenRow(ids, [IGNORED, *ids[1:]]) for ids in symbols],
    )


def _pretraining_text(draw: random.Random) -> list[int]:
    subject, filler = draw.randrange(SUBJECTS), draw.randrange(FILLERS)
    if draw.random() < SKILL_SHARE:
        reply = taught(subject) if draw.random() < HINTED else draw.randrange(SUBJECTS)
        return _symbols(None, subject, filler, reply)
    relation = draw.randrange(RELATIONS)
    return _symbols(relation, subject, filler, answer(relation, subject))


def config(hidden: int, blocks: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
    )


def pretrain(hidden: int, blocks: int, steps: int = STEPS) -> PreTrainedModel:
    """Train a Llama from scratch on facts and on the skill's form; a warm-up and a linear decay."""
    torch.manual_seed(0)
    model, draw = LlamaForCausalLM(config(hidden, blocks)).train(), random.Random(3)
    peak = RATE * (96 / hidden) ** 0.5
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    for step in range(steps):
        ids = torch.tensor([_pretraining_text(draw) for _ in range(BATCH)])
        with autocast():
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = peak * min((step + 1) / 50, (steps - step) / (steps - 49) if steps > 50 else 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model.eval()


def llama_subject(name: str, work: Path, steps: int = STEPS) -> Subject:
    """The subject of a size; it is pretrained if the work folder does not have it."""
    hidden, blocks = plan.LLAMAS[name]
    file = work / f"{name.replace(' ', '-')}.safetensors"
    if not file.is_file():
        work.mkdir(parents=True, exist_ok=True)
        model = pretrain(hidden, blocks, steps)
        with replacing(file) as path:
            save_file(model.state_dict(), path)
    weights = load_file(file)

    def load() -> PreTrainedModel:
        model = LlamaForCausalLM(config(hidden, blocks))
        model.load_state_dict(weights)
        return model

    return Subject(load, rows_of, measured(plan.TRAININGS[name]), lambda parameter: True)
