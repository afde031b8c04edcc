"""The files of test-time training: what TTT adds to a checkpoint, and a state.

    ttt_config.json      the settings, beside an ordinary checkpoint or adapter
    ttt.safetensors      the prime MLPs, which the layout in_place does not have
    *.safetensors        a state: windows, what was learned, the chunk under way

The checkpoint itself has no key of TTT, so stock transformers and other engines load it as the model without TTT.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from eaftdrope.files import honour_umask, replacing, write_atomically
from eaftdrope.models import TTT_CONFIG

from .config import TTTConfig
from .fast_mlps import ATTRIBUTE, causal_lm, fast_mlps
from .window import make_layer

CONFIG_FILE, WEIGHTS_FILE = TTT_CONFIG, "ttt.safetensors"
_CONFIG_VERSION, _STATE_VERSION = 1, 1
_STATE_FORMAT = "eaftdrope.ttt.state"
# values of each tensor that identify a model; all of them would take half a minute for 8B parameters
_SAMPLE = 4096


# Beside a checkpoint


def save_ttt(model: Any, folder: str | Path) -> None:
    """Write what TTT adds to a checkpoint: for folders that `model.save_pretrained` does not write, such as an adapter's."""
    folder, fast = Path(folder), fast_mlps(model)
    tensors = {name: value.detach().contiguous() for name, value in fast.state_dict().items()}
    _write_ttt(fast.config, tensors, folder)


def _write_ttt(config: TTTConfig, tensors: dict[str, Tensor], folder: Path) -> None:
    document = {"version": _CONFIG_VERSION, **asdict(config)}
    write_atomically(folder / CONFIG_FILE, json.dumps(document, indent=2) + "\n")
    if tensors:
        with replacing(folder / WEIGHTS_FILE) as partial:
            save_file(tensors, partial, metadata={"format": "pt"})
        honour_umask(folder)


def copy_ttt(source: str | Path, target: str | Path) -> None:
    """Copy what `save_ttt` wrote to another folder with the same model, such as one with its adapters merged."""
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        if (Path(source) / name).is_file():
            with replacing(Path(target) / name) as partial:
                shutil.copyfile(Path(source) / name, partial)


def save_pretrained(
    self: PreTrainedModel,
    save_directory: str | Path,
    *args: Any,
    state_dict: dict[str, Tensor] | None = None,
    **kwargs: Any,
) -> None:
    """`save_pretrained` of the model's class, with what TTT adds in files of its own.

    A Trainer's checkpoint (`checkpoint-100`) has the prime MLPs among its weights too: a Trainer that resumes reads these.
    """
    prefix, folder = f"{ATTRIBUTE}.", Path(save_directory)
    every = self.state_dict() if state_dict is None else state_dict
    own = {name[len(prefix) :]: value for name, value in every.items() if name.startswith(prefix)}
    if not folder.name.startswith("checkpoint-"):
        every = {name: value for name, value in every.items() if not name.startswith(prefix)}
    type(self).save_pretrained(self, save_directory, *args, state_dict=every, **kwargs)
    if kwargs.get("is_main_process", True):
        tensors = {name: value.detach().cpu().contiguous() for name, value in own.items()}
        _write_ttt(fast_mlps(self).config, tensors, folder)


def read_config(file: str | Path) -> TTTConfig:
    """Read a ttt_config.json.

    Raises:
        ValueError: it is not one, or is of a later version.
    """
    try:
        document = json.loads(Path(file).read_text(encoding="utf-8"))
        version = document.pop("version")
        if version == _CONFIG_VERSION:
            return TTTConfig(**document)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} is not a configuration of test-time training: {error}") from error
    raise ValueError(f"{file} has version {version}, and this eaftdrope reads version {_CONFIG_VERSION}.")


def load_primes(model: Any, file: str | Path) -> None:
    """Load the prime MLPs that `save_ttt` wrote into a model with the same settings.

    Raises:
        ValueError: the file is damaged, or its tensors do not fit the model.
    """
    fast = fast_mlps(model)
    tensors, _ = _read(Path(file))
    own = fast.state_dict()
    if tensors.keys() != own.keys() or any(tensors[name].shape != own[name].shape for name in own):
        raise ValueError(f"{file} does not fit this model: its prime MLPs have other names or shapes.")
    fast.load_state_dict(tensors)


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or not a safetensors file: {error}") from error


# A state


def write_state(state: Any, file: Path) -> None:
    """Write a `TTTState` with what identifies its model."""
    model = state.model
    tensors = {name: tensor.detach().contiguous() for name, tensor in _tensors_of(state)}
    metadata = {
        "format": _STATE_FORMAT,
        "version": str(_STATE_VERSION),
        "position": str(state.position),
        "checksum": _digest(tensors.items(), None),
        "config": json.dumps(asdict(fast_mlps(model).config)),
        **_identity(model),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file, durable=True) as partial:
        save_file(tensors, partial, metadata=metadata)
        # private, as the text is: for its owner only
        partial.chmod(0o600)


