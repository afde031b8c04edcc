"""A temperature inside weight files: the query tensors are rewritten in a copy, everything else stays as it is.

A factor on the scores is a factor on the queries, and a factor on the queries can be folded into the weights that make
them: the checkpoint then carries its temperature to every engine. The tensor depends on the architecture: the query norm's
weight if queries are normalised, else the query projection, by itself or within a fused one.

The header of a safetensors file does not change (same names, shapes and types), so only the tensors' own bytes are written,
a few megabytes at a time, and the former bytes go to one side file from which `undo` restores them.

Between the query weights and the scores a class may normalise the queries again (after the rotation, without weights, in
another order), and then a factor on the weights does nothing. No list of classes can keep up with that, so `check_folding`
measures it on a slice: folded as files are, against scaled scores.
"""

from __future__ import annotations

import copy
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PretrainedConfig

from eaftdrope.errors import UserError

from .checkpoint import Tensor, read_header, weight_map
from .identity import OTHER_TOWERS
from .slices import logits, random_model, tokens
from .temperature import scaled_queries

SAVED = "queries.raw"
_BLOCK = 4 << 20
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# norms that multiply by 1 + weight
_OFFSET_NORMS = (
    "gemma3_text",
    "minimax_m3_vl_text",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_next",
)
_NORM = re.compile(r"\.(q_norm|q_layernorm|query_layernorm)(\.norms\.\d+)?\.(weight|bias)$")
# DeepSeek's queries are made by the second of two projections
_PROJECTION = re.compile(r"\.(q_proj|q_b_proj)\.(weight|bias)$")
_FUSED = re.compile(r"\.(qkv_proj|query_key_value)\.(weight|bias)$")
# Relative to what the temperature changes; folding rounds each weight once.
_LIMIT = 1e-2
_LAYER = re.compile(r"^.*?\.(\d+)\.")


class Patch(NamedTuple):
    """Bytes of `file` from `start` on that were replaced; the former ones are in the side file, one after another."""

    file: str
    start: int
    length: int


def query_tensors(names: list[str], config: PretrainedConfig) -> list[str]:
    """Return those of a checkpoint's tensor names that set the length of the queries: norms if any, else projections.

    Raises:
        UserError: no name is that of a query tensor.
    """
    names = [name for name in names if not OTHER_TOWERS.search(name)]
    for pattern in (_NORM, _PROJECTION, _FUSED):
        found = [name for name in names if pattern.search(name)]
        if found:
            return found
    raise UserError(
        f"no tensor of this {config.model_type} checkpoint has the name of a query projection (q_proj, q_norm, qkv_proj, "
        "query_key_value), so a temperature cannot be folded into its weights. Leave the temperature out."
    )


def query_rows(name: str, rows: int, config: PretrainedConfig) -> list[range]:
    """Return which of the `rows` of a tensor of `query_tensors` (along its first dimension) make queries."""
    if not _FUSED.search(name):
        return [range(rows)]
    text = config.get_text_config()
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    if ".qkv_proj." in name:
        return [range(heads * head_dim)]
    # query, key and value of one head after another
    return [range(start, start + head_dim) for start in range(0, rows, 3 * head_dim)]


def scaled_rows(name: str, rows: torch.Tensor, beta: float, config: PretrainedConfig) -> torch.Tensor:
    """Return such rows with every query made `beta` times as long, rounded once to their own dtype."""
    wide = rows.double()
    if _NORM.search(name) and config.get_text_config().model_type in _OFFSET_NORMS:
        return ((1.0 + wide) * beta - 1.0).to(rows.dtype)
    return (wide * beta).to(rows.dtype)


def find_queries(folder: Path, files: dict[str, str], config: PretrainedConfig) -> dict[str, dict[str, Tensor]]:
    """Find the query tensors of a checkpoint.

    Args:
        folder (`Path`): the checkpoint.
        files (`dict[str, str]`): tensor name -> file.
        config (`PretrainedConfig`): its configuration.

    Returns:
        File -> the query tensors in it, by name.

    Raises:
        UserError: no query tensor is known by its name, or one is quantised.
    """
    by_file: dict[str, dict[str, Tensor]] = defaultdict(dict)
    headers = {file: read_header(folder / file)[0] for file in sorted(set(files.values()))}
    for name in query_tensors(list(files), config):
        tensor = headers[files[name]][name]
        if tensor.dtype not in _DTYPES:
            raise UserError(
                f"{name} is stored as {tensor.dtype}: a temperature cannot be folded into quantised weights. Convert the "
                "model before it is quantised, or leave the temperature out."
            )
        by_file[files[name]][name] = tensor
    return dict(by_file)


