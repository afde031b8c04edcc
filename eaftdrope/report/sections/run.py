"""A training run: before and after, curves, landscape, samples, and how it was run."""

from __future__ import annotations

import math
from pathlib import Path

from eaftdrope.evaluate.scores import Score, scores_from_json
from eaftdrope.files import read_json, read_lines

from ..blocks import Facts, Folded, Gallery, Page, PageSection, Picture, Sample, Samples, TableBlock, Text
from ..figures.curves import CURVES, curve_figure, gate_over_time, position_figure, probes_over_time
from ..figures.landscape import gate_figure, landscape_figure, merge_windows
from ..figures.recovery import recovery_figure
from ..positions import position_rows
from ..render import FigureWriter
from ..words import arrowed, clip, left_out, number, plural, score_of
from .changes import Pair, change_pictures, change_sentence, change_table, pairs_of, probe_section
from .inspection import conflict_sections
from .rlm_tasks import rlm_tasks_section

_SAMPLES = 12
_SAMPLE_TEXT = 1500
# The landscape is shown for the first and the last of this many parts of the training.
_PARTS = 4


def run_page(folder: Path, writer: FigureWriter) -> Page:
    """Return the page of a folder with run.json."""
    run = read_json(folder / "run.json")
    before, after = ([*_scores(folder / f"probes_{when}.json")] for when in ("before", "after"))
    metrics = read_lines(folder / "metrics.jsonl")
    pairs = pairs_of(before, after)
    sections = [
        *_outcome(pairs, writer),
        *rlm_tasks_section(before, after, writer),
        *_recovery(folder, writer),
        *_positions(metrics, writer),
        *_curves(folder, metrics, writer),
        *_landscape(folder, writer),
        *conflict_sections(read_json(folder / "inspect.json")),
        *_samples(folder),
        _provenance(folder, run, metrics),
        *([probe_section(pairs)] if pairs else []),
    ]
    return Page("Training run", folder.resolve().name, _summary(run, pairs), sections)


def _scores(path: Path) -> list[Score]:
    return scores_from_json(path.read_text(encoding="utf-8")) if path.is_file() else []


def _summary(run: dict, pairs: list[Pair]) -> str:
    if run["status"] == "running" and not any(pair.new for pair in pairs):
        return "This run is not finished: the page shows what has been measured so far."
    if not pairs:
        return "Nothing was measured: the recipe has no probes."
    return change_sentence(pairs)


def _outcome(pairs: list[Pair], writer: FigureWriter) -> list[PageSection]:
    if not pairs:
        return []
    return [PageSection("outcome", "Gained and forgotten", [change_table(pairs), *change_pictures(pairs, writer)])]


def _recovery(folder: Path, writer: FigureWriter) -> list[PageSection]:
    curve = read_json(folder / "recovery.json")
    if not curve or not curve["points"]:
        return []
    points = [(point["tokens"], point["nll"]) for point in curve["points"]]
    reference = curve["original"]["nll"]
    original, last = math.exp(reference), math.exp(points[-1][1])
    figure = recovery_figure(original=reference, points=points, tokens=curve["measured_tokens"])
    label = (
        f"Perplexity over the tokens of the recalibration, {last:.2f} at the end; the original model with its rotary "
        f"embedding has {original:.2f}."
    )
    return [PageSection("recovery", "Recovery", [Gallery([writer.picture("recovery", figure, label)])])]


def _positions(metrics: list[dict], writer: FigureWriter) -> list[PageSection]:
    rows = position_rows(metrics)
    if not rows:
        return []
    words = (
        "Cross-entropy of the training batches by position in the row. In the first bin, one chunk, the model has learned "
        "nothing from the row yet; the bins after it double. Later tokens are easier for any model that sees the earlier "
        "ones: how much of the difference is learned at test time only a measurement beside the same model without learning "
        "shows."
    )
    label = "Loss by position in the first and in the last quarter of the training."
    table = TableBlock(
        "Nats per token by position in the row",
        ("Position", "First quarter of the training", "Last quarter"),
        [(name, number(first, 3), number(last, 3)) for name, first, last in rows],
        numeric=(1, 2),
    )
    picture = writer.picture("loss_by_position", position_figure(rows), label)
    return [PageSection("positions", "Loss by position", [Text(words), Gallery([picture]), table])]


def _curves(folder: Path, metrics: list[dict], writer: FigureWriter) -> list[PageSection]:
    pictures = []
    for curve in CURVES:
        figure = curve_figure(curve, metrics)
        if figure is not None:
            pictures.append(writer.picture(f"curve_{curve.name}", figure, curve.description))
    gates = gate_over_time(metrics)
    if gates is not None:
        words = (
            "Distribution of the gates during training, from closed (faint, below 0.1) at the bottom to open (strong, above "
            "0.9) at the top."
        )
        pictures.append(writer.picture("curve_gates", gates, words))
    pictures += _during(folder, writer)
    return [PageSection("curves", "Training", [Gallery(pictures)])] if pictures else []


