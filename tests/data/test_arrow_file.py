"""Tokenised rows in the temporary folder: theirs who write them, and nobody's once those are gone."""

import os
import signal
import subprocess
import sys
import tempfile

import pytest

SCRIPT = """
import sys
from eaftdrope.data.arrow_file import write_rows
rows = write_rows(iter([{"input_ids": [1, 2], "labels": [1, 2], "origin": "a:1"}]), ("input_ids", "labels", "origin"))
print("written", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The temporary folder, of this process and of those that it starts."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield tmp_path
    tempfile.tempdir = None


def writer():
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "written\n"
    return process


def write():
    from eaftdrope.data.arrow_file import write_rows

    return write_rows(iter([{"input_ids": [1], "labels": [1]}]), ("input_ids", "labels"))


def test_what_a_killed_process_leaves_is_removed_by_the_next(temporary):
    (temporary / "eaftdrope-data-older").mkdir()
    (temporary / "eaftdrope-data-file").write_text("")
    process = writer()
    names = set(os.listdir(temporary))
    first = names - {"eaftdrope-data-older", "eaftdrope-data-file"}
    rows = write()
    # two processes at once, and two sets of rows of one
    assert set(os.listdir(temporary)) > names
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = write()
    left = set(os.listdir(temporary))
    assert left == {"eaftdrope-data-older", "eaftdrope-data-file", *(left - names)} and len(left) == 4
    assert not first & left
    assert rows[0] == again[0] == {"input_ids": [1], "labels": [1]}


def test_a_process_that_ends_leaves_nothing(temporary):
    writer().communicate("")
    assert os.listdir(temporary) == []


def test_a_disk_without_locks_keeps_what_is_in_use(temporary, monkeypatch):
    import fcntl

    def none(descriptor, how):
        raise OSError(95, os.strerror(95))

    monkeypatch.setattr(fcntl, "flock", none)
    assert [write()[0], write()[0]] == [{"input_ids": [1], "labels": [1]}] * 2
    assert len(os.listdir(temporary)) == 2
