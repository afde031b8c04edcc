"""Runs that are killed at random, again and again, by a signal that nothing can catch: each ends as an undisturbed one does,
to the bit, in a complete folder.

EAFTDROPE_KILLS=124 pytest tests/run/test_kills.py     more of them than the 40 of `make test-kills`
"""

import os
import random
import signal
import time

import pytest
import yaml

from eaftdrope.run.interrupts import LOCK_FILE
from tests.tiny_run import hashes, make_project, make_staged_project, metrics, train

KILLS = int(os.environ.get("EAFTDROPE_KILLS", "40"))
LOGS = ("metrics.jsonl", "recipe.yaml", "run.json", "README.md", "report.html", "adapter_config.json")
# the last step's random state is drawn after it, and the trainer's own records have times
UNEQUAL = ("rng_state.pth", "trainer_state.json", "training_args.bin", "manifest.json")
LORA = {"output": {"merge": True}}
FULL = {"lora": None}
TRAIN = {"steps": 12, "save_every": 3, "keep_checkpoints": 2}


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    """The three recipes, by name."""
    folder = tmp_path_factory.mktemp("project")
    plain = yaml.safe_load(make_project(folder).read_text(encoding="utf-8"))
    for name, other in {"lora": LORA, "full": FULL}.items():
        rate = 0.001 if name == "full" else 0.01
        output = {**plain["output"], **other.get("output", {})}
        recipe = {**plain, **other, "output": output, "train": {**plain["train"], **TRAIN, "learning_rate": rate}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    staged = make_staged_project(folder)
    return {name: folder / f"{name}.yaml" for name in ("lora", "full")} | {"staged": staged}


def contents(run):
    """Every file of a finished run, with what must be equal in it: its bytes, the logs without times, else nothing."""
    found = {}
    for name, value in hashes(run).items():
        last = name.split("/")[-1]
        if last == LOCK_FILE:
            # of a start that was killed when all was done: locked by nobody
            continue
        found[name] = None if last in (*LOGS, *UNEQUAL) else value
    for log in run.rglob("metrics.jsonl"):
        found[str(log.relative_to(run))] = metrics(log.parent)
    return found


@pytest.fixture(scope="module")
def undisturbed(recipes, tmp_path_factory):
    known = {}

    def run(kind):
        if kind not in known:
            folder = tmp_path_factory.mktemp("undisturbed") / "run"
            ended = train(recipes[kind], f"output.dir={folder}", report=True)
            assert ended.code == 0, ended.out
            known[kind] = contents(folder)
        return known[kind]

    return run


# what a kill waits for, beside a time: something that appears in the folder while it is written
SIGHTS = ("checkpoint-*", "optimizer.pt", "manifest.json", "*.safetensors", ".merged.partial", "figures", "report.html")


def there(run, sight):
    try:
        return set(run.rglob(sight))
    except FileNotFoundError:
        # a folder was deleted in between
        return set()


def moment(draw, run):
    """A function that is true from a random moment on: after some seconds, or a little after something new is seen."""
    if draw.random() < 0.4:
        until = time.monotonic() + draw.uniform(0.05, 2.5)
        return lambda: time.monotonic() > until
    sight = draw.choice(SIGHTS)
    seen, wait, first = there(run, sight), draw.uniform(0, 0.02), []

    def is_now():
        if not first and there(run, sight) - seen:
            first.append(time.monotonic())
        return bool(first) and time.monotonic() - first[0] > wait

    return is_now


def kill_until_done(draw, recipe, run, kills):
    """Starts the run and kills it up to `kills` times, then lets it end; how many kills there were."""
    for number in range(kills):
        ended = train(recipe, f"output.dir={run}", killed=moment(draw, run), report=True)
        if ended.code != -signal.SIGKILL:
            return check_ended(ended, number)
    return check_ended(train(recipe, f"output.dir={run}", report=True), kills)


def check_ended(ended, kills):
    """It ended well; or a kill has come when all was done."""
    assert ended.code == 0 or (kills and ended.code == 2 and "holds a finished run" in ended.out), ended.out
    return kills


# kinds in turn: as many kills of each
@pytest.mark.parametrize(
    ("kind", "kills", "seed"),
    [
        pytest.param("lora", 3, 0, id="a few"),
        pytest.param("lora", round(KILLS * 0.35), 1, id="lora", marks=pytest.mark.kills),
        pytest.param("full", round(KILLS * 0.35), 2, id="full", marks=pytest.mark.kills),
        pytest.param("staged", KILLS - 2 * round(KILLS * 0.35), 3, id="staged", marks=pytest.mark.kills),
    ],
)
def test_killed_at_random(recipes, undisturbed, tmp_path, kind, kills, seed):
    """Each run is killed one to six times."""
    draw, done, runs = random.Random(seed), 0, 0
    while done < kills:
        run, runs = tmp_path / f"run-{runs}", runs + 1
        done += kill_until_done(draw, recipes[kind], run, min(draw.randint(1, 6), kills - done))
        found = contents(run)
        expected = undisturbed(kind)
        assert found.keys() == expected.keys(), (done, found.keys() ^ expected.keys())
        assert {name for name in found if found[name] != expected[name]} == set(), (done, runs)
    print(f"{kind}: {done} kills in {runs} runs, all equal")
