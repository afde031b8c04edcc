"""One start at a time, wherever its temporary and home folders are."""

import os
import signal
import subprocess
import sys

import pytest

from eaftdrope.errors import UserError
from eaftdrope.recipe import Recipe
from eaftdrope.run.folder import RunFolder
from eaftdrope.run.interrupts import LOCK_FILE, run_lock

SCRIPT = """
import sys
from eaftdrope.run.interrupts import run_lock
with run_lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""
NAME_ANOTHER = "Nothing was changed: wait for it, stop it, or choose another folder with output.dir=..."
REFUSED = "another process is already running in {}. " + NAME_ANOTHER


def recipe(folder):
    return Recipe.model_validate({"model": "org/model", "data": {"train": "org/rows"}, "output": {"dir": str(folder)}})


def another(folder, **environment):
    """Another process that takes the lock and waits; it has it once "held" was read."""
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def test_a_second_start_is_refused_wherever_its_temporary_folder_is(tmp_path):
    from rich.console import Console

    from eaftdrope.run.train import run_recipe

    (tmp_path / "tmp").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    with run_lock(str(tmp_path / "run")):
        with run_lock(str(tmp_path / "other")):
            pass
        second = another(tmp_path / "x" / ".." / "run", TMPDIR=str(tmp_path / "tmp"), HOME=str(tmp_path / "tmp"))
        assert REFUSED.format(tmp_path / "x" / ".." / "run") in second.communicate(timeout=60)[1]
        linked = tmp_path / "link" / "run"
        with pytest.raises(UserError) as error:
            run_recipe(recipe(linked), Console(quiet=True), command="")
        assert str(error.value) == REFUSED.format(linked)
        assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK_FILE]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "tmp"]


def test_what_a_killed_start_leaves_is_no_obstacle(tmp_path):
    """Its lock file is neither locked nor a stranger's."""
    run = tmp_path / "a" / "run"
    first = another(run)
    assert first.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="another process is already running"), run_lock(str(run)):
        pass
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert [path.name for path in run.iterdir()] == [LOCK_FILE]
    RunFolder(run, recipe(run))
    with run_lock(str(run)):
        (run / "kept").write_text("")
    assert [path.name for path in run.iterdir()] == ["kept"]


def test_a_lock_whose_file_was_deleted_in_between_keeps_nobody_out(tmp_path, monkeypatch):
    """The file is opened, another start ends and deletes it, and only then it is locked: it is made again."""
    import fcntl

    lock, calls = fcntl.flock, []

    def late(descriptor, how):
        calls.append(how)
        if len(calls) == 1:
            (tmp_path / LOCK_FILE).unlink()
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with run_lock(str(tmp_path)):
        assert len(calls) == 2
        with pytest.raises(UserError, match="another process is already running"), run_lock(str(tmp_path)):
            pass


def test_a_disk_without_locks_is_refused(tmp_path, monkeypatch):
    import errno
    import fcntl

    def none(descriptor, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    run = tmp_path / "run"
    with pytest.raises(UserError) as error, run_lock(str(run)):
        pass
    assert str(error.value) == (
        f"{run} cannot be locked, so two processes could write it at the same time (No locks available: {run / LOCK_FILE}). "
        "Choose a folder on another disk with output.dir=..., or change its permissions."
    )
