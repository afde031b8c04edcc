"""From a validated recipe to the objects of a run: tokenizer, data, model, trainer arguments, probes.

The only file that knows both the recipe's keys and the trainer's.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from eaftdrope.errors import DataError, UserError
from eaftdrope.recipe.probe_sections import GENERATED
from eaftdrope.recipe.schema import Recipe
from eaftdrope.recipe.stage_sections import TextData

from .lora import freeze_beside_the_text
from .machine import training_device, uses_bfloat16, weights_dtype
from .plan import DataStats, steps_of
from .samples import SAMPLES
from .stages.chain import tokens_of_a_step

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from datasets import Dataset
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from eaftdrope.data import DataReport, Example, Source
    from eaftdrope.evaluate import Probe
    from eaftdrope.trainer import EAFTConfig


@dataclass(frozen=True)
class RunData:
    """Encoded rows, and the held-out ones also as examples for the probes that generate."""

    train: Dataset
    report: DataReport
    held_out: Dataset | None
    held_out_examples: list[Example]

    @property
    def longest(self) -> int:
        """Tokens of the longest row that is trained on."""
        import pyarrow.compute as pc

        batches = self.train.select_columns("input_ids").with_format("arrow").iter(10_000)
        return max((pc.max(pc.list_value_length(batch["input_ids"])).as_py() or 0 for batch in batches), default=0)

    @property
    def stats(self) -> DataStats:
        """What the plan needs; rows set aside by a held-out share are not among them."""
        import pyarrow.compute as pc

        tokens = trained = 0
        for batch in self.train.select_columns("labels").with_format("arrow").iter(10_000):
            labels = pc.list_flatten(batch["labels"])
            tokens += len(labels)
            trained += pc.sum(pc.not_equal(labels, -100)).as_py() or 0
        report = self.report
        skipped = report.skipped_rows + report.fully_masked
        return DataStats(len(self.train), tokens, trained, truncated=report.truncated, skipped=skipped)


def encode_rows(
    recipe: Recipe,
    sources: list[Source],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    enough: Callable[[int, int], bool] | None = None,
) -> tuple[Dataset, DataReport]:
    """The rows of `sources`, masked and encoded as the recipe's data section says.

    Raises:
        DataError: a source or row that can not be used, or no row with a trained token.
    """
    from eaftdrope.data import build_dataset

    with warnings.catch_warnings():
        # the report carries them; the run prints it
        warnings.simplefilter("ignore", UserWarning)
        return build_dataset(
            sources,
            tokenizer,
            format=recipe.data.format,
            train_on=recipe.data.train_on,
            max_length=max_length,
            on_bad_row=recipe.data.on_bad_row,
            seed=recipe.data.drawn_by(recipe.train.seed),
            enough=enough,
        )


def build_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> RunData:
    """Reads, masks and encodes the rows, and cuts text to recalibrate on into blocks.

    Raises:
        DataError: a source or row that can not be used, or no row with a trained token.
    """
    from eaftdrope.data import held_out_warnings, hold_out, iter_examples

    data = recipe.data
    if isinstance(data, TextData):
        return build_text(recipe, tokenizer)

    def encode(sources: list[Source]) -> tuple[Dataset, DataReport]:
        return encode_rows(recipe, sources, tokenizer, max_length=data.max_length)

    train, report = encode(data.train_sources())
    sources = data.held_out_sources()
    if data.held_out_share:
        train, held_out = hold_out(train, data.held_out_share, seed=data.drawn_by(recipe.train.seed))
        sources = data.train_sources()
    elif sources:
        held_out, held_out_report = encode(sources)
        report.warnings += held_out_warnings(train, held_out, held_out_report)
    else:
        return RunData(train, report, None, [])
    chosen = set(_asked(recipe, held_out["origin"]))
    # of the others some may be bad, and were skipped
    examples = [e for source in sources for e in iter_examples(source, format=data.format, only=chosen)]
    return RunData(train, report, held_out, examples)


def _asked(recipe: Recipe, origins: list[str]) -> list[str]:
    """Which of the held-out rows are answered: all for a probe that generates, else a few for people to read, and none where
    nothing is measured."""
    from eaftdrope.evaluate.texts import evenly_spaced

    probes = recipe.probes
    if any(
        probe.name == "function_calls" or (probe.name in GENERATED and not probe.options.file)
        for probe in probes.target
    ):
        return origins
    return evenly_spaced(origins, SAMPLES) if probes.target or probes.general else []


def build_text(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> RunData:
    """Blocks of text, held-out ones too; no more is read than the steps of the recipe take.

    Raises:
        DataError: as `build_data`, or there is not enough text for a block.
    """
    from eaftdrope.data import held_out_warnings, hold_out, text_blocks

    data, train = recipe.data, recipe.train
    share = data.held_out_share or 0.0

    def enough(rows: int, tokens: int) -> bool:
        # no source alone needs more than all steps take, and a share of the rows is at least one
        return tokens * (1 - share) >= train.steps * tokens_of_a_step(recipe) and (not share or rows * share >= 1)

    rows, report = encode_rows(
        recipe, data.train_sources(), tokenizer, max_length=None, enough=enough if train.steps else None
    )
    # Nobody asks a recalibration to answer, so it does not change where generation stops.
    report.stop_tokens.clear()
    held_out = None
    if share:
        rows, held_out = hold_out(rows, share, seed=data.drawn_by(train.seed))
    elif sources := data.held_out_sources():
        held_out, held_out_report = encode_rows(recipe, sources, tokenizer, max_length=None)
        report.warnings += held_out_warnings(rows, held_out, held_out_report)

    def blocks(rows: Dataset, name: str, *, boundaries: bool = False) -> Dataset:
        try:
            return text_blocks(rows, length=data.max_length, eos=tokenizer.eos_token_id, boundaries=boundaries)
        except DataError as error:
            raise DataError(f"recalibrate.data.{name}: {error}") from error

    trained = blocks(rows, "train", boundaries=data.documents == "separate")
    return RunData(trained, report, None if held_out is None else blocks(held_out, "held_out"), [])


def build_model(recipe: Recipe) -> PreTrainedModel:
    """The model, its weights loaded; what text does not reach is frozen."""
    from eaftdrope.models import hub_id_of, load_model

    chosen = recipe.model
    model = load_model(
        chosen.reference,
        dtype=weights_dtype(recipe),
        attn_implementation=chosen.attn_implementation,
        revision=chosen.revision,
        trust_remote_code=chosen.trust_remote_code,
        quantization=None if chosen.quantization == "none" else chosen.quantization,
    )
    freeze_beside_the_text(model)
    if hub_id := hub_id_of(chosen.reference):
        # what peft writes into adapter_config.json: a package's weights lie in a folder that only this machine has
        model.name_or_path = model.config._name_or_path = hub_id
    return model


def stop_where_trained(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_tokens: list[str]) -> None:
    """Lets generation stop at the tokens that answers were trained to end in, beside those it knows."""
    known = model.generation_config.eos_token_id
    known = [] if known is None else known if isinstance(known, list) else [known]
    trained = [tokenizer.convert_tokens_to_ids(token) for token in stop_tokens]
    every = list(dict.fromkeys([*trained, *known]))
    if every:
        model.generation_config.eos_token_id = every[0] if len(every) == 1 else every


def let_be_saved(model: PreTrainedModel) -> None:
    """Makes a generation configuration with a temperature but without `do_sample` sample: transformers loads what some
    published models have there, and refuses to save it, which would only show when the training is over.

    Raises:
        UserError: something else is wrong with it.
    """
    config = model.generation_config
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True
        try:
            config.validate(strict=True)
        except ValueError as error:
            raise UserError(
                f"the model's generation_config.json could not be saved with the result: {error} Correct it in a copy of "
                "the model, and name that copy."
            ) from error


def tile_bytes(recipe: Recipe) -> int | None:
    """The size of a tile of logits that the recipe sets; None for the operator's own."""
    return None if recipe.loss.tile_mb is None else recipe.loss.tile_mb << 20


