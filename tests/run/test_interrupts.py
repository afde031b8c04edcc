"""Errors of disks, told to the user; all others pass."""

import errno
import os

import pytest

from eaftdrope.errors import UserError
from eaftdrope.run.interrupts import disk_errors_to_user_errors


def told(error, folder):
    with pytest.raises(UserError) as caught, disk_errors_to_user_errors(str(folder)):
        raise error
    assert caught.value.__cause__ is error
    return str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
        RuntimeError("basic_ios::clear: iostream error"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
    ],
    ids=repr,
)
def test_a_full_disk_by_all_its_names(error):
    assert told(error, "runs/a") == (
        f"the disk of runs/a is full ({error}). Complete files are kept: free some space and run the same command again "
        "(without --overwrite) to resume."
    )


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EFBIG, "File too large"),
        RuntimeError("Error while serializing: I/O error: File too large (os error 27)"),
    ],
    ids=repr,
)
def test_a_file_that_may_not_become_so_large(error):
    """`ulimit -f`."""
    assert told(error, "runs/a") == (
        f"a file of runs/a would exceed the size limit ({error}): raise the limit of this shell (ulimit -f) or choose a "
        "folder on another disk. Complete files are kept: run the same command again (without --overwrite) to resume."
    )


def test_the_full_disk_may_be_another_one(tmp_path):
    other = str(tmp_path / "cache" / "rows.arrow")
    error = OSError(errno.ENOSPC, "No space left on device", other)
    assert told(error, "runs/a").startswith(f"the disk of {other} is full ")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_file_of_the_run_that_can_not_be_written(tmp_path, number):
    file = str(tmp_path / "run" / "run.json")
    error = OSError(number, os.strerror(number), file)
    assert told(error, tmp_path / "run") == (
        f"{tmp_path / 'run'} cannot be written to ({os.strerror(number)}: {file}). Choose another folder with "
        "output.dir=..., or change its permissions."
    )


@pytest.mark.parametrize(
    "error",
    [
        UserError("disk: No space left on device"),
        OSError(errno.EACCES, "Permission denied", "/elsewhere/rows.jsonl"),
        OSError(errno.EIO, "Input/output error"),
        RuntimeError("shapes differ"),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_others_pass(tmp_path, error):
    with pytest.raises(type(error)) as caught, disk_errors_to_user_errors(str(tmp_path)):
        raise error
    assert caught.value is error
