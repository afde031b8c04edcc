"""What no single key can tell: combinations that cannot work, each with the way out.

The checks read the recipe as written, so they all run even when some keys are wrong, and every problem is reported at
once. A value of the wrong type is passed over here: the schema has already said so.
"""

from __future__ import annotations

from collections.abc import Iterator

from .gates import ALL_GATE_OPTIONS, GATE_OPTIONS
from .probes import GENERATED
from .stage_combinations import get, stage_problems
from .suggest import did_you_mean
from .yaml_lines import Loc, Problem


def combination_problems(raw: object) -> Iterator[Problem]:
    """Yields a Problem (with `loc`, without a line) for every impossible combination in the recipe's plain data."""
    for loc, text in _all(raw):
        yield Problem(text, loc)


def _all(raw: object) -> Iterator[tuple[Loc, str]]:
    yield from _training(raw, (), default_gate="eaft")
    if isinstance(get(raw, "recalibrate"), dict):
        # a run of its own, with the same sections under other defaults
        for loc, text in _training(raw["recalibrate"], ("recalibrate",), default_gate="none"):
            yield ("recalibrate", *loc), text
    yield from _lora(raw)
    yield from stage_problems(raw)


def _training(raw: object, at: Loc, *, default_gate: str) -> Iterator[tuple[Loc, str]]:
    """Problems of the sections of one training, which stand at `at` in the recipe; locations are from there."""
    yield from _length(raw)
    yield from _schedule(raw)
    yield from _gate_options(raw, default_gate)
    yield from _loss_settings(raw)
    yield from _held_out_needed(raw, ".".join((*at, "data.held_out")))
    yield from _same_rows(raw)


def _is_set(raw: object, *keys: str) -> bool:
    return get(raw, *keys) is not None


def _length(raw) -> Iterator[tuple[Loc, str]]:
    if _is_set(raw, "train", "epochs") and _is_set(raw, "train", "steps"):
        yield (
            ("train", "steps"),
            "epochs and steps are both set, and each alone fixes the length of the run. Keep one "
            "(on the command line: train.epochs=null)",
        )


def _schedule(raw) -> Iterator[tuple[Loc, str]]:
    ratio, steps = get(raw, "train", "warmup_ratio"), get(raw, "train", "warmup_steps")
    if ratio is not None and steps is not None:
        yield ("train", "warmup_steps"), "warmup_ratio and warmup_steps are both set. Keep one"
    if get(raw, "train", "scheduler") == "constant" and (ratio or steps):
        key = "warmup_ratio" if ratio else "warmup_steps"
        yield (
            ("train", key),
            "scheduler constant has no warm-up and would ignore this. "
            "Use scheduler constant_with_warmup, or leave this key out",
        )
    decay = get(raw, "train", "decay_ratio")
    if all(isinstance(share, float) for share in (ratio, decay)) and ratio + decay > 1:
        yield (
            ("train", "decay_ratio"),
            f"warming up and decaying take {ratio + decay:g} of the steps. Lower one of them",
        )
    for key in ("decay_ratio", "min_rate_ratio"):
        if _is_set(raw, "train", key) and get(raw, "train", "scheduler") != "warmup_stable_decay":
            yield (
                ("train", key),
                f"{key} is read by scheduler warmup_stable_decay alone. Use it, or leave this key out",
            )


def _gate_options(raw, default: str) -> Iterator[tuple[Loc, str]]:
    gate = get(raw, "loss", "gate") if isinstance(get(raw, "loss"), dict) and "gate" in raw["loss"] else default
    if not isinstance(gate, str) or gate not in GATE_OPTIONS:
        return
    known = GATE_OPTIONS[gate]
    for option in ALL_GATE_OPTIONS:
        if option in known or not _is_set(raw, "loss", option):
            continue
        takes = f"it takes: {', '.join(known)}" if known else "it takes none"
        owners = ", ".join(name for name, options in GATE_OPTIONS.items() if option in options)
        hint = did_you_mean(option, known)
        yield ("loss", option), f"gate {gate} has no option {option} ({takes}).{hint} {option} belongs to: {owners}"


def _loss_settings(raw) -> Iterator[tuple[Loc, str]]:
    tail = get(raw, "loss", "tail")
    if tail == "sparse" and get(raw, "loss", "recompute"):
        yield (
            ("loss", "recompute"),
            "recompute forms whole slices of the gradient, tail sparse leaves most columns out. Keep one",
        )
    if _is_set(raw, "loss", "tail_threshold") and tail != "sparse":
        yield (
            ("loss", "tail_threshold"),
            "tail_threshold is read by tail sparse alone. Set tail: sparse, or leave it out",
        )


def _held_out_needed(raw, key: str) -> Iterator[tuple[Loc, str]]:
    if not isinstance(get(raw, "data"), dict) or get(raw, "data", "held_out") is not None:
        return
    way_out = f"Set {key}: a file, a dataset, or a share of train such as 0.05"
    if _is_set(raw, "train", "eval_every"):
        yield ("train", "eval_every"), f"there is nothing to evaluate on. {way_out}"
    target = get(raw, "probes", "target")
    for index, entry in enumerate(target if isinstance(target, list) else [target]):
        name = next(iter(entry), None) if isinstance(entry, dict) else entry
        held_out = name in GENERATED and get(entry, name, "file") is None
        if held_out or name in ("held_out_loss", "function_calls"):
            loc = ("probes", "target", index) if isinstance(target, list) else ("probes", "target")
            yield loc, f"{name} is measured on held-out rows, and there are none. {way_out}"


def _same_rows(raw) -> Iterator[tuple[Loc, str]]:
    def rows(value) -> list[tuple[object, object, object]]:
        entries = value if isinstance(value, list) else [value]
        mappings = [{"path": entry} if isinstance(entry, str) else entry for entry in entries]
        return [
            (entry["path"], entry.get("split", "train"), entry.get("name"))
            for entry in mappings
            if isinstance(entry, dict) and isinstance(entry.get("path"), str)
        ]

    train = rows(get(raw, "data", "train"))
    for path, split, name in rows(get(raw, "data", "held_out")):
        if (path, split, name) in train:
            yield (
                ("data", "held_out"),
                f"'{path}' (split {split}) is trained on as well, so the held-out loss would measure memory. "
                "Name other rows, or a share of train such as 0.05",
            )


def _lora(raw) -> Iterator[tuple[Loc, str]]:
    if _is_set(raw, "lora"):
        return
    if get(raw, "model", "quantization") == "4bit":
        yield (
            ("model", "quantization"),
            "4-bit weights cannot be trained themselves. Add a lora section (QLoRA), or quantization: none",
        )
    if get(raw, "output", "merge") is True:
        yield (
            ("output", "merge"),
            "there are no adapters to merge: without a lora section the full weights are written anyway. "
            "Leave merge out, or add lora",
        )
