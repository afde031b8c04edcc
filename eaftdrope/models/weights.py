"""Weights: every tensor of a model comes from its checkpoint, and every failure is one sentence that names the file.

transformers fills a tensor that a checkpoint lacks with random numbers, prints a table and continues; here it is an error.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import pickle
import re
import warnings
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from eaftdrope.errors import UserError

RESTORE = "Download or copy it again."
_JSON_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "adapter_config.json",
)
# Whole numbers of a configuration: each must be at least 1 if present. A list has one per layer.
_SIZES = re.compile(
    r"hidden_size|vocab_size|intermediate_size|head_dim|num_hidden_layers|num_attention_heads|num_key_value_heads"
    r"|max_position_embeddings|n_embd|n_layers?|n_heads?|n_positions|d_model"
)
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers")
# The deepest published models have some 130; a configuration with a billion would fill the memory before it is refused.
_MOST_LAYERS = 10_000
_MOST = 1 << 31
_SHOWN = 5


def load_complete(path: str | Path, *, name: str | None = None, **options: Any) -> PreTrainedModel:
    """Load a causal language model, every tensor of it from its checkpoint. Tied tensors count as present.

    Tensors of the checkpoint that the model has no place for are listed in a `UserWarning`.

    Args:
        path (`str` or `Path`): folder or hub id, for `AutoModelForCausalLM.from_pretrained`.
        name (`str`, *optional*): the model's name in messages; `path` by default.
        options (`Any`): of `from_pretrained`.

    Raises:
        UserError: tensors are missing from the checkpoint or have another shape than config.json gives them.
    """
    with _without_report():
        # a tensor of another shape is refused below, by name
        model, found = AutoModelForCausalLM.from_pretrained(
            path, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    name, kind = name or str(path), type(model).__name__
    if wrong := sorted(found["mismatched_keys"]):
        tensor, saved, wanted = wrong[0]
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise UserError(
            f"the weights of {name!r} do not fit its config.json: {tensor} is {list(saved)} in the checkpoint, and "
            f"{list(wanted)} by the configuration of {kind}{more}. Restore the config.json that was saved with the weights."
        )
    if missing := found["missing_keys"]:
        head = model.get_output_embeddings()
        tie = ""
        if head is not None and any(model.get_submodule(key.rpartition(".")[0]) is head for key in missing):
            tie = " If the head is the input embeddings, set tie_word_embeddings to true in its config.json."
        raise UserError(
            f"the weights of {name!r} lack {_number(missing, 'tensor')} of {kind}: {_named(missing)}. The model would "
            f"compute with random numbers there. Restore the complete checkpoint.{tie}"
        )
    if unused := found["unexpected_keys"]:
        warnings.warn(
            f"the weights of {name!r} hold {_number(unused, 'tensor')} that {kind} has no place for, and that are not "
            f"used: {_named(unused)}. If they belong to the model, its config.json is not the one it was saved with.",
            stacklevel=2,
        )
    return model


def check_config(config: object, name: str) -> None:
    """Check the sizes in a raw config.json and its parts (`text_config`), before anything is built from them.

    Raises:
        UserError: not a JSON object, or a size that is not a whole number of at least 1 or is beyond any model's.
    """
    if not isinstance(config, dict):
        raise UserError(f"{name} is not a JSON object (it holds a {type(config).__name__}). {RESTORE}")
    for key, value in config.items():
        if isinstance(value, dict):
            check_config(value, name)
        elif _SIZES.fullmatch(key) and value is not None:
            most = _MOST_LAYERS if key in _LAYERS else _MOST
            for number in value if isinstance(value, list) else [value]:
                whole = isinstance(number, int) and not isinstance(number, bool)
                if not (whole and 1 <= number <= most):
                    raise UserError(
                        f"{name}: {key} is {number!r}, and must be a whole number from 1 to {most:,}. Restore the file that "
                        "was saved with the weights."
                    )


def quantization_config_of(quantization: str | None) -> BitsAndBytesConfig | None:
    """Return the bitsandbytes configuration of a base for QLoRA: "4bit" is NF4 with double quantisation.

    Raises:
        UserError: another name, no bitsandbytes, or no CUDA device.
    """
    if quantization is None:
        return None
    if quantization != "4bit":
        raise UserError(f"quantization {quantization!r} is not known; only `4bit` is.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "4-bit loading (QLoRA) needs bitsandbytes, which is not installed. "
            "Run `pip install bitsandbytes` (with a CUDA device), or leave `quantization` out for plain LoRA."
        )
    if not torch.cuda.is_available():
        raise UserError(
            "4-bit loading (QLoRA) needs a CUDA device and none is visible. Leave `quantization` out for plain LoRA."
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16,
    )


def check_room(config: PretrainedConfig, folder: Path) -> None:
    """Check that the weight files of a local folder can hold the matrices that its config.json announces.

    transformers would allocate them first and fail afterwards.

    Raises:
        UserError: a matrix has more elements than the files have bits.
    """
    bits = 8 * sum(file.stat().st_size for pattern in ("*.safetensors", "*.bin") for file in folder.glob(pattern))
    text = config.get_text_config()
    for name in ("vocab_size", "intermediate_size"):
        rows, columns = getattr(text, name, None), getattr(text, "hidden_size", None)
        if isinstance(rows, int) and isinstance(columns, int) and bits and rows * columns > bits:
            raise UserError(
                damaged(folder)
                or f"{folder / 'config.json'}: {name} {rows:,} with hidden_size {columns:,} is more than the weights beside "
                f"it hold ({bits // 8:,} bytes). Restore the config.json that was saved with the weights."
            )


def failure_reason(error: Exception, part: str, folder: Path | None) -> str:
    """Return why `part` of a model could not be loaded: the damaged file of its folder, else the error's text."""
    text, kind = " ".join(str(error).split()).rstrip("."), type(error).__name__
    if isinstance(error, ImportError):
        return f"{text}."
    if "memory" in text or isinstance(error, MemoryError):
        return f"{text or kind}. Free memory, or load it in bfloat16."
    if folder is not None and (damage := damaged(folder)):
        return damage
    if isinstance(error, (OSError, ValueError)) and text:
        return f"{text}."
    if part == "configuration" and folder is not None:
        return f"{kind}: {text}. Correct {folder / 'config.json'}, or restore it."
    return f"{kind}: {text}. Its files are damaged or do not belong together: restore them."


