"""The plan of `eaftdrope ttt eval`: models, texts and arms, cell by cell; every mistake is found before weights are loaded.

A cell is the smallest part that is stored: one passage of one arm, one needle, one position of the latency, one state of
the retention.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from eaftdrope.errors import UserError, raise_problems
from eaftdrope.models import short_name

from ..long_context.needles import Hay
from ..long_context.plan import read_given_texts
from ..texts import SHIPPED
from .arms import ARMS, TTTArm
from .needle import PLACES, PassKeys
from .options import TTTEvalOptions, wrong_options
from .passages import Passages, choose_passages, counted, cut_passages
from .positions import position_edges
from .retention import BLOCK, STATES, TextToRead, text_to_read
from .ttt_folder import TTTModels, find_models

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# With fewer passages, an error is hardly known.
_FEW = 8
# Retention that read less than this share of what was requested is worth a note.
_ENOUGH = 0.9


class TTTEvalCell(NamedTuple):
    """The smallest part that is stored.

    `at` is the rate of a fit, the place of a needle, the position of the latency, the state of the retention, or "". The
    latency of all arms is one cell, without an arm: they are measured in turn.
    """

    probe: str
    arm: str = ""
    at: str = ""
    index: int = 0


@dataclass(frozen=True)
class TTTEvalPlan:
    """A checked plan.

    Attributes:
        edges: borders of the bins of positions; the last is the length of a passage.
        keys: needles; None if they are not measured.
        read: what the retention reads.
        absent: arm -> why it is not measured.
        settings: what determines the results, as JSON.
        notes: remarks for the reader.
    """

    options: TTTEvalOptions
    models: TTTModels
    tokenizer: PreTrainedTokenizerBase
    passages: Passages
    edges: list[int]
    keys: PassKeys | None
    read: TextToRead
    cells: tuple[TTTEvalCell, ...]
    absent: dict[str, str]
    settings: dict
    notes: tuple[str, ...]

    def tokens(self, cell: TTTEvalCell) -> int:
        """Return the tokens of text that pass through the model for a cell (those of the probes are not counted)."""
        if cell.probe in ("fit", "loss"):
            return self.edges[-1]
        if cell.probe == "needle":
            assert self.keys is not None
            return len(self.keys.trial(cell.at, cell.index).prompt)
        return len(self.read.ids) if cell.at == "read" else 0


def make_plan(options: TTTEvalOptions, problems: Sequence[str] = ()) -> TTTEvalPlan:
    """Check everything that can be checked without weights, and list the cells.

    Args:
        problems: those that the caller has found; reported with the rest.

    Raises:
        UserError: with every problem that was found.
    """
    wrong = wrong_options(options)
    problems, models = [*problems, *wrong], None
    texts = [_texts(options.texts or (None,), "--text", problems), _texts(options.fit_texts, "--fit-text", problems)]
    if not wrong:
        try:
            models = find_models(options)
        except UserError as error:
            problems.append(str(error))
    raise_problems(problems)
    assert models is not None
    return _planned(options, models, *texts)


def _texts(files: Sequence[Path | None], option: str, problems: list[str]) -> list[str]:
    texts = []
    for file in files:
        try:
            texts += read_given_texts(file, option)
        except UserError as error:
            problems.append(str(error))
    return texts


def _planned(options: TTTEvalOptions, models: TTTModels, texts: list[str], fit_texts: list[str]) -> TTTEvalPlan:
    tokenizer = models.subjects["model"].tokenizer()
    hay = Hay(tokenizer, texts)
    length = options.length or 4 * models.window
    if length <= models.window:
        raise UserError(
            f"--length {length}: nothing lies beyond a window of {models.window} tokens. Pass a longer one."
        )
    passages = _passages(options, tokenizer, hay, length, fit_texts)
    absent = _absent(options, models, length, passages)
    chosen = [arm for arm in ARMS.values() if arm.name in (options.arms or ARMS) and arm.name not in absent]
    raise_problems([f"--arms {name}: {absent[name]}" for name in options.arms if name in absent])
    read = TextToRead([], 0)
    if "retention" in options.probes:
        read = text_to_read(tokenizer, cut_passages(hay.documents, [], BLOCK), hay.prefix, options.read)
    plan = TTTEvalPlan(
        options=options,
        models=models,
        tokenizer=tokenizer,
        passages=passages,
        edges=position_edges(length, models.window),
        keys=PassKeys(tokenizer, hay, models.window, seed=options.seed) if "needle" in options.probes else None,
        read=read,
        cells=tuple(_cells(options, chosen, passages)),
        absent={name: reason for name, reason in absent.items() if name in (options.arms or ARMS)},
        settings={},
        notes=(),
    )
    return dataclasses.replace(plan, settings=_settings(plan, texts, fit_texts), notes=tuple(_notes(plan)))


def _passages(
    options: TTTEvalOptions, tokenizer: PreTrainedTokenizerBase, hay: Hay, length: int, fit_texts: list[str]
) -> Passages:
    blocks = cut_passages(hay.documents, hay.prefix, length)
    if not blocks and "loss" in options.probes:
        longest = max(map(len, hay.documents))
        raise UserError(
            f"no document of the text has {length:,} tokens (the longest: {longest:,}), and passages do not cross documents. "
            "Pass a lower --length, or a longer text with --text."
        )
    fit_blocks = None
    if fit_texts:
        documents = [tokenizer(text, add_special_tokens=False, verbose=False).input_ids for text in fit_texts]
        fit_blocks = cut_passages(documents, hay.prefix, length)
    # the same test passages whichever arms are chosen
    return choose_passages(blocks, options.passages, fit_blocks, options.fit_passages if len(options.rates) > 1 else 0)


def _absent(options: TTTEvalOptions, models: TTTModels, length: int, passages: Passages) -> dict[str, str]:
    """Return the arms that cannot be measured, each with the reason."""
    absent, stock = {}, models.stock_windows["base"]
    if len(options.rates) > 1 and not passages.fit:
        reason = "no text to fit the inner rate on beside the test text. Pass --fit-text, or a single rate with --lr."
        absent |= {"naive": reason, "control-naive": reason}
    if stock is not None:
        absent["sink"] = "the window of the model's own configuration has no sink."
    if stock is not None and stock < length:
        absent["full"] = f"the model's own configuration has a window of {stock:,} tokens. Pass a --base without one."
    if options.control is None:
        reason = "no --control, a checkpoint trained on the same tokens without TTT, was passed."
        absent |= {"control": reason, "control-naive": reason}
    if not models.trained:
        reason = "the model has no TTT of its own (no ttt_config.json). Without training, TTT is naive TTT."
        absent |= {"ttt": reason, "off": reason}
    return absent


def _cells(options: TTTEvalOptions, chosen: list[TTTArm], passages: Passages) -> list[TTTEvalCell]:
    """List the cells by arm, so that each arm is set up once."""
    learning = learning_arm([arm.name for arm in chosen])
    cells = []
    for arm in chosen:
        name = arm.name
        retention = name == learning and "retention" in options.probes
        learns_text = retention or {"loss", "needle"} & set(options.probes)
        if arm.learning == "fitted" and len(options.rates) > 1 and learns_text:
            cells += [
                TTTEvalCell("fit", name, f"{rate:g}", i) for rate in options.rates for i in range(len(passages.fit))
            ]
        if "loss" in options.probes:
            cells += [TTTEvalCell("loss", name, "", i) for i in range(len(passages.test))]
        if "needle" in options.probes:
            cells += [TTTEvalCell("needle", name, where, i) for where in PLACES for i in range(options.trials)]
        if retention:
            cells += [TTTEvalCell("retention", name, state) for state in STATES]
    if "latency" in options.probes:
        cells += [TTTEvalCell("latency", at=str(position)) for position in options.positions]
    return cells


def learning_arm(names: Sequence[str]) -> str | None:
    """Return the arm whose retention is measured: TTT, or else naive TTT."""
    return next((name for name in ("ttt", "naive") if name in names), None)


def _settings(plan: TTTEvalPlan, texts: list[str], fit_texts: list[str]) -> dict:
    options, models = plan.options, plan.models

    def model(weights: str, reference: str | None) -> dict | None:
        if reference is None:
            return None
        identity = models.subjects[weights].fingerprint()[:16]
        return {"reference": reference, "name": short_name(reference), "checkpoint": identity}

    def text(files: Sequence[Path], read: list[str]) -> dict:
        digest = hashlib.sha256("\0".join(read).encode()).hexdigest()
        return {"name": ", ".join(file.name for file in files), "sha256": digest}

    return {
        "model": model("model", options.model),
        "base": model("base", options.base),
        "control": model("control", options.control),
        "trained": models.trained,
        "ttt": dataclasses.asdict(models.config),
        "window": models.window,
        "arms": [name for name in ARMS if name in {cell.arm for cell in plan.cells}],
        "probes": list(options.probes),
        "text": text(options.texts or [Path(SHIPPED)], texts),
        "fit_text": text(options.fit_texts, fit_texts) if fit_texts else None,
        "edges": plan.edges,
        "length": plan.edges[-1],
        "passages": len(plan.passages.test),
        "fit_passages": len(plan.passages.fit),
        "rates": list(options.rates),
        "trials": options.trials,
        "read": len(plan.read.ids),
        "positions": list(options.positions),
        "questions": options.questions,
        "probe_tokens": options.probe_tokens,
        "seed": options.seed,
        "dtype": options.dtype,
        "device": options.device.split(":")[0],
    }


def _notes(plan: TTTEvalPlan) -> list[str]:
    options, passages = plan.options, plan.passages
    notes, measured = [], {cell.arm for cell in plan.cells}
    if "loss" in options.probes and len(passages.test) < options.passages:
        notes.append(
            f"the text has {counted(len(passages.test))} of {plan.edges[-1]:,} tokens for the test, not {options.passages}: "
            "the errors are larger. Pass more text, or a lower --length."
        )
    if "loss" in options.probes and len(passages.test) < _FEW:
        notes.append(
            f"{counted(len(passages.test))}: a first look. A standard error over so few is itself uncertain, and a "
            "difference counts only if every passage shows it."
        )
    if any(cell.probe == "fit" for cell in plan.cells):
        where = "of --fit-text" if options.fit_texts else "at the end of the text, which is not measured"
        notes.append(
            f"the rate of naive TTT is the best of {len(options.rates)} on {counted(len(passages.fit))} {where}."
        )
    elif {"naive", "control-naive"} & measured:
        notes.append(f"naive TTT has the rate {options.rates[0]:g} of --lr; no rate was fitted.")
    if plan.models.trained and options.base is None and {"full", "window", "sink", "naive"} & measured:
        notes.append(
            f"full attention, the windows and naive TTT are measured on the weights of {short_name(options.model)} without "
            "its TTT, which were trained for a window. Pass the model that it was trained from with --base."
        )
    if {"control", "control-naive"} & measured:
        notes.append(f"{options.control} is taken to have been trained on the same tokens; this is not verified.")
    if "retention" in options.probes and len(plan.read.ids) < _ENOUGH * options.read:
        notes.append(
            f"retention reads {len(plan.read.ids):,} tokens: the text has no more that its probes do not contain."
        )
    if plan.read.left_out:
        notes.append(
            f"the text contains some of the text of the perplexity probe ({SHIPPED}): {plan.read.left_out} blocks of {BLOCK} "
            "tokens are not read. If the rest is of the same work, a lower perplexity after reading is no general gain."
        )
    return notes
