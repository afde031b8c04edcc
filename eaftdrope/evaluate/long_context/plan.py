"""The plan of `eaftdrope context`: models, variants and lengths, cell by cell; every mistake is found before a model is
loaded.

A cell is one probe of one variant of one model at one length.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from eaftdrope.drope.config import trained_length
from eaftdrope.errors import UserError, raise_problems
from eaftdrope.models import check_model_reference, load_config, load_tokenizer, refuse_ttt, resolve_model, short_name

from ..texts import SHIPPED, read_texts, shipped_text
from .lengths import parse_lengths
from .needles import KINDS, Hay, Needles
from .variants import AS_IS, BASELINES, variants_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

PROBES = ("perplexity", *KINDS, "attention")
SUITES = ("ruler", "longbench")
# The lengths that lm-eval's RULER tasks have a metric for.
_RULER_LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)


@dataclass(frozen=True)
class ContextOptions:
    """The options of `eaftdrope context`.

    Attributes:
        lengths: as `parse_lengths` reads them.
        text: a file; None for the shipped novel.
        device, dtype: torch's names.
    """

    models: tuple[str, ...]
    lengths: str = "1x,2x,4x"
    probes: tuple[str, ...] = PROBES
    baselines: tuple[str, ...] = ()
    suites: tuple[str, ...] = ()
    text: Path | None = None
    trials: int = 100
    depths: int = 10
    windows: int = 8
    attention_trials: int = 4
    trained_length: int | None = None
    device: str = "cpu"
    dtype: str = "float32"
    batch_tokens: int = 16384
    seed: int = 0


@dataclass(frozen=True)
class ContextModel:
    """A model to measure; `name` is its name in tables and figures."""

    reference: str
    name: str
    trained: int
    lengths: tuple[int, ...]
    variants: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase
    hay: Hay
    identity: str


@dataclass(frozen=True)
class ContextCell:
    """One probe of one variant of one model at one length; `tokens` pass through the model, at most: its cost."""

    model: str
    variant: str
    probe: str
    length: int
    tokens: int

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What identifies the cell in the results."""
        return self.model, self.variant, self.probe, self.length


@dataclass(frozen=True)
class ContextPlan:
    """A checked plan; `settings` is what determines the results, as JSON, `notes` are remarks for their reader."""

    options: ContextOptions
    models: tuple[ContextModel, ...]
    cells: tuple[ContextCell, ...]
    settings: dict
    notes: tuple[str, ...]


def make_plan(options: ContextOptions, problems: Sequence[str] = ()) -> ContextPlan:
    """Check everything that can be checked without weights, and list the cells.

    Args:
        problems: those that the caller has found; reported with the rest.

    Raises:
        UserError: with every problem that was found.
    """
    problems = [*problems, *_wrong_names(options), *_wrong_models(options), *_missing_suites(options.suites)]
    texts: list[str] = []
    try:
        texts = read_given_texts(options.text)
    except UserError as error:
        problems.append(str(error))
    configs = {}
    for reference in options.models:
        if check_model_reference(reference) is None:
            try:
                refuse_ttt(reference)
                configs[reference] = load_config(reference)
            except UserError as error:
                problems.append(str(error))
    for reference, config in configs.items():
        problems += _wrong_for(reference, config, options)
    raise_problems(problems)

    models, problems = [], []
    for reference, config in configs.items():
        try:
            models.append(_planned(reference, config, options, texts))
        except UserError as error:
            problems.append(f"{reference}: {error}")
    raise_problems(problems)
    cells = tuple(cell for model in models for cell in _cells(model, options))
    return ContextPlan(options, tuple(models), cells, _settings(options, models, texts), tuple(_notes(models, options)))