def damaged(folder: Path) -> str | None:
    """Return a sentence about the first damaged file of a model's or an adapter's folder, with what to do; or None."""
    for name in _JSON_FILES:
        if (folder / name).is_file() and (problem := _json_problem(folder / name)):
            return f"{folder / name} {problem}. {RESTORE}"
    if (file := folder / "config.json").is_file():
        try:
            check_config(json.loads(file.read_text(encoding="utf-8")), str(file))
        except UserError as error:
            return str(error)
    for index in sorted(folder.glob("*.index.json")):
        if problem := _index_problem(index):
            return f"{index} {problem}. {RESTORE}"
    for file in sorted(folder.glob("*.safetensors")):
        if problem := _safetensors_problem(file):
            return f"{file} is damaged ({problem}). {RESTORE}"
    for file in sorted(folder.glob("*.bin")):
        if problem := _pickle_problem(file):
            return f"{file} {problem}"
    return None


@contextmanager
def _without_report() -> Iterator[None]:
    """Hide transformers' table of missing and unexpected tensors: `load_complete` reports them itself.

    Tables with errors of a conversion stay: they are reported nowhere else.
    """
    logger = logging.getLogger("transformers.modeling_utils")

    def not_a_report(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return "LOAD REPORT" not in text or "CONVERSION" in text

    logger.addFilter(not_a_report)
    try:
        yield
    finally:
        logger.removeFilter(not_a_report)


def _json_problem(file: Path) -> str | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        return f"is not valid JSON ({error})"
    return None if isinstance(content, dict) else f"is not a JSON object (it holds a {type(content).__name__})"


def _index_problem(index: Path) -> str | None:
    files = json.loads(index.read_text(encoding="utf-8")).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        return "has no weight_map with the file of each tensor"
    gone = sorted({name for name in files.values() if not (index.parent / name).is_file()})
    return f"lists {gone[0]}, which does not exist" if gone else None


def _safetensors_problem(file: Path) -> str | None:
    if file.stat().st_size == 0:
        return "it is empty"
    try:
        with safe_open(file, framework="pt"):
            return None
    except (SafetensorError, OSError, ValueError) as error:
        return str(error)


def _pickle_problem(file: Path) -> str | None:
    if file.stat().st_size == 0:
        return f"is empty. {RESTORE}"
    try:
        torch.load(file, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError:
        return (
            "holds Python objects other than tensors; they could run code, so they are not loaded. Use the model's "
            "safetensors files, or ask its author for them."
        )
    except Exception as error:  # a file that is no archive fails in many ways
        return f"is damaged ({type(error).__name__}: {' '.join(str(error).split())}). {RESTORE}"
    return None


def _number(names: Collection[str], what: str) -> str:
    return f"{len(names)} {what}" + ("" if len(names) == 1 else "s")


def _named(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names)[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
