"""Checked metrics for continuous integration: a JUnit file, and GitHub's annotations.

In JUnit every checked metric is a test case: worse is a failure, not enough evidence is skipped with its reason. GitHub shows
a line `::error title=...::...` of a log beside the change that caused it
(https://docs.github.com/actions/reference/workflow-commands-for-github-actions).
"""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree

from eaftdrope.errors import printable

from ..verdicts import UNDECIDED, WORSE
from .regressions import CheckedMetric

_LEVELS = {WORSE: "error", UNDECIDED: "warning"}


def junit_xml(checked: Sequence[CheckedMetric]) -> str:
    """Return a JUnit document with one suite per model."""
    root = ElementTree.Element("testsuites", _counts(checked))
    for model in dict.fromkeys(one.model for one in checked):
        own = [one for one in checked if one.model == model]
        name = printable(f"{model} against {own[0].base}")
        suite = ElementTree.SubElement(root, "testsuite", {"name": name, **_counts(own)})
        for one in own:
            # viewers group cases by class; a metric has no code, so its probe is the class
            case = ElementTree.SubElement(
                suite, "testcase", {"classname": one.change.before.probe, "name": printable(one.metric), "time": "0"}
            )
            tag = {WORSE: "failure", UNDECIDED: "skipped"}.get(one.word, "system-out")
            message = printable(one.text)
            if tag == "system-out":
                ElementTree.SubElement(case, tag).text = message
            else:
                ElementTree.SubElement(case, tag, {"message": message}).text = message
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _counts(checked: Sequence[CheckedMetric]) -> dict[str, str]:
    words = [one.word for one in checked]
    counts = {"tests": len(words), "failures": words.count(WORSE), "skipped": words.count(UNDECIDED), "errors": 0}
    return {name: str(count) for name, count in counts.items()}


def github_annotations(checked: Sequence[CheckedMetric]) -> list[str]:
    """Return a line for each metric that is worse (an error) or without enough evidence (a warning)."""
    return [
        f"::{_LEVELS[one.word]} title={_escaped(f'{one.metric} of {one.model}', ',:')}::{_escaped(one.text)}"
        for one in checked
        if one.word in _LEVELS
    ]


def _escaped(text: str, more: str = "") -> str:
    """Escape what ends a value in GitHub's commands, as its own toolkit does."""
    for char in "%\r\n" + more:
        text = text.replace(char, f"%{ord(char):02X}")
    return text