def rescale(
    folder: Path, queries: dict[str, dict[str, Tensor]], beta: float, config: PretrainedConfig, side: Path
) -> list[Patch]:
    """Make every query `beta` times as long in the files of `folder`, which must be copies; former bytes go to `side`."""
    patches = []
    with side.open("wb") as saved:
        for file, tensors in queries.items():
            with (folder / file).open("r+b") as stream:
                for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
                    for patch in _blocks(file, name, tensor, config):
                        stream.seek(patch.start)
                        old = bytearray(stream.read(patch.length))
                        saved.write(old)
                        stream.seek(patch.start)
                        stream.write(_rescaled(name, tensor, old, beta, config))
                        patches.append(patch)
    return patches


def _blocks(file: str, name: str, tensor: Tensor, config: PretrainedConfig) -> Iterator[Patch]:
    """Yield the bytes of a tensor's query rows, at most `_BLOCK` (or one row) at a time."""
    row = tensor.length // tensor.shape[0]
    step = max(1, _BLOCK // row)
    for rows in query_rows(name, tensor.shape[0], config):
        for first in range(rows.start, rows.stop, step):
            yield Patch(file, tensor.start + first * row, (min(first + step, rows.stop) - first) * row)


def _rescaled(name: str, tensor: Tensor, old: bytearray, beta: float, config: PretrainedConfig) -> bytes:
    values = torch.frombuffer(old, dtype=getattr(torch, _DTYPES[tensor.dtype]))
    return scaled_rows(name, values, beta, config).view(torch.uint8).numpy().tobytes()


def restore(folder: Path, patches: list[Patch], side: Path) -> None:
    """Write the former bytes back into the files of `folder`, which must be copies."""
    with side.open("rb") as saved:
        for patch in patches:
            with (folder / patch.file).open("r+b") as stream:
                stream.seek(patch.start)
                stream.write(saved.read(patch.length))


def check_folding(small: PretrainedConfig, names: list[str], beta: float, config: PretrainedConfig) -> None:
    """Fold `beta` into the saved weights of a slice, load them, and compare with the slice whose scores are scaled.

    Args:
        small (`PretrainedConfig`): the slice's configuration.
        names (`list[str]`): the checkpoint's own tensor names that the temperature goes into.
        beta (`float`): the temperature.
        config (`PretrainedConfig`): the checkpoint's text configuration.

    Raises:
        UserError: the temperature would not have its effect.
    """
    small = copy.deepcopy(small)
    # saved as two tensors: a class whose head is tied in its own way would come back without them
    small.tie_word_embeddings = False
    model, ids = random_model(small), tokens(small)
    plain = logits(model, ids)
    with scaled_queries(model, beta):
        expected = logits(model, ids)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved = weight_map(Path(folder))
        found = find_queries(Path(folder), saved, small)
        rescale(Path(folder), found, beta, small, Path(folder) / SAVED)
        folded = type(model).from_pretrained(
            folder, config=copy.deepcopy(small), dtype=model.dtype, attn_implementation="eager"
        )
        got = logits(folded.eval(), ids)
    error, effect = (got - expected).abs().max().item(), (expected - plain).abs().max().item()
    if not error <= _LIMIT * effect:
        raise UserError(
            f"a temperature cannot be folded into the query weights of {config.model_type}: on a small model of it the "
            f"logits then miss those with scaled scores by {error:.2g}, where the temperature changes them by {effect:.2g}. "
            "Leave the temperature out."
        )
    _compare_names(names, [name for tensors in found.values() for name in tensors], small, config)


def _compare_names(names: list[str], own: list[str], small: PretrainedConfig, config: PretrainedConfig) -> None:
    """Check that the checkpoint has the query tensors that its class saves, in as many layers."""
    theirs, expected = _layer_counts(names), _layer_counts(own)
    missing = sorted(expected.keys() - theirs.keys()) or [
        kind
        for kind, layers in expected.items()
        if layers == small.num_hidden_layers and theirs[kind] != config.num_hidden_layers
    ]
    if missing:
        raise UserError(
            f"a temperature cannot be folded in: the checkpoint does not have {missing[0]} in each layer, as its class "
            "saves it (quantised, or under other names). Convert the model before it is quantised, or leave the temperature "
            "out."
        )


def _layer_counts(names: list[str]) -> dict[str, int]:
    """Return the name after the layer's number -> how many layers have it."""
    layers: dict[str, set[str]] = {}
    for name in names:
        if match := _LAYER.match(name):
            layers.setdefault(name[match.end() :], set()).add(match[1])
    return {kind: len(numbers) for kind, numbers in layers.items()}
