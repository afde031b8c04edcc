"""Errors meant for the person at the keyboard: each says what is wrong, where, and what to do about it."""


class UserError(ValueError):
    """Something the user asked for cannot be honoured. The command line prints it without a traceback, exit code 2."""


class DataError(UserError):
    """A data source or row cannot be used; the text names the file and line (or the row) and the reason."""


class RecipeError(UserError):
    """A recipe has problems; the text lists every one with its line."""
