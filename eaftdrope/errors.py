"""Errors meant for the person at the keyboard: each says what is wrong, where, and what to do about it."""

import unicodedata


class UserError(ValueError):
    """Something the user asked for cannot be honoured. The command line prints it without a traceback, exit code 2."""


class DataError(UserError):
    """A data source or row cannot be used; the text names the file and line (or the row) and the reason."""


class LostTextError(DataError):
    """The rendering of a row lacks something that the row has.

    Args:
        message (`str`): what is lost, why, and what to do about it.
        lost (`tuple[str, ...]`): the path of each lost value (`messages[1].reasoning_content`), for the audit's table.
    """

    def __init__(self, message: str, lost: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.lost = lost


class ChatTemplateError(DataError):
    """The tokenizer's chat template itself is at fault, whatever the row."""


class RecipeError(UserError):
    """A recipe has problems; the text lists every one with its line."""


def raise_problems(problems: list[str]) -> None:
    """Raise one UserError with all problems, if there are any."""
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        raise UserError("\n".join([f"{len(problems)} problems:", *(f"- {problem}" for problem in problems)]))


def printable(text: str, *, lines: bool = False) -> str:
    """`text` with everything escaped that could steer a terminal (`\\x1b`): control and format characters, halves of
    surrogate pairs, separators of lines. What joins emoji stays, and with `lines` line breaks and tabs."""
    if text.isascii() and text.isprintable():
        return text
    kept = "\u200d\n\t" if lines else "\u200d"
    return "".join(
        char if char in kept or unicodedata.category(char) not in _STEERING else char.encode("unicode_escape").decode()
        for char in text
    )


_STEERING = ("Cc", "Cf", "Cs", "Zl", "Zp")
