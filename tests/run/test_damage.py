"""A killed run whose folder is then damaged: the same command ends with the undisturbed run's result, or says in one line
what is damaged and what to do. It never crashes, and never ends with another result."""

import json
import shutil
import signal
from pathlib import Path

import pytest

from tests.tiny_run import make_project, metrics, results, train

STEPS = ("train.steps=6", "train.save_every=2", "train.keep_checkpoints=2")
NEWEST, OLDER = "checkpoint-4", "checkpoint-2"
WEIGHTS, STATE = "adapter_model.safetensors", "trainer_state.json"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    make_project(folder)
    return folder


@pytest.fixture(scope="module")
def killed(project, tmp_path_factory):
    """A run that was killed in step 6, with the checkpoints of steps 2 and 4."""
    run = tmp_path_factory.mktemp("killed") / "run"
    ended = train(project / "recipe.yaml", f"output.dir={run}", *STEPS, moment="in step 6, after two checkpoints")
    assert ended.code == -signal.SIGKILL
    return run


@pytest.fixture(scope="module")
def undisturbed(project, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    ended = train(project / "recipe.yaml", f"output.dir={run}", *STEPS)
    assert ended.code == 0, ended.out
    return results(run)


# ---- what is done to a file or a folder ----


def cut(path: Path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path):
    path.write_bytes(b"")


def deleted(path: Path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def flipped(path: Path):
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    for index in range(middle - 32, middle + 32):
        content[index] ^= 255
    path.write_bytes(content)


def written(text):
    def damage(path: Path):
        path.write_text(text)

    damage.__name__ = text[:8] or "nothing"
    return damage


def with_values(**values):
    def damage(path: Path):
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    damage.__name__ = str(values)
    return damage


def added(content: bytes):
    def damage(path: Path):
        path.write_bytes(path.read_bytes() + content)

    damage.__name__ = f"with {content[:8]!r}"
    return damage


def not_utf8(path: Path):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([b"\xff\xfe\x00\n", *lines[1:]]))


def a_file(path: Path):
    shutil.rmtree(path)
    path.write_text("")


def a_link_to_a_damaged_one(path: Path):
    elsewhere = path.parents[2] / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    cut(elsewhere / WEIGHTS)


def made_empty(path: Path):
    path.mkdir()


def both_cut(path: Path):
    for name in (NEWEST, OLDER):
        cut(path / name / WEIGHTS)


# ---- what must come of it: the older checkpoint, a note and the same result, or a refusal ----

MISSING = f"missing); resuming from {OLDER}"
OTHER = f"its contents have changed); resuming from {OLDER}"
REBUILT = "run.json is damaged or missing and was rebuilt from recipe.yaml: whether data and base model are those that"
SAVED = ("rng_state.pth", STATE, WEIGHTS, "optimizer.pt", "scheduler.pt")


def newest(name, damage, what):
    note = f"{NEWEST} is damaged ({name}: {what}"
    return pytest.param(f"checkpoints/{NEWEST}/{name}", damage, note, id=f"{name}-{damage.__name__}")


def run_file(name, damage, note):
    return pytest.param(name, damage, note, id=f"{name}-{damage.__name__}")


EQUAL = [
    *(newest(name, cut, "") for name in SAVED),
    *(newest(name, empty, "0 bytes, ") for name in SAVED),
    *(newest(name, deleted, MISSING) for name in SAVED),
    *(newest(name, flipped, OTHER) for name in SAVED),
    newest("adapter_config.json", deleted, MISSING),
    newest("adapter_config.json", empty, "0 bytes, "),
    newest("training_args.bin", deleted, MISSING),
    newest(STATE, written("{}"), "2 bytes, "),
    newest(STATE, written("[]"), "2 bytes, "),
    newest("manifest.json", written("{}"), "not a list of files"),
    run_file(f"checkpoints/{NEWEST}/manifest.json", deleted, f"{NEWEST} is incomplete (no manifest.json: "),
    run_file(f"checkpoints/{NEWEST}", deleted, f"resuming from {OLDER} of 6"),
    run_file(f"checkpoints/{NEWEST}", a_file, f"{NEWEST} is damaged (a file, and not a folder); resuming from {OLDER}"),
    run_file(f"checkpoints/{NEWEST}", a_link_to_a_damaged_one, f"{NEWEST} is damaged ({WEIGHTS}: "),
    run_file(
        "checkpoints/checkpoint-99",
        made_empty,
        "checkpoint-99 is incomplete (no manifest.json: it was not ",
    ),
    run_file("checkpoints", deleted, "step 1/6"),
    run_file("metrics.jsonl", added(b'{"step": 6, "lo'), f"resuming from {NEWEST} of 6"),
    run_file("metrics.jsonl", added(b"\0\0\0\0"), f"resuming from {NEWEST} of 6"),
    run_file("recipe.yaml", deleted, f"resuming from {NEWEST} of 6"),
    run_file("foreign.txt", written("somebody's"), f"resuming from {NEWEST} of 6"),
    run_file("probes_before.json", cut, "the scores before training are damaged: measured again"),
    run_file("probes_before.json", empty, "the scores before training are damaged: measured again"),
    run_file("probes_before.json", written('[{"probe": 1}]'), "the scores before training are damaged: measured again"),
    run_file("probes_before.json", deleted, "probing before: held_out_loss"),
    run_file("samples.json", cut, f"resuming from {NEWEST} of 6"),
    run_file("samples.json", written("{}"), f"resuming from {NEWEST} of 6"),
    run_file("samples.json", deleted, f"resuming from {NEWEST} of 6"),
    run_file("run.json", empty, REBUILT),
    run_file("run.json", cut, REBUILT),
    run_file("run.json", deleted, REBUILT),
    run_file("run.json", with_values(data={}), REBUILT),
    run_file("run.json", with_values(recipe=[]), REBUILT),
    run_file("run.json", with_values(fingerprints=[]), REBUILT),
]
# a logged curve that is gone cannot come back, and nothing else may differ
LOST = [
    ("metrics.jsonl", deleted, "metrics.jsonl has no lines of steps 1 to 4: its curves will lack them"),
    ("landscape.jsonl", deleted, "landscape.jsonl has no lines of steps 1 to 4: its curves will lack them"),
]
REFUSED = [
    run_file(
        "checkpoints",
        both_cut,
        f"holds no checkpoint to resume from: {NEWEST} is damaged ({WEIGHTS}: ",
    ),
    run_file(
        "metrics.jsonl", not_utf8, "metrics.jsonl:1: not a line of training metrics, so the file cannot be continued"
    ),
    run_file("metrics.jsonl", written("foreign\n"), "metrics.jsonl:1: not a line of training metrics, so the file"),
    run_file(
        "landscape.jsonl", not_utf8, "landscape.jsonl:1: not a line of landscapes of tokens, so the file cannot be"
    ),
]
# of each kind one in every run of the tests, the others with `make test-kills`
ALWAYS = {
    "optimizer.pt-deleted",
    f"{WEIGHTS}-flipped",
    "run.json-cut",
    "probes_before.json-cut",
    "metrics.jsonl-not_utf8",
}


def chosen(cases):
    return [
        pytest.param(*case.values, id=case.id, marks=[] if case.id in ALWAYS else [pytest.mark.kills]) for case in cases
    ]


@pytest.fixture
def again(project, killed, tmp_path):
    """again(name, damage): the same command after the damage."""

    def start(name, damage):
        run = tmp_path / "run"
        shutil.copytree(killed, run)
        damage(run / name)
        return run, train(project / "recipe.yaml", f"output.dir={run}", *STEPS)

    return start


@pytest.mark.parametrize(("name", "damage", "note"), chosen(EQUAL))
def test_it_ends_with_the_same_result(again, undisturbed, name, damage, note):
    run, ended = again(name, damage)
    assert ended.code == 0, ended.out
    assert note in ended.out
    found = results(run)
    found.pop("foreign.txt", None)
    assert found == undisturbed


@pytest.mark.kills
@pytest.mark.parametrize(("name", "damage", "note"), LOST)
def test_what_cannot_come_back_is_reported(again, undisturbed, name, damage, note):
    run, ended = again(name, damage)
    assert ended.code == 0, ended.out
    assert note in ended.out
    found = results(run)
    assert {file for file in found if found[file] != undisturbed[file]} == {name}
    assert [row["step"] for row in metrics(run)] == ([5, 6] if name == "metrics.jsonl" else [1, 2, 3, 4, 5, 6])


@pytest.mark.parametrize(("name", "damage", "text"), chosen(REFUSED))
def test_it_is_refused_in_one_line(again, name, damage, text):
    run, ended = again(name, damage)
    assert ended.code == 2, ended.out
    assert text in ended.out.splitlines()[-1]
    assert "Traceback" not in ended.out
    assert {NEWEST, OLDER} <= {path.name for path in (run / "checkpoints").iterdir()}


def test_every_case_of_the_attack_is_here():
    """reliability.md 1.3 counts 49."""
    assert len(EQUAL) + len(LOST) + len(REFUSED) >= 49
    assert {case.id for case in [*EQUAL, *REFUSED]} >= ALWAYS
