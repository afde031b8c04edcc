"""Atomic writes, output folders, and what a user reads when one cannot be used."""

import os

import pytest

from eaftdrope.errors import UserError
from eaftdrope.files import ResultFolder, atomic_folder, check_unused, differences, replacing, write_atomically


def killed(*arguments):
    raise KeyboardInterrupt


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_write_creates_folders_and_returns_the_path(tmp_path):
    file = tmp_path / "a" / "b.json"
    assert write_atomically(file, "ä\n") == file
    assert file.read_bytes() == "ä\n".encode()
    write_atomically(file, b"\xff", durable=True)
    assert file.read_bytes() == b"\xff" and names(file.parent) == ["b.json"]


@pytest.mark.parametrize("durable", [False, True])
def test_a_write_that_is_stopped_leaves_the_old_file_only(tmp_path, monkeypatch, durable):
    file = write_atomically(tmp_path / "x", "old")
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(file, "new", durable=durable)
    assert file.read_text() == "old" and names(tmp_path) == ["x"]


def test_a_block_that_fails_leaves_the_old_file_only(tmp_path):
    file = write_atomically(tmp_path / "x", "old")
    with pytest.raises(RuntimeError), replacing(file) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert file.read_text() == "old" and names(tmp_path) == ["x"]


def test_a_hard_link_keeps_its_content(tmp_path):
    file = write_atomically(tmp_path / "x", "old")
    os.link(file, tmp_path / "y")
    write_atomically(file, "new")
    assert (tmp_path / "y").read_text() == "old"


def test_durable_content_is_flushed_before_the_rename_and_the_name_after(tmp_path, monkeypatch):
    calls, replace = [], os.replace
    monkeypatch.setattr("eaftdrope.files.flush", lambda path: calls.append(path.name))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("rename"), replace(*paths)))
    write_atomically(tmp_path / "x", "text", durable=True)
    assert calls == [".x.partial", "rename", tmp_path.name]
    write_atomically(tmp_path / "y", "text")
    assert calls[3:] == ["rename"]


def test_processes_that_share_a_file_write_beside_it_under_names_of_their_own(tmp_path):
    with replacing(tmp_path / "x", shared=True) as partial:
        partial.write_text("")
        assert str(os.getpid()) in partial.name


def test_an_atomic_folder_replaces_an_empty_one(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / ".x.partial").mkdir()
    (tmp_path / ".x.partial" / "left").write_text("by a killed process")
    with atomic_folder(tmp_path / "x") as folder:
        (folder / "file").write_text("")
        assert names(tmp_path / "x") == []
    assert names(tmp_path) == ["x"] and names(tmp_path / "x") == ["file"]


def test_an_atomic_folder_that_fails_is_deleted(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "x") as folder:
        (folder / "file").write_text("")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_differences_are_dotted_keys_with_both_values():
    old = {"a": {"b": 1, "c": [1]}, "models": [{"name": "x", "n": 1}], "same": 0}
    new = {"a": {"b": 2}, "models": [{"name": "x", "n": 2}], "same": 0}
    assert differences(old, new) == {"a.b": (1, 2), "a.c": ([1], None), "models.x.n": (1, 2)}
    assert differences({"rows": [{"n": 1}]}, {"rows": [{"n": 2}]}) == {"rows": ([{"n": 1}], [{"n": 2}])}


def test_results_are_resumed_with_the_same_settings_only(tmp_path):
    folder = tmp_path / "out"
    first = ResultFolder(folder, "x.json", "a test", {"limit": 1}, schema=1)
    assert first.document is None and not folder.exists()
    first.document = {"schema": 1, "settings": {"limit": 1}, "cells": [3]}
    first.save()
    assert ResultFolder(folder, "x.json", "a test", {"limit": 1}, schema=1).document == first.document
    with pytest.raises(UserError, match=r"holds a test with other settings \(different: limit\)\. Nothing was changed"):
        ResultFolder(folder, "x.json", "a test", {"limit": 2}, schema=1)
    with pytest.raises(UserError, match="cannot be read as results of this version"):
        ResultFolder(folder, "x.json", "a test", {"limit": 1}, schema=2)
    assert ResultFolder(folder, "x.json", "a test", {"limit": 2}, schema=1, overwrite=True).document is None


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / ".x.json.partial").write_text("")
    check_unused(tmp_path, "x.json", ignore=(".x.json.partial",))
    with pytest.raises(UserError, match=r"is not empty and does not contain x\.json\. Nothing was changed"):
        check_unused(tmp_path, "x.json")