def _tensors_of(state: Any) -> Iterator[tuple[str, Tensor]]:
    named = {"hidden": state.hidden, "ids": state.ids}
    named |= {f"delta.{index}": change for index, change in enumerate(state.delta or [])}
    for index, layer in enumerate(state.layers):
        named |= {f"layer.{index}.keys": layer.keys, f"layer.{index}.values": layer.values}
    for index, (keys, values) in enumerate(state.kept):
        named |= {f"kept.{index}.keys": keys, f"kept.{index}.values": values}
    seen: set[int] = set()
    for name, tensor in named.items():
        if tensor is not None:
            # safetensors refuses memory that two names share
            yield name, tensor.clone() if id(tensor) in seen else tensor
            seen.add(id(tensor))


def read_state_config(file: Path) -> TTTConfig:
    """The settings with which a state was read; nothing else of the file is loaded.

    Raises:
        ValueError: the file is not a state, is damaged, or is of another version.
    """
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or not a safetensors file: {error}") from error
    _check_version(file, metadata)
    return TTTConfig(**json.loads(metadata["config"]))


def _check_version(file: Path, metadata: dict[str, str]) -> None:
    if metadata.get("format") != _STATE_FORMAT:
        raise ValueError(f"{file} is not a state of test-time training.")
    if metadata["version"] != str(_STATE_VERSION):
        raise ValueError(
            f"{file} has version {metadata['version']}, and this eaftdrope reads version {_STATE_VERSION}."
        )


def read_state(state: Any, file: Path, model: PreTrainedModel) -> Any:
    """Fill an empty `TTTState` of `model` from a file.

    Raises:
        ValueError: see `TTTState.load`.
    """
    tensors, metadata = _read(file)
    _check_version(file, metadata)
    for name, value in _identity(model).items():
        if metadata.get(name) != value:
            raise ValueError(
                f"{file} is a state of another model: {_WHAT[name]} differ. A state fits only the model that read the text, "
                "in the same precision."
            )
    if metadata.get("checksum") != _digest(sorted(tensors.items()), None):
        raise ValueError(f"{file} is damaged: its content does not match its checksum.")

    tensors = {name: tensor.to(model.device) for name, tensor in tensors.items()}
    position, config = int(metadata["position"]), fast_mlps(model).config
    for index in range(len(state.layers)):
        kept = tensors.get(f"layer.{index}.keys"), tensors.get(f"layer.{index}.values")
        state.layers[index] = make_layer(model, config, kept, position)
    state.kept = [(tensors.get(f"kept.{i}.keys"), tensors.get(f"kept.{i}.values")) for i in range(len(state.kept))]
    state.hidden, state.ids = tensors.get("hidden"), tensors.get("ids")
    changes = [tensors[f"delta.{i}"] for i in range(len(fast_mlps(model).w0())) if f"delta.{i}" in tensors]
    state.delta = changes or None
    return state


# settings of a configuration that change what a model reads without a change of its weights
_ATTENTION = (
    "rope_parameters",
    "rope_theta",
    "rope_scaling",
    "no_rope_layers",
    "max_position_embeddings",
    "sliding_window",
)
_WHAT = {
    "settings": "the settings of test-time training (window, sink, chunk, fast blocks, layout)",
    "attention": "the rotary embedding or the attention of the configuration",
    "model": "the weights or their precision",
    "w0": "the initial fast weights",
}


def _identity(model: PreTrainedModel) -> dict[str, str]:
    """What must be the same where a state is read: the settings that shape it, the model, the initial fast weights."""
    fast = fast_mlps(model)
    config = causal_lm(model).config.get_text_config().to_dict()
    own = (pair for pair in causal_lm(model).named_parameters() if not pair[0].startswith(f"{ATTRIBUTE}."))
    # prime MLPs with their norms; in place, the weights that learn are the model's
    initial = list(fast.named_parameters()) or [(str(index), weight) for index, weight in enumerate(fast.w0())]
    return {
        "settings": json.dumps(fast.settings),
        "attention": json.dumps({name: config.get(name) for name in _ATTENTION}, sort_keys=True),
        "model": _digest(own, _SAMPLE),
        "w0": _digest(initial, None),
    }


def _digest(tensors: Any, sample: int | None) -> str:
    """The SHA-256 of names, types, shapes and values; of `sample` values of each tensor, spread over it, unless None."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().flatten()
        if sample is not None and len(flat) > sample:
            flat = flat[:: -(-len(flat) // sample)]
        digest.update(flat.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
