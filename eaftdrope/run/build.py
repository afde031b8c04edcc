"""From sections of a recipe to objects: the model, its generation settings, the probes; checks before weights are loaded."""

from __future__ import annotations

import os
import time

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.distributed import DistributedConfig

from eaftdrope.errors import UserError
from eaftdrope.evaluate import Probe, build_probes
from eaftdrope.loss.backends import VARIABLE, check_backend_name, unavailable
from eaftdrope.models import hub_id_of, load_model, resolve_model
from eaftdrope.models.loading import find_file
from eaftdrope.recipe.probe_sections import Probes
from eaftdrope.recipe.schema import Model
from eaftdrope.recipe.training_sections import Loss
from eaftdrope.ttt import TTTConfig, apply_ttt
from eaftdrope.ttt.saved import CONFIG_FILE, WEIGHTS_FILE, load_primes

from .data import RunData
from .degrees import Degrees
from .lora import freeze_non_text_modules
from .machine import training_device, uses_bfloat16, weights_dtype
from .replay import find_replies
from .settings import TrainingSettings


def build_model(section: Model, degrees: Degrees | None = None) -> PreTrainedModel:
    """The model with its weights; modules that no text passes through are frozen.

    Args:
        degrees: of the launch; every process then loads only its part of a tensor-parallel model.
    """
    distributed = None
    if degrees and degrees.tp > 1:
        distributed = DistributedConfig(tp_size=degrees.tp, fsdp_size=degrees.fsdp, dp_replicate_size=degrees.dp)
    model = load_model(
        section.reference,
        dtype=weights_dtype(section.dtype),
        attn_implementation=section.attn_implementation,
        revision=section.revision,
        trust_remote_code=section.trust_remote_code,
        quantization=None if section.quantization == "none" else section.quantization,
        distributed_config=distributed,
    )
    freeze_non_text_modules(model)
    if hub_id := hub_id_of(section.reference):
        # peft writes it into adapter_config.json, and a package's folder exists on this machine only
        model.name_or_path = model.config._name_or_path = hub_id
    return model


def generate_replay(
    settings: TrainingSettings, tokenizer: PreTrainedTokenizerBase, data: RunData, console: Console
) -> None:
    """Load the model, let it generate the replay that is missing, and release it again.

    Raises:
        UserError: see [`Replies.generate`].
    """
    assert data.replay is not None, "the recipe has replay"
    model = build_model(settings.model)
    if settings.model.quantization == "none":
        # pyrefly: ignore[bad-argument-type]
        model = model.to(training_device().kind)
    # stops as after the training, where the answers of the rows end
    add_stop_tokens(model, tokenizer, data.report.stop_tokens)
    # a model on the hub has a place only now
    replies = find_replies(settings, tokenizer)
    started = time.monotonic()
    done = replies.cached(data.replay.rows)

    def progress(rows: int, wanted: int) -> None:
        if rows > done:
            minutes = (time.monotonic() - started) * (wanted - rows) / (rows - done) / 60
            console.print(f"replay {rows}/{wanted}, about {minutes:.0f} minutes left", highlight=False)

    replies.generate(
        model, tokenizer, data.replay.rows, batch_tokens=4 * settings.probes.batch_tokens, progress=progress
    )


def learning_model(model: PreTrainedModel, section: Model, config: TTTConfig) -> PreTrainedModel:
    """Let `model` learn as it reads. Where the model it was loaded from does, its fast MLPs are trained further.

    Raises:
        UserError: the architecture is not supported, or the model has fast MLPs that do not fit `config`.
    """
    apply_ttt(model, config)
    source = resolve_model(section.reference, revision=section.revision)
    primes = find_file(source.path, WEIGHTS_FILE, revision=source.revision)
    if primes is not None:
        try:
            load_primes(model, primes)
        except ValueError as error:
            raise UserError(
                f"{section.reference} learns as it reads already, with other settings: {error} Set ttt.layout and "
                f"ttt.fast_blocks as in its {CONFIG_FILE}."
            ) from error
    return model


def add_stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_tokens: list[str]) -> None:
    """Let generation also stop at the tokens that the trained answers end in."""
    config = model.generation_config
    assert config is not None, "a causal language model has a generation configuration"
    own = config.eos_token_id
    own = [] if own is None else own if isinstance(own, list) else [own]
    trained = [tokenizer.convert_tokens_to_ids(token) for token in stop_tokens]
    every = list(dict.fromkeys([*trained, *own]))
    if every:
        config.eos_token_id = every[0] if len(every) == 1 else every


def make_generation_config_saveable(model: PreTrainedModel) -> None:
    """Set `do_sample` in a generation configuration that has a temperature without it.

    Some published models have such a file. transformers loads it and refuses to save it, which would only show when the
    training is over.

    Raises:
        UserError: the configuration has another fault.
    """
    config = model.generation_config
    assert config is not None, "a causal language model has a generation configuration"
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True
        try:
            config.validate(strict=True)
        except ValueError as error:
            raise UserError(
                f"the model's generation_config.json could not be saved with the result: {error} Correct it in a copy of "
                "the model, and use that copy."
            ) from error


def tile_bytes(loss: Loss) -> int | None:
    """The size of a tile of logits that the recipe sets; None for the operator's default."""
    return None if loss.tile_mb is None else loss.tile_mb << 20


def check_backend(model: Model, loss: Loss, precision: str) -> None:
    """Check that the loss backend chosen by the recipe or the environment works on the training device.

    Raises:
        UserError: it does not.
    """
    name, where = loss.backend, "loss.backend"
    if name == "auto":
        name, where = os.environ.get(VARIABLE) or "auto", VARIABLE
    if name == "auto":
        return
    try:
        check_backend_name(name)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    device = training_device().kind
    half = uses_bfloat16(precision) or weights_dtype(model.dtype) == "bfloat16"
    reason = unavailable(name, torch.device(device), torch.bfloat16 if half else torch.float32)
    if reason is not None:
        raise UserError(f"{where}: {name} cannot work on this machine's {device}: {reason}")


def build_run_probes(section: Probes, data: RunData, *, length: int | None = None) -> list[Probe]:
    """The probes of the recipe; `length` is the trained one, in tokens.

    Raises:
        UserError: the data of a probe is missing or cannot be used.
    """
    wanted = [
        (probe.name, group, probe.options.model_dump())
        for group, probes in (("target", section.target or []), ("general", section.general))
        for probe in probes
    ]
    for name, _, options in wanted:
        if name in ("long_recall", "long_loss") and options["length"] is None:
            options["length"] = length
    return build_probes(wanted, held_out_examples=data.held_out_examples, held_out_dataset=data.held_out)
