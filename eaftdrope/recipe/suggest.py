"""Did-you-mean: the known words nearest to a mistyped one."""

from __future__ import annotations

from collections.abc import Iterable

# What the keys are called elsewhere (TRL, transformers, Axolotl, LLaMA-Factory, torchtune) -> our key.
FOREIGN_KEYS = {
    "model_name_or_path": "model.reference",
    "base_model": "model.reference",
    "name_or_path": "model.reference",
    "torch_dtype": "model.dtype",
    "load_in_4bit": "model.quantization",
    "datasets": "data.train",
    "dataset": "data.train",
    "dataset_name": "data.train",
    "eval_dataset": "data.held_out",
    "val_set_size": "data.held_out",
    "max_seq_length": "data.max_length",
    "sequence_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "sample_packing": "data.packing",
    "train_on_inputs": "data.train_on",
    "assistant_only_loss": "data.train_on",
    "eaft_alpha": "loss.alpha",
    "eaft_k": "loss.k",
    "loss_type": "loss.gate",
    "use_eaft": "loss.gate",
    "use_eaft_loss": "loss.gate",
    "use_asft_loss": "loss.preset",
    "asft_alpha": "loss.anchor",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "rank": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target": "lora.target_modules",
    "lora_target_modules": "lora.target_modules",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "max_steps": "train.steps",
    "lr": "train.learning_rate",
    "per_device_train_batch_size": "train.batch_size",
    "micro_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.accumulation",
    "lr_scheduler": "train.scheduler",
    "lr_scheduler_type": "train.scheduler",
    "optim": "train.optimizer",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "save_steps": "train.save_every",
    "save_total_limit": "train.keep_checkpoints",
    "logging_steps": "train.log_every",
    "eval_steps": "train.eval_every",
    "dataloader_num_workers": "train.dataloader_workers",
    "output_dir": "output.dir",
    "hub_model_id": "output.push_to_hub",
}


def distance(a: str, b: str) -> int:
    """Edits from `a` to `b`: insert, delete, replace a letter, or swap two neighbours (optimal string alignment)."""
    before, row = [], list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before_that, before, row = before, row, [i]
        for j, y in enumerate(b, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                cost = min(cost, before_that[j - 2] + 1)
            row.append(cost)
    return row[-1]


def nearest(word: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """At most `limit` of the `known` words that `word` may stand for, nearest first; empty when none is near.

    Near is one edit for every three letters (at least one), or a word that the other begins or ends with. Case and
    the difference between `-` and `_` do not count.
    """
    plain = word.lower().replace("-", "_")
    scored = []
    for position, candidate in enumerate(known):
        other = candidate.lower().replace("-", "_")
        edits = distance(plain, other)
        contained = min(len(plain), len(other)) >= 3 and (
            other.startswith(plain) or other.endswith(plain) or plain.startswith(other) or plain.endswith(other)
        )
        if edits <= max(1, max(len(plain), len(other)) // 3) or contained:
            scored.append((edits, position, candidate))
    return [candidate for _, _, candidate in sorted(scored)[:limit]]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` Did you mean `x` or `y`?` with a leading space, or nothing when no known word is near."""
    words = [f"`{candidate}`" for candidate in nearest(word, known)]
    if not words:
        return ""
    text = words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
    return f" Did you mean {text}?"