def _during(folder: Path, writer: FigureWriter) -> list[Picture]:
    """Return a figure of each probe that was also measured during training, with its value before training."""
    lines = read_lines(folder / "probes_during.jsonl")
    measured: dict[tuple[str, str], list] = {}
    for line in lines:
        for score in map(score_of, line["scores"]):
            measured.setdefault((score.probe, score.metric), []).append((line["step"], score))
    pictures = []
    for number_, scores in enumerate(measured.values()):
        score = scores[0][1]
        points = [(step, one.value, one.stderr) for step, one in scores]
        figure = probes_over_time(arrowed(score.metric, score.better), points, score.kind)
        words = (
            f"{score.metric} during training, on {plural(score.n, 'unit')} (a subset of those before and after). Bars: one "
            "standard error; dotted: the first value."
        )
        pictures.append(writer.picture(f"during_{number_:02}_{score.probe}", figure, words))
    return pictures


def _landscape(folder: Path, writer: FigureWriter) -> list[PageSection]:
    windows = [window for window in read_lines(folder / "landscape.jsonl") if window["tokens"]]
    if not windows:
        return []
    ends = [merge_windows(windows)]
    if len(windows) > 1:
        part = max(1, len(windows) // _PARTS)
        ends = [merge_windows(windows[:part]), merge_windows(windows[-part:])]
    most = max(max(map(max, window["density"])) for window in ends)
    pictures, gates = [], {}
    for name, window in zip(("first", "last"), ends):
        first, last = window["first_step"], window["step"]
        steps = f"step {last:,}" if first == last else f"steps {first:,} to {last:,}"
        gates[steps] = window
        label = (
            f"Tokens by the model's entropy and the label's probability, {steps}: {window['tokens']:,} tokens, "
            f"{window['conflicts']:,} of them confident conflicts."
        )
        pictures.append(writer.picture(f"landscape_{name}", landscape_figure(window, steps, most=most), label))
    pictures.append(writer.picture("landscape_gates", gate_figure(gates), "Share of the tokens by gate."))
    words = (
        "The trained tokens by the model's entropy (left: confident) and the probability of the label (top: 1). In the "
        "outlined corner the model was confident of another token. The dashed lines bound the groups of low and high entropy."
    )
    return [PageSection("landscape", "Landscape of the trained tokens", [Text(words), Gallery(pictures)])]


def _samples(folder: Path) -> list[PageSection]:
    samples = read_json(folder / "samples.json")
    if not samples:
        return []
    items = []
    for sample in samples[:_SAMPLES]:
        answers = [("Before", sample["before"]), ("After", sample["after"])]
        shown = [(title, _cut(text) or "(empty)") for title, text in answers if text is not None]
        items.append(Sample(_cut(sample["prompt"]), _cut(sample["reference"] or ""), shown))
    words = "Greedy output of each model. Prompts were selected by their position in the data, not by the output."
    rest = left_out(len(items), len(samples), "prompts", "samples.json")
    return [PageSection("samples", "Samples", [Text(f"{words} {rest}".strip()), Samples(items)])]


def _cut(text: str) -> str:
    return clip(text, _SAMPLE_TEXT, file="samples.json")


def _provenance(folder: Path, run: dict, metrics: list[dict]) -> PageSection:
    recipe, about, data = run["recipe"], run.get("about", {}), run["data"]
    summary = next((row for row in reversed(metrics) if "train_runtime" in row), {})
    pairs = [
        ("Command", about.get("command")),
        ("Finished", about.get("date")),
        ("Hardware", about.get("device")),
        ("Seed", str(_training(recipe)["train"]["seed"])),
        ("Model", recipe["model"]["reference"]),
        ("Method", about.get("method")),
        ("Data", _data_text(data)),
        ("Steps", f"{summary['step']:,} in {number(summary['train_runtime'] / 60, 1)} minutes" if summary else None),
        ("Processes", str(run["processes"])),
        ("Versions", ", ".join(f"{name} {version}" for name, version in run["versions"].items())),
    ]
    recipe_file = folder / "recipe.yaml"
    text = recipe_file.read_text(encoding="utf-8") if recipe_file.is_file() else ""
    return PageSection(
        "run",
        "How it was run",
        [Facts([(name, value) for name, value in pairs if value]), Folded("Full recipe", text.strip())],
    )


def _training(recipe: dict) -> dict:
    """The sections of the run's training: those of its last stage."""
    last = (recipe.get("stages") or ["eaft"])[-1]
    return recipe if last == "eaft" else recipe.get(last) or recipe


def _data_text(data: dict) -> str | None:
    if not data:
        return None
    return f"{data['rows']:,} rows, {data['tokens']:,} tokens, {data['trained_tokens']:,} of them trained"
