"""The models of a measurement: the one with TTT as it is saved, and the ones that its controls are measured on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from eaftdrope.checkpoints.adapters import is_adapter
from eaftdrope.errors import UserError, raise_problems
from eaftdrope.models import resolve_model
from eaftdrope.models.loading import find_file
from eaftdrope.ttt import TTTConfig, load_ttt
from eaftdrope.ttt.saved import CONFIG_FILE, read_config

from ..suites.subject import Subject, find_subject
from .options import TTTEvalOptions

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class TTTModels:
    """Models by the weights of an arm ("base", "control", "model").

    Attributes:
        subjects: without "control" if none was passed.
        stock_windows: the window of a model's own configuration; None for full attention.
        trained: the model has TTT of its own.
        config: its settings, or those for a model without TTT.
        window: tokens that attention sees.
    """

    subjects: dict[str, Subject]
    stock_windows: dict[str, int | None]
    trained: bool
    config: TTTConfig
    window: int

    def config_of(self, weights: str) -> TTTConfig:
        """Return the settings of arms on some weights: a model with full attention is given the same window."""
        if self.config.window is None and self.stock_windows[weights] is None:
            return dataclasses.replace(self.config, window=self.window, sink=0)
        return self.config

    def load(self, weights: str, dtype: str, device: str) -> PreTrainedModel:
        """Load a model, or an adapter on its base, in evaluation mode; only "model" has its TTT.

        Raises:
            UserError: the weights cannot be read.
        """
        subject = self.subjects[weights]
        if weights != "model":
            return subject.load(dtype, device)
        try:
            return load_ttt(_path(subject.reference), dtype=dtype).to(device).eval()
        except (OSError, ValueError) as error:
            raise UserError(f"{subject.reference} cannot be loaded with TTT: {error}") from error


def find_models(options: TTTEvalOptions) -> TTTModels:
    """Find the models and the settings of TTT, without loading weights.

    Raises:
        UserError: with every problem of the models and of the options for them.
    """
    references = {"model": options.model, "base": options.base or options.model, "control": options.control}
    subjects = {weights: find_subject(reference) for weights, reference in references.items() if reference}
    stock = {weights: _own_window(subject.config()) for weights, subject in subjects.items()}
    own = ttt_config_of(options.model)
    raise_problems(_wrong_models(options, own))
    config = own or _config_for(options, stock["model"])
    window = config.window or stock["model"]
    if window is None:
        raise UserError(f"{options.model}: its TTT has no window, and neither has its own configuration.")
    return TTTModels(subjects, stock, own is not None, config, window)


def ttt_config_of(reference: str) -> TTTConfig | None:
    """Return the settings of a saved model with TTT; None for one without it.

    Raises:
        UserError: its ttt_config.json is damaged.
    """
    file = find_file(_path(reference), CONFIG_FILE)
    try:
        return None if file is None else read_config(file)
    except ValueError as error:
        raise UserError(str(error)) from None


def _path(reference: str) -> str:
    return reference if is_adapter(reference) else resolve_model(reference).path


def _own_window(config: PretrainedConfig) -> int | None:
    """Return the window that a model's own configuration has in every layer; None where a layer has full attention."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["sliding_attention"])
    used = kinds == {"sliding_attention"} and getattr(text, "use_sliding_window", True)
    return getattr(text, "sliding_window", None) if used else None


def _wrong_models(options: TTTEvalOptions, own: TTTConfig | None) -> list[str]:
    problems = []
    for option, reference in (("--base", options.base), ("--control", options.control)):
        if reference is not None and ttt_config_of(reference) is not None:
            problems.append(f"{option} {reference}: it is a model with TTT. Pass one that was trained without it.")
    given = [f"--{name}" for name in ("window", "sink", "chunk") if getattr(options, name) is not None]
    if own is not None and given:
        problems.append(
            f"{', '.join(given)}: {options.model} has settings of its own (ttt_config.json). Leave them out, or measure a "
            "model without TTT."
        )
    return problems


def _config_for(options: TTTEvalOptions, stock: int | None) -> TTTConfig:
    """Return the settings of TTT for a model without it: the options, else the defaults of `TTTConfig`.

    Raises:
        UserError: settings that exclude each other, or another window for a model that has one.
    """
    if stock is not None and (options.window or options.sink):
        raise UserError(
            f"{options.model}: its own configuration has a window of {stock:,} tokens. Leave out --window and --sink."
        )
    defaults = TTTConfig()
    assert defaults.window is not None
    window = options.window or defaults.window
    chunk = options.chunk or min(defaults.chunk, stock or window)
    sink = defaults.sink if options.sink is None else options.sink
    try:
        return TTTConfig(window=None if stock else window, sink=sink, chunk=chunk)
    except ValueError as error:
        raise UserError(str(error)) from None
