"""Combinations of keys that cannot work, each with the way out; and the sections that each stage needs.

The checks read the recipe as written, so they all run even when some keys are wrong, and every problem is reported at
once. A value of the wrong type is skipped here: the schema reports it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from eaftdrope.loss.anchor import PRESETS
from eaftdrope.loss.gates import ALL_GATE_OPTIONS, GATE_OPTIONS

from .parallel_section import parallel_problems
from .probe_sections import READ_HELD_OUT
from .stage_sections import STAGE_SECTIONS, STAGES
from .suggest import did_you_mean
from .ttt_section import ttt_problems
from .yaml_lines import Loc, Problem


def combination_problems(raw: Any) -> Iterator[Problem]:
    """Yield a Problem (with `loc`, without a line) for every impossible combination in the recipe's plain data."""
    for loc, text in _all(raw):
        yield Problem(text, loc)


def _all(raw: Any) -> Iterator[tuple[Loc, str]]:
    yield from _training(raw, (), default_gate="eaft")
    for stage in ("pretrain", "recalibrate", "ttt"):
        if isinstance(get(raw, stage), dict):
            # a run of its own, with the same sections under other defaults
            for loc, text in _training(raw[stage], (stage,), default_gate="none"):
                yield (stage, *loc), text
    yield from _replay(raw)
    yield from _lora(raw)
    yield from stage_problems(raw)
    if isinstance(get(raw, "ttt"), dict):
        for loc, text in ttt_problems(raw["ttt"]):
            yield ("ttt", *loc), text
    if isinstance(raw, dict):
        yield from parallel_problems(raw)


def _training(raw: Any, at: Loc, *, default_gate: str) -> Iterator[tuple[Loc, str]]:
    """Problems of the sections of one training, which are at `at` in the recipe; locations are relative to it."""
    yield from _length(raw)
    yield from _schedule(raw)
    yield from _gate_options(raw, default_gate)
    yield from _loss_settings(raw)
    yield from _held_out_needed(raw, ".".join([*map(str, at), "data.held_out"]))
    yield from _same_rows(raw)


def _is_set(raw: Any, *keys: str) -> bool:
    return get(raw, *keys) is not None


def _length(raw: Any) -> Iterator[tuple[Loc, str]]:
    if _is_set(raw, "train", "epochs") and _is_set(raw, "train", "steps"):
        yield (
            ("train", "steps"),
            "epochs and steps are both set, and either one fixes the length of the run. Keep one "
            "(on the command line: train.epochs=null)",
        )


def _schedule(raw: Any) -> Iterator[tuple[Loc, str]]:
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
            f"warm-up and decay are {ratio + decay:g} of the steps together. Lower one of them",
        )
    for key in ("decay_ratio", "min_rate_ratio"):
        if _is_set(raw, "train", key) and get(raw, "train", "scheduler") != "warmup_stable_decay":
            yield (
                ("train", key),
                f"only scheduler warmup_stable_decay reads {key}. Use it, or leave this key out",
            )


def _gate_options(raw: Any, default: str) -> Iterator[tuple[Loc, str]]:
    preset = get(raw, "loss", "preset")
    if isinstance(preset, str) and preset in PRESETS:
        default = PRESETS[preset].gate
    gate = get(raw, "loss", "gate") if isinstance(get(raw, "loss"), dict) and "gate" in raw["loss"] else default
    if not isinstance(gate, str) or gate not in GATE_OPTIONS:
        return
    known = GATE_OPTIONS[gate]
    for option in ALL_GATE_OPTIONS:
        if option in known or not _is_set(raw, "loss", option):
            continue
        takes = f"its options: {', '.join(known)}" if known else "it has none"
        owners = ", ".join(name for name, options in GATE_OPTIONS.items() if option in options)
        hint = did_you_mean(option, known)
        yield ("loss", option), f"gate {gate} has no option {option} ({takes}).{hint} {option} belongs to: {owners}"


def _loss_settings(raw: Any) -> Iterator[tuple[Loc, str]]:
    tail = get(raw, "loss", "tail")
    if tail == "sparse" and get(raw, "loss", "recompute"):
        yield (
            ("loss", "recompute"),
            "recompute forms whole slices of the gradient, tail sparse leaves most columns out. Keep one",
        )
    if tail == "sparse" and (_is_set(raw, "loss", "anchor") or _is_set(raw, "loss", "preset")):
        yield (
            ("loss", "tail"),
            "a sparse tail restores what it drops as one mean, which needs gradients of one sign; those of an anchor have "
            "both. Use tail: exact, or leave the anchor out",
        )
    if _is_set(raw, "loss", "tail_threshold") and tail != "sparse":
        yield (
            ("loss", "tail_threshold"),
            "only tail sparse reads tail_threshold. Set tail: sparse, or leave it out",
        )


