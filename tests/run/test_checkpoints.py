"""Which checkpoint a run resumes from, and what it reports of those that it passes over."""

import json
import shutil

import pytest

from eaftdrope.errors import UserError
from eaftdrope.run.checkpoints import Checkpoints


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with the files of a checkpoint of LoRA, as the Trainer writes them."""
    import torch
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("written")
    save_file({"lora_A.weight": torch.ones(4, 8)}, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text("{}")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": torch.arange(64)}, path / name)
    (path / "trainer_state.json").write_text('{"global_step": 12, "max_steps": 24}')
    return path


@pytest.fixture
def checkpoints(tmp_path, written):
    """checkpoints(*steps, sealed=True, processes=1): the checkpoints of a run."""

    def make(*steps, sealed=True, processes=1):
        found = Checkpoints(tmp_path, processes)
        for step in steps:
            shutil.copytree(written, tmp_path / f"checkpoint-{step}")
            if sealed:
                found.seal(step)
        return found

    return make


def cut(file):
    file.write_bytes(file.read_bytes()[:-20])


def flip(file):
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 8] = bytes(byte ^ 255 for byte in content[middle : middle + 8])
    file.write_bytes(content)


def empty(file):
    file.write_bytes(b"")


def a_list(file):
    file.write_text("[]")


def no_sizes(file):
    file.write_text('{"files": {"a": 1}}')


def test_a_manifest_has_every_file(checkpoints, tmp_path, written):
    import hashlib

    checkpoints(12)
    (tmp_path / "checkpoint-12" / "engine").mkdir()
    (tmp_path / "checkpoint-12" / "engine" / "shard-0").write_text("half")
    checkpoints().seal(12)
    manifest = json.loads((tmp_path / "checkpoint-12" / "manifest.json").read_text())
    expected = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in written.iterdir()
    }
    expected["engine/shard-0"] = {"bytes": 4, "sha256": hashlib.sha256(b"half").hexdigest()}
    assert manifest == {"files": expected}


def test_the_newest_by_number(checkpoints, tmp_path):
    found = checkpoints(8, 9, 10).newest(manifests=True)
    assert (found.checkpoint, found.notes()) == (tmp_path / "checkpoint-10", [])
    (tmp_path / "checkpoint-best").mkdir()
    assert checkpoints().newest(manifests=True) == found


OPTIMIZER, WEIGHTS = "optimizer.pt", "adapter_model.safetensors"


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        (OPTIMIZER, empty, "optimizer.pt: 0 bytes, {size:,} expected"),
        (OPTIMIZER, cut, "optimizer.pt: {cut:,} bytes, {size:,} expected"),
        (OPTIMIZER, flip, "optimizer.pt: its contents have changed"),
        (WEIGHTS, flip, "adapter_model.safetensors: its contents have changed"),
        ("trainer_state.json", lambda file: file.write_text("{}"), "trainer_state.json: 2 bytes, {size:,} expected"),
        ("manifest.json", empty, "manifest.json: not a list of files"),
        (
            "manifest.json",
            lambda file: file.write_text('{"files": {"a": 1}}'),
            "manifest.json: not a list of files with sizes and hashes",
        ),
    ],
)
def test_a_damaged_one_is_passed_over(checkpoints, tmp_path, name, damage, reason):
    checkpoints(9, 12)
    file = tmp_path / "checkpoint-12" / name
    size = file.stat().st_size
    damage(file)
    found = checkpoints().newest(manifests=True)
    reason = reason.format(size=size, cut=size - 20)
    assert found.notes() == [f"checkpoint-12 is damaged ({reason}); resuming from checkpoint-9"]
    assert found.checkpoint == tmp_path / "checkpoint-9"
    assert file.exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", WEIGHTS])
def test_a_missing_file(checkpoints, tmp_path, name):
    checkpoints(9, 12)
    (tmp_path / "checkpoint-12" / name).unlink()
    note = f"checkpoint-12 is damaged ({name}: missing); resuming from checkpoint-9"
    assert checkpoints().newest(manifests=True).notes() == [note]
    assert checkpoints().newest(manifests=True, contents=False).notes() == [note]


def test_what_is_no_folder(checkpoints, tmp_path):
    checkpoints(9)
    (tmp_path / "checkpoint-11").symlink_to(tmp_path / "nowhere")
    (tmp_path / "checkpoint-12").write_text("")
    (tmp_path / "checkpoint-99").mkdir()
    assert checkpoints().newest(manifests=True).notes() == [
        "checkpoint-99 is incomplete (no manifest.json: it was not written completely); resuming from checkpoint-9",
        "checkpoint-12 is damaged (a file, and not a folder); resuming from checkpoint-9",
        "checkpoint-11 is damaged (a broken link); resuming from checkpoint-9",
    ]


def test_without_a_good_one(checkpoints, tmp_path):
    """One that was never complete is begun again; one that was complete is somebody's hours."""
    checkpoints(9, sealed=False)
    found = checkpoints().newest(manifests=True)
    assert (found.checkpoint, found.notes()) == (
        None,
        ["checkpoint-9 is incomplete (no manifest.json: it was not written completely); resuming from the beginning"],
    )
    checkpoints(12)
    (tmp_path / "checkpoint-12" / OPTIMIZER).unlink()
    with pytest.raises(UserError) as error:
        checkpoints().newest(manifests=True)
    assert str(error.value) == (
        f"{tmp_path} holds no checkpoint to resume from: checkpoint-12 is damaged (optimizer.pt: missing), checkpoint-9 is "
        "incomplete (no manifest.json: it was not written completely). Nothing was changed: put back a copy of one of them; "
        "to train from the beginning, delete this folder, or pass --overwrite to delete the whole run."
    )


