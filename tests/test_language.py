"""Plain English in the field's standard terms: phrases that the glossary of CONTRIBUTING.md replaces do not come back."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# "nats a token", "a line a cell": after a unit or a number word, "a" stands for "per"
UNITS = "token|row|step|second|layer|line|verb|stage|model|cell|gate|seed|device|process|symbol|metric|file"
COUNTED = r"(?:\d[\d,.]*|one|two|three|four|several|many|few|nats|bits|bytes|tokens|rows|steps|seconds|ms|ns|MB|GB|KB)"
FUNCTION_WORDS = (
    "(?:without|of|that|where|when|in|with|has|had|is|are|was|and|or|to|at|for|than|from|on|by|as|if|but|into|like|is)"
)
FOLLOWING = "of|in|at|that|which|to|with|is|for"
THINGS = "model|checkpoint|file|recipe|program|tokenizer|template|configuration|config|folder|row|library"
BANNED = {
    r"can not\b": "cannot",
    r"\banew\b|\bafresh\b": "again, from scratch, over",
    rf"\b{COUNTED} (?:(?!{FUNCTION_WORDS}\b)[a-z]+ )?an? (?:{UNITS})\b(?! (?:{FOLLOWING}))": "per token, per row, ...",
    r"\b(?:go|goes|going|gone|went) on (?:with|from|where|after)\b": "resume, continue",
    r"\bthe processor\b|\bprocessor time\b|\bon a processor\b": "the CPU, CPU time",
    r"\bthere is none\b|\bis none of\b": "no ..., is not a ...",
    r"\bof ours\b|\bstrangers'|\banybody else": "not written by eaftdrope",
    r"\bgradients? by (?:the|a) (?!step|hand|finite)": "gradient with respect to",
    rf"\b(?:{THINGS}) (?:says|said|tells|told|asks|asked|knows|knew)\b": "states, reports, requires, contains",
    r"\bno way to\b": "cannot",
    r"(?<=\. )(?:Take|Name|Say) (?:a|an|the|it|another|one)\b": "Use, Choose, Pass, Set",
}
# the glossary itself, the log of the past, and what quotes others
EXEMPT = {"CONTRIBUTING.md"}


def texts() -> list[Path]:
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]
    found += [*(ROOT / "eaftdrope").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "cuda").rglob("*.py")]
    found += [
        *(ROOT / "recipes").rglob("*.yaml"),
        *(ROOT / "examples").rglob("*.py"),
        *(ROOT / "examples").rglob("*.md"),
    ]
    return sorted(path for path in found if path.name not in EXEMPT)


def banned_in(text: str) -> list[str]:
    """Each banned phrase with its line and what to write instead; a phrase may be broken over two lines."""
    joined = re.sub(r"\n[ \t]*(?:#[ \t]?|//[ \t]?)?", " ", text)
    found = []
    for pattern, better in BANNED.items():
        for match in re.finditer(pattern, joined):
            found.append(
                f"'{match.group(0)}' (write: {better}) in '...{joined[max(0, match.start() - 30) : match.end() + 20]}'"
            )
    return found


@pytest.mark.parametrize("path", texts(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_banned_phrase(path):
    assert not (found := banned_in(path.read_text(encoding="utf-8"))), "\n".join(found)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("It can not work.", 1),
        ("two nats a token", 1),
        ("one file a\n# verb", 1),
        ("one of a layer, tokens that a model answers", 0),
        ("The same command goes on\n    with a run", 1),
        ("the gradient by the logits", 1),
        ("the file says so", 1),
        ("Wrong. Take another one.", 1),
        ("per token, again, on the CPU; cannot; resume", 0),
    ],
)
def test_the_phrases_are_found(text, count):
    assert len(banned_in(text)) == count
