"""Keys that need nothing in a recipe, and keys without a translation: patterns of names with the reason.

`Leftovers` looks a key up in the patterns of its tool and then in those of transformers' TrainingArguments, which every tool
passes on. The names are checked against the tools' own lists by tests/recipe/translate.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import NamedTuple


class LeftoverReason(NamedTuple):
    """Why nothing is written for a key; `needs_nothing` if the recipe does the same without it."""

    why: str
    needs_nothing: bool


@dataclass(frozen=True)
class Leftovers:
    """The keys of a tool that its translation does not decide on.

    Args:
        nothing, lost: reason -> names, separated by spaces; `*` matches any characters.
        translated: names that the translation decides on, for suggestions.
    """

    nothing: dict[str, str]
    lost: dict[str, str]
    translated: Iterable[str] = field(default=())

    def reason(self, key: str) -> LeftoverReason | None:
        """Return the reason for a key; None if no pattern matches it."""
        for reasons, needs_nothing in ((self.nothing, True), (self.lost, False), (NOTHING, True), (LOST, False)):
            for why, patterns in reasons.items():
                if any(fnmatchcase(key, pattern) for pattern in patterns.split()):
                    return LeftoverReason(why, needs_nothing)
        return None

    @cached_property
    def names(self) -> list[str]:
        """Every known name, for suggestions."""
        tables = (self.nothing, self.lost, NOTHING, LOST)
        patterns = [name for table in tables for names in table.values() for name in names.split() if "*" not in name]
        return [*self.translated, *patterns]


NOTHING = {
    "run the same command again to resume": (
        "resume_from_checkpoint auto_resume_from_checkpoints overwrite_output_dir ignore_data_skip "
        "restore_callback_states_from_checkpoint enable_jit_checkpoint save_on_each_node save_only_model save_safetensors"
    ),
    "a recipe trains, and measures before and after": "do_train do_eval do_predict prediction_loss_only",
    "the probes have their own batches (probes.batch_tokens)": (
        "per_device_eval_batch_size per_gpu_eval_batch_size eval_accumulation_steps bf16_full_eval fp16_full_eval "
        "eval_batch_size batch_eval_metrics eval_do_concat_batches eval_use_gather_object include_for_metrics "
        "include_inputs_for_metrics"
    ),
    "each run logs loss, gate and tokens per second": (
        "logging_strategy logging_first_step log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen "
        "include_tokens_per_second log_level log_level_replica disable_tqdm skip_memory_metrics logging_dir"
    ),
    "the loss is fused with the LM head without it": "use_liger_kernel liger_kernel_config",
    "rows are read and tokenised as they are needed": (
        "dataset_num_proc dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
        "dataloader_multiprocessing_context dataloader_in_order remove_unused_columns label_names length_column_name"
    ),
    "checkpointing is not reentrant": "gradient_checkpointing_kwargs use_cache",
    "the device is chosen automatically": "no_cuda use_cpu use_mps_device local_rank _n_gpu",
    "the loss is averaged over the tokens of a whole step": "average_tokens_across_devices",
}
LOST = {
    "a setting of `accelerate launch`, which starts the training on several devices (docs/distributed.md)": (
        "deepspeed fsdp fsdp_* accelerator_config parallelism_config ddp ddp_* tpu_* mp_parameters"
    ),
    "the schedule has no options beyond train.decay_ratio and train.min_rate_ratio": "lr_scheduler_kwargs",
    "AdamW's epsilon is 1e-8": "adam_epsilon",
    "the optimiser has no further options": "optim_args optim_target_modules adafactor",
    "a recipe computes in bfloat16 or float32 (train.precision)": ("tf32 fp16 fp16_* half_precision_backend"),
    "the gated loss is the cross-entropy of the label, without smoothing": "label_smoothing_factor",
    "noise on the embeddings is not part of the method": "neftune_noise_alpha",
    "the model is not compiled": "torch_compile* torchdynamo jit_mode_eval",
    "the batch size is fixed (train.batch_size)": "auto_find_batch_size",
    "rows are shuffled": "train_sampling_strategy group_by_length sortish_sampler",
    "the last incomplete batch is trained": "dataloader_drop_last",
    "the result is the last step: compare checkpoints with `eaftdrope eval`": (
        "load_best_model_at_end metric_for_best_model greater_is_better early_stopping_*"
    ),
    "the trackers have no options in a recipe: set them by their environment variables": (
        "run_name project trackio_* wandb_* swanlab_* comet_* mlflow_*"
    ),
    "a recipe uploads the result once, with the token of `hf auth login`": "hub_* push_to_hub_*",
    "evaluations begin after train.eval_every steps": "eval_delay eval_on_start",
    "memory is not emptied between steps": "torch_empty_cache_steps activation_checkpointing* activation_offloading",
    "training is not made deterministic": "full_determinism",
    "generation has the options of each probe (probes)": ("generation_* predict_with_generate eval_num_beams"),
    "for debugging transformers": "debug past_index ray_scope use_legacy_prediction_loop per_gpu_train_batch_size",
}
