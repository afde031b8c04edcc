"""Keys of transformers' TrainingArguments, which all three tools pass on, under their names or their own.

A recipe has other defaults than transformers, so what decides the result is written out even where the configuration leaves
it to its tool.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from ..schema import LOGGERS
from ..training_sections import OPTIMIZERS, Train
from .draft import Draft, Fate

SCHEDULERS = get_args(Train.model_fields["scheduler"].annotation)
LEFT_TO_PEFT = "left to peft, which chooses by the architecture, often q_proj and v_proj"
_NEAREST = {"cosine_with_min_lr": "cosine", "cosine_warmup_with_min_lr": "cosine", "reduce_lr_on_plateau": "constant"}
_SAME_OPTIMIZER = {
    "adamw_hf": "adamw_torch",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_adamw_bnb_8bit": "paged_adamw_8bit",
    "lion": "lion_32bit",
    "paged_lion": "paged_lion_32bit",
}


@dataclass(frozen=True)
class ArgumentDefaults:
    """The defaults of a tool (None: it computes the value, so nothing is written), and its own names for four keys."""

    learning_rate: float | None = 5e-5
    batch_size: int = 8
    epochs: float = 3.0
    scheduler: str = "linear"
    warmup_ratio: float = 0.0
    optimizer: str = "adamw_torch_fused"
    save_every: int | None = 500
    keep_checkpoints: int | None = None
    log_every: int | None = 500
    gradient_checkpointing: bool = False
    epochs_key: str = "num_train_epochs"
    batch_key: str = "per_device_train_batch_size"
    scheduler_key: str = "lr_scheduler_type"
    optimizer_key: str = "optim"


def write_training(draft: Draft, defaults: ArgumentDefaults) -> None:
    """Write the section `train` from the keys that all tools share."""
    _length(draft, defaults)
    draft.number_to("learning_rate", "train.learning_rate", defaults.learning_rate, float)
    draft.number_to(defaults.batch_key, "train.batch_size", defaults.batch_size, int)
    draft.number_to("gradient_accumulation_steps", "train.accumulation", 1, int)
    _schedule(draft, defaults)
    draft.number_to("weight_decay", "train.weight_decay", 0.0, float)
    draft.number_to("max_grad_norm", "train.max_grad_norm", 1.0, float)
    _optimizer(draft, defaults)
    draft.number_to("adam_beta1", "train.adam_beta1", None, float)
    draft.number_to("adam_beta2", "train.adam_beta2", None, float)
    if draft.number("adam_epsilon", 1e-8) == 1e-8:
        draft.nothing("the epsilon of AdamW here", "adam_epsilon")
    draft.number_to("seed", "train.seed", 42, int)
    draft.number_to("data_seed", "data.seed", None, int)
    if draft.get("gradient_checkpointing", defaults.gradient_checkpointing):
        draft.write("train.gradient_checkpointing", True, "gradient_checkpointing", default=True)
    draft.number_to("dataloader_num_workers", "train.dataloader_workers", None, int)


def _length(draft: Draft, defaults: ArgumentDefaults) -> None:
    steps = draft.number("max_steps", -1)
    if steps > 0:
        draft.write("train.steps", int(steps), "max_steps")
        draft.nothing("max_steps decides the length", defaults.epochs_key)
    else:
        draft.nothing("the epochs decide the length", "max_steps")
        draft.number_to(defaults.epochs_key, "train.epochs", defaults.epochs, float)


def _schedule(draft: Draft, defaults: ArgumentDefaults) -> None:
    name = draft.get(defaults.scheduler_key, defaults.scheduler)
    steps = draft.number("warmup_steps", 0)
    ratio = draft.number("warmup_ratio", 0 if "warmup_steps" in draft.config else defaults.warmup_ratio)
    # transformers 5 reads a share of the steps from warmup_steps as well
    if 0 < steps < 1:
        steps, ratio = 0, steps
    if name == "constant":
        draft.nothing("the schedule constant has no warm-up", "warmup_steps", "warmup_ratio")
        steps = ratio = 0
    if name in SCHEDULERS:
        draft.write("train.scheduler", name, defaults.scheduler_key, default=True)
    else:
        nearest = _NEAREST.get(name, "cosine")
        draft.write("train.scheduler", nearest, default=True)
        draft.lose(f"no such schedule here: {nearest} is the nearest", defaults.scheduler_key)
    if steps:
        draft.write("train.warmup_steps", int(steps), "warmup_steps")
        draft.nothing("warmup_steps goes before it", "warmup_ratio")
    elif ratio:
        draft.write("train.warmup_ratio", float(ratio), "warmup_ratio", "warmup_steps", default=True)
    else:
        draft.nothing("no warm-up", "warmup_steps", "warmup_ratio")


def _optimizer(draft: Draft, defaults: ArgumentDefaults) -> None:
    name = draft.get(defaults.optimizer_key, defaults.optimizer)
    name = _SAME_OPTIMIZER.get(name, name)
    if name in OPTIMIZERS:
        draft.write("train.optimizer", name, defaults.optimizer_key, default=True)
        return
    draft.write("train.optimizer", "adamw_torch", default=True)
    draft.lose(f"a recipe has {', '.join(OPTIMIZERS[:5])} and their 8-bit and paged forms", defaults.optimizer_key)


def write_precision(draft: Draft, *, pure: bool = False) -> None:
    """Write `train.precision` from bf16 and fp16; `pure` also loads the weights in bfloat16."""
    if draft.get("fp16") and not draft.get("bf16"):
        draft.write("train.precision", "auto")
        draft.lose("float16 needs loss scaling; the recipe uses bfloat16 where the device is fast at it", "fp16")
        draft.nothing("off", "bf16")
        return
    draft.lose("bf16 goes before it", "fp16")
    if draft.get("bf16") == "auto":
        draft.write("train.precision", "auto", "bf16")
    elif draft.get("bf16") or pure:
        draft.write("train.precision", "bfloat16", "bf16")
    else:
        draft.write("train.precision", "float32", "bf16", default=True)
    if pure:
        draft.write("model.dtype", "bfloat16", "pure_bf16", "bfloat16")


def write_intervals(draft: Draft, defaults: ArgumentDefaults) -> None:
    """Write how often the training saves, logs and evaluates; `data.held_out` must have been written before."""
    strategy = draft.get("save_strategy", "steps")
    steps = draft.number("save_steps", defaults.save_every)
    if steps is None:
        draft.lose("a recipe saves every so many steps (train.save_every)", "save_strategy")
    elif strategy == "steps" and steps >= 1:
        draft.write("train.save_every", int(steps), "save_steps", "save_strategy", default=True)
    elif strategy == "steps":
        draft.lose("a recipe saves every so many steps, not after a share of them", "save_steps")
        draft.nothing("as here", "save_strategy")
    else:
        draft.lose("a recipe saves every so many steps (train.save_every)", "save_strategy")
        draft.nothing(f"save_strategy {strategy} does not read it", "save_steps")
    draft.number_to("save_total_limit", "train.keep_checkpoints", defaults.keep_checkpoints, int)
    steps = draft.number("logging_steps", defaults.log_every)
    if steps is None or steps >= 1:
        draft.number_to("logging_steps", "train.log_every", defaults.log_every, int)
    else:
        draft.lose("a recipe logs every so many steps, not after a share of them", "logging_steps")
    _evaluations(draft)


def _evaluations(draft: Draft) -> None:
    key = "eval_strategy" if "eval_strategy" in draft.config else "evaluation_strategy"
    strategy, steps = draft.get(key, "no"), draft.number("eval_steps")
    if draft.config.get(key) is None and steps:
        strategy = "steps"
    if draft.recipe.get("data", {}).get("held_out") is None:
        draft.lose("no rows to evaluate on", key, "eval_steps")
    elif strategy in ("no", False):
        draft.nothing("the probes measure before and after training", key, "eval_steps")
    elif strategy == "steps" and (steps is None or steps >= 1):
        steps = draft.number("logging_steps", 500) if steps is None else steps
        draft.write("train.eval_every", max(1, int(steps)), "eval_steps", key)
    else:
        draft.lose("a recipe evaluates every so many steps (train.eval_every), and its probes before and after", key)
        draft.lose("a recipe evaluates every so many steps, not after a share of them", "eval_steps")


def write_output(draft: Draft, default_dir: str) -> None:
    """Write the section `output`, without the trackers."""
    draft.write("output.dir", str(draft.get("output_dir", default_dir)), "output_dir", default=True)
    if draft.get("push_to_hub") and draft.get("hub_model_id"):
        draft.write("output.push_to_hub", draft.get("hub_model_id"), "hub_model_id", "push_to_hub")
        private = draft.get("hub_private_repo")
        if private is not None:
            draft.write("output.private", bool(private), "hub_private_repo")
    else:
        draft.lose("a recipe needs the repository's name to upload to (output.push_to_hub)", "push_to_hub")
        draft.nothing("nothing is uploaded", "hub_model_id", "hub_private_repo")


def write_trackers(draft: Draft, names: Any, *keys: str) -> None:
    """Write `output.report_to` from the names of trackers."""
    names = [names] if isinstance(names, str) else list(names or [])
    known = [name for name in names if name in LOGGERS]
    others = [name for name in names if name not in (*LOGGERS, "none")]
    if known:
        draft.write("output.report_to", known, *keys)
        if others:
            draft.record(f"{keys[0]}[{','.join(others)}]", others, Fate.LOST, _no_tracker(others))
    elif others:
        draft.lose(_no_tracker(others), *keys)
    else:
        draft.nothing("no tracker", *keys)


def _no_tracker(names: list[str]) -> str:
    return f"not a tracker of a recipe: {', '.join(names)} (output.report_to has {', '.join(LOGGERS)})"


def write_targets(draft: Draft, targets: list[str], saved: list[str], targets_key: str, saved_key: str) -> None:
    """Write the modules that get an adapter (all linear ones without `targets`), and those that are trained in full."""
    head = [name for name in targets if name == "lm_head"]
    others = [name for name in targets if name not in head]
    draft.write("lora.target_modules", others or "all-linear", targets_key)
    # the fused loss reads the head's own weight, so that it is trained in full
    saved = list(dict.fromkeys([*saved, *head]))
    if saved:
        draft.write("lora.modules_to_save", saved, saved_key)
