"""LLaMA-Factory 0.9.5: `llamafactory-cli train CONFIG`.

Its loss `use_eaft_loss` divides the top-20 entropy by 3.0, which is the gate's option `divisor`. It evaluates a share of the
rows (`val_size`), and names its data in a dataset_info.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .draft import Draft, Translation
from .hf_arguments import (
    ArgumentDefaults,
    write_intervals,
    write_output,
    write_precision,
    write_targets,
    write_trackers,
    write_training,
)
from .leftovers import Leftovers
from .llamafactory_data import write_sources
from .recipe_text import SECTIONS

NAME = "LLaMA-Factory"
_DEFAULTS = ArgumentDefaults(gradient_checkpointing=True)
_ATTENTION = {"disabled": "eager", "sdpa": "sdpa", "fa2": "flash_attention_2", "fa3": "flash_attention_3"}
_STAGES = {"rm": "a reward model", "ppo": "PPO", "dpo": "preference pairs", "kto": "KTO's feedback"}
_OPTIMIZERS = ("use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_muon")


def translate_llamafactory(config: dict[str, Any], folder: Path) -> Translation:
    """Translate a configuration of LLaMA-Factory.

    Args:
        config: its plain data.
        folder: where it lies; dataset_info.json is also searched from there.

    Raises:
        UserError: it trains in a way that a recipe does not have.
    """
    draft = Draft(NAME, config)
    _purpose(draft)
    _model(draft)
    write_sources(draft, folder)
    _rows(draft)
    _loss(draft)
    if draft.get("finetuning_type", "lora") == "lora":
        _lora(draft)
    write_training(draft, _DEFAULTS)
    if draft.get("disable_gradient_checkpointing"):
        draft.recipe["train"].pop("gradient_checkpointing", None)
        draft.nothing("off, as by default here", "disable_gradient_checkpointing")
    write_precision(draft, pure=bool(draft.get("pure_bf16")))
    write_intervals(draft, _DEFAULTS)
    write_output(draft, "saves/llamafactory")
    write_trackers(draft, draft.get("report_to", "none"), "report_to")
    if draft.get("use_swanlab"):
        trackers = draft.recipe["output"].get("report_to", [])
        draft.write("output.report_to", [*trackers, "swanlab"], "report_to", "use_swanlab")
    return draft.finish(LEFTOVERS, SECTIONS)


def _purpose(draft: Draft) -> None:
    stage, method = draft.get("stage", "sft"), draft.get("finetuning_type", "lora")
    if stage in _STAGES:
        draft.refuse(f"stage: {stage} trains on {_STAGES[stage]}; a recipe trains on labels (stages sft and pt).")
    if method not in ("lora", "full"):
        draft.refuse(f"finetuning_type: {method}: a recipe trains all weights or LoRA adapters.")
    if draft.get("export_dir") and not draft.get("dataset"):
        draft.refuse("export_dir: this configuration merges a model. Use `eaftdrope merge`.")
    elif draft.get("do_train") is False:
        draft.refuse("do_train: false: this configuration does not train. Use `eaftdrope eval` to measure a model.")
    draft.nothing("a recipe fine-tunes", "stage")
    draft.nothing("adapters" if method == "lora" else "a recipe without `lora` trains all weights", "finetuning_type")
    for key in _OPTIMIZERS:
        draft.lose("an optimiser that a recipe does not have (train.optimizer)", key)


def _model(draft: Draft) -> None:
    if draft.get("model_name_or_path"):
        draft.write("model.reference", draft.get("model_name_or_path"), "model_name_or_path")
    else:
        draft.refuse("model_name_or_path is missing.")
    if draft.get("model_revision", "main") == "main":
        draft.nothing("the main branch", "model_revision")
    else:
        draft.write("model.revision", draft.get("model_revision"), "model_revision")
    if draft.get("trust_remote_code"):
        draft.write("model.trust_remote_code", True, "trust_remote_code")
    bits = draft.get("quantization_bit")
    if bits == 4 and draft.get("quantization_method", "bnb") in ("bnb", "bitsandbytes"):
        draft.write("model.quantization", "4bit", "quantization_bit", "quantization_method")
    else:
        draft.lose("a recipe quantises to 4 bits with bitsandbytes, or not", "quantization_bit", "quantization_method")
    attention = draft.get("flash_attn", "auto")
    if attention in _ATTENTION:
        draft.write("model.attn_implementation", _ATTENTION[attention], "flash_attn")
    else:
        draft.nothing("attention is chosen automatically", "flash_attn")


def _rows(draft: Draft) -> None:
    draft.lose("train_on_prompt goes before it", "mask_history")
    draft.nothing("off", "train_on_prompt")
    if draft.get("stage") == "pt" or draft.get("train_on_prompt"):
        draft.write("data.train_on", "all", *(["train_on_prompt"] if draft.get("train_on_prompt") else ["stage"]))
    elif draft.get("mask_history"):
        draft.write("data.train_on", "last_assistant", "mask_history")
    else:
        draft.write("data.train_on", "assistant", default=True)
    draft.number_to("cutoff_len", "data.max_length", 2048, int)
    if draft.get("neat_packing") or draft.get("packing", draft.get("stage") == "pt"):
        # rows never attend to each other here, whichever of the two is set
        draft.write("data.packing", True, "packing", "neat_packing", default=True)
    else:
        draft.nothing("off", "packing", "neat_packing")
    share = draft.number("val_size", 0)
    if 0 < share < 1 and "held_out" not in draft.recipe["data"]:
        draft.write("data.held_out", float(share), "val_size")
    elif share >= 1:
        draft.lose("a recipe holds out a share of the rows (data.held_out: 0.05), not a number", "val_size")
    else:
        draft.nothing("off" if not share else "eval_dataset goes before it", "val_size")


def _loss(draft: Draft) -> None:
    losses = ("use_eaft_loss", "use_dft_loss", "use_asft_loss")
    chosen = next((key for key in losses if draft.get(key)), None)
    if chosen == "use_eaft_loss":
        draft.write("loss.gate", "eaft", chosen)
        draft.write("loss.alpha", float(draft.number("eaft_alpha", 1.0)), "eaft_alpha", default=True)
        draft.write("loss.divisor", 3.0, default=True)
    elif chosen == "use_asft_loss":
        draft.write("loss.preset", "asft", chosen)
        draft.write("loss.anchor.kl", float(draft.number("asft_alpha", 0.1)), "asft_alpha", default=True)
    elif chosen:
        draft.write("loss.gate", "dft", chosen)
    else:
        draft.write("loss.gate", "none", default=True)
    draft.lose(f"{chosen} goes before it", *(key for key in losses if key != chosen))
    for option, loss in (("eaft_alpha", "use_eaft_loss"), ("asft_alpha", "use_asft_loss")):
        if loss != chosen:
            draft.nothing(f"the loss is not that of {loss}", option)


def _lora(draft: Draft) -> None:
    draft.number_to("lora_rank", "lora.r", 8, int)
    rank = draft.recipe["lora"]["r"]
    draft.number_to("lora_alpha", "lora.alpha", 2 * rank, float)
    draft.number_to("lora_dropout", "lora.dropout", 0.0, float)
    targets = _names(draft.get("lora_target", "all"))
    saved = _names(draft.get("additional_target", []))
    targets = [] if targets == ["all"] else targets
    write_targets(draft, targets, saved, "lora_target", "additional_target")
    for key in ("use_rslora", "use_dora"):
        if draft.get(key):
            draft.write(f"lora.{key}", True, key)


def _names(value: Any) -> list[str]:
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else list(value)


LEFTOVERS = Leftovers(
    nothing={
        "rows are read as they are needed": (
            "overwrite_cache preprocessing_* streaming buffer_size tokenized_path data_shared_file_system "
            "ignore_pad_token_for_loss dataset_dir low_cpu_mem_usage use_fast_tokenizer"
        ),
        "the report has the curve of the loss": "plot_loss compute_accuracy include_effective_tokens_per_second",
        "the loss is fused with the LM head without it": "enable_liger_kernel use_v1_kernels",
        "for inference, which a recipe does not do": (
            "infer_backend infer_dtype use_kv_cache vllm_* sglang_* do_sample temperature top_p top_k num_beams max_length "
            "max_new_tokens repetition_penalty length_penalty skip_special_tokens offload_folder"
        ),
        "bitsandbytes's NF4 with double quantisation": "quantization_type double_quantization quantization_device_map",
        "printed by `eaftdrope train --dry-run`": "print_param_status",
        "LayerNorm is computed as the model defines it": "upcast_layernorm upcast_lmhead_output",
        "checkpointing is not reentrant": "use_reentrant_gc use_unsloth_gc",
    },
    lost={
        "the tokenizer's own chat template is used; see `eaftdrope preview`": (
            "template tool_format default_system enable_thinking preserve_thinking"
        ),
        "a recipe starts from a model: merge the adapter first (`eaftdrope merge`)": (
            "adapter_name_or_path adapter_folder create_new_adapter"
        ),
        "sources have weights, by which rows are repeated (data.train, weight)": "mix_strategy interleave_probs",
        "rows are shuffled": "disable_shuffling",
        "the held-out rows are evaluated together": "eval_on_each_dataset",
        "LoRA's other initialisations and learning rates are not available": "loraplus_* pissa_*",
        "the optimiser has no further options": "galore_* apollo_* badam_*",
        "the tokenizer and its embeddings stay as they are": (
            "resize_vocab split_special_tokens add_tokens add_special_tokens new_special_tokens_config init_special_tokens"
        ),
        "the context is extended by the stage drope": "rope_scaling shift_attn",
        "a part of other ways to train": (
            "freeze_* oft_* module_dropout pref_* dpo_* kto_* simpo_* ppo_* ref_model* reward_model* ld_alpha use_llama_pro "
            "mixture_of_depths train_from_scratch"
        ),
        "only text is trained": "media_dir image_* video_* audio_* crop_to_patches use_audio_in_video",
        "other engines are not used": (
            "use_unsloth use_mca use_kt kt_* use_hyper_parallel hyper_parallel_args ray_* master_addr master_port fp8 fp8_* "
        ),
        "the caches and tokens are those of huggingface_hub": "cache_dir hf_hub_token ms_hub_token om_hub_token",
        "the model is merged by `eaftdrope merge`": "export_*",
        "training is not profiled": "enable_torch_profiler profiler_* profile_modules",
        "the loss of a mixture's router is the model's own": "moe_aux_loss_coef",
    },
    translated=(
        *("model_name_or_path", "model_revision", "dataset", "eval_dataset", "cutoff_len", "val_size", "packing"),
        *("lora_rank", "lora_alpha", "lora_dropout", "lora_target", "use_eaft_loss", "use_dft_loss", "use_asft_loss"),
        *(
            "learning_rate",
            "num_train_epochs",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "lr_scheduler_type",
        ),
        *("warmup_ratio", "warmup_steps", "logging_steps", "save_steps", "eval_steps", "eval_strategy", "output_dir"),
    ),
)
