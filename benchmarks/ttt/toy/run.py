"""Train the arms and measure them on the test sequences: one JSON file for each (arm, seed), never computed twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from eaftdrope.errors import UserError
from eaftdrope.files import replacing, write_atomically
from eaftdrope.ttt import TTTConfig, apply_ttt, sequence_nll

from . import task
from .arms import ARMS, NAIVE_RATES, TTT, Arm, new_model, stock_nll, train

SEEDS = (42, 43, 44)
TEST_SEQUENCES, VALIDATION_SEQUENCES = 192, 48
# sequences of an evaluation that are read at once
_ROWS = 48


class ToyRun:
    """The pieces of a run in `folder`, which also keeps the trained weights.

    Args:
        folder (`Path`): created if missing; a run in it is resumed.
        arms (`tuple` of `Arm`): the arms to run.
        seeds (`tuple` of `int`): the seeds of weights and training batches.
        sequences (`int`): test sequences.
        validation (`int`): validation sequences, for the curves of the trainings and naive TTT's learning rate.
    """

    def __init__(
        self,
        folder: Path,
        arms: tuple[Arm, ...] = ARMS,
        seeds: tuple[int, ...] = SEEDS,
        sequences: int = TEST_SEQUENCES,
        validation: int = VALIDATION_SEQUENCES,
    ):
        self.folder, self.arms, self.seeds = folder, arms, seeds
        for part in ("pieces", "weights"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        self.test_BT = torch.from_numpy(task.test_sequences(sequences))
        self.validation_BT = torch.from_numpy(task.validation_sequences(validation))

    def jobs(self) -> list[tuple[Arm, int]]:
        """Return (arm, seed) seed by seed, so that an interrupted run has complete seeds."""
        return [(arm, seed) for n, seed in enumerate(self.seeds) for arm in self.arms if n < arm.seeds]

    def piece(self, arm: Arm, seed: int) -> dict | None:
        """Return the finished piece of an arm and a seed, or None.

        Raises:
            UserError: it was made with other settings of the arm.
        """
        path = self._file("pieces", arm, seed, "json")
        if not path.is_file():
            return None
        piece = json.loads(path.read_text(encoding="utf-8"))
        if piece["settings"] != arm.settings:
            raise UserError(f"{path} is of an arm with other settings. Choose another folder, or remove the file.")
        return piece

    def run(self, report: Callable[[str], None]) -> list[dict]:
        """Compute the missing pieces and return all."""
        for arm, seed in self.jobs():
            if self.piece(arm, seed) is None:
                piece = {"arm": arm.name, "seed": seed, "settings": arm.settings, **self._measure(arm, seed)}
                write_atomically(self._file("pieces", arm, seed, "json"), json.dumps(piece) + "\n")
                read = ", ".join(f"{name} {reading['nll']:.3f}" for name, reading in piece["readings"].items())
                report(f"{arm.name}, seed {seed}: {read} ({piece['training']['cpu_seconds']:.0f} CPU s)")
        return [piece for job in self.jobs() if (piece := self.piece(*job)) is not None]

    def _file(self, part: str, arm: Arm, seed: int, kind: str) -> Path:
        return self.folder / part / f"{arm.name}-{seed}.{kind}"

    def _measure(self, arm: Arm, seed: int) -> dict:
        if arm.kind == "naive":
            return self._measure_naive(arm, seed)
        model, training = self._trained(arm, seed)
        readings = {"as trained": self._read(model, arm, self.test_BT)}
        if arm.kind == "ttt":
            readings["TTT off"] = self._read(with_changes(model, lr=0.0), arm, self.test_BT)
            gate = "none" if arm.ttt.get("inner_gate") else "eaft"
            readings[f"inner gate {gate}"] = self._read(
                with_changes(model, lr=TTT["lr"], inner_gate=gate), arm, self.test_BT
            )
        return {
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "training": training,
            "readings": {name: summary(nll_BT.double().numpy()) for name, nll_BT in readings.items()},
        }

    def _measure_naive(self, arm: Arm, seed: int) -> dict:
        window = next(other for other in self.arms if other.name == "window")
        model = new_model("full")
        model.load_state_dict(self._trained(window, seed)[0].state_dict())
        with_ttt(model, arm, seed)
        sweep = {
            rate: self._read(with_changes(model, lr=rate), arm, self.validation_BT).mean().item()
            for rate in NAIVE_RATES
        }
        best = min(sweep, key=sweep.__getitem__)
        return {
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "training": {"cpu_seconds": 0.0, "curve": []},
            "validation_by_rate": {f"{rate:g}": round(nll, 4) for rate, nll in sweep.items()},
            "inner_rate": best,
            "readings": {
                "as trained": summary(self._read(with_changes(model, lr=best), arm, self.test_BT).double().numpy())
            },
        }

    def _trained(self, arm: Arm, seed: int) -> tuple[nn.Module, dict]:
        """Return the trained model and the record of its training; weights that were kept are not trained again."""
        torch.manual_seed(seed)
        model = new_model("full" if arm.kind == "ttt" else arm.kind)
        if arm.kind == "ttt":
            with_ttt(model, arm, seed)
        path = self._file("weights", arm, seed, "pt")
        if path.is_file():
            kept = torch.load(path)
            model.load_state_dict(kept["model"])
            return model, kept["training"]

        def loss(tokens_BT: Tensor) -> Tensor:
            return model(tokens_BT, labels=tokens_BT).loss if arm.kind == "ttt" else stock_nll(model, tokens_BT).mean()

        def measure() -> float:
            return self._read(model, arm, self.validation_BT).mean().item()

        training = train(model, loss, measure, arm=arm, seed=seed)
        with replacing(path) as partial:
            torch.save({"model": model.state_dict(), "training": training}, partial)
        return model, training

    def _read(self, model: nn.Module, arm: Arm, tokens_BT: Tensor) -> Tensor:
        """Return the negative log-likelihood of every token after the first, `[B, T - 1]`."""
        nll = sequence_nll if arm.kind in ("ttt", "naive") else torch.no_grad()(stock_nll)
        return torch.cat([nll(model, rows_BT) for rows_BT in tokens_BT.split(_ROWS)])


def with_ttt(model: nn.Module, arm: Arm, seed: int) -> None:
    """Apply TTT with the settings of the arm, in place; `seed` determines random primes."""
    config = TTTConfig(**{**TTT, **arm.ttt})
    apply_ttt(model, config)
    if config.layout == "prime" and arm.init == "random":
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight_FD in (weight for prime in model.ttt.primes for weight in (prime.gate, prime.up)):
                weight_FD.normal_(0, weight_FD.shape[1] ** -0.5, generator=random)


def with_changes(model: nn.Module, **changes) -> nn.Module:
    """Change settings of TTT, in place; return the model."""
    model.ttt.config = replace(model.ttt.config, **changes)
    return model


def summary(nll_BT: np.ndarray) -> dict:
    """Return means over sequences; the mean of each sequence is kept for paired differences."""
    by_bin = task.by_bin(nll_BT)
    return {
        "nll": round(nll_BT.mean().item(), 5),
        "by_bin": by_bin.mean(0).round(4).tolist(),
        "by_bin_error": (by_bin.std(0, ddof=1) / len(by_bin) ** 0.5).round(4).tolist(),
        "by_sequence": nll_BT.mean(1).round(4).tolist(),
    }
