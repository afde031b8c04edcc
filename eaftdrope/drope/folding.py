"""Is a temperature in the weights what it should be? Measured on a slice: folded as files are, against scaled scores.

Between the query weights and the scores a class may normalise the queries again (after the rotation, without weights, in
another order), and then a factor on the weights does nothing. No list of classes can keep up with that.
"""

from __future__ import annotations

import copy
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from eaftdrope.errors import UserError

from . import queries
from .checkpoint import weight_map
from .slices import logits, random_model, tokens
from .temperature import scaled_queries

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Of what the temperature changes; folding rounds each weight once.
_LIMIT = 1e-2
_LAYER = re.compile(r"^.*?\.(\d+)\.")


def check_folding(small: PretrainedConfig, names: list[str], beta: float, config: PretrainedConfig) -> None:
    """Fold `beta` into the saved weights of a slice, load them, and compare with the slice whose scores are scaled.

    Args:
        small: the slice's configuration.
        names: the checkpoint's own tensor names that the temperature goes into.
        config: the checkpoint's text configuration.

    Raises:
        UserError: the temperature would not be what was asked for.
    """
    small = copy.deepcopy(small)
    # saved as two tensors: a class whose head is tied in its own way would come back without them
    small.tie_word_embeddings = False
    model, ids = random_model(small), tokens(small)
    plain = logits(model, ids)
    with scaled_queries(model, beta):
        wanted = logits(model, ids)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved = weight_map(Path(folder))
        found = queries.find_queries(Path(folder), saved, small)
        queries.rescale(Path(folder), found, beta, small, Path(folder) / queries.SAVED)
        folded = type(model).from_pretrained(
            folder, config=copy.deepcopy(small), dtype=model.dtype, attn_implementation="eager"
        )
        got = logits(folded.eval(), ids)
    error, effect = (got - wanted).abs().max().item(), (wanted - plain).abs().max().item()
    if not error <= _LIMIT * effect:
        raise UserError(
            f"a temperature cannot be folded into the query weights of {config.model_type}: on a small model of it the "
            f"logits then miss those with scaled scores by {error:.2g}, where the temperature changes them by {effect:.2g}. "
            "Leave the temperature out."
        )
    _compare_names(names, [name for tensors in found.values() for name in tensors], small, config)


def _compare_names(names: list[str], own: list[str], small: PretrainedConfig, config: PretrainedConfig) -> None:
    """The checkpoint has the query tensors that its class saves, in as many layers."""
    theirs, expected = _places(names), _places(own)
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


def _places(names: list[str]) -> dict[str, int]:
    """Name behind the layer's number -> how many layers have it."""
    places: dict[str, set[str]] = {}
    for name in names:
        if match := _LAYER.match(name):
            places.setdefault(name[match.end() :], set()).add(match[1])
    return {kind: len(layers) for kind, layers in places.items()}
