"""Folders with a PEFT adapter: the base model it was trained on, and both as one live model."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from transformers import GenerationConfig

from eaftdrope.errors import UserError
from eaftdrope.files import usable_path
from eaftdrope.models import MODEL_PACKAGES, PACKAGE_PREFIX, load_model, load_tokenizer
from eaftdrope.models.tokenizer_file import load_tokenizer_files
from eaftdrope.models.weights import damaged, failure_reason

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
RECIPE = "recipe.yaml"
# Initialisations that move a part of the base weights into the adapter, chosen at random or from data that the adapter's
# folder does not have. "pissa" and "olora" do so too, but peft repeats them exactly when it loads the adapter.
_NOT_REPEATABLE = ("pissa_niter", "corda", "lora_ga")


def is_adapter(reference: str | Path) -> bool:
    """True if a reference is a folder with an adapter and without a model.

    Raises:
        UserError: the name is not possible for a folder.
    """
    folder = usable_path(reference)
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def adapter_settings(folder: Path) -> dict[str, Any]:
    """Return adapter_config.json; `base_model_name_or_path` is any model reference, `revision` its commit or None.

    A run on a package's model writes the hub id of that model, which others can load. If the run's recipe is beside the
    adapter, its reference replaces the hub id: the adapter was trained on the package's weights.

    Raises:
        UserError: no weights beside it, damaged files, a missing base model or kind of adapter, or an initialisation that
            changed the base model in a way that cannot be repeated.
    """
    file = folder / CONFIG
    if not any((folder / name).is_file() for name in WEIGHTS):
        raise UserError(
            f"{folder} has an {CONFIG} but no {WEIGHTS[0]}. Was its saving interrupted? Use an earlier checkpoint."
        )
    if problem := damaged(folder):
        raise UserError(f"the adapter cannot be loaded: {problem}")
    settings = json.loads(file.read_text(encoding="utf-8"))
    for key, what in (("base_model_name_or_path", "base model"), ("peft_type", "kind of adapter")):
        if not isinstance(settings.get(key), str) or not settings[key]:
            raise UserError(f"{file} has no {what}. Set `{key}` in it.")
    start = settings.get("init_lora_weights", True)
    if any(str(start).startswith(name) for name in _NOT_REPEATABLE):
        raise UserError(
            f"{folder} began with init_lora_weights={start!r}, which changes the base model in a way that loading cannot "
            "repeat: the trained model is lost. If its training can be resumed, save it there with peft's "
            "save_pretrained(path_initial_model_for_weight_conversion=...), which converts it to a plain LoRA adapter."
        )
    settings["base_model_name_or_path"] = _as_trained(folder, settings["base_model_name_or_path"])
    return settings


def _as_trained(folder: Path, base: str) -> str:
    """Return the reference in the recipe of the run that wrote the adapter, if it has the same hub id, else `base`."""
    for recipe in (folder / RECIPE, folder.resolve().parent.parent / RECIPE):
        if not recipe.is_file():
            continue
        try:
            model = yaml.safe_load(recipe.read_text(encoding="utf-8"))["model"]
            reference = model if isinstance(model, str) else model["reference"]
        except (yaml.YAMLError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{recipe} cannot be read, and it records which model the adapter {folder} was trained on. Restore it, or "
                f"move it away to use {base!r}."
            ) from error
        package = MODEL_PACKAGES.get(str(reference).removeprefix(PACKAGE_PREFIX))
        if package is not None and package.hub_id == base:
            return reference
    return base


def adapter_tokenizer(folder: Path, base: str, revision: str | None) -> PreTrainedTokenizerBase:
    """Return the adapter's own tokenizer (its template may be the one it was trained with), else the base model's."""
    if not (folder / "tokenizer_config.json").is_file():
        return load_tokenizer(base, revision=revision)
    try:
        return load_tokenizer_files(str(folder))
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises a plain one
        raise UserError(
            f"the tokenizer of {str(folder)!r} cannot be loaded: {failure_reason(error, 'tokenizer', folder)}"
        ) from error


def load_adapted(folder: Path, base: str, revision: str | None, *, dtype: str) -> PeftModel:
    """Return base model and adapter, not merged, with the end-of-answer tokens of the adapter's folder.

    Raises:
        UserError: the base cannot be loaded, or the adapter does not fit it.
    """
    model = load_model(base, dtype=dtype, revision=revision)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(folder))
    return attach(model, folder)


def attach(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Return the base model with the adapter of a folder; every tensor of the adapter comes from the folder.

    Raises:
        UserError: the adapter does not fit the model, lacks tensors, has tensors that the model has no place for, or
            cannot be read.
    """
    from peft import PeftModel, load_peft_weights, set_peft_model_state_dict

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "(?s).*Found missing adapter keys", UserWarning)
            adapted = PeftModel.from_pretrained(model, str(folder))
        if adapted.peft_config["default"].peft_type != "LORA":
            return adapted
        # peft silently ignores tensors that do not fit; this second load returns their names
        found = set_peft_model_state_dict(adapted, load_peft_weights(str(folder), device="cpu"), "default")
    except UserWarning as warning:
        raise UserError(f"{folder} is incomplete: {warning} Use another checkpoint.") from warning
    except KeyError as error:
        raise UserError(f"{folder} is incomplete: it has no tensor {error}. Use another checkpoint.") from error
    except Exception as error:
        if "size mismatch" in str(error):
            raise misfit(folder, error) from error
        text = " ".join(str(error).split())
        raise UserError(f"the adapter {folder} cannot be loaded: {type(error).__name__}: {text}") from error
    missing = [key for key in found.missing_keys if ".modules_to_save.default." in key]
    if missing or found.unexpected_keys:
        keys = missing or found.unexpected_keys
        what = "lacks" if missing else "has tensors that the model has no place for"
        more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
        raise UserError(
            f"{folder} {what}: {', '.join(sorted(keys)[:5])}{more}. Use another checkpoint, or set "
            f"`base_model_name_or_path` of its {CONFIG} to the model that the adapter was trained on."
        )
    return adapted


def misfit(folder: Path, error: Exception) -> UserError:
    """Return the error for an adapter whose tensors do not fit its base model."""
    return UserError(
        f"{folder} does not fit its base model: {str(error).splitlines()[-1].strip()} Set "
        f"`base_model_name_or_path` of its {CONFIG} to the model that the adapter was trained on."
    )