# ---- of versions that wrote no manifest ----

OLDER = (
    "checkpoint-9 was written by an older version, without a manifest: its files are complete, but whether their contents "
    "are as they were written cannot be checked"
)


def test_one_of_an_older_version_is_resumed_with_a_note(checkpoints, tmp_path):
    checkpoints(9, sealed=False)
    found = checkpoints().newest(manifests=False)
    assert (found.checkpoint, found.notes(), found.has_manifest) == (tmp_path / "checkpoint-9", [OLDER], False)


@pytest.mark.parametrize(
    ("name", "damage", "text"),
    [
        (OPTIMIZER, lambda file: file.unlink(), "is damaged (optimizer.pt: missing)"),
        (OPTIMIZER, empty, "is damaged (optimizer.pt: truncated)"),
        (OPTIMIZER, flip, "is damaged (optimizer.pt: its contents have changed)"),
        ("scheduler.pt", cut, "is damaged (scheduler.pt: truncated)"),
        ("scheduler.pt", lambda file: file.unlink(), "is damaged (scheduler.pt: missing)"),
        (WEIGHTS, lambda file: file.unlink(), "is damaged (no weights)"),
        (WEIGHTS, cut, "is damaged (adapter_model.safetensors: truncated)"),
        (WEIGHTS, empty, "is damaged (adapter_model.safetensors: truncated)"),
        (
            "trainer_state.json",
            lambda file: file.write_text("[]"),
            "is damaged (trainer_state.json: not the state of a trainer)",
        ),
        ("trainer_state.json", lambda file: file.unlink(), "is incomplete (it was not written completely)"),
        ("rng_state.pth", lambda file: file.unlink(), "is incomplete (it was not written completely)"),
        ("rng_state.pth", cut, "is damaged (rng_state.pth: truncated)"),
    ],
)
def test_one_of_an_older_version_that_is_not_whole(checkpoints, tmp_path, name, damage, text):
    checkpoints(9, 12, sealed=False)
    damage(tmp_path / "checkpoint-12" / name)
    found = checkpoints().newest(manifests=False)
    assert found.notes() == [f"checkpoint-12 {text}; resuming from checkpoint-9", OLDER]


def test_of_two_processes_both_must_have_written(checkpoints, tmp_path):
    checkpoints(2, 4, sealed=False)
    for step in (2, 4):
        state = tmp_path / f"checkpoint-{step}" / "rng_state.pth"
        shutil.copy(state, state.with_name("rng_state_0.pth"))
        state.rename(state.with_name(f"rng_state_{'1' if step == 2 else '0'}.pth"))
    assert checkpoints(processes=2).newest(manifests=False).checkpoint == tmp_path / "checkpoint-2"


# ---- keeping the newest ----


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_rotation_counts_only_complete_ones(checkpoints, tmp_path):
    found = checkpoints(2, 4, 6, 8)
    checkpoints(5, sealed=False)
    (tmp_path / "checkpoint-7").symlink_to(tmp_path / "nowhere")
    checkpoints(99)
    found.rotate(8, 2)
    assert names(tmp_path) == ["checkpoint-6", "checkpoint-8", "checkpoint-99"]


def test_rotation_does_not_count_what_was_passed_over(checkpoints, tmp_path):
    checkpoints(9, 12, 15).rotate(15, 2, passed_over=(12,))
    assert names(tmp_path) == ["checkpoint-15", "checkpoint-9"]
