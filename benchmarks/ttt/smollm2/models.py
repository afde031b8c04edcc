"""A model for a task: its weights, its window, and how it learns as it reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from eaftdrope.errors import UserError
from eaftdrope.models import load_model
from eaftdrope.run.machine import training_device, uses_bfloat16
from eaftdrope.ttt import TTTConfig, apply_ttt

from .plan import CHUNK, FAST_BLOCKS, MODEL, ORIGINAL, SINK, WARMUP, WINDOW
from .rules import muon

_TTT = TTTConfig(window=WINDOW, sink=SINK, chunk=CHUNK, fast_blocks=FAST_BLOCKS)


def reading_config(weights: str, reads: str, rate: float) -> TTTConfig:
    """The settings of a task; a model without prime MLPs is the in-place layout without learning."""
    config = replace(_TTT, lr=rate)
    if reads in ("window", "sink"):
        layout = "prime" if weights.startswith("meta-") else "in_place"
        return replace(config, layout=layout, sink=SINK if reads == "sink" else 0)
    if reads == "in_place":
        return replace(config, layout="in_place")
    return replace(config, warmup=WARMUP) if reads in ("warmup", "muon_warmup") else config


def build(weights: str, reads: str, rate: float, work: Path) -> PreTrainedModel:
    """Load the original or trained weights, and apply TTT unless the model reads with full attention.

    Raises:
        UserError: the weights of a training are no longer in `work`.
    """
    model = load_model(MODEL, dtype="float32").eval()
    trained = {} if weights == ORIGINAL else load_weights(work, weights)
    # the fast MLPs are copied from the trained blocks; prime MLPs that were trained replace the copies
    restore(model, {name: tensor for name, tensor in trained.items() if not name.startswith("ttt.")})
    if reads != "full":
        model = apply_ttt(model, reading_config(weights, reads, rate))
        restore(model, {name: tensor for name, tensor in trained.items() if name.startswith("ttt.")})
        if reads in ("muon", "muon_warmup"):
            model.ttt.rule = muon
    return model


def weights_file(work: Path, weights: str) -> Path:
    name, rows = weights.split("@")
    return work / name / f"rows-{int(rows):05d}.safetensors"


def load_weights(work: Path, weights: str) -> dict[str, Tensor]:
    file = weights_file(work, weights)
    if not file.is_file():
        raise UserError(
            f"{file}: no such file. The weights of this training are needed for a measurement: delete the training's entry "
            "from the results to repeat it."
        )
    return load_file(file)


@torch.no_grad()
def restore(model: PreTrainedModel, tensors: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)


def slow_weights(model: PreTrainedModel, arm: str) -> dict[str, torch.nn.Parameter]:
    """The parameters that a training changes, by name: the last blocks, the final norm, and prime MLPs."""
    first = model.config.num_hidden_layers - FAST_BLOCKS
    parts = tuple(f"model.layers.{index}." for index in range(first, model.config.num_hidden_layers))
    parts += ("model.norm.", *(["ttt."] if arm in ("meta", "meta_muon") else []))
    return {name: parameter for name, parameter in model.named_parameters() if name.startswith(parts)}


def autocast() -> torch.autocast:
    """bfloat16 where the CPU has instructions for it, else float32."""
    device = training_device().kind
    return torch.autocast(device, dtype=torch.bfloat16, enabled=uses_bfloat16("auto"))
