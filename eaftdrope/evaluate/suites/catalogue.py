"""The suites of `eaftdrope eval --suite`: named parts, each a probe with its options and its data.

| part                     | probe           | data, unless set with `--data PART=FILE`                         |
|--------------------------|-----------------|------------------------------------------------------------------|
| general: perplexity      | perplexity      | the opening of a novel, shipped                                  |
|          multiple_choice | multiple_choice | questions, shipped                                               |
|          instructions    | instructions    | instructions, shipped                                            |
|          agreement       | agreement       | prompts, shipped; needs a base model                             |
| medical: pubmedqa        | yes_no_maybe    | qiaojin/PubMedQA, the labelled part                              |
|          medqa           | multiple_choice | GBaker/MedQA-USMLE-4-options, test                               |
| math:    gsm8k           | numeric_answers | openai/gsm8k, test                                               |
| tool_use: calls          | function_calls  | package:bfcl, test                                               |
| behaviour: format_keeping | format_keeping | stated formats, built in                                         |
|          verbosity       | verbosity       | prompts and questions, shipped                                   |
|          language_drift  | language_drift  | questions in eight languages, shipped                            |
|          turn_consistency | turn_consistency | pairs of turns, built in; needs a chat template                |
|          call_refusal    | call_refusal    | bfcl-eval's irrelevance rows; needs a chat template              |
| recall:  long_recall     | long_recall     | needles in the shipped text, at 1, 2 and 4 times 1,024 tokens    |

`medical:pubmedqa` is only that part, `lm-eval:mmlu` a task of lm-eval; names after it are lm-eval's too, up to the next
suite. The suites are for following a model, not for a leaderboard: few rows, one prompt, greedy answers.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eaftdrope.data import Row, Source, check_source, iter_examples, iter_rows
from eaftdrope.errors import DataError, UserError
from eaftdrope.files import usable_path

from ..probes.base import Probe
from ..probes.build import build_probes
from ..probes.multiple_choice import MultipleChoiceProbe, Question
from ..texts import evenly_spaced

LM_EVAL = "lm-eval"
# Preferred in this order if several files of a folder have a part's name.
_SPLITS = ("test", "validation", "valid", "dev", "eval")


@dataclass(frozen=True)
class Part:
    """A part of a suite.

    Attributes:
        name, group: the part's; the group is that of the probe.
        probe, options: a probe of `PROBES` with all of its options, which are the suite's own.
        rows: what a file for the part must contain, for messages; "" if the part takes no file.
        source: the data that is read without a file.
        option: the probe's own option for a file, if it has one.
    """

    name: str
    probe: str
    group: str
    options: dict[str, Any]
    rows: str = ""
    source: Source | None = None
    option: str | None = None


@dataclass(frozen=True)
class Selection:
    """The content of --suite: the parts of each suite, in order, and the tasks of lm-eval."""

    parts: dict[str, list[Part]] = field(default_factory=dict)
    tasks: list[str] = field(default_factory=list)


_CHAT = "rows with messages, or with question and answer"
SUITES = {
    "general": (
        Part(
            "perplexity",
            "perplexity",
            "general",
            {"files": None, "max_tokens": 8192},
            "text, or JSONL with text",
            option="files",
        ),
        Part(
            "multiple_choice",
            "multiple_choice",
            "general",
            {"file": None, "limit": None},
            "JSONL with question, choices and answer (an index)",
            option="file",
        ),
        Part("instructions", "instructions", "general", {"limit": None, "max_new_tokens": 160}),
        Part(
            "agreement",
            "agreement",
            "general",
            {"file": None, "limit": None, "max_tokens": 1024, "max_new_tokens": 32},
            "JSONL with prompt or messages",
            option="file",
        ),
    ),
    "medical": (
        Part(
            "pubmedqa",
            "yes_no_maybe",
            "target",
            {"file": None, "limit": 100, "max_new_tokens": 16},
            "rows in PubMedQA's form, or with messages whose last one begins with yes, no or maybe",
            Source("qiaojin/PubMedQA", name="pqa_labeled"),
        ),
        Part(
            "medqa",
            "multiple_choice",
            "target",
            {"limit": 100},
            "rows with question, choices (or options) and answer (or answer_idx)",
            Source("GBaker/MedQA-USMLE-4-options", split="test"),
        ),
    ),
    "math": (
        Part(
            "gsm8k",
            "numeric_answers",
            "target",
            {"file": None, "limit": 100, "max_new_tokens": 256},
            f"{_CHAT} that ends with a number",
            Source("openai/gsm8k", split="test", name="main"),
        ),
    ),
    "tool_use": (
        Part(
            "calls",
            "function_calls",
            "target",
            {"limit": 64, "max_new_tokens": 128},
            "rows with messages, the last one with tool_calls, and tools",
            Source("package:bfcl", split="test"),
        ),
    ),
    "behaviour": (
        Part("format_keeping", "format_keeping", "general", {"limit": None, "max_new_tokens": 48}),
        Part("verbosity", "verbosity", "general", {"limit": 100, "max_new_tokens": 128}),
        Part("language_drift", "language_drift", "general", {"limit": None, "max_new_tokens": 32}),
        Part("turn_consistency", "turn_consistency", "general", {"limit": None, "max_new_tokens": 32}),
        Part(
            "call_refusal",
            "call_refusal",
            "general",
            {"file": None, "limit": 100, "max_new_tokens": 48},
            "JSONL with messages and tools that no call answers",
            option="file",
        ),
    ),
    "recall": (Part("long_recall", "long_recall", "general", {"length": 1024, "multiples": [1, 2, 4], "trials": 100}),),
}
_WITH_FILE = {part.name: part for parts in SUITES.values() for part in parts if part.rows}


def parse_suites(text: str) -> Selection:
    """Parse `general,medical:pubmedqa,lm-eval:mmlu,ifeval`.

    Raises:
        UserError: a name that is not a suite, a part or a task of lm-eval, or an empty list.
    """
    wanted, after_lm_eval = Selection(), False
    for name in filter(None, (word.strip() for word in text.split(","))):
        suite, _, part = name.partition(":")
        if suite == LM_EVAL or (after_lm_eval and suite not in SUITES):
            task = part if suite == LM_EVAL else name
            if not task:
                raise UserError(f"--suite {name}: no task after lm-eval:. Add some, such as lm-eval:mmlu,ifeval.")
            after_lm_eval = True
            if task not in wanted.tasks:
                wanted.tasks.append(task)
            continue
        after_lm_eval = False
        if suite not in SUITES:
            raise UserError(f"--suite {name}: no such suite.{_nearest(suite, [*SUITES, LM_EVAL])} {_choices()}")
        names = [found.name for found in SUITES[suite]]
        if part and part not in names:
            raise UserError(
                f"--suite {name}: {suite} has no such part.{_nearest(part, names)} Its parts: {', '.join(names)}."
            )
        chosen = wanted.parts.setdefault(suite, [])
        taken = [part] if part else names
        chosen += [found for found in SUITES[suite] if found.name in taken and found not in chosen]
    if not wanted.parts and not wanted.tasks:
        raise UserError(f"--suite is empty. {_choices()}")
    return wanted


def find_data(given: Iterable[str], wanted: Selection) -> dict[str, Path]:
    """Return the files of --data, by the names of their parts.

    `PART=FILE` is for that part; `FILE` for the part whose name its own name contains; in a folder, such files are found
    automatically: of several, the one that also has "test" (or validation, dev, eval) in its name is used.

    Raises:
        UserError: no such file, or its name contains the name of no part.
    """
    parts = [part for chosen in wanted.parts.values() for part in chosen if part.rows]
    found: dict[str, Path] = {}
    for word in given:
        name, equals, path = word.partition("=")
        if equals and name in _WITH_FILE:
            found[name] = _existing(Path(path), word)
            continue
        place = usable_path(word)
        if place.is_dir():
            inside = sorted(file for file in place.iterdir() if file.is_file())
            matches = {part.name: _named_after(part.name, inside, word) for part in parts}
            found |= {name: file for name, file in matches.items() if file is not None and name not in found}
            continue
        file = _existing(place, word)
        names = [name for name in _WITH_FILE if _has_name(name, file)]
        if len(names) != 1:
            raise UserError(
                f"--data {word}: for which part of a suite? Write PART=FILE, with one of {', '.join(_WITH_FILE)}."
            )
        found[names[0]] = file
    if unused := [name for name in found if name not in {part.name for part in parts}]:
        suite = next(suite for suite, chosen in SUITES.items() if any(part.name == unused[0] for part in chosen))
        raise UserError(f"--data: {unused[0]} is not part of --suite. Add {suite}:{unused[0]}, or leave the file out.")
    return found


def build_part(suite: str, part: Part, file: Path | None, limit: int | None) -> Probe:
    """Build the probe of a part; its rows are read from `file`, or from the part's own source.

    Raises:
        UserError: the data is not available, or has no row that the probe can use; the message has the way out.
    """
    options = dict(part.options)
    if limit is not None and "limit" in options:
        options["limit"] = limit
    if part.source is None:
        if file is not None:
            assert part.option is not None, "only parts with an option take a file"
            options[part.option] = [str(file)] if part.option == "files" else str(file)
        (probe,) = build_probes([(part.probe, part.group, options)])
        return probe
    source = part.source if file is None else Source(str(file))
    try:
        if problem := check_source(source):
            raise DataError(problem)
        if part.probe == "multiple_choice":
            questions = [_question(row) for row in iter_rows(source)]
            return MultipleChoiceProbe(evenly_spaced(questions, options["limit"]), part.group)
        (probe,) = build_probes([(part.probe, part.group, options)], held_out_examples=list(iter_examples(source)))
        return probe
    except UserError as error:
        others = [other.name for other in SUITES[suite] if other is not part]
        without = f", or pass only --suite {','.join(f'{suite}:{name}' for name in others)}" if others else ""
        raise UserError(
            f"{suite}:{part.name} cannot be measured: {error}\n  Pass a file with --data {part.name}=FILE "
            f"({part.rows}){without}."
        ) from error


def _question(row: Row) -> Question:
    """Return a row of a published set of questions: choices in a list or by letter, the answer as index or letter."""
    if row.error is not None:
        raise DataError(f"{row.origin}: {row.error}")
    data = row.data
    choices, answer = data.get("choices", data.get("options")), data.get("answer_idx", data.get("answer"))
    if isinstance(choices, dict) and "label" in choices:
        choices = dict(zip(choices["label"], choices["text"]))
    if isinstance(choices, dict):
        answer = list(choices).index(answer) if answer in choices else answer
        choices = list(choices.values())
    match data.get("question"), choices, answer:
        case str(question), [str(), str(), *_], int(index) if 0 <= index < len(choices) and all(choices):
            return Question(question, tuple(choices), index)
    raise DataError(f"{row.origin}: not a question with choices and the index or letter of the right one.")


def _existing(file: Path, word: str) -> Path:
    file = usable_path(file)
    if not file.is_file():
        raise UserError(f"--data {word}: no such file.")
    return file


def _named_after(name: str, files: list[Path], word: str) -> Path | None:
    """Return the file of a folder whose name contains `name`; None if there is no such file."""
    matches = [file for file in files if _has_name(name, file)]
    for split in _SPLITS:
        of_split = [file for file in matches if _has_name(split, file)]
        matches = of_split or matches
    if len(matches) > 1:
        names = ", ".join(file.name for file in matches)
        raise UserError(f"--data {word}: several files are named {name}: {names}. Choose one: --data {name}=FILE.")
    return matches[0] if matches else None


def _has_name(name: str, file: Path) -> bool:
    return re.search(rf"(?<![a-z0-9]){name}(?![a-z0-9])", file.stem.lower()) is not None


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]}?" if close else ""


def _choices() -> str:
    return (
        f"Suites: {', '.join(SUITES)}; one part of them, such as general:perplexity; tasks of lm-eval as lm-eval:TASK."
    )
