"""Meta-training and the fine-tuned control: the same rows in the same order, resumed exactly.

Notable:
- A step is one row. The rate is constant after a warm-up, so a checkpoint under way is the end of a shorter training:
  the control at equal tokens is a checkpoint of the control at equal time.
- The budget is in CPU seconds of the steps. A training ends at a mark, every 16 or 32 rows; the control keeps its weights at
  each, since the one at equal tokens is known only when meta-training has ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from eaftdrope.errors import UserError
from eaftdrope.files import replacing

from .models import autocast, build, restore, slow_weights, weights_file
from .plan import LONG, ORIGINAL, TRAINED, Train

RATE, BETAS, WEIGHT_DECAY, CLIP, WARM_UP_ROWS = 2e-4, (0.9, 0.95), 0.1, 1.0, 8


def row_order(count: int, seed: int, number: int) -> int:
    """The index of the row of step `number`: every pass over the rows is shuffled by the seed and its own number."""
    epoch, place = divmod(number, count)
    generator = torch.Generator().manual_seed(1000 * seed + epoch)
    return int(torch.randperm(count, generator=generator)[place])


class Training:
    """A model in training, at the row where its folder `work/<key>` has it."""

    def __init__(self, task: Train, rows_RT: Tensor, digest: str, work: Path) -> None:
        self.task, self.rows_RT, self.digest, self.work = task, rows_RT, digest, work
        self.mark = 32 if task.budget >= LONG else 16
        reads, rate = TRAINED[task.arm]
        self.model = build(ORIGINAL, reads, rate, work).train().requires_grad_(False)
        self.slow = slow_weights(self.model, task.arm)
        for parameter in self.slow.values():
            parameter.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(self.slow.values(), lr=RATE, betas=BETAS, weight_decay=WEIGHT_DECAY)
        self.losses: list[float] = []
        self.cpu_seconds = 0.0
        if self._snapshot.is_file():
            self._resume()

    @property
    def _snapshot(self) -> Path:
        return self.work / self.task.key / "snapshot.pt"

    @property
    def finished(self) -> bool:
        return self.cpu_seconds >= self.task.budget and len(self.losses) % self.mark == 0

    def run(self, deadline: float, report: Callable[[str], None]) -> None:
        """Train until the budget is used, or until `deadline` (`time.monotonic`); what was trained is on disk then."""
        while not self.finished and time.monotonic() < deadline:
            self._step()
            if len(self.losses) % self.mark == 0:
                if self.finished or self.task.arm == "control":
                    self._keep()
                self._save()
                recent = sum(self.losses[-self.mark :]) / self.mark
                report(f"{self.task.key}: {len(self.losses)} rows, {self.cpu_seconds:.0f} CPU s, loss {recent:.3f}")
        self._save()

    def _step(self) -> None:
        started = time.process_time()
        number = len(self.losses)
        ids = self.rows_RT[row_order(len(self.rows_RT), self.task.seed, number)][None]
        for group in self.optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (number + 1) / WARM_UP_ROWS)
        with autocast():
            loss = self.model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.slow.values(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(round(loss.item(), 4))
        self.cpu_seconds += time.process_time() - started

    def _keep(self) -> None:
        file = weights_file(self.work, f"{self.task.key}@{len(self.losses)}")
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as path:
            save_file({name: parameter.detach() for name, parameter in self.slow.items()}, path)

    def _save(self) -> None:
        self._snapshot.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "digest": self.digest,
            "weights": {name: parameter.detach() for name, parameter in self.slow.items()},
            "optimizer": self.optimizer.state_dict(),
            "losses": self.losses,
            "cpu_seconds": self.cpu_seconds,
        }
        with replacing(self._snapshot) as path:
            torch.save(content, path)

    def _resume(self) -> None:
        content = torch.load(self._snapshot, weights_only=True)
        if content["digest"] != self.digest:
            raise UserError(
                f"{self._snapshot} was trained on another text. Choose another --work folder, or delete it."
            )
        restore(self.model, content["weights"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.losses, self.cpu_seconds = content["losses"], content["cpu_seconds"]
