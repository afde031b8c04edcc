"""A JSON Lines file written during training, each line with its step.

A run that was killed after step k+n and resumed from the checkpoint of step k repeats the steps after k. When training
begins, the lines that the resumed run will write again are therefore dropped: the file of a resumed run has the same
lines as that of an uninterrupted run.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from eaftdrope.errors import UserError
from eaftdrope.files import write_atomically


class StepLines:
    """The lines of `path`, each `{"step": k, ...}` and passed to the operating system at once. For the main process.

    Args:
        path (`Path`): the file. Missing folders are created.
        content (`str`): the kind of lines, for messages, such as "training metrics".

    Raises:
        UserError: in the method that fails, if the file cannot be written or has a line in another format.
    """

    def __init__(self, path: Path, content: str) -> None:
        self.path, self._content = path, content

    def begin(self, step: int, again: Callable[[dict], bool] = lambda row: False) -> None:
        """Drop the lines that a run resumed from `step` will write again (all of them at step 0), and rows for which `again`
        is true; an unwritable file raises here."""
        with self._os_errors_to_user_errors():
            write_atomically(self.path, b"".join(self._kept(step, again) if step else []), durable=True)

    def add(self, row: dict) -> None:
        """Append one line. NaN and infinity are refused: JSON does not have them."""
        text = json.dumps(row, allow_nan=False)
        # Opened for each line: nothing is buffered when the process is killed, and no handle outlives an exception.
        with self._os_errors_to_user_errors(), open(self.path, "a", encoding="utf-8") as file:
            file.write(text + "\n")

    def _kept(self, step: int, again: Callable[[dict], bool]) -> list[bytes]:
        """Return the lines (with line ends) that a run resumed from `step` will not write again."""
        if not self.path.exists():
            return []
        # bytes: a line that is not UTF-8 is reported like any other in another format
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = []
        for number, line in enumerate(lines, start=1):
            if number == len(lines) and not line.endswith(b"\n"):
                break  # the process was killed, or the disk was full, in the middle of this line
            try:
                row = json.loads(line)
                dropped = row["step"] > step or again(row)
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise UserError(
                    f"{self.path}:{number}: not a line of {self._content}, so the file cannot be continued. "
                    "Move the file away and run the command again; the run then resumes with a new file."
                ) from error
            if not dropped:
                kept.append(line)
        return kept

    @contextmanager
    def _os_errors_to_user_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise UserError(
                    f"cannot write {self.path}: the disk is full. Free some space and run the same command again: it "
                    "resumes from the last checkpoint."
                ) from error
            raise UserError(
                f"cannot write the {self._content} to {self.path}: {error.strerror}. "
                "Choose an output folder that can be written to."
            ) from error
