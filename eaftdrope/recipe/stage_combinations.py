"""What the stages of a recipe ask of its sections, read as written: each stage its own, no section without its stage."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from .probes import GENERATED
from .stage_sections import STAGES
from .yaml_lines import Loc

_EAFT_SECTIONS = ("data", "loss", "lora", "train", "probes")
_LENGTHS = (("tokens",), ("share",), ("train", "steps"), ("train", "epochs"))


def get(raw: object, *keys: str) -> object:
    """The value at `keys`, or None where the path does not exist."""
    for key in keys:
        raw = raw.get(key) if isinstance(raw, dict) else None
    return raw


def stage_problems(raw: object) -> Iterator[tuple[Loc, str]]:
    """(location, text) of each problem in the recipe's plain data. `stages` of a wrong type is the schema's to tell."""
    stages = get(raw, "stages")
    if stages is None:
        stages = ["eaft"]
    elif not isinstance(stages, list) or not stages or not all(stage in STAGES for stage in stages):
        return
    yield from _order(stages)
    yield from _sections(raw, stages)
    yield from _budget(raw)
    yield from _text_probes(raw)


def _order(stages: list[str]) -> Iterator[tuple[Loc, str]]:
    for index, (before, stage) in enumerate(pairwise(stages), start=1):
        if stage in stages[:index]:
            yield ("stages", index), f"{stage} is there twice. Keep one"
        elif STAGES.index(stage) < STAGES.index(before):
            yield (
                ("stages", index),
                f"{stage} comes before {before}: a model is dropped, recalibrated and then fine-tuned. "
                f"Write [{', '.join(sorted(set(stages), key=STAGES.index))}]",
            )


def _sections(raw, stages: list[str]) -> Iterator[tuple[Loc, str]]:
    written = get(raw, "stages") is not None
    for name in ("drope", "recalibrate"):
        if get(raw, name) is not None and name not in stages:
            where = "stages does not name" if written else "a recipe without `stages` does not have"
            wanted = sorted({name, *stages}, key=STAGES.index)
            yield (
                (name,),
                f"this section belongs to the stage {name}, which {where}. "
                f"Write `stages: [{', '.join(wanted)}]`, or leave the section out",
            )
    if "recalibrate" in stages and get(raw, "recalibrate") is None:
        yield (
            ("stages", stages.index("recalibrate")),
            "the stage recalibrate has no text to train on. Add `recalibrate: {data: {train: text.jsonl}}`",
        )
    if "eaft" in stages and get(raw, "data") is None:
        yield ("data",), "missing. What to train on, and what to hold out."
    if "eaft" not in stages:
        for name in _EAFT_SECTIONS:
            if get(raw, name) is not None:
                elsewhere = f"For the text to recalibrate on write recalibrate.{name}. " if name != "lora" else ""
                yield (
                    (name,),
                    f"this section belongs to the stage eaft, which stages does not name. {elsewhere}"
                    "Add eaft to stages, or leave the section out",
                )


def _budget(raw) -> Iterator[tuple[Loc, str]]:
    section = get(raw, "recalibrate")
    lengths = [keys for keys in _LENGTHS if get(section, *keys) is not None]
    # epochs and steps together are told by the checks of every training
    if len(lengths) > 1 and lengths != [("train", "steps"), ("train", "epochs")]:
        names = " and ".join(".".join(keys) for keys in lengths)
        count = "both" if len(lengths) == 2 else "all"
        yield (
            ("recalibrate", *lengths[-1]),
            f"{names} are {count} set, and each alone fixes the length of the recalibration. Keep one",
        )
    share, pretraining = get(section, "share"), get(section, "pretraining_tokens")
    if share is not None and pretraining is None:
        yield (
            ("recalibrate", "share"),
            "a share of how many tokens? Set pretraining_tokens, such as 600.0e+9, or tokens instead",
        )
    if pretraining is not None and share is None:
        yield ("recalibrate", "pretraining_tokens"), "nothing reads this without share. Set share, such as 0.02"


def _text_probes(raw) -> Iterator[tuple[Loc, str]]:
    target = get(raw, "recalibrate", "probes", "target")
    for index, entry in enumerate(target if isinstance(target, list) else [target]):
        name = next(iter(entry), None) if isinstance(entry, dict) else entry
        conversations = name == "function_calls" or (name in GENERATED and get(entry, name, "file") is None)
        if conversations and get(raw, "recalibrate", "data", "held_out") is not None:
            loc = ("target", index) if isinstance(target, list) else ("target",)
            yield (
                ("recalibrate", "probes", *loc),
                f"{name} needs conversations, and a recalibration holds out text. Put it under probes.target of "
                "the stage eaft",
            )
