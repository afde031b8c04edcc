"""TRL 1.16: `trl sft --config CONFIG`; and the options of EAFTConfig (`gate`, `gate_kwargs`), which such a file may have.

TRL's own default trains on every token of a conversation, and only on the completion where rows have one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eaftdrope.errors import UserError

from .draft import Draft, Fate, Translation
from .hf_arguments import (
    LEFT_TO_PEFT,
    ArgumentDefaults,
    write_intervals,
    write_output,
    write_precision,
    write_targets,
    write_trackers,
    write_training,
)
from .leftovers import Leftovers
from .recipe_text import SECTIONS

NAME = "TRL"
_DEFAULTS = ArgumentDefaults(learning_rate=2e-5, log_every=10, gradient_checkpointing=True)
_TYPES = ("float32", "bfloat16", "auto")
# keys of `trl dpo`, `grpo`, `kto`, `reward` and others, which `trl sft` does not have
_OTHER_COMMANDS = {
    "preference pairs (trl dpo, kto)": (
        "beta",
        "ref_model_init_kwargs",
        "precompute_ref_log_probs",
        "desirable_weight",
        "max_prompt_length",
    ),
    "rewards (trl grpo, rloo, reward)": (
        *("num_generations", "reward_funcs", "reward_model_name_or_path", "max_completion_length", "reward_weights"),
        *("center_rewards_coefficient", "use_vllm"),
    ),
    "a teacher (trl distillation)": ("teacher_model_name_or_path", "lmbda"),
}


def translate_trl(config: dict[str, Any], folder: Path) -> Translation:
    """Translate a configuration of the TRL command line.

    Args:
        config: its plain data.
        folder: where it lies; not read.

    Raises:
        UserError: it is for another command than `trl sft`.
    """
    draft = Draft(NAME, config)
    for what, keys in _OTHER_COMMANDS.items():
        if found := [key for key in keys if key in config]:
            draft.refuse(f"{', '.join(found)}: this trains on {what}; a recipe trains on labels (trl sft).")
    _model(draft)
    _sources(draft)
    _rows(draft)
    _loss(draft)
    if draft.get("use_peft"):
        _lora(draft)
    write_training(draft, _DEFAULTS)
    if "bf16" not in config and not draft.get("fp16"):
        draft.write("train.precision", "bfloat16", default=True)
    else:
        write_precision(draft)
    write_intervals(draft, _DEFAULTS)
    write_output(draft, "trainer_output")
    write_trackers(draft, draft.get("report_to", "none"), "report_to")
    return draft.finish(LEFTOVERS, SECTIONS)


def _mapping(draft: Draft, key: str) -> dict[str, Any]:
    """Return a value that is a mapping, or one as JSON text, as the command line takes it."""
    value = draft.get(key, {})
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if not isinstance(value, dict):
        raise UserError(f"{key}: expected a mapping, found {draft.get(key)!r}.")
    return value


def _model(draft: Draft) -> None:
    if draft.get("model_name_or_path"):
        draft.write("model.reference", draft.get("model_name_or_path"), "model_name_or_path")
    else:
        draft.refuse("model_name_or_path is missing.")
    nested = _mapping(draft, "model_init_kwargs")
    revision = draft.get("model_revision", nested.pop("revision", "main"))
    if revision != "main":
        draft.write("model.revision", revision, "model_revision")
    draft.nothing("the main branch", *(["model_revision"] if revision == "main" else []))
    dtype = draft.get("dtype", draft.get("torch_dtype", nested.pop("dtype", nested.pop("torch_dtype", None))))
    if dtype in _TYPES:
        draft.write("model.dtype", dtype, "dtype", "torch_dtype")
    else:
        draft.lose(f"weights are loaded as {', '.join(_TYPES)} (model.dtype)", "dtype", "torch_dtype")
    attention = draft.get("attn_implementation", nested.pop("attn_implementation", None))
    if attention:
        draft.write("model.attn_implementation", attention, "attn_implementation")
    if draft.get("trust_remote_code", nested.pop("trust_remote_code", False)):
        draft.write("model.trust_remote_code", True, "trust_remote_code")
    if draft.get("load_in_4bit"):
        if draft.get("use_peft"):
            draft.write("model.quantization", "4bit", "load_in_4bit")
        else:
            draft.refuse("load_in_4bit: 4-bit weights cannot be trained without adapters (use_peft).")
    if nested:
        draft.lose(f"no key of a recipe's model: {', '.join(nested)}", "model_init_kwargs")
    else:
        draft.nothing("its values are in the section model", "model_init_kwargs")


def _sources(draft: Draft) -> None:
    entries = draft.get("datasets", [])
    if entries:
        sources = [_source(draft, f"datasets[{index}]", entry) for index, entry in enumerate(entries)]
        draft.write("data.train", sources, "datasets")
        draft.lose(
            "datasets goes before it", "dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split"
        )
    elif draft.get("dataset_name"):
        source = {"path": draft.get("dataset_name")}
        if draft.get("dataset_train_split", "train") != "train":
            source["split"] = draft.get("dataset_train_split")
        if draft.get("dataset_config"):
            source["name"] = draft.get("dataset_config")
        draft.write("data.train", [source], "dataset_name", "dataset_config", "dataset_train_split")
    else:
        draft.refuse("dataset_name is missing: a recipe trains on rows.")
    share = draft.number("test_split_size", 0)
    if 0 < share < 1:
        draft.write("data.held_out", float(share), "test_split_size")
    else:
        draft.lose("a recipe holds out a share of the rows (data.held_out: 0.05), not a number", "test_split_size")
    if draft.get("eval_strategy", "no") == "no" or "held_out" in draft.recipe.get("data", {}) or entries:
        draft.nothing("nothing is evaluated on it", "dataset_test_split")
    else:
        held_out = {"path": draft.get("dataset_name"), "split": draft.get("dataset_test_split", "test")}
        if draft.get("dataset_config"):
            held_out["name"] = draft.get("dataset_config")
        draft.write("data.held_out", [held_out], "dataset_test_split")


def _source(draft: Draft, label: str, entry: dict[str, Any]) -> dict[str, Any]:
    files, path = entry.get("data_files"), entry.get("path")
    source: dict[str, Any] = {"path": str(path)}
    if isinstance(files, str) and path in ("json", "csv", "parquet", "text"):
        source["path"] = files
    elif files:
        draft.record(f"{label}.data_files", files, Fate.LOST, "a source is one file or folder: write a source for each")
    if entry.get("split", "train") != "train":
        source["split"] = entry["split"]
    if entry.get("name"):
        source["name"] = entry["name"]
    if entry.get("fraction") not in (None, 1, 1.0):
        source["weight"] = float(entry["fraction"])
    for option, why in (
        ("data_dir", "write the folder as the path"),
        ("columns", "columns that are not read are reported"),
    ):
        if entry.get(option):
            draft.record(f"{label}.{option}", entry[option], Fate.LOST, why)
    return source


def _rows(draft: Draft) -> None:
    if draft.get("assistant_only_loss"):
        draft.write("data.train_on", "assistant", "assistant_only_loss")
        draft.nothing("assistant_only_loss decides", "completion_only_loss")
    elif draft.get("completion_only_loss"):
        draft.write("data.train_on", "completion", "completion_only_loss")
    else:
        draft.write("data.train_on", "all", "completion_only_loss", "assistant_only_loss", default=True)
        if draft.get("completion_only_loss") is None:
            draft.origins["data.train_on"] = (
                "TRL's default; it trains rows of prompt and completion on the completion only"
            )
    draft.number_to("max_length", "data.max_length", 1024, int)
    if draft.get("packing"):
        draft.write("data.packing", True, "packing")
    else:
        draft.nothing("off", "packing")
    if draft.get("packing_strategy", "bfd") == "wrapped":
        draft.lose("rows stay whole in a pack", "packing_strategy")
    else:
        draft.nothing("as here", "packing_strategy")


def _loss(draft: Draft) -> None:
    kind = draft.get("loss_type", "nll")
    gate = draft.get("gate")
    options = _mapping(draft, "gate_kwargs")
    if gate:
        draft.write("loss.gate", gate, "gate")
        for name, value in options.items():
            draft.write(f"loss.{name}", value, "gate_kwargs")
        draft.lose("gate goes before it", "loss_type")
    elif kind == "dft":
        draft.write("loss.gate", "dft", "loss_type")
    else:
        draft.write("loss.gate", "none", "loss_type", default=True)
        if kind not in ("nll", "chunked_nll"):
            draft.lose("no such loss in a recipe (loss.gate); plain cross-entropy is written", "loss_type")
    for key, name in (("loss_backend", "backend"), ("loss_tail", "tail"), ("loss_gate_threshold", "gate_threshold")):
        if draft.get(key):
            draft.write(f"loss.{name}", draft.get(key), key)
    if draft.get("loss_recompute"):
        draft.write("loss.recompute", True, "loss_recompute")


def _lora(draft: Draft) -> None:
    draft.nothing("the section lora", "use_peft")
    draft.number_to("lora_r", "lora.r", 16, int)
    draft.number_to("lora_alpha", "lora.alpha", 32, float)
    draft.number_to("lora_dropout", "lora.dropout", 0.05, float)
    targets = draft.get("lora_target_modules", [])
    targets = targets.split() if isinstance(targets, str) else list(targets)
    saved = draft.get("lora_modules_to_save", [])
    saved = saved.split() if isinstance(saved, str) else list(saved)
    write_targets(
        draft, [] if targets == ["all-linear"] else targets, saved, "lora_target_modules", "lora_modules_to_save"
    )
    if not targets:
        draft.origins["lora.target_modules"] = LEFT_TO_PEFT
    for key in ("use_rslora", "use_dora"):
        if draft.get(key):
            draft.write(f"lora.{key}", True, key)


LEFTOVERS = Leftovers(
    nothing={
        "rows of text have the column text": "dataset_text_field",
        "batches are padded to their longest row, and packs not at all": "padding_free pad_to_multiple_of eval_packing",
        "rows are read as they are needed": "dataset_streaming streaming dataset_num_proc",
        "rows are shuffled": "shuffle_dataset",
        "an adapter is for causal language modelling": "lora_task_type",
        "bitsandbytes's NF4 with double quantisation": "bnb_4bit_* use_bnb_nested_quant",
        "not in a recipe without adapters": "use_peft lora_*",
        "buffers are checked by torch": "ignore_bias_buffers",
    },
    lost={
        "the tokenizer's own chat template is used; see `eaftdrope preview`": "chat_template_path",
        "the tokenizer's own special tokens are used": "eos_token pad_token",
        "rows are prepared by eaftdrope": "dataset_kwargs",
        "a row is truncated at its end": "truncation_mode",
        "a recipe quantises to 4 bits, or not": "load_in_8bit",
        "adapters are on modules": "lora_target_parameters",
        "the loss of a mixture's router is the model's own": "router_aux_loss_coef",
        "set environment variables in the shell": "env",
        "a setting of `accelerate launch`": "accelerate_config num_processes num_machines config_file gpu_ids",
        "the backend chooses its tile (loss.tile_mb)": "loss_tile_bytes loss_tail_threshold",
    },
    translated=(
        *(
            "model_name_or_path",
            "model_revision",
            "dataset_name",
            "dataset_config",
            "dataset_train_split",
            "max_length",
        ),
        *("packing", "assistant_only_loss", "completion_only_loss", "loss_type", "use_peft", "lora_r", "lora_alpha"),
        *(
            "learning_rate",
            "num_train_epochs",
            "max_steps",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
        ),
        *(
            "lr_scheduler_type",
            "warmup_ratio",
            "warmup_steps",
            "output_dir",
            "report_to",
            "eval_strategy",
            "eval_steps",
        ),
    ),
)
