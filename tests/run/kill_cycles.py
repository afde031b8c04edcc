"""Runs that are killed at random and resumed, more of them than a test has time for; the counts are committed.

    python -m tests.run.kill_cycles one --cycles 200         one process
    python -m tests.run.kill_cycles two --cycles 50          two processes, of which one is killed, or both

A cycle is a SIGKILL and the start after it. Each run has one to six, is let end, and is compared with an undisturbed
one: every file of it, to the bit. What happens in a run is drawn from its number. Finished runs are kept in
benchmarks/results/kill_cycles.json, and a second start continues with the next; `--seconds` ends it early.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import yaml

from eaftdrope.files import write_atomically
from tests import forked
from tests.run.test_kills import FULL, LORA, TRAIN, contents, kill_until_done, moment
from tests.tiny_run import _train, make_project, train

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "kill_cycles.json"
# a lost process is noticed within seconds; a rank that waits for a dead one may wait this long
_TIMEOUT = "parallel.timeout_minutes=1"


def recipe_of(folder: Path, kind: str) -> Path:
    plain = yaml.safe_load(make_project(folder).read_text(encoding="utf-8"))
    other = {"lora": LORA, "full": FULL}[kind]
    rate = 0.001 if kind == "full" else 0.01
    recipe = {**plain, **other, "train": {**plain["train"], **TRAIN, "learning_rate": rate}}
    recipe["output"] = {**plain["output"], **other.get("output", {})}
    file = folder / f"{kind}.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return file


def two_ranks(recipe: Path, run: Path, *, killed=None, victims=()) -> list[int]:
    """The exit codes of a start as two processes, of which `victims` are killed once `killed` returns true."""
    arguments = [str(recipe), f"output.dir={run}", "train.batch_size=2", _TIMEOUT]
    together = forked._rendezvous(2)
    with tempfile.TemporaryDirectory() as place:
        ranks = [
            forked.start(
                _train,
                arguments,
                None,
                None,
                False,
                out=Path(place) / str(rank),
                **together,
                RANK=str(rank),
                LOCAL_RANK=str(rank),
            )
            for rank in range(2)
        ]
        while killed and all(rank.exitcode is None for rank in ranks):
            if killed():
                for victim in victims:
                    ranks[victim].kill()
                break
            time.sleep(0.002)
        for rank in ranks:
            rank.join(300)
            assert rank.exitcode is not None, "a rank hangs"
        return [rank.exitcode for rank in ranks]


def killed_in_two(draw: random.Random, recipe: Path, run: Path, kills: int) -> int:
    """As `kill_until_done`, with two processes."""
    for number in range(kills):
        victims = draw.choice([(0,), (1,), (0, 1)])
        codes = two_ranks(recipe, run, killed=moment(draw, run), victims=victims)
        if not any(codes[victim] == -9 for victim in victims):
            assert codes in ([0, 0], [2, 2]), codes
            return number
    codes = two_ranks(recipe, run)
    assert codes == [0, 0] or (kills and codes == [2, 2]), codes
    return kills


def one_run(processes: str, number: int, folder: Path) -> dict:
    """Run `number`: its kind, its kills, and what differs from an undisturbed run."""
    kind = ("lora", "full")[number % 2]
    recipe, draw = recipe_of(folder / "project", kind), random.Random(f"{processes} {number}")
    run, whole, kills = folder / "run", folder / "whole", draw.randint(1, 6)
    if processes == "one":
        done = kill_until_done(draw, recipe, run, kills)
        assert train(recipe, f"output.dir={whole}", report=True).code == 0
    else:
        done = killed_in_two(draw, recipe, run, kills)
        assert two_ranks(recipe, whole) == [0, 0]
    found, expected = contents(run), contents(whole)
    # the random states of the last step are drawn after it
    names = {name for name in found.keys() | expected.keys() if "rng_state" not in name}
    differs = sorted(name for name in names if found.get(name, "") != expected.get(name, ""))
    return {"number": number, "kind": kind, "kills": done, "differs": differs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("processes", choices=("one", "two"))
    parser.add_argument("--cycles", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    options = parser.parse_args()
    until = time.monotonic() + options.seconds
    stored = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    runs = stored.setdefault(options.processes, {"runs": []})["runs"]
    while sum(run["kills"] for run in runs) < options.cycles and time.monotonic() < until:
        with tempfile.TemporaryDirectory() as folder:
            runs.append(one_run(options.processes, len(runs), Path(folder)))
        stored[options.processes] |= {
            "kills": sum(run["kills"] for run in runs),
            "equal": f"{sum(not run['differs'] for run in runs)} of {len(runs)} runs",
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
        }
        write_atomically(RESULTS, json.dumps(stored, indent=1) + "\n")
        print(options.processes, runs[-1], flush=True)


if __name__ == "__main__":
    main()
