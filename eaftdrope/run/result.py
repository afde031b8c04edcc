"""The result of a training: adapter or weights, written by us whatever the engine shards, and found by stock loaders."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from eaftdrope.errors import UserError

if TYPE_CHECKING:
    from eaftdrope.recipe.schema import Recipe
    from eaftdrope.trainer import EAFTTrainer

    from .folder import RunFolder


def gather_on_save(trainer: EAFTTrainer) -> None:
    """Has ZeRO-3 gather its weights when a model is saved, which it does not by default. Before the training begins."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if trainer.is_deepspeed_enabled and plugin is not None and plugin.zero_stage == 3:
        plugin.deepspeed_config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True


def save_result(trainer: EAFTTrainer, tokenizer, folder: RunFolder, recipe: Recipe) -> None:
    """Adapter or weights, with everything stock loaders look for beside them. For every process.

    Raises:
        UserError: on the main process, stock loaders would not find what was trained (see `check_result`).
    """
    from eaftdrope.drope.config import restore_v4_keys

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
    # pickled trainer arguments: of no use to anyone who loads the result
    (folder.path / "training_args.bin").unlink(missing_ok=True)
    # of an earlier result of this run
    shutil.rmtree(folder.path / "merged", ignore_errors=True)
    if recipe.lora is None:
        check_weights(folder.path, trust_remote_code=recipe.model.trust_remote_code)
    else:
        check_adapter(folder.path, trainer.accelerator.unwrap_model(trainer.model))


@contextmanager
def loaded_by_one_process() -> Iterator[None]:
    """Has transformers load a model as if there were no ZeRO-3, which would have every process take part."""
    from transformers.integrations import deepspeed

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
    """Loads the names and shapes of a saved model with stock transformers, and no values: no memory is needed.

    Raises:
        UserError: a weight is missing, or has another shape than the configuration says.
    """
    from transformers import AutoModelForCausalLM

    if not (folder / "config.json").is_file():
        raise UserError(_not_whole(folder, "there is no config.json"))
    try:
        with loaded_by_one_process():
            _, info = AutoModelForCausalLM.from_pretrained(
                folder, device_map="meta", output_loading_info=True, trust_remote_code=trust_remote_code
            )
    # a file that is missing, cut or of other shapes: each library has an error of its own
    except Exception as error:
        raise UserError(_not_whole(folder, " ".join(str(error).split()))) from error
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(_not_whole(folder, f"the weights {', '.join(missing[:3])}{more} are missing"))


def check_adapter(folder: Path, model) -> None:
    """Looks up every tensor of the trained adapter in the saved file.

    Raises:
        UserError: a file or a tensor of the adapter is missing, or a tensor is empty.
    """
    from peft import get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    if not (folder / "adapter_config.json").is_file():
        raise UserError(_not_whole(folder, "there is no adapter_config.json"))
    try:
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(_not_whole(folder, f"adapter_model.safetensors: {error}")) from error
    for name in get_peft_model_state_dict(model, save_embedding_layers=False):
        if 0 in shapes.get(name, [0]):
            raise UserError(_not_whole(folder, f"the weight {name} is {'empty' if name in shapes else 'missing'}"))


def _not_whole(folder: Path, reason: str) -> str:
    return (
        f"the training is done, but its result in {folder} is not whole: {reason}. The checkpoints are kept. If the model "
        "is sharded, have its state dict gathered (FSDP: fsdp_state_dict_type: FULL_STATE_DICT; DeepSpeed: "
        "zero3_save_16bit_model: true), and run the same command again: it trains nothing twice."
    )