def fingerprint(reference: str, config: PretrainedConfig) -> str:
    """Return an identifier of the checkpoint: the hub's commit, or a hash of configuration and weight files."""
    source = resolve_model(reference)
    if source.kind == "hub":
        return str(getattr(config, "_commit_hash", None))
    folder = Path(source.path)
    weights = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(folder.glob("*.safetensors"))
    ]
    whole = (folder / "config.json").read_bytes() + json.dumps(weights).encode()
    return hashlib.sha256(whole).hexdigest()[:16]


def _wrong_names(options: ContextOptions) -> list[str]:
    problems = []
    for option, names, known in (
        ("--probes", options.probes, PROBES),
        ("--baselines", options.baselines, BASELINES),
        ("--suite", options.suites, SUITES),
    ):
        for name in names:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f" Did you mean {close[0]}?" if close else ""
                problems.append(f"{option}: {name!r} is not one of {', '.join(known)}.{hint}")
    if not options.probes and not options.suites:
        problems.append(f"--probes is empty. Pass some of {', '.join(PROBES)}, or a --suite.")
    return problems


def _wrong_models(options: ContextOptions) -> list[str]:
    problems = [problem for problem in map(check_model_reference, options.models) if problem]
    if len(set(options.models)) < len(options.models):
        problems.append("a model is given twice. Pass each once; --baselines measures other rotary embeddings on it.")
    try:
        parse_lengths(options.lengths, options.trained_length or 1024)
    except UserError as error:
        problems.append(f"--lengths: {error}")
    return problems


def _missing_suites(suites: tuple[str, ...]) -> list[str]:
    wanted = [name for name in suites if name in SUITES]
    if wanted and importlib.util.find_spec("lm_eval") is None:
        return [
            f"--suite {','.join(wanted)} is measured by lm-eval, which is not installed. "
            f"Run `pip install 'lm-eval[hf,{','.join(wanted)}]'`, or leave --suite out."
        ]
    return []


def read_given_texts(file: Path | None, option: str = "--text") -> list[str]:
    """Read the documents of the file of an option; without a file, the shipped novel.

    Raises:
        UserError: no such file, not text, or empty.
    """
    if file is None:
        return [shipped_text()]
    if not file.is_file():
        raise UserError(f"{option} {file}: no such file.")
    try:
        texts = read_texts(file, option)
    except UnicodeDecodeError as error:
        raise UserError(f"{option} {file}: not UTF-8 text ({error.reason} at byte {error.start}).") from error
    if not any(text.strip() for text in texts):
        raise UserError(f"{option} {file}: the file is empty. Use a file with some pages of text.")
    return texts


def _wrong_for(reference: str, config: PretrainedConfig, options: ContextOptions) -> list[str]:
    """Return the problems of a model's configuration with the options."""
    problems = []
    try:
        variants_of(config, tuple(name for name in options.baselines if name in BASELINES))
    except UserError as error:
        problems.append(f"--baselines on {reference}: {error}")
    try:
        _trained(config, options)
    except UserError as error:
        problems.append(f"{reference}: {error}")
    return problems


def _trained(config: PretrainedConfig, options: ContextOptions) -> int:
    return options.trained_length or trained_length(config)


def _planned(reference: str, config: PretrainedConfig, options: ContextOptions, texts: list[str]) -> ContextModel:
    tokenizer = load_tokenizer(reference)
    hay = Hay(tokenizer, texts)
    trained = _trained(config, options)
    lengths = parse_lengths(options.lengths, trained)
    others = [str(length) for length in lengths if length not in _RULER_LENGTHS]
    if "ruler" in options.suites and others:
        known = ", ".join(map(str, _RULER_LENGTHS))
        raise UserError(f"--suite ruler: lm-eval has it at {known} tokens, not at {', '.join(others)}. Pass --lengths.")
    for kind in _kinds(options.probes):
        # The shortest prompt must fit, and the others after a crop.
        shortest = min(lengths[0], trained if "crop" in options.baselines else lengths[0])
        Needles(kind, tokenizer, hay, shortest, depths=options.depths, seed=options.seed)
    names = [short_name(other) for other in options.models]
    name = short_name(reference) if names.count(short_name(reference)) == 1 else reference
    variants = tuple(variants_of(config, options.baselines))
    identity = fingerprint(reference, config)
    return ContextModel(reference, name, trained, tuple(lengths), variants, tokenizer, hay, identity)