def _held_out_needed(raw: Any, key: str) -> Iterator[tuple[Loc, str]]:
    if not isinstance(get(raw, "data"), dict) or get(raw, "data", "held_out") is not None:
        return
    way_out = f"Set {key}: a file, a dataset, or a share of train such as 0.05"
    for name in ("eval_every", "stop_at"):
        if _is_set(raw, "train", name):
            yield ("train", name), f"no rows to evaluate on. {way_out}"
    target = get(raw, "probes", "target")
    for index, entry in enumerate(target if isinstance(target, list) else [target]):
        name = next(iter(entry), None) if isinstance(entry, dict) else entry
        held_out = name in READ_HELD_OUT and get(entry, name, "file") is None
        if held_out or name in ("held_out_loss", "function_calls"):
            loc = ("probes", "target", index) if isinstance(target, list) else ("probes", "target")
            yield loc, f"{name} is measured on held-out rows, and the recipe has none. {way_out}"


def _same_rows(raw: Any) -> Iterator[tuple[Loc, str]]:
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
                "Use other rows, or a share of train such as 0.05",
            )


def _replay(raw: Any) -> Iterator[tuple[Loc, str]]:
    replay = get(raw, "data", "replay")
    if not isinstance(replay, dict):
        return
    is_generated, prompts = replay.get("from", "model") == "model", replay.get("prompts")
    if is_generated and prompts is None:
        yield (
            ("data", "replay"),
            "the model replies to prompts, and there are none. Set data.replay.prompts to a .jsonl file of them (other ones "
            "than the probes measure), or data.replay.from to a file of rows",
        )
    if not is_generated and prompts is not None:
        yield (
            ("data", "replay", "prompts"),
            "rows of a file need no prompts. Leave prompts out, or set from: model",
        )


def _lora(raw: Any) -> Iterator[tuple[Loc, str]]:
    stages = get(raw, "stages")
    stages = stages if isinstance(stages, list) else ["eaft"]
    quantized, has_lora = get(raw, "model", "quantization") == "4bit", _is_set(raw, "lora")
    if quantized and "ttt" in stages and "eaft" not in stages:
        yield (
            ("model", "quantization"),
            "the fast MLPs of the stage ttt are copied from the model's own, which 4-bit weights do not allow. Use none",
        )
    elif quantized and not has_lora:
        yield (
            ("model", "quantization"),
            "4-bit weights cannot be trained. Add a lora section (QLoRA), or quantization: none",
        )
    section = "ttt.lora" if "ttt" in stages else "lora"
    if not _is_set(raw, *section.split(".")) and get(raw, "output", "merge") is True:
        yield (
            ("output", "merge"),
            f"no adapters to merge: without a {section} section the full weights are written anyway. "
            f"Leave merge out, or add {section}",
        )


_LENGTHS = (("tokens",), ("share",), ("train", "steps"), ("train", "epochs"))


def get(raw: Any, *keys: str) -> Any:
    """The value at `keys`; None if the path does not exist."""
    for key in keys:
        raw = raw.get(key) if isinstance(raw, dict) else None
    return raw


def stage_problems(raw: Any) -> Iterator[tuple[Loc, str]]:
    """(location, text) of each problem in the recipe's plain data. The schema reports `stages` of a wrong type."""
    stages = get(raw, "stages")
    if stages is None:
        stages = ["eaft"]
    elif not isinstance(stages, list) or not stages or not all(stage in STAGES for stage in stages):
        return
    yield from _order(stages, is_free=get(raw, "any_order") is True)
    yield from _sections(raw, stages)
    yield from _budget(raw)
    yield from _from_scratch(raw, stages)
    yield from _text_probes(raw)


_OTHER_ORDERS = {("eaft", "drope"), ("eaft", "recalibrate"), ("ttt", "eaft")}
"""Pairs of stages that `any_order` accepts: the first may come before the second."""


def _order(stages: list[str], *, is_free: bool) -> Iterator[tuple[Loc, str]]:
    wanted = f"Write [{', '.join(sorted(set(stages), key=STAGES.index))}]"
    for index, (before, stage) in enumerate(pairwise(stages), start=1):
        late = [other for other in stages[:index] if STAGES.index(other) > STAGES.index(stage)]
        if stage in stages[:index]:
            yield ("stages", index), f"{stage} is listed twice. Keep one"
        elif is_free and not all((other, stage) in _OTHER_ORDERS for other in late):
            yield (
                ("stages", index),
                f"any_order accepts eaft before drope and ttt before eaft, and here {late[0]} comes before {stage}. {wanted}",
            )
        elif not is_free and STAGES.index(stage) < STAGES.index(before):
            yield (
                ("stages", index),
                f"{stage} comes before {before}: a model is dropped, recalibrated, fine-tuned and then made to learn "
                f"as it reads. {wanted}",
            )


