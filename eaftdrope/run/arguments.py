"""The trainer of a run and its arguments: the only file that has both the recipe's keys and the trainer's."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from eaftdrope.loss.settings import LossSettings
from eaftdrope.recipe.training_sections import Train
from eaftdrope.trainer import EAFTConfig, EAFTTrainer
from eaftdrope.ttt.meta_training import TTTTrainer

from .build import add_stop_tokens, build_model, learning_model, make_generation_config_saveable, tile_bytes
from .data import RunData
from .degrees import Degrees
from .lora import lora_config
from .machine import training_device
from .plan import steps_of
from .record import DataStats
from .result import gather_on_save
from .settings import TrainingSettings

_DECAY_RATIO = 0.2
# share of the steps between evaluations that only watch for the end
_WATCH_RATIO = 0.05


def schedule_options(settings: TrainingSettings, data: DataStats) -> dict[str, float] | None:
    """Arguments of transformers' `warmup_stable_decay`: the steps of its decay and the final rate; None for others."""
    train = settings.train
    if train.scheduler != "warmup_stable_decay":
        return None
    steps = train.steps or steps_of(settings, data, Degrees.present().ranks)
    decay = max(1, round(steps * (_DECAY_RATIO if train.decay_ratio is None else train.decay_ratio)))
    return {"num_decay_steps": decay, "min_lr_ratio": train.min_rate_ratio or 0.0}


def evaluates(train: Train) -> bool:
    """Return whether the held-out rows are evaluated during the training."""
    return train.eval_every is not None or train.stop_at is not None


def build_arguments(settings: TrainingSettings, checkpoints: Path, data: DataStats) -> EAFTConfig:
    """The arguments of the trainer."""
    train, loss = settings.train, settings.loss
    # transformers reads a warm-up below 1 as a share of the steps
    warmup = train.warmup_steps if train.warmup_steps is not None else (train.warmup_ratio or 0)
    return EAFTConfig(
        output_dir=str(checkpoints),
        per_device_train_batch_size=train.batch_size,
        per_device_eval_batch_size=train.batch_size,
        gradient_accumulation_steps=train.accumulation,
        max_steps=train.steps or -1,
        num_train_epochs=train.epochs or 1,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.scheduler,
        lr_scheduler_kwargs=schedule_options(settings, data),
        warmup_steps=warmup,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        optim=train.optimizer,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        seed=train.seed,
        bf16=settings.autocast,
        fp16=False,
        use_cpu=training_device().kind == "cpu",
        gradient_checkpointing=train.gradient_checkpointing,
        save_strategy="steps",
        save_steps=train.save_every,
        # the run deletes old ones itself, once a newer one is complete
        save_total_limit=None,
        logging_steps=train.log_every,
        # a NaN must be seen
        logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluates(train) else "no",
        eval_steps=train.eval_every or (None if train.stop_at is None else _WATCH_RATIO),
        dataloader_num_workers=train.dataloader_workers,
        report_to=list(settings.report_to) or "none",
        disable_tqdm=True,
        packing=settings.packing,
        # documents that do not attend to each other are separated by their positions, in one row without padding
        padding_free=settings.separate_documents,
        max_length=None if settings.separate_documents else settings.max_length,
        # rows are encoded, masked and truncated already; only packing is left to do
        dataset_kwargs={"skip_prepare_dataset": not settings.packing},
        gate=loss.gate,
        gate_kwargs=loss.gate_kwargs(),
        loss_backend=loss.backend,
        loss_tile_bytes=tile_bytes(loss),
        loss_tail=loss.tail,
        loss_tail_threshold=loss.tail_threshold or LossSettings.tail_threshold,
        loss_gate_threshold=loss.gate_threshold,
        loss_recompute=loss.recompute,
        anchor=None if settings.anchor is None else asdict(settings.anchor),
    )


def build_trainer(
    settings: TrainingSettings, data: RunData, tokenizer: PreTrainedTokenizerBase, checkpoints: Path
) -> EAFTTrainer:
    """The model with its weights in a trainer, ready to train."""
    arguments = build_arguments(settings, checkpoints, data.stats)
    model = build_model(settings.model, Degrees.present())
    if settings.ttt:
        model = learning_model(model, settings.model, settings.ttt)
    adapters = lora_config(settings.lora, model) if settings.lora else None
    if adapters:
        # peft records the base model's place, but not its commit
        adapters.revision = settings.model.revision
    # A search for unused parameters takes a pass over the graph in every step. Only experts, and a model that learns as it
    # reads, may leave some unused: a batch without a trained token has gradients of zero.
    has_experts = any("expert" in key for key in model.config.get_text_config().to_dict())
    arguments.ddp_find_unused_parameters = has_experts or settings.ttt is not None
    add_stop_tokens(model, tokenizer, data.report.stop_tokens)
    make_generation_config_saveable(model)
    trainer_class = TTTTrainer if settings.ttt else EAFTTrainer
    trainer = trainer_class(
        model,
        arguments,
        train_dataset=data.train,
        eval_dataset=data.held_out if evaluates(settings.train) else None,
        processing_class=tokenizer,
        peft_config=adapters,
        base_model=build_model(settings.model) if settings.needs_second_model else None,
    )
    gather_on_save(trainer)
    return trainer
