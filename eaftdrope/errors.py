"""Errors for users: each states what is wrong, where, and what to do about it; and text that is safe to print."""

import unicodedata


class UserError(ValueError):
    """A request that cannot be honoured. The command line prints it without a traceback and exits with code 2."""


class DataError(UserError):
    """A data source or row that cannot be used; the message has the file and line (or the row) and the reason."""


class LostTextError(DataError):
    """A rendering that lacks something that its row has.

    Args:
        message (`str`): what is lost, why, and what to do about it.
        lost (`tuple[str, ...]`): the path of each lost value (`messages[1].reasoning_content`), for the audit's table.
    """

    def __init__(self, message: str, lost: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.lost = lost


class ChatTemplateError(DataError):
    """A fault of the tokenizer's chat template itself, whatever the row."""


class TemplateLimitError(UserError):
    """A chat template that takes too long or too much memory. It is no fault of a row: no further one is rendered."""


class ReportedByAnother(UserError):
    """An error that another process of the launch prints: this one only ends with its exit code."""


class RecipeError(UserError):
    """A recipe with problems; the message lists all of them with their lines."""


def raise_problems(problems: list[str]) -> None:
    """Raise one UserError with all problems, if there are any."""
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        raise UserError("\n".join([f"{len(problems)} problems:", *(f"- {problem}" for problem in problems)]))


# What an installation with `--no-deps` may lack, by the name that is imported, and what to pass to `pip install`.
_PACKAGES = {
    **{
        name: name
        for name in ("accelerate", "datasets", "filelock", "matplotlib", "numpy", "peft", "psutil", "pyarrow")
    },
    **{"jinja2": "jinja2", "trl": "trl", "gguf": "'eaftdrope[gguf]'", "liger_kernel": "'eaftdrope[liger]'"},
    **dict.fromkeys(("pydantic_monty", "bm25s"), "'eaftdrope[rlm]'"),
}


def missing_package(error: ModuleNotFoundError) -> UserError | None:
    """The error for a package that is needed here and not installed; None where the missing module is another one."""
    name = (error.name or "").split(".")[0]
    if name not in _PACKAGES:
        return None
    return UserError(f"{name} is needed here and is not installed: pip install {_PACKAGES[name]}")


def printable(text: str, *, lines: bool = False) -> str:
    """Escape all characters of `text` that could control a terminal (`\\x1b`).

    These are control and format characters, halves of surrogate pairs and line separators. The joiner of emoji is kept, and
    with `lines` line breaks and tabs.
    """
    if text.isascii() and text.isprintable():
        return text
    kept = "\u200d\n\t" if lines else "\u200d"
    return "".join(
        char if char in kept or unicodedata.category(char) not in _ESCAPED else char.encode("unicode_escape").decode()
        for char in text
    )


_ESCAPED = ("Cc", "Cf", "Cs", "Zl", "Zp")