def _kinds(probes: tuple[str, ...]) -> list[str]:
    kinds = [probe for probe in probes if probe in KINDS]
    return [*kinds, "niah"] if "attention" in probes and "niah" not in kinds else kinds


def _cells(model: ContextModel, options: ContextOptions) -> list[ContextCell]:
    cells = []
    for length in model.lengths:
        cut = model.hay.windows(length, options.windows) if "perplexity" in options.probes else None
        for variant in model.variants:
            seen = min(length, model.trained) if variant == "crop" else length
            for probe in options.probes:
                if probe == "perplexity":
                    # A cropped window slides by half of the tokens seen.
                    cost = 0 if cut is None else len(cut.rows) * (2 * length - seen)
                elif probe == "attention":
                    # A needle that a crop cuts off gets no attention: nothing to measure.
                    cost = 0 if variant == "crop" else options.attention_trials * length
                else:
                    cost = options.trials * seen
                if cost:
                    cells.append(ContextCell(model.name, variant, probe, length, cost))
            cells += [
                ContextCell(model.name, variant, suite, length, 0) for suite in options.suites if suite == "ruler"
            ]
    # LongBench has documents of its own lengths: it is measured once, with room for the longest.
    if "longbench" in options.suites:
        cells += [ContextCell(model.name, variant, "longbench", model.lengths[-1], 0) for variant in model.variants]
    return cells


def _settings(options: ContextOptions, models: list[ContextModel], texts: list[str]) -> dict:
    return {
        "models": [
            {
                "reference": model.reference,
                "name": model.name,
                "checkpoint": model.identity,
                "trained_length": model.trained,
                "lengths": list(model.lengths),
                "arms": list(model.variants),
                "text_tokens": len(model.hay.tokens),
            }
            for model in models
        ],
        "probes": list(options.probes),
        "suites": list(options.suites),
        "text": {
            "name": SHIPPED if options.text is None else options.text.name,
            "sha256": hashlib.sha256("\0".join(texts).encode()).hexdigest(),
        },
        "trials": options.trials,
        "depths": options.depths,
        "windows": options.windows,
        "attention_trials": options.attention_trials,
        "seed": options.seed,
        "dtype": options.dtype,
        "device": options.device.split(":")[0],
    }


def _notes(models: list[ContextModel], options: ContextOptions) -> list[str]:
    notes = []
    for model in models:
        tokens = len(model.hay.tokens)
        longer = [f"{length:,}" for length in model.lengths if model.hay.repeats(length)]
        if longer and _kinds(options.probes):
            notes.append(
                f"{model.name}: the text has {tokens:,} tokens, so the hay of {', '.join(longer)} tokens repeats it. "
                "Pass a longer one with --text."
            )
        if "perplexity" in options.probes:
            cut = {length: model.hay.windows(length, options.windows) for length in model.lengths}
            missing = [f"{length:,}" for length, windows in cut.items() if windows is None]
            joined = [f"{length:,}" for length, windows in cut.items() if windows and windows.joined]
            if missing:
                notes.append(
                    f"{model.name}: no perplexity at {', '.join(missing)}: the text has {tokens:,} tokens, and a repeated "
                    "text would measure copying. Pass a longer one with --text."
                )
            if joined and len(model.hay.documents) > 1:
                notes.append(
                    f"{model.name}: no document has {', '.join(joined)} tokens: windows cross documents there."
                )
        if "rope" in options.baselines and "rope" not in model.variants:
            notes.append(f"{model.name}: the baseline rope is this model as it is ({AS_IS}), measured once.")
    return notes
