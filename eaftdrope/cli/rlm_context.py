"""The files of `eaftdrope rlm ask` as a context: one text, or a list of documents."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import TYPE_CHECKING

from eaftdrope.errors import UserError, raise_problems
from eaftdrope.files import usable_path

if TYPE_CHECKING:
    from eaftdrope.rlm.protocol import Context

JOURNALS = Path("runs") / "rlm"
"""Where `ask` writes, unless a journal is chosen."""

# of files that are not text: this many are listed
_PROBLEMS = 10


def read_context(patterns: list[str], journal: Path | None = None) -> Context:
    """Read the files of `rlm ask`: one file is a text, several are a list of documents in the order of their paths.

    What `ask` itself writes below a folder is left out, or the same command would be another question.

    Args:
        journal: the file of `--journal`.

    Raises:
        UserError: nothing matches, or a file is not text.
    """
    found: list[Path] = []
    for pattern in patterns:
        path = usable_path(pattern)
        if path.is_file():
            matching = [path]
        elif path.is_dir():
            matching = [file for file in path.rglob("*") if file.is_file() and not _is_hidden(file, path)]
        else:
            matching = [Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()]
        if not path.is_file():
            matching = sorted(file for file in matching if not _is_own(file, journal))
        if not matching:
            raise UserError(f"{pattern}: no such file, and no file matches. The query comes last, in quotes.")
        found += matching
    files, problems = dict.fromkeys(found), []
    texts = [text for file in files if (text := _read(file, problems)) is not None]
    if len(problems) > _PROBLEMS:
        problems[_PROBLEMS:] = [f"and {len(problems) - _PROBLEMS:,} more files."]
    raise_problems(problems)
    if not any(texts):
        raise UserError(f"{' '.join(patterns)}: no text, only empty files. There is nothing to ask about.")
    is_one_file = len(patterns) == 1 and usable_path(patterns[0]).is_file()
    return texts[0] if is_one_file else texts


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _is_own(file: Path, journal: Path | None) -> bool:
    """Whether `ask` wrote the file: in the folder of its journals, or the journal with its page and its lock."""
    file = file.resolve()
    own = [] if journal is None else [journal, journal.with_suffix(".html"), Path(f"{journal}.lock")]
    return file.is_relative_to(JOURNALS.resolve()) or file in [path.resolve() for path in own]


def _read(file: Path, problems: list[str]) -> str | None:
    """The text of a file; None, with a problem more, if it is not text."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        if error.object.startswith(b"%PDF-"):
            problems.append(f"{file} is a PDF. Extract its text first, such as with pdftotext, or leave it out.")
        else:
            where = f"byte 0x{error.object[error.start]:02X} at position {error.start:,}"
            problems.append(f"{file} is not text in UTF-8 ({where}). Convert it, or leave it out.")
        return None