def check_vocabulary(data: RunData, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Every row's tokens against the embedding of the model, before its weights are loaded.

    Raises:
        DataError: a token that the model has no row for.
    """
    from eaftdrope.loaded_model import check_token_ids

    for rows in (data.train, data.held_out):
        if rows is not None:
            check_token_ids(rows, config.get_text_config().vocab_size, tokenizer)


def check_backend(recipe: Recipe) -> None:
    """A loss backend that the recipe or the environment names, on the device that training takes, before anything is
    loaded.

    Raises:
        UserError: it can not work there.
    """
    import torch

    from eaftdrope.loss.backends import VARIABLE, check_backend_name, unavailable

    name, where = recipe.loss.backend, "loss.backend"
    if name == "auto":
        name, where = os.environ.get(VARIABLE) or "auto", VARIABLE
    if name == "auto":
        return
    try:
        check_backend_name(name)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    device = training_device().kind
    dtype = torch.bfloat16 if uses_bfloat16(recipe) or weights_dtype(recipe) == "bfloat16" else torch.float32
    reason = unavailable(name, torch.device(device), dtype)
    if reason is not None:
        raise UserError(f"{where}: {name} can not work on this machine's {device}: {reason}")


def schedule_options(recipe: Recipe, data: DataStats) -> dict[str, float] | None:
    """What transformers' `warmup_stable_decay` needs to be told: its decay in steps, and where it ends."""
    train = recipe.train
    if train.scheduler != "warmup_stable_decay":
        return None
    steps = train.steps or steps_of(recipe, data, int(os.environ.get("WORLD_SIZE", "1")))
    decay = max(1, round(steps * (0.2 if train.decay_ratio is None else train.decay_ratio)))
    return {"num_decay_steps": decay, "min_lr_ratio": train.min_rate_ratio or 0.0}


def build_arguments(recipe: Recipe, checkpoints: Path, data: DataStats) -> EAFTConfig:
    """The trainer's arguments."""
    from eaftdrope.loss.checks import TAIL_THRESHOLD
    from eaftdrope.trainer import EAFTConfig

    train, loss, output = recipe.train, recipe.loss, recipe.output
    separate = isinstance(recipe.data, TextData) and recipe.data.documents == "separate"
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
        lr_scheduler_kwargs=schedule_options(recipe, data),
        warmup_steps=warmup,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        optim=train.optimizer,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        seed=train.seed,
        bf16=uses_bfloat16(recipe),
        fp16=False,
        use_cpu=training_device().kind == "cpu",
        gradient_checkpointing=train.gradient_checkpointing,
        save_strategy="steps",
        save_steps=train.save_every,
        # the run deletes them itself, once a newer one is complete
        save_total_limit=None,
        logging_steps=train.log_every,
        # a NaN must be seen
        logging_nan_inf_filter=False,
        eval_strategy="steps" if train.eval_every else "no",
        eval_steps=train.eval_every,
        dataloader_num_workers=train.dataloader_workers,
        report_to=output.report_to or "none",
        disable_tqdm=True,
        packing=recipe.data.packing,
        # documents that do not see each other are told apart by their positions, in one row without padding
        padding_free=separate,
        max_length=None if separate else recipe.data.max_length,
        # rows come encoded, masked and cut; only packing is left to do
        dataset_kwargs={"skip_prepare_dataset": not recipe.data.packing},
        gate=loss.gate,
        gate_kwargs=loss.gate_kwargs(),
        loss_backend=loss.backend,
        loss_tile_bytes=tile_bytes(recipe),
        loss_tail=loss.tail,
        loss_tail_threshold=loss.tail_threshold or TAIL_THRESHOLD,
        loss_gate_threshold=loss.gate_threshold,
        loss_recompute=loss.recompute,
    )


def build_run_probes(recipe: Recipe, data: RunData) -> list[Probe]:
    """The probes of the recipe.

    Raises:
        UserError: a probe whose data is not there or can not be used.
    """
    from eaftdrope.evaluate import build_probes

    wanted = [
        (probe.name, group, probe.options.model_dump())
        for group in ("target", "general")
        for probe in getattr(recipe.probes, group)
    ]
    return build_probes(wanted, held_out_examples=data.held_out_examples, held_out_dataset=data.held_out)
