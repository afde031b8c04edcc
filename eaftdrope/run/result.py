"""The result of a training: adapter or weights, written whatever the engine shards, and checked as stock loaders read it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.integrations import deepspeed

from eaftdrope.drope.config import restore_v4_keys
from eaftdrope.errors import UserError
from eaftdrope.trainer import EAFTTrainer
from eaftdrope.trainer.shard_checkpoints import sharded_at_load
from eaftdrope.ttt.fast_mlps import fast_mlps
from eaftdrope.ttt.saved import WEIGHTS_FILE

from .folder import MERGED, RunFolder
from .settings import TrainingSettings


def is_sharded(trainer: EAFTTrainer) -> bool:
    """True if each process holds only a part of the model once its training has begun."""
    return trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or sharded_at_load(trainer.model)


def gather_on_save(trainer: EAFTTrainer) -> None:
    """Let ZeRO-3 gather its weights when a model is saved, which is not its default. Before the training begins."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if trainer.is_deepspeed_enabled and plugin is not None and plugin.zero_stage == 3:
        plugin.deepspeed_config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True


def save_result(
    trainer: EAFTTrainer, tokenizer: PreTrainedTokenizerBase, folder: RunFolder, settings: TrainingSettings
) -> None:
    """Write the adapter or the weights, with the files that stock loaders read beside them. For every process.

    Raises:
        UserError: in the main process, stock loaders would not find the trained weights (`check_weights`, `check_adapter`,
            `check_fast_mlps`).
    """
    if trainer.is_fsdp_enabled:
        # the Trainer itself writes nothing under SHARDED_STATE_DICT
        trainer._save(str(folder.path), state_dict=trainer.accelerator.get_state_dict(trainer.model))
    else:
        trainer.save_model(str(folder.path))
    if not trainer.accelerator.is_main_process:
        return
    tokenizer.save_pretrained(folder.path)
    trainer.model.generation_config.save_pretrained(folder.path)
    restore_v4_keys(folder.path)
    # pickled trainer arguments: useless to anyone who loads the result
    (folder.path / "training_args.bin").unlink(missing_ok=True)
    # of an earlier result of this run
    shutil.rmtree(folder.path / MERGED, ignore_errors=True)
    if settings.lora is None:
        check_weights(folder.path, trust_remote_code=settings.model.trust_remote_code)
    else:
        check_adapter(folder.path, trainer.accelerator.unwrap_model(trainer.model))
    if settings.ttt:
        check_fast_mlps(folder.path, trainer.model)


@contextmanager
def loaded_by_one_process() -> Iterator[None]:
    """Let transformers load a model as if ZeRO-3 were off, which would need every process to take part."""
    reference = deepspeed._hf_deepspeed_config_weak_ref
    config = reference and reference()
    if config is None:
        yield
        return
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed.set_hf_deepspeed_config(config)


def check_weights(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Load the names and shapes of a saved model with stock transformers, but no values: this needs no memory.

    Raises:
        UserError: a weight is missing, or its shape is not that of the configuration.
    """
    if not (folder / "config.json").is_file():
        raise UserError(_incomplete(folder, "config.json is missing"))
    try:
        with loaded_by_one_process():
            _, info = AutoModelForCausalLM.from_pretrained(
                folder, device_map="meta", output_loading_info=True, trust_remote_code=trust_remote_code
            )
    # a file that is missing, truncated or of other shapes: each library raises its own error
    except Exception as error:
        raise UserError(_incomplete(folder, " ".join(str(error).split()))) from error
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(_incomplete(folder, f"the weights {', '.join(missing[:3])}{more} are missing"))


def check_adapter(folder: Path, model: nn.Module) -> None:
    """Look up every tensor of the trained adapter in the saved file.

    Raises:
        UserError: a file or a tensor of the adapter is missing, or a tensor is empty.
    """
    from peft import get_peft_model_state_dict

    if not (folder / "adapter_config.json").is_file():
        raise UserError(_incomplete(folder, "adapter_config.json is missing"))
    _check_tensors(folder, "adapter_model.safetensors", get_peft_model_state_dict(model, save_embedding_layers=False))


def check_fast_mlps(folder: Path, model: nn.Module) -> None:
    """Look up every tensor of the fast MLPs, which a layout in place does not have, in their saved file.

    Raises:
        UserError: the file or a tensor is missing, or a tensor is empty.
    """
    expected = fast_mlps(model).state_dict()
    if expected:
        _check_tensors(folder, WEIGHTS_FILE, expected)


def _check_tensors(folder: Path, name: str, expected: Iterable[str]) -> None:
    try:
        with safe_open(folder / name, framework="pt") as file:
            shapes = {tensor: file.get_slice(tensor).get_shape() for tensor in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(_incomplete(folder, f"{name}: {error}")) from error
    for tensor in expected:
        if 0 in shapes.get(tensor, [0]):
            raise UserError(_incomplete(folder, f"the weight {tensor} is {'empty' if tensor in shapes else 'missing'}"))


def _incomplete(folder: Path, reason: str) -> str:
    return (
        f"the training is done, but its result in {folder} is incomplete: {reason}. The checkpoints are kept. If the model "
        "is sharded, gather its state dict (FSDP: fsdp_state_dict_type: FULL_STATE_DICT; DeepSpeed: "
        "zero3_save_16bit_model: true), and run the same command again: it trains nothing twice."
    )
