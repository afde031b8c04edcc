"""Full fine-tuning with exact and with tail-sparse gradients, and the held-out cross-entropy during training.

Notable:
- All weights are trained, so the gradients with respect to the hidden states and to the head both matter.
- A seed is an order of the same rows: exact and sparse of one seed see the same batches.
- Weights are float32 and computation is in bfloat16, as in recipes for full fine-tuning.
- The distance between the final weights is measured, too. Adam normalises a gradient by its size, so a row of the head
  whose tiny gradients are dropped does not move, while exact gradients would move it by whole steps.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers import TrainerCallback

from eaftdrope.errors import UserError
from eaftdrope.run.machine import keep_freed_memory

from .inputs import source_name
from .kept import KeptColumns, watch_kept_columns
from .verdict import judge

ARMS = ("exact", "sparse")


@dataclass(frozen=True)
class CurveSettings:
    """Settings of all runs of one call."""

    model: str
    steps: int
    batch_size: int
    max_length: int
    held_out_rows: int
    eval_every: int
    learning_rate: float
    scheduler: str
    seeds: int
    gates: tuple[str, ...]


class CurveWatch(TrainerCallback):
    """Record the share of kept columns (None if nothing was sparse) and the time of every step, and the held-out loss
    before the first step and after every `every` steps."""

    def __init__(self, kept: KeptColumns, every: int):
        self.kept, self.every = kept, every
        self.batches: list[dict[str, Tensor]] = []
        self.shares: list[float | None] = []
        self.seconds: list[float] = []
        self.held_out: list[tuple[int, float]] = []

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.held_out.append((0, held_out_loss(model, self.batches)))

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, model, **kwargs):
        self.seconds.append(round(time.perf_counter() - self.started, 2))
        self.shares.append(None if self.kept.share is None else round(self.kept.share, 5))
        self.kept.reset()
        if state.global_step % self.every == 0:
            self.held_out.append((state.global_step, held_out_loss(model, self.batches)))


@torch.no_grad()
def held_out_loss(model, batches: list[dict[str, Tensor]]) -> float:
    """Return the plain cross-entropy of a model with EAFT, averaged over all trained tokens."""
    model.eval()
    total = tokens = 0
    for batch in batches:
        count = int((batch["labels"][:, 1:] != -100).sum())
        with torch.autocast(batch["labels"].device.type, dtype=torch.bfloat16):
            loss = model(**batch, use_cache=False, skip_logits=True).loss
        total, tokens = total + loss.item() * count, tokens + count
    model.train()
    return total / tokens


def load_rows(settings: CurveSettings, data: str, held_out: str | None, tokenizer):
    """Return training rows (the first of `data`) and held-out rows (the first of `held_out`, or the next of `data`).

    Raises:
        UserError: there are too few rows.
    """
    from eaftdrope.data import Source, build_dataset

    wanted = settings.steps * settings.batch_size

    def read(source: str, count: int):
        rows, _ = build_dataset([Source(source, limit=count)], tokenizer, max_length=settings.max_length)
        if len(rows) < count:
            raise UserError(f"{source} has {len(rows)} rows, but {count} are needed. Use fewer --steps or other data.")
        return rows

    if held_out is not None:
        rows, rows_held_out = read(data, wanted), read(held_out, settings.held_out_rows)
    else:
        both = read(data, wanted + settings.held_out_rows)
        rows, rows_held_out = both.select(range(wanted)), both.select(range(wanted, len(both)))
    # rows of similar length in a batch, for little padding
    lengths = [len(ids) for ids in rows_held_out["input_ids"]]
    return rows, rows_held_out.select(sorted(range(len(lengths)), key=lengths.__getitem__))


def train(settings: CurveSettings, arm: str, gate: str, seed: int, rows, held_out, tokenizer) -> tuple[dict, dict]:
    """Return the log of a run and its final weights by name."""
    from eaftdrope import EAFTConfig, EAFTTrainer
    from eaftdrope.models import load_model

    with tempfile.TemporaryDirectory() as folder, watch_kept_columns() as kept:
        watch = CurveWatch(kept, settings.eval_every)
        config = EAFTConfig(
            output_dir=folder,
            gate=gate,
            loss_tail=arm,
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            lr_scheduler_type=settings.scheduler,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True},
            seed=seed,
        )
        model = load_model(settings.model, dtype="float32")
        trainer = EAFTTrainer(
            model, config, train_dataset=rows, eval_dataset=held_out, processing_class=tokenizer, callbacks=[watch]
        )
        watch.batches = list(trainer.get_eval_dataloader())
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    weights = {name: value.detach() for name, value in trainer.model.named_parameters()}
    run = {"arm": arm, "gate": gate, "seed": seed, "held_out_loss": watch.held_out}
    trained = [entry for entry in trainer.state.log_history if "eaft/cross_entropy" in entry]
    for name, logged in (("batch_cross_entropy", "eaft/cross_entropy"), ("gate_mean", "eaft/gate_mean")):
        run[name] = [round(entry[logged], 5) for entry in trained]
    if arm == "sparse":
        run["kept_share"] = watch.shares
    return run | {"step_seconds": watch.seconds, "seconds": round(seconds, 1)}, weights


def distances(exact: dict[str, Tensor], sparse: dict[str, Tensor], first: dict[str, Tensor], head: str) -> dict:
    """Return the distance of the final weights relative to the distance that exact training moved them; `head` is the head's
    name."""
    result = {}
    for part, names in (("head", [head]), ("body", [name for name in exact if name != head])):
        apart = sum((sparse[name] - exact[name]).double().square().sum().item() for name in names)
        moved = sum((exact[name] - first[name]).double().square().sum().item() for name in names)
        result[part] = round((apart / moved) ** 0.5, 4) if moved else None
    return result


def run(settings: CurveSettings, data: str, held_out: str | None, keep) -> dict:
    """Run exact and sparse training in turn and return a verdict by gate. `keep(result so far)` is called after every run."""
    from eaftdrope.models import load_model, load_tokenizer

    keep_freed_memory()
    tokenizer = load_tokenizer(settings.model)
    rows, rows_held_out = load_rows(settings, data, held_out, tokenizer)
    first_model = load_model(settings.model, dtype="float32")
    first = {name: value.detach() for name, value in first_model.named_parameters()}
    head_weight = first_model.get_output_embeddings().weight
    head = next(name for name, value in first_model.named_parameters() if value is head_weight)
    result: dict = {
        # an interrupted run is recorded as such
        "complete": False,
        "trained_tokens": sum(trained_tokens(rows)),
        "held_out_tokens": sum(trained_tokens(rows_held_out)),
        "verdict": {},
        "weights_apart": [],
        "runs": [],
    }
    for gate in settings.gates:
        for seed in range(settings.seeds):
            weights = {}
            for arm in ARMS:
                logged, weights[arm] = train(settings, arm, gate, seed, rows, rows_held_out, tokenizer)
                result["runs"].append(logged)
                print(
                    f"{gate} seed {seed} {arm}: {logged['held_out_loss'][-1][1]:.5f} in {logged['seconds']} s",
                    flush=True,
                )
                keep(result)
            apart = distances(weights["exact"], weights["sparse"], first, head)
            result["weights_apart"].append({"gate": gate, "seed": seed, **apart})
        result["verdict"][gate] = judge(*(by_seed(result["runs"], gate, arm) for arm in ARMS))
        keep(result)
    return result | {"complete": True}


def by_seed(runs: list[dict], gate: str, arm: str) -> dict[int, list]:
    return {run["seed"]: run["held_out_loss"] for run in runs if (run["gate"], run["arm"]) == (gate, arm)}


def trained_tokens(rows) -> Iterator[int]:
    """Return the number of tokens with a loss in each row; the first token of a row has no prediction."""
    return (sum(label != -100 for label in row["labels"][1:]) for row in rows)


def settings_for_json(settings: CurveSettings, data: str, held_out: str | None) -> dict:
    names = {"model": settings.model, "data": data, "held_out": held_out or data}
    return {**asdict(settings), **{key: source_name(source) for key, source in names.items()}}
