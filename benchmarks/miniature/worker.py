"""One group in its own process: train its trunk, branch from it, and write a piece for every arm.

    python -m benchmarks.miniature.worker JOB.json FOLDER

Snapshots of the trunk are kept until the group is complete, so that an interrupted worker repeats little.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path

import torch
from torch import nn

from eaftdrope.drope.rope import with_rope
from eaftdrope.files import replacing

from .arms import NOPE, RECALIBRATED, SEEN_AS, Group, MiniatureSettings, from_job, write_json
from .evaluate import View, evaluate
from .train import Training, TrainingRecipe, build, model_config


class Worker:
    def __init__(self, group: Group, settings: MiniatureSettings, folder: Path):
        self.group, self.settings, self.folder = group, settings, folder
        theta = 10000.0 if group.theta is None else group.theta
        muon = group.optimiser == "muon"
        self.recipe = TrainingRecipe(theta, group.seed, settings.steps, settings.batch, muon, settings.compiled)
        # CPU seconds already attributed to a piece
        self.charged = 0.0

    def run(self) -> None:
        for arm in self.group.arms:
            if not self.group.piece(self.folder, arm).is_file():
                self._arm(arm)
        for snapshot in self.folder.glob(f"snapshots/{self.group.name}-*.pt"):
            snapshot.unlink()

    def _arm(self, arm: str) -> None:
        model = self._trained(arm)
        training = self._spent()
        view = View(model, SEEN_AS.get(arm, "rope"), crop=arm == "crop")
        found = evaluate(view, self.group.seed, self.settings.sequences, self.settings.fit)
        piece = {
            "theta": self.group.theta,
            "seed": self.group.seed,
            "optimiser": self.group.optimiser,
            "arm": arm,
            "cpu_seconds": {"training": training, "evaluation": self._spent()},
            **found,
        }
        write_json(self.group.piece(self.folder, arm), piece)

    def _trained(self, arm: str) -> nn.Module:
        """Return the model of an arm, ready for evaluation."""
        steps = self.settings.steps
        if arm in RECALIBRATED or arm == NOPE:
            start = 0 if arm == NOPE else drop_step(arm, steps)
            training = Training(self.recipe, dropped_at=start)
            if start:
                training.restore(self._trunk(start))
            training.run_to(steps)
            config, weights = with_rope(model_config(self.recipe), "nope"), training.model.state_dict()
        else:
            config, weights = model_config(self.recipe), self._trunk(steps)["model"]
        model = build(config, "sdpa")
        model.load_state_dict(weights)
        return model.eval()

    def _trunk(self, step: int) -> dict:
        """Return the snapshot of the trunk at `step`; train the trunk to its end if the snapshot is missing."""
        path = self._snapshot(step)
        if not path.is_file():
            training = Training(self.recipe)
            stops = [*sorted(drop_step(arm, self.settings.steps) for arm in RECALIBRATED), self.settings.steps]
            done = [stop for stop in stops if self._snapshot(stop).is_file()]
            if done:
                training.restore(torch.load(self._snapshot(done[-1])))
            for stop in stops[len(done) :]:
                training.run_to(stop)
                with replacing(self._snapshot(stop)) as partial:
                    torch.save(training.snapshot(), partial)
        return torch.load(path)

    def _snapshot(self, step: int) -> Path:
        return self.folder / "snapshots" / f"{self.group.name}-{step}.pt"

    def _spent(self) -> float:
        """Return the CPU seconds of this process and its compilers since the last call."""
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        total = sum(one.ru_utime + one.ru_stime for one in used)
        spent, self.charged = total - self.charged, total
        return round(spent, 1)


def drop_step(arm: str, steps: int) -> int:
    return round(steps * (1 - RECALIBRATED[arm]))


def main(job_file: str, folder: str) -> None:
    # one thread per worker, one worker per core
    torch.set_num_threads(1)
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    group, settings = from_job(job)
    Worker(group, settings, Path(folder)).run()


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main(*sys.argv[1:])
