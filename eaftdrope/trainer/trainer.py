"""`EAFTTrainer`: TRL's `SFTTrainer` with the entropy-gated loss, computed inside `model.forward` without logits."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import ParallelismConfig
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from eaftdrope.errors import UserError
from eaftdrope.files import honour_umask
from eaftdrope.loaded_model import check_token_ids
from eaftdrope.loss.gates import GateLike, resolve_gate
from eaftdrope.loss.landscape import Landscape
from eaftdrope.loss.products import has_instructions

from .callbacks.divergence import Fault, Guard, check_saved
from .config import EAFTConfig
from .meter import TokenClock, log_names
from .optimizer import check_optimizer, reshard
from .packing import check_packing
from .patch import install, latest, pop_landscape, pop_meter, refuse_applied
from .saving import original_settings, with_settings
from .shard_checkpoints import SCHEDULER_FILE, load_optimizer, load_weights, save_optimizer, sharded_at_load
from .step_rows import describe_rows, rows_of_step
from .token_weights import COLUMN, WeightedCollator, has_weights, prepared

if TYPE_CHECKING:
    from peft import PeftModel

_SLOW_BFLOAT16 = (
    "bf16 is on, as TRL has it by default, but this CPU has no instructions for it: the model's matrix products are many "
    "times slower than in float32. Set bf16=False."
)


class EAFTTrainer(SFTTrainer):
    """
    Drop-in for [`~trl.SFTTrainer`]: `from eaftdrope import EAFTTrainer as SFTTrainer`.

    Training minimises `sum_t w_t nll_t / num_items` with `w_t` the detached gate of the token; evaluation reports plain
    cross-entropy. Gradients do not depend on how a batch is split over accumulation steps or processes (for gates that
    weight each token separately: all but `eaft-mask`, `conflict-mask`, `talr` and `mile`).

    Every log carries `eaft/weighted_loss`, `eaft/cross_entropy`, `entropy` (nats), `eaft/gate_mean`,
    `eaft/gate_low_share` (gate < 0.05), `eaft/conflict_share` (entropy < 0.5 nats and p < 0.1), `mean_token_accuracy`,
    `num_tokens`, `eaft/trained_tokens`, `eaft/tokens_per_second`, and from the tokens' landscape: share and cross-entropy
    of the tokens of high (>= 2 nats) and low (<= 0.5) entropy (`eaft/high_entropy_loss`, `eaft/high_entropy_share`,
    `eaft/low_entropy_loss`, `eaft/low_entropy_share`) and the gates by tenths (`eaft/gate_hist_00` to `_09`, shares). With
    an anchor it also carries `eaft/anchor_kl`, the mean divergence from the base model (nats).

    A column `token_weights` of the training rows (a number per token, for its label) weights the loss: a factor on the gate,
    or negative in its place. The divisor stays the number of trained tokens, and evaluation does not read it.

    Args:
        gate (`str`, [`~eaftdrope.loss.gates.Gate`] or callable, *optional*):
            Overrides `args.gate`; may be a function of [`~eaftdrope.loss.TokenStats`].
        base_model ([`~transformers.PreTrainedModel`], *optional*):
            The base of `args.anchor`: the model before training, frozen here and held whole by every process. Not needed
            with adapters, whose base is the model without them.
        **kwargs:
            Passed to [`~trl.SFTTrainer`]. A plain `SFTConfig` as `args` trains with the default gate.

    Raises:
        UserError: settings that would silently train another loss: `compute_loss_func`, label smoothing, `loss_type="dft"`,
            Liger's fused cross-entropy, an adapter on the head, an anchor without a base, sequence or context parallelism,
            `nn.DataParallel`; a model whose weights contain NaN or infinity. In `train`: a trainable parameter that is not
            in the optimiser; a loss, a gradient or a weight that became NaN or infinite, before a checkpoint is written. In
            `save_model`: such weights.
    """

    _tag_names = ["trl", "sft", "eaft"]
    model: PreTrainedModel  # pyrefly: ignore[bad-override]  # set by the base class, never None after __init__
    # compute_loss divides by the tokens of the whole accumulated batch
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: TrainingArguments | None = None,
        *trainer_args: Any,
        gate: GateLike | None = None,
        base_model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        config = _as_eaft_config(args)
        if kwargs.get("compute_loss_func") is not None:
            raise UserError(
                "compute_loss_func replaces the loss, so the gate would not be used. Pass a gate instead: "
                "EAFTTrainer(..., gate=lambda stats: ...)."
            )
        refuse_parallelism(config.parallelism_config)
        if config.n_gpu > 1:
            raise UserError(
                f"nn.DataParallel ({config.n_gpu} GPUs in one process) is not supported: launch one process per GPU, with "
                "`accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one GPU."
            )
        assert not isinstance(config.model_init_kwargs, str), "TrainingArguments parses JSON"
        self._original_settings = original_settings(model, config.model_init_kwargs)
        settings = config.loss_settings()
        if gate is not None:
            settings = replace(settings, gate=resolve_gate(gate))
        self.gate = settings.gate
        if isinstance(model, nn.Module):
            refuse_applied(model)
        with _checkpoints_are_ours(config, model):
            super().__init__(model, config, *trainer_args, **kwargs)
        self._check_vocabulary()
        self._weighted = has_weights(self.train_dataset)
        if self._weighted and type(self.data_collator) is DataCollatorForLanguageModeling:
            self.data_collator = WeightedCollator.like(self.data_collator)
        # an accelerate configuration file can enable what args do not show
        refuse_parallelism(self.accelerator.parallelism_config)
        if base_model is not None:
            base_model.to(self.accelerator.device)
        install(self.model, settings, base_model)
        if self.padding_free:
            check_packing(self.model)
        # the base class read these from the model before it was patched (see patch.py)
        self.model_accepts_loss_kwargs = self._loss_shifts_labels = True
        self._clock = TokenClock()
        self._aux_losses = {"train": [], "eval": []}
        self._guard = Guard(self.args.device, self.args.gradient_accumulation_steps, self.gate.formula)
        self.add_callback(self._guard)
        if self.args.bf16 and self.accelerator.device.type == "cpu" and not has_instructions(torch.bfloat16):
            warnings.warn(_SLOW_BFLOAT16, stacklevel=2)

    def _check_vocabulary(self) -> None:
        """Check before the first step that the model has a row for every token."""
        size: Any = getattr(self.model.get_input_embeddings(), "num_embeddings", None)
        tokenizer: Any = getattr(self.processing_class, "tokenizer", self.processing_class)
        held_out = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        for rows in (self.train_dataset, *held_out.values()):
            if size and isinstance(rows, Dataset) and "input_ids" in rows.column_names:
                check_token_ids(rows, size, tokenizer)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, *rest: Any, **options: Any
    ) -> Any:
        weighted = has_weights(dataset) or args.loss_exempt
        rows = super()._prepare_dataset(dataset, processing_class, args, packing and not weighted, *rest, **options)
        if not weighted:
            return rows
        return prepared(rows, getattr(processing_class, "tokenizer", processing_class), args, packing)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        assert self._signature_columns is not None
        if COLUMN not in self._signature_columns:
            self._signature_columns.append(COLUMN)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with with_settings(self.model.config, self._original_settings):
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            assert folder is not None
            honour_umask(folder)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        if self.model.training:
            if num_items_in_batch is None:
                raise UserError(
                    "the batch has no `labels`, so its trained tokens cannot be counted. Check the collator."
                )
            if self._weighted and COLUMN not in inputs:
                raise UserError(
                    f"the training rows have {COLUMN}, and the data collator leaves them out of its batches. Pass them on as "
                    "eaftdrope.trainer.token_weights.WeightedCollator does, or remove the column."
                )
            self._clock.add(inputs)
        inputs = {**inputs, "use_cache": False, "skip_logits": not return_outputs}
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        loss = outputs.loss
        if self.aux_loss_enabled:
            self._aux_losses["train" if self.model.training else "eval"].append(outputs.aux_loss.detach())
        aux_loss = self.router_aux_loss_coef * outputs.aux_loss if self.aux_loss_enabled else 0.0
        loss = loss - aux_loss
        if num_items_in_batch is not None:
            # num_items counts the tokens of every rank while DDP averages gradients over ranks
            if self.args.average_tokens_across_devices:
                loss = loss * (self.accelerator.num_processes // self.get_tp_size())
            # a mean of the micro-batch, unlike the token loss; older releases pass num_items to an evaluation too
            if self.model.training:
                aux_loss = aux_loss / self.current_gradient_accumulation_steps
        loss = loss + aux_loss
        return (loss, outputs) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        figures = latest(self.model)
        extreme_gate = figures.extreme_gate if figures else torch.zeros((), dtype=torch.bool)
        self._guard.watch.add_loss(self.state.global_step + 1, loss, extreme_gate)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: float | None = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        # under float16 the scaler skips a step whose gradients overflow: no fault
        if self.accelerator.mixed_precision != "fp16":
            self._guard.watch.add_gradient(self.state.global_step + 1, norm)
        if self._guard.watch.is_free:
            self._check_numbers()
        return norm

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        # undo what an evaluation before training leaves: FSDP2 with gathered parameters instead of shards, and a mark on
        # the model with which accelerate would not wrap it in DDP, so that each process would train its own
        reshard(self.model)
        if self.model_wrapped is self.model and hasattr(self.model, "_is_accelerate_prepared"):
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            del self.model._is_accelerate_prepared
        optimizer = super().create_optimizer(model)
        check_optimizer(self.model if model is None else model, optimizer, str(self.args.optim))
        return optimizer

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # before any file of the checkpoint, or one that it replaces, is changed
        self._check_numbers()
        check_saved(self.model, self.args, self.state)
        super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        check_saved(self.model, self.args, self.state)
        super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not sharded_at_load(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        assert self.optimizer is not None and self.lr_scheduler is not None, "it is training"
        save_optimizer(self.model, self.optimizer, Path(output_dir), writes=self.args.should_save)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not sharded_at_load(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        assert self.optimizer is not None and self.lr_scheduler is not None, "it is training"
        load_optimizer(self.model, self.optimizer, Path(checkpoint))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_FILE), weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if sharded_at_load(self.model):
            load_weights(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _check_numbers(self) -> None:
        """Stop the training if a loss or gradient was not finite; waits for the device."""
        self._guard.check(self.model, self.args, self.state, self._rows_of)

    def _rows_of(self, fault: Fault) -> str:
        size = self.get_tp_size()
        # processes of a tensor-parallel group have the same rows
        batch = fault.batch and (fault.batch[0], fault.batch[1] // size)
        loader, accumulation = self.callback_handler.train_dataloader, self.args.gradient_accumulation_steps
        assert loader is not None, "it is training"
        replicas = self.accelerator.num_processes // size
        found = rows_of_step(loader, fault.step, accumulation, replicas=replicas, batch=batch)
        return describe_rows(found, self.train_dataset)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().prediction_step(model, self._without_repeated_rows(inputs), *args, **kwargs)

    def _without_repeated_rows(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the last batch without labels for the rows that accelerate repeats from the beginning, so that every
        process has equally many: they are in the mean already."""
        state = self.accelerator.gradient_state
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return inputs
        rows = inputs["labels"].shape[0]
        before = self.accelerator.process_index // self.get_tp_size() * rows
        labels = inputs["labels"].clone()
        labels[max(0, state.remainder - before) :] = -100
        return {**inputs, "labels": labels}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        metrics = pop_meter(self.model, training=self.model.training, reduce=self._sum_over_ranks)
        if metrics:
            names = log_names(metrics)
            if mode == "eval":
                # the mean over tokens, not over batches, so that the batch size does not change it
                logs.update({key: metrics["nll"] for key in logs if key.endswith("_loss")})
                kept = ("entropy", "mean_token_accuracy", "eaft/conflict_share")
                names = {key: value for key, value in names.items() if key in kept or key.startswith("position/")}
                names["num_tokens"] = (
                    self._total("num_tokens") + self._clock.tokens(self._sum_over_ranks) / self.get_tp_size()
                )
            else:
                names |= self._token_counts(metrics["tokens"])
            if aux_losses := self._aux_losses[mode]:
                mean = torch.stack(aux_losses).mean()
                names["aux_loss"] = self.accelerator.reduce(mean, reduction="mean").item()
                aux_losses.clear()
            self._metrics[mode].update({name: [value] for name, value in names.items()})
        super().log(logs, start_time)
        # after the callbacks that show and keep the log
        if "loss" in logs or "train_runtime" in logs:
            self._check_numbers()
        if "train_runtime" in logs:
            check_saved(self.model, self.args, self.state)

    def pop_landscape(self) -> Landscape | None:
        """Return the landscape of the tokens trained since the last call, over all processes, which must all call."""
        # the processes of a tensor-parallel group have the same tokens
        size = self.get_tp_size()

        def once(values: torch.Tensor) -> torch.Tensor:
            summed = self._sum_over_ranks(values)
            return summed / size if summed.is_floating_point() else summed // size

        return pop_landscape(self.model, reduce=once)

    def _token_counts(self, trained: float) -> dict[str, float]:
        """Return running totals and speed; a resumed run continues from the last logged totals."""
        tokens, seconds = self._clock.pop(self._sum_over_ranks)
        return {
            "num_tokens": self._total("num_tokens") + tokens / self.get_tp_size(),
            "eaft/trained_tokens": self._total("eaft/trained_tokens") + trained / self.get_tp_size(),
            "eaft/tokens_per_second": tokens / self.get_tp_size() / seconds,
        }

    def _total(self, name: str) -> float:
        """Return the value in the last log that has it."""
        return next((entry[name] for entry in reversed(self.state.log_history) if name in entry), 0)

    def _sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(values, reduction="sum")


