"""From a folder, a repository on the hub or any reference of a model to a model with TTT.

model = load_ttt("runs/mine")                                # saved with TTT
source = find_ttt("package:NAME", {"lr": 0.1})               # or not: naive TTT; nothing is loaded yet
model, tokenizer = source.load("float32", "cpu"), source.tokenizer()
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoModelForCausalLM

from eaftdrope.checkpoints.adapters import adapter_settings, adapter_tokenizer, is_adapter, load_adapted
from eaftdrope.errors import UserError
from eaftdrope.files import usable_path
from eaftdrope.models import check_model_reference, load_model, load_tokenizer, resolve_model, ttt_config_file
from eaftdrope.models.loading import find_file

from .config import TTTConfig
from .fast_mlps import fast_mlps
from .model import apply_ttt
from .saved import CONFIG_FILE, WEIGHTS_FILE, load_primes, read_config, read_state_config
from .state import TTTState

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHANGEABLE = ("lr", "clip", "horizon", "checkpoint", "inner_gate", "warmup")
"""Settings that a model saved with TTT may be used with other values of; the others are those it was trained with."""


def load_ttt(reference: str | Path, **kwargs: Any) -> Any:
    """Load a model that `save_pretrained` wrote with TTT applied.

    Args:
        reference (`str` or `Path`): a folder or a hub id, of a checkpoint or of a PEFT adapter.
        kwargs: of `from_pretrained`.

    Raises:
        ValueError: it has no ttt_config.json, or its files are damaged or do not fit each other.
    """
    hub = {name: kwargs[name] for name in ("revision", "token", "cache_dir", "local_files_only") if name in kwargs}
    config = find_file(reference, CONFIG_FILE, **hub)
    if config is None:
        raise ValueError(
            f"{reference} has no {CONFIG_FILE}: it was not saved with TTT. Load it as usual and call apply_ttt(model)."
        )
    adapter = find_file(reference, "adapter_config.json", **hub)
    if adapter is None:
        model = AutoModelForCausalLM.from_pretrained(reference, **kwargs)
        return apply_saved(model, reference, **hub)
    from peft import PeftConfig, PeftModel

    if Path(reference).is_dir():
        # a run records which model the adapter was trained on, where that is no id of the hub
        base = resolve_model(adapter_settings(Path(reference))["base_model_name_or_path"]).path
    else:
        base = PeftConfig.from_pretrained(str(reference), **hub).base_model_name_or_path
    model = apply_saved(AutoModelForCausalLM.from_pretrained(base, **kwargs), reference, **hub)
    return PeftModel.from_pretrained(model, str(reference), **hub)


def apply_saved(model: Any, reference: str | Path, **hub: Any) -> Any:
    """Apply TTT to a loaded model, with the settings and the prime MLPs of `reference`; return it.

    Raises:
        ValueError: the files are missing or damaged, or do not fit the model.
    """
    config, weights = find_file(reference, CONFIG_FILE, **hub), find_file(reference, WEIGHTS_FILE, **hub)
    if config is None:
        raise ValueError(f"{reference} has no {CONFIG_FILE}: it was not saved with TTT.")
    settings = read_config(config)
    if settings.layout == "prime" and weights is None:
        raise ValueError(f"{reference} has {CONFIG_FILE} but no {WEIGHTS_FILE}, which holds its prime MLPs.")
    model = apply_ttt(model, settings)
    if weights is not None:
        load_primes(model, weights)
    return model


@dataclass(frozen=True)
class TTTSource:
    """A model that is used with TTT.

    Attributes:
        reference: as the user wrote it.
        base, revision: the model that the weights are loaded from.
        adapter: the folder of an adapter on it, or None.
        config: the settings.
        naive: it was not saved with TTT, so it was not trained to learn at test time.
    """

    reference: str
    base: str
    revision: str | None
    adapter: Path | None
    config: TTTConfig
    naive: bool

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer: the adapter's, if it has one."""
        if self.adapter is None:
            return load_tokenizer(self.base)
        return adapter_tokenizer(self.adapter, self.base, self.revision)

    def load(self, dtype: str, device: str) -> Any:
        """Load the model in evaluation mode with TTT applied; an adapter is not merged.

        Raises:
            UserError: the weights cannot be read, an adapter does not fit its base, or TTT does not fit the architecture.
        """
        if self.adapter is None:
            model: Any = load_model(self.base, dtype=dtype)
        else:
            model = load_adapted(self.adapter, self.base, self.revision, dtype=dtype)
        try:
            if self.naive:
                apply_ttt(model, self.config)
            else:
                apply_saved(model, self.adapter or resolve_model(self.base).path)
                fast_mlps(model).config = self.config
        except ValueError as error:
            raise UserError(f"model {self.reference!r}: {error}") from error
        return model.to(device).eval()

    def state(self, model: Any, file: Path | None) -> TTTState:
        """Return the state of a file, or a fresh one.

        Raises:
            UserError: the file is not a state of this model.
        """
        if file is None:
            return TTTState(model)
        try:
            return TTTState.load(usable_path(file), model)
        except ValueError as error:
            raise UserError(str(error)) from error


def find_ttt(reference: str, changes: Mapping[str, Any], state: Path | None = None) -> TTTSource:
    """Find a model and its settings of TTT without loading weights.

    Args:
        reference (`str`): any reference of a model, or a folder with an adapter.
        changes (`Mapping[str, Any]`): settings that differ from those saved with the model, or from the defaults.
        state (`Path`, *optional*): file of a state, whose settings a model that was not saved with TTT is used with.

    Raises:
        UserError: no such model, a setting out of range, or a change of one that the model was trained with.
    """
    base, revision, adapter = reference, None, None
    if is_adapter(reference):
        adapter = usable_path(reference)
        settings = adapter_settings(adapter)
        base, revision = settings["base_model_name_or_path"], settings.get("revision")
    if problem := check_model_reference(base):
        raise UserError(problem)
    file = adapter / CONFIG_FILE if adapter is not None else ttt_config_file(base)
    saved = None if file is None or not file.is_file() else _checked(reference, lambda: read_config(file))
    if saved is not None:
        _refuse_changes(reference, saved, changes)
    read_with = None if state is None else _checked(reference, lambda: read_state_config(usable_path(state)))
    config = _checked(reference, lambda: replace(saved or read_with or TTTConfig(), **changes))
    return TTTSource(reference, base, revision, adapter, config, naive=saved is None)


def _refuse_changes(reference: str, saved: TTTConfig, changes: Mapping[str, Any]) -> None:
    wrong = [name for name, value in changes.items() if name not in CHANGEABLE and value != getattr(saved, name)]
    if wrong:
        own = ", ".join(f"{name}={getattr(saved, name)}" for name in wrong)
        raise UserError(
            f"model {reference!r} was saved with {own} in its {CONFIG_FILE}, which cannot be changed. Leave "
            f"{', '.join(wrong)} out; only {', '.join(CHANGEABLE)} may differ."
        )


def _checked(reference: str, make: Callable[[], TTTConfig]) -> TTTConfig:
    try:
        return make()
    except ValueError as error:
        raise UserError(f"model {reference!r}: {error}") from error
