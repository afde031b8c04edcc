"""A training run: before and after, curves, landscape, samples, what was run."""

from __future__ import annotations

import math
from pathlib import Path

from eaftdrope.evaluate.scores import scores_from_json
from eaftdrope.files import read_json, read_lines

from ..blocks import Facts, Folded, Gallery, Page, Picture, Sample, Samples, Section, Text
from ..figures.curves import CURVES, curve_figure, gate_over_time, probes_over_time
from ..figures.landscape import gate_figure, joined, landscape_figure
from ..figures.recovery import recovery_figure
from ..render import Drawer
from ..words import arrowed, clip, left_out, number, plural, score_of
from .changes import change_pictures, change_sentence, change_table, pairs_of, probe_section
from .inspection import conflict_sections

_SAMPLES = 12
_SAMPLE_TEXT = 1500
# Of the training, the first and the last of so many parts are put side by side.
_PARTS = 4


def run_page(folder: Path, drawer: Drawer) -> Page:
    """The page of a folder with run.json."""
    run = read_json(folder / "run.json")
    before, after = ([*_scores(folder / f"probes_{when}.json")] for when in ("before", "after"))
    metrics = read_lines(folder / "metrics.jsonl")
    pairs = pairs_of(before, after)
    sections = [
        *_outcome(pairs, drawer),
        *_recovery(folder, drawer),
        *_curves(folder, metrics, pairs, drawer),
        *_landscape(folder, drawer),
        *conflict_sections(read_json(folder / "inspect.json")),
        *_samples(folder),
        _what_was_run(folder, run, metrics),
        *([probe_section(pairs)] if pairs else []),
    ]
    return Page("Training run", folder.resolve().name, _summary(run, pairs), sections)


def _scores(path: Path):
    return scores_from_json(path.read_text(encoding="utf-8")) if path.is_file() else []


def _summary(run: dict, pairs) -> str:
    if run["status"] == "running" and not any(pair.new for pair in pairs):
        return "This run is not finished: what is here was measured until now."
    if not pairs:
        return "Nothing was measured: the recipe has no probes."
    return change_sentence(pairs)


def _outcome(pairs, drawer: Drawer) -> list[Section]:
    if not pairs:
        return []
    return [Section("outcome", "Gained and forgotten", [change_table(pairs), *change_pictures(pairs, drawer)])]


def _recovery(folder: Path, drawer: Drawer) -> list[Section]:
    curve = read_json(folder / "recovery.json")
    if not curve or not curve["points"]:
        return []
    points = [(point["tokens"], point["nll"]) for point in curve["points"]]
    reference = curve["original"]["nll"]
    original, last = math.exp(reference), math.exp(points[-1][1])
    figure = recovery_figure(original=reference, points=points, tokens=curve["measured_tokens"])
    label = (
        f"Perplexity over the tokens of the recalibration, in the end {last:.2f}; the original model, with its rotary "
        f"embedding, has {original:.2f}."
    )
    return [Section("recovery", "Recovery", [Gallery([drawer.picture("recovery", figure, label)])])]


def _curves(folder: Path, metrics: list[dict], pairs, drawer: Drawer) -> list[Section]:
    pictures = []
    for curve in CURVES:
        figure = curve_figure(curve, metrics)
        if figure is not None:
            pictures.append(drawer.picture(f"curve_{curve.name}", figure, curve.words))
    gates = gate_over_time(metrics)
    if gates is not None:
        words = (
            "How the gates are spread over the training: from closed (faint, below 0.1) at the bottom to open (strong, over "
            "0.9) at the top."
        )
        pictures.append(drawer.picture("curve_gates", gates, words))
    pictures += _during(folder, metrics, pairs, drawer)
    return [Section("curves", "Training", [Gallery(pictures)])] if pictures else []


def _during(folder: Path, metrics: list[dict], pairs, drawer: Drawer) -> list[Picture]:
    """The probes that were also measured during training, each with what came before."""
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
            f"{score.metric} during training, on {plural(score.n, 'unit')} (a part of those of before and after); bars "
            "are one standard error, dotted is the first."
        )
        pictures.append(drawer.picture(f"during_{number_:02}_{score.probe}", figure, words))
    return pictures


def _landscape(folder: Path, drawer: Drawer) -> list[Section]:
    windows = [window for window in read_lines(folder / "landscape.jsonl") if window["tokens"]]
    if not windows:
        return []
    ends = [joined(windows)]
    if len(windows) > 1:
        part = max(1, len(windows) // _PARTS)
        ends = [joined(windows[:part]), joined(windows[-part:])]
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
        pictures.append(drawer.picture(f"landscape_{name}", landscape_figure(window, steps, most=most), label))
    pictures.append(drawer.picture("landscape_gates", gate_figure(gates), "Share of the tokens by their gate."))
    words = (
        "Where the trained tokens lay: how sure the model was (left: sure) and what it gave the label (top: all). In the "
        "outlined corner it was sure of something else. The dashed lines bound the groups of low and high entropy."
    )
    return [Section("landscape", "Landscape of the trained tokens", [Text(words), Gallery(pictures)])]


def _samples(folder: Path) -> list[Section]:
    samples = read_json(folder / "samples.json")
    if not samples:
        return []
    items = []
    for sample in samples[:_SAMPLES]:
        answers = [("Before", sample["before"]), ("After", sample["after"])]
        shown = [(title, _cut(text) or "(nothing)") for title, text in answers if text is not None]
        items.append(Sample(_cut(sample["prompt"]), _cut(sample["reference"] or ""), shown))
    words = (
        "The most likely text of each model, for prompts chosen by their place in the data and not by what came out."
    )
    rest = left_out(len(items), len(samples), "prompts", "samples.json")
    return [Section("samples", "Samples", [Text(f"{words} {rest}".strip()), Samples(items)])]


def _cut(text: str) -> str:
    return clip(text, _SAMPLE_TEXT, file="samples.json")


def _what_was_run(folder: Path, run: dict, metrics: list[dict]) -> Section:
    recipe, about, data = run["recipe"], run.get("about", {}), run["data"]
    summary = next((row for row in reversed(metrics) if "train_runtime" in row), {})
    pairs = [
        ("Command", about.get("command")),
        ("Finished", about.get("date")),
        ("Hardware", about.get("device")),
        ("Seed", str(recipe["train"]["seed"])),
        ("Model", recipe["model"]["reference"]),
        ("Method", about.get("method")),
        ("Data", _data_text(data)),
        ("Steps", f"{summary['step']:,} in {number(summary['train_runtime'] / 60, 1)} minutes" if summary else None),
        ("Processes", str(run["processes"])),
        ("Versions", ", ".join(f"{name} {version}" for name, version in run["versions"].items())),
    ]
    recipe_file = folder / "recipe.yaml"
    text = recipe_file.read_text(encoding="utf-8") if recipe_file.is_file() else ""
    return Section(
        "run", "What was run", [Facts([pair for pair in pairs if pair[1]]), Folded("The whole recipe", text.strip())]
    )


def _data_text(data: dict) -> str | None:
    if not data:
        return None
    return f"{data['rows']:,} rows, {data['tokens']:,} tokens, {data['trained_tokens']:,} of them trained"
