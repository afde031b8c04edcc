"""Errors meant for the person at the keyboard: each says what is wrong, where, and what to do about it."""


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