def _from_scratch(raw: Any, stages: list[str]) -> Iterator[tuple[Loc, str]]:
    if _is_set(raw, "pretrain", "tokens"):
        for name in ("steps", "epochs"):
            if _is_set(raw, "pretrain", "train", name):
                yield (
                    ("pretrain", "train", name),
                    f"tokens and train.{name} are both set, and either one fixes the length of the pretraining. Keep one",
                )
    if "pretrain" in stages and get(raw, "model", "quantization") == "4bit":
        yield (
            ("model", "quantization"),
            "a model is pretrained in full precision, from random weights. Use quantization: none",
        )
    if "ttt" in stages and "eaft" in stages[stages.index("ttt") :] and get(raw, "data", "packing") is True:
        yield (
            ("data", "packing"),
            "after the stage ttt the model learns as it reads, and packed rows would share what is learned. Leave it out",
        )


def _sections(raw: Any, stages: list[str]) -> Iterator[tuple[Loc, str]]:
    written = get(raw, "stages") is not None
    for name in ("pretrain", "drope", "recalibrate", "ttt"):
        if get(raw, name) is not None and name not in stages:
            where = "is not in stages" if written else "a recipe without `stages` does not have"
            wanted = sorted({name, *stages}, key=STAGES.index)
            yield (
                (name,),
                f"this section belongs to the stage {name}, which {where}. "
                f"Write `stages: [{', '.join(wanted)}]`, or leave the section out",
            )
    for name in ("pretrain", "recalibrate", "ttt"):
        if name in stages and get(raw, name) is None:
            yield (
                ("stages", stages.index(name)),
                f"the stage {name} has no text to train on. Add `{name}: {{data: {{train: text.jsonl}}}}`",
            )
    if "eaft" in stages and get(raw, "data") is None:
        yield ("data",), "missing. What to train on, and what to hold out."
    if "eaft" not in stages:
        for name in STAGE_SECTIONS["eaft"]:
            if get(raw, name) is not None:
                elsewhere = _elsewhere(name, stages)
                yield (
                    (name,),
                    f"this section belongs to the stage eaft, which is not in stages. {elsewhere}"
                    "Add eaft to stages, or leave the section out",
                )


def _elsewhere(name: str, stages: list[str]) -> str:
    """Where a section of eaft belongs in a recipe without that stage."""
    if "ttt" in stages:
        return f"For the stage ttt write ttt.{name}. "
    return f"For the text to recalibrate on write recalibrate.{name}. " if name != "lora" else ""


def _budget(raw: Any) -> Iterator[tuple[Loc, str]]:
    section = get(raw, "recalibrate")
    lengths = [keys for keys in _LENGTHS if get(section, *keys) is not None]
    # the checks of every training report epochs and steps together
    if len(lengths) > 1 and lengths != [("train", "steps"), ("train", "epochs")]:
        names = " and ".join(".".join(keys) for keys in lengths)
        count = "both" if len(lengths) == 2 else "all"
        yield (
            ("recalibrate", *lengths[-1]),
            f"{names} are {count} set, and any one of them fixes the length of the recalibration. Keep one",
        )
    share, pretraining = get(section, "share"), get(section, "pretraining_tokens")
    if share is not None and pretraining is None:
        yield (
            ("recalibrate", "share"),
            "a share of how many tokens? Set pretraining_tokens, such as 600.0e+9, or tokens instead",
        )
    if pretraining is not None and share is None:
        yield ("recalibrate", "pretraining_tokens"), "nothing reads this without share. Set share, such as 0.02"


def _text_probes(raw: Any) -> Iterator[tuple[Loc, str]]:
    for stage, what in {
        "pretrain": "pretraining",
        "recalibrate": "a recalibration",
        "ttt": "sequences: blocks",
    }.items():
        if stage == "ttt" and get(raw, "ttt", "data", "sequences") == "rows":
            continue
        target = get(raw, stage, "probes", "target")
        for index, entry in enumerate(target if isinstance(target, list) else [target]):
            name = next(iter(entry), None) if isinstance(entry, dict) else entry
            conversations = name == "function_calls" or (name in READ_HELD_OUT and get(entry, name, "file") is None)
            if conversations and get(raw, stage, "data", "held_out") is not None:
                loc = ("target", index) if isinstance(target, list) else ("target",)
                yield (
                    (stage, "probes", *loc),
                    f"{name} needs conversations, and {what} holds out text. Put it under probes.target of "
                    "the stage eaft",
                )
