"""What `eaftdrope drope temperature` does, with every mistake found before the model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from eaftdrope.drope.config import RECORD, trained_length
from eaftdrope.errors import UserError
from eaftdrope.evaluate.texts import SHIPPED
from eaftdrope.models import load_config, load_model, load_tokenizer

from .haystack import Hay
from .lengths import parse_lengths
from .plan import read_given_texts, tell

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .temperature import Fit


@dataclass(frozen=True)
class TemperaturePlan:
    """`target` is the length to serve, `lengths` all that are fitted; `announced` is `max_position_embeddings`."""

    model: str
    target: int
    lengths: tuple[int, ...]
    trained: int
    announced: int
    windows: int
    text: str
    texts: list[str]
    tokenizer: PreTrainedTokenizerBase
    notes: tuple[str, ...]


def plan_temperature(
    model: str,
    length: str,
    lengths: str | None,
    text: Path | None,
    windows: int,
    trained: int | None = None,
    problems: list[str] | None = None,
) -> TemperaturePlan:
    """Check what was asked for; `problems` are what the caller has found wrong already.

    Raises:
        UserError: with every problem that was found.
    """
    problems = list(problems or [])
    texts, config = [], None
    try:
        texts = read_given_texts(text)
    except UserError as error:
        problems.append(str(error))
    try:
        config = load_config(model)
        trained = trained or trained_length(config)
        folded = (getattr(config, RECORD, None) or {}).get("temperature", 1.0)
        if folded != 1.0:
            problems.append(
                f"{model} has a temperature of {folded:g} folded in already, and a fit on top of it would be no formula of "
                "the length. Fit on the checkpoint that it was made from."
            )
    except UserError as error:
        problems.append(str(error))
    target, fitted = 0, []
    try:
        (target,) = parse_lengths(length, trained or 1024)
        fitted = sorted({target, *parse_lengths(lengths or length, trained or 1024)})
    except UserError as error:
        problems.append(f"--length and --lengths: {error}")
    except ValueError:
        problems.append(f"--length {length}: one length is baked in. Name the others in --lengths.")
    if trained and fitted and fitted[0] <= trained:
        problems.append(
            f"{fitted[0]:,} tokens are not beyond the trained {trained:,}, where beta is 1. Name longer lengths, or correct "
            "--trained-length."
        )
    tell(problems)
    tokenizer = load_tokenizer(model)
    hay = Hay(tokenizer, texts)
    cut = {length: hay.windows(length, windows) for length in fitted}
    if missing := [f"{length:,}" for length, found in cut.items() if found is None]:
        raise UserError(
            f"the text has {len(hay.tokens):,} tokens, too few for a window of {', '.join(missing)}. Name a longer one with "
            "--text: held-out text, that the model was not trained on."
        )
    announced = getattr(config.get_text_config(), "max_position_embeddings", None) or trained
    notes = tuple(_notes(cut, len(hay.documents)))
    name = SHIPPED if text is None else text.name
    return TemperaturePlan(model, target, tuple(fitted), trained, announced, windows, name, texts, tokenizer, notes)


def fit_all(
    plan: TemperaturePlan,
    *,
    device: str,
    dtype: str,
    batch_tokens: int,
    started: Callable[[str], Callable[[int, int], None]],
) -> list[Fit]:
    """Load the model and search at each length. `started(words)` is called before one, and what it returns with
    (passes done, about how many there will be)."""
    from .temperature import USUAL_PASSES, fit_temperature

    model = load_model(plan.model, dtype=dtype).to(device)
    fits = []
    for length in plan.lengths:
        step, done = started(f"fitting at {length:,} tokens"), []

        def progress(beta: float, perplexity: float, step=step, done=done) -> None:
            done.append(beta)
            step(len(done), max(len(done), USUAL_PASSES))

        fits.append(
            fit_temperature(
                model,
                plan.tokenizer,
                plan.texts,
                length,
                windows=plan.windows,
                batch_tokens=batch_tokens,
                progress=progress,
            )
        )
    return fits


def as_document(plan: TemperaturePlan, fits: list[Fit]) -> dict:
    """What temperature.json holds of the fits."""
    from .temperature import fit_slope

    return {
        "schema": 1,
        "model": plan.model,
        "trained_length": plan.trained,
        "announced_length": plan.announced,
        "target": plan.target,
        "text": plan.text,
        "windows": plan.windows,
        "slope": fit_slope({fit.length / plan.trained: fit.beta for fit in fits}),
        "fits": [
            {
                "length": fit.length,
                "windows": fit.best.n,
                "beta": fit.beta,
                "perplexity": fit.best.value,
                "perplexity_at_1": fit.plain.value,
                "stderr": fit.stderr,
                "distinguishable": fit.distinguishable,
                "at_edge": fit.at_edge,
                "tried": [
                    {"beta": beta, "perplexity": score.value, "stderr": score.stderr}
                    for beta, score in fit.tried.items()
                ],
            }
            for fit in fits
        ],
    }


def _notes(cut: dict, documents: int) -> list[str]:
    notes = []
    joined = [f"{length:,}" for length, found in cut.items() if found.joined]
    if joined and documents > 1:
        notes.append(f"no document has {', '.join(joined)} tokens: windows cross documents there.")
    if few := [f"{length:,}" for length, found in cut.items() if len(found.rows) < 4]:
        notes.append(f"fewer than four windows at {', '.join(few)}: what comes out is hardly certain.")
    return notes
