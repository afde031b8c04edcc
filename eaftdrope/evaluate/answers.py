"""What an answer says, and whether it is right: the rules of the probes that read generated text.

Numbers, as the graders of GSM8K read them:

- the number after the last "####", else the one in the last \\boxed{...}, else the last number of the text;
- "1,234" is 1234, "$3.50" is 3.5, "18 %" is 18, "-5" is minus five but "8-5" ends in five; a full stop that ends a sentence
  is no part of a number;
- "3/4", "\\frac{3}{4}" and "1 1/2" are fractions with their value; two numbers are the same if their values are equal.

Exact answers are compared as SQuAD does: in lower case, without punctuation, without a, an and the, one blank between words.

Yes, no or maybe is the first of these words in the answer, in any case.

A model that thinks first is read after its last `</think>`; one that never comes out of thinking has not answered.
"""

from __future__ import annotations

import re
import string
from fractions import Fraction

LABELS = ("yes", "no", "maybe")
_LABEL = re.compile(rf"\b({'|'.join(LABELS)})\b", re.IGNORECASE)
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
# A sign is one only where nothing stands before it that could be subtracted from; a currency may stand on either side of it.
_NUMBER = re.compile(
    rf"(?:(?<![\w).])(?P<sign>-)\s?)?[$€£]?(?P<minus>(?<=[$€£])-)?"
    rf"(?:(?P<whole>{_DIGITS})\s+(?=\d+/\d))?"
    rf"(?:(?P<numerator>{_DIGITS})\s?/\s?(?P<denominator>\d+)(?![\d/])|(?P<plain>{_DIGITS}(?:\.\d+)?|\.\d+))"
)
_FRAC = re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}")
_BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def final_part(answer: str) -> str:
    """The answer without the thinking before it; "" where the thinking did not end."""
    _, ended, tail = answer.rpartition("</think>")
    if ended:
        return tail
    return "" if "<think>" in answer else answer


def number_said(answer: str) -> Fraction | None:
    """The number that an answer ends up with, None where it has none."""
    text = final_part(answer).replace("−", "-")
    if "####" in text:
        return _first_number(text.rpartition("####")[2])
    boxed = _BOXED.findall(text)
    numbers = _numbers(boxed[-1] if boxed else text)
    return numbers[-1] if numbers else None


def normalised(answer: str) -> str:
    """An answer as exact answers are compared."""
    text = final_part(answer).lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def label_said(answer: str) -> str | None:
    """ "yes", "no" or "maybe", whichever comes first; None where none does."""
    found = _LABEL.search(final_part(answer))
    return found[1].lower() if found else None


def _first_number(text: str) -> Fraction | None:
    numbers = _numbers(text)
    return numbers[0] if numbers else None


def _numbers(text: str) -> list[Fraction]:
    values = (_value(match) for match in _NUMBER.finditer(_FRAC.sub(r"\1/\2", text)))
    return [value for value in values if value is not None]


def _value(match: re.Match[str]) -> Fraction | None:
    if len(match[0]) > 100:
        # a model that repeats itself, not a number
        return None
    parts = {name: part and part.replace(",", "") for name, part in match.groupdict().items()}
    if parts["plain"] is not None:
        value = Fraction(parts["plain"])
    elif int(parts["denominator"]) == 0:
        return None
    else:
        value = Fraction(int(parts["numerator"]), int(parts["denominator"])) + int(parts["whole"] or 0)
    return -value if parts["sign"] or parts["minus"] else value
