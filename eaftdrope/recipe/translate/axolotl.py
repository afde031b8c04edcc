"""Axolotl 0.21: `axolotl train CONFIG`.

Its loss `use_eaft` does not divide the entropy, so weights are up to ln k: the gate's option `divisor: 1.0`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .axolotl_data import write_sources
from .draft import Draft, Translation
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

NAME = "Axolotl"
_DEFAULTS = ArgumentDefaults(
    learning_rate=None,
    batch_size=1,
    epochs=1.0,
    scheduler="cosine",
    # at most 100 steps of it
    warmup_ratio=0.03,
    save_every=None,
    keep_checkpoints=4,
    log_every=None,
    epochs_key="num_epochs",
    batch_key="micro_batch_size",
    scheduler_key="lr_scheduler",
    optimizer_key="optimizer",
)
_ATTENTION = {
    "flash_attention": "flash_attention_2",
    "sdp_attention": "sdpa",
    "flex_attention": "flex_attention",
    "eager_attention": "eager",
}
_REFUSED = {
    "rl": "it trains on preferences or rewards",
    "reward_model": "it trains a reward model",
    "process_reward_model": "it trains a reward model",
    "diffusion_lm": "it trains a diffusion model",
    "diffusion": "it trains a diffusion model",
    "kd_trainer": "it distils a teacher's logits",
    "unfrozen_parameters": "a recipe trains all weights or LoRA adapters",
    "relora": "a recipe trains LoRA adapters without restarts",
    "processor_type": "only text is trained",
}
_TRACKERS = {
    "wandb": ("use_wandb", "wandb_project"),
    "mlflow": ("use_mlflow", "mlflow_tracking_uri"),
    "comet_ml": ("use_comet", "comet_project_name"),
    "trackio": ("use_trackio", "trackio_project_name"),
    "swanlab": ("use_swanlab", "swanlab_project"),
    "tensorboard": ("use_tensorboard",),
}


def translate_axolotl(config: dict[str, Any], folder: Path) -> Translation:
    """Translate a configuration of Axolotl.

    Args:
        config: its plain data.
        folder: where it lies; not read.

    Raises:
        UserError: it trains in a way that a recipe does not have.
    """
    draft = Draft(NAME, config)
    _purpose(draft)
    _model(draft)
    write_sources(draft)
    if draft.get("chat_template") == "tokenizer_default":
        draft.nothing("as in a recipe", "chat_template")
    draft.number_to("sequence_len", "data.max_length", 512, int)
    if draft.get("sample_packing"):
        draft.write("data.packing", True, "sample_packing")
    else:
        draft.nothing("off", "sample_packing")
    _loss(draft)
    if draft.get("adapter"):
        _lora(draft)
    if draft.get("gradient_checkpointing") in ("offload", "offload_disk"):
        draft.write("train.gradient_checkpointing", True, "gradient_checkpointing")
    write_training(draft, _DEFAULTS)
    if "bf16" not in config and not draft.get("fp16"):
        draft.write("train.precision", "auto", default=True)
    else:
        write_precision(draft, pure=bool(draft.get("bfloat16")))
    write_intervals(draft, _DEFAULTS)
    write_output(draft, "./model-out")
    if draft.get("hub_model_id"):
        draft.write("output.push_to_hub", draft.get("hub_model_id"), "hub_model_id")
    used = [name for name, keys in _TRACKERS.items() if any(draft.get(key) for key in keys)]
    write_trackers(draft, used, *(key for keys in _TRACKERS.values() for key in keys))
    return draft.finish(LEFTOVERS, SECTIONS)


def _purpose(draft: Draft) -> None:
    for key, why in _REFUSED.items():
        if draft.get(key):
            draft.refuse(f"{key}: {draft.get(key)}: {why}.")
    if draft.get("learning_rate") is None:
        draft.refuse("learning_rate is missing.")
    adapter = draft.get("adapter")
    if adapter not in (None, "lora", "qlora"):
        draft.refuse(f"adapter: {adapter}: a recipe trains all weights or LoRA adapters.")
    draft.nothing("adapters" if adapter else "a recipe without `lora` trains all weights", "adapter")


def _model(draft: Draft) -> None:
    if draft.get("base_model"):
        draft.write("model.reference", draft.get("base_model"), "base_model")
    else:
        draft.refuse("base_model is missing.")
    # each has a second name, which the documentation uses
    for key in ("revision_of_model", "model_revision"):
        if draft.get(key):
            draft.write("model.revision", draft.get(key), key)
    if draft.get("trust_remote_code"):
        draft.write("model.trust_remote_code", True, "trust_remote_code")
    if draft.get("adapter") == "qlora" or draft.get("load_in_4bit"):
        if draft.get("adapter"):
            draft.write("model.quantization", "4bit", "load_in_4bit")
        else:
            draft.refuse("load_in_4bit: 4-bit weights cannot be trained without adapters.")
    chosen = [key for key in _ATTENTION if draft.get(key)]
    if draft.get("attn_implementation"):
        draft.write("model.attn_implementation", draft.get("attn_implementation"), "attn_implementation")
        draft.lose("attn_implementation goes before it", *chosen)
    elif chosen:
        draft.write("model.attn_implementation", _ATTENTION[chosen[0]], chosen[0])
        draft.lose(f"{chosen[0]} goes before it", *chosen[1:])
    draft.nothing("off", *(key for key in _ATTENTION if key not in chosen))


def _loss(draft: Draft) -> None:
    if draft.get("use_eaft"):
        draft.write("loss.gate", "eaft", "use_eaft")
        draft.write("loss.alpha", float(draft.number("eaft_alpha", 1.0)), "eaft_alpha", default=True)
        draft.write("loss.k", int(draft.number("eaft_k", 20)), "eaft_k", default=True)
        draft.write("loss.divisor", 1.0, default=True)
    elif draft.get("use_dft"):
        draft.write("loss.gate", "dft", "use_dft")
    else:
        draft.write("loss.gate", "none", default=True)
    if draft.get("use_eaft"):
        draft.lose("use_eaft goes before it", "use_dft")
    else:
        draft.nothing("use_eaft is off", "use_eaft", "eaft_alpha", "eaft_k")


def _lora(draft: Draft) -> None:
    draft.number_to("lora_r", "lora.r", 8, int)
    draft.number_to("lora_alpha", "lora.alpha", 16, float)
    draft.number_to("lora_dropout", "lora.dropout", 0.0, float)
    targets = draft.get("lora_target_modules", [])
    targets = [targets] if isinstance(targets, str) else list(targets)
    saved = list(draft.get("lora_modules_to_save", []))
    if draft.get("lora_target_linear"):
        draft.nothing("all-linear has them", "lora_target_modules")
        write_targets(draft, [], saved, "lora_target_linear", "lora_modules_to_save")
    elif len(targets) == 1 and not targets[0].replace("_", "").isalnum() and targets != ["all-linear"]:
        draft.lose("a recipe has names of modules, or all-linear, which is written", "lora_target_modules")
        write_targets(draft, [], saved, "", "lora_modules_to_save")
    else:
        write_targets(
            draft, [] if targets == ["all-linear"] else targets, saved, "lora_target_modules", "lora_modules_to_save"
        )
        if not targets:
            draft.origins["lora.target_modules"] = LEFT_TO_PEFT
    draft.nothing("off", *(["lora_target_linear"] if not draft.get("lora_target_linear") else []))
    for key, name in (("peft_use_rslora", "use_rslora"), ("peft_use_dora", "use_dora")):
        if draft.get(key):
            draft.write(f"lora.{name}", True, key)


LEFTOVERS = Leftovers(
    nothing={
        "the loss is fused with the LM head without it": (
            "cut_cross_entropy* chunked_cross_entropy* liger_* flash_attn_cross_entropy flash_attn_rms_norm "
            "flash_attn_fuse_mlp lora_*_kernel use_kernels fused_attn_kernel"
        ),
        "rows are read and tokenised as they are needed": (
            "dataset_prepared_path dataset_processes dataset_keep_in_memory dataset_shard_* skip_prepare_dataset streaming "
            "streaming_multipack_buffer_size pretrain_multipack_* num_dataset_shards_to_save preprocess_iterable "
            "is_preprocess "
            "multipack_real_batches sample_packing_* eval_sample_packing batch_flattening fa_varlen_kwargs_in_collator "
            "pretraining_sample_concatenation shuffle_before_merging_datasets"
        ),
        "batches are padded to their longest row": "pad_to_sequence_len pad_to_multiple_of",
        "rows are shuffled": "shuffle_merged_datasets",
        "a recipe is strict": "strict",
        "the type of model and tokenizer is that of its files": (
            "type_of_model model_type tokenizer_type tokenizer_use_fast tokenizer_legacy tokenizer_save_jinja_files "
            "is_falcon_derived_model is_llama_derived_model is_mistral_derived_model is_qwen_derived_model low_cpu_mem_usage"
        ),
        "computed by Axolotl itself": "total_num_tokens total_supervised_tokens axolotl_config_path world_size batch_size",
        "the loss is reported with every step": "loss_watchdog_* do_causal_lm_eval eval_causal_lm_metrics include_tkps",
        "the accelerator's memory is not limited": "gc_steps gc_collect_steps",
        "bitsandbytes's NF4 with double quantisation": "nf4_backend",
        "an adapter keeps float32": "lora_fp32_gradients peft_autocast_adapter_dtype embeddings_skip_upcast",
    },
    lost={
        "the tokenizer's own chat template is used; see `eaftdrope preview`": (
            "chat_template chat_template_* default_system_message eot_tokens role_boundaries"
        ),
        "the tokenizer and its embeddings stay as they are": (
            "special_tokens tokens added_tokens_overrides tokenizer_config tokenizer_use_mistral_common "
            "resize_token_embeddings_to_32x mean_resizing_embeddings shrink_embeddings fix_untrained_tokens reinit_weights"
        ),
        "plugins of Axolotl": "plugins trainer_cls",
        "a recipe saves, and evaluates, every so many steps (train.save_every, train.eval_every)": (
            "saves_per_epoch evals_per_epoch save_first_step dynamic_checkpoint"
        ),
        "longer rows are truncated, and counted": "excess_length_strategy max_prompt_len min_sample_len eval_sequence_len",
        "rows are trained once per epoch, as they are": (
            "dataset_exact_deduplication curriculum_sampling balance_labels label_balance_*"
        ),
        "8-bit weights: a recipe quantises to 4 bits, or not": (
            "load_in_8bit bnb_config_kwargs gptq quantization qat quantize_* *_quantization* nvfp4_* "
            "llmcompressor "
            "recipe save_compressed use_onebitllms"
        ),
        "LoRA has rank, alpha, dropout and modules": (
            "lora_* loraplus_* peft peft_* mora mixlora_* merge_lora merge_method qlora_sharded_model_loading lisa_*"
        ),
        "the optimiser has no further options": (
            "adam_beta3 adam_epsilon2 dion_* qgalore_* torchdistx_path embedding_lr* lr_groups lr_div_factor "
            "lr_quadratic_warmup grokfast_*"
        ),
        "the schedule ends at train.min_rate_ratio of warmup_stable_decay, or at 0": "cosine_* jagged_*",
        "a recipe computes in bfloat16 or float32 (train.precision)": "fp8 fp8_* bfloat16 float16 float32 fp32_*",
        "the attention of transformers is used (model.attn_implementation)": (
            "xformers_attention sage_attention s2_attention flash_optimum flash_attn_d512 flex_attn_* sdpa_varlen "
            "gemma4_hybrid_attn_impl large_head_attention scaling_softmax* llama4_linearized_experts"
        ),
        "training runs as accelerate launches it (docs/distributed.md)": (
            "dp_* sequence_parallel_degree context_parallel* heads_k_stride ring_attn_func tensor_parallel_size "
            "expert_* experts_implementation deepcompile use_ray ray_* resources_per_worker device device_map max_memory "
            "gpu_memory_limit coreweave hatchery nemo_gym_*"
        ),
        "memory is saved by checkpointing, packing and the fused loss only": (
            "selective_checkpointing layer_offloading tiled_mlp* ple_cpu_offload moe_* dense_mixer use_scattermoe "
            "use_sonicmoe "
            "use_dsv4_kernels use_glm_dsa_kernels dsv4_* gemma4_* autotune_* experimental_skip_move_to_device"
        ),
        "the context is extended by the stage drope": "use_pose pose_* rope_scaling",
        "a part of other ways to train": (
            "rl_beta dpo_* kto_* orpo_* simpo_* cpo_* rpo_* trl vllm ebft precompute_ref_log_probs "
            "center_rewards_coefficient "
            "num_labels kd_* diffusion_* relora_* freeze_mm_modules spectrum_* processor_kwargs image_* base_model_config "
            "cls_model_config"
        ),
        "measured by `eaftdrope eval --suite lm-eval:...` afterwards": (
            "lm_eval_* do_bench_eval bench_* eval_table_size eval_max_new_tokens generate_samples num_generation_samples"
        ),
        "the trackers have no options in a recipe: set them by their environment variables": (
            "hf_mlflow_log_artifacts use_otel_metrics otel_*"
        ),
        "a recipe uploads the result once, with the token of `hf auth login`": "hf_use_auth_token push_dataset_to_hub",
        "the model is configured by its own files": "overrides_of_model_* model_config model_kwargs",
        "training is not profiled": "profiler_* sync_profiler_*",
        "for a web page": "gradio_*",
        "not available": "noisy_embedding_alpha max_packed_sequence_len export",
    },
    translated=(
        *(
            "base_model",
            "datasets",
            "test_datasets",
            "val_set_size",
            "sequence_len",
            "sample_packing",
            "train_on_inputs",
        ),
        *(
            "adapter",
            "lora_r",
            "lora_alpha",
            "lora_dropout",
            "lora_target_linear",
            "lora_target_modules",
            "load_in_4bit",
        ),
        *(
            "micro_batch_size",
            "gradient_accumulation_steps",
            "num_epochs",
            "max_steps",
            "learning_rate",
            "lr_scheduler",
        ),
        *(
            "optimizer",
            "warmup_ratio",
            "warmup_steps",
            "weight_decay",
            "bf16",
            "flash_attention",
            "output_dir",
            "use_eaft",
        ),
    ),
)