def _as_eaft_config(args: TrainingArguments | None) -> EAFTConfig:
    """Return the arguments as an `EAFTConfig`; a plain `SFTConfig` or `TrainingArguments` gets the default gate."""
    if args is None:
        return EAFTConfig()
    if isinstance(args, EAFTConfig):
        return args
    known = {item.name for item in fields(EAFTConfig) if item.init}
    return EAFTConfig(
        **{item.name: getattr(args, item.name) for item in fields(args) if item.init and item.name in known}
    )


@contextmanager
def _checkpoints_are_ours(args: EAFTConfig, model: object) -> Iterator[None]:
    """Let the base class accept checkpoints of a model that was sharded while it was loaded: see shard_checkpoints.py."""
    wanted = args.save_only_model
    args.save_only_model = wanted or sharded_at_load(model)
    try:
        yield
    finally:
        args.save_only_model = wanted


def refuse_parallelism(config: ParallelismConfig | None) -> None:
    """Refuse sequence and context parallelism: they shard a sequence over processes, which the loss does not support yet."""
    if config is not None and (config.sp_enabled or config.cp_enabled):
        kind = "sequence parallelism (sp_size)" if config.sp_enabled else "context parallelism (cp_size)"
        raise UserError(
            f"{kind} is not supported by the gated loss: with it the Trainer reduces the model's own cross-entropy, or "
            "shards labels so that they are shifted wrongly. Set it to 1; data parallelism, FSDP and gradient "
            "checkpointing are the supported ways to fit long sequences."
        )
