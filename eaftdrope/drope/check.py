"""Checks that a converted checkpoint has no rotary embedding, measured on the architecture's own class.

    identity   logits equal those of the unconverted configuration whose dropped layers receive cos = 1, sin = 0
    shift      logits do not change when all positions move by 100,000           (every layer dropped)
    order      with one layer, the last token's logits do not depend on the order of those before it
    control    the unconverted configuration as it is gives other logits: the checks above can fail

The first two must hold bit for bit, in float32 and bfloat16. They run on a slice (`slices`), or on the weights
themselves. The shift is left out if the reference itself, without any rotation, fails it: if a class uses positions in
another way as well (convolutions, linear attention, a temperature by position). An order that cannot be checked is
reported as a skipped check with its reason.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from eaftdrope.errors import UserError

from .checkpoint import carried_files, read_header, read_json
from .config import RECORD, check_record, one_line, original_config, read_config, text_part
from .identity import attention_modules, identity_rotation, scaling_of, set_scaling
from .slices import CONTROL, logits, one_layer, random_model, seeded, small_pair, tokens

_SHIFT = 100_000
_ORDER_LIMIT = 1e-4


@dataclass(frozen=True)
class Check:
    """One check of a conversion.

    Attributes:
        name (`str`): what is checked.
        value (`float`): the largest difference of logits.
        limit (`float`): the largest value that passes; for a control, the smallest.
        at_least (`bool`): the check is a control.
        skipped (`str`, *optional*): why it could not be made; then it counts as passed.
    """

    name: str
    value: float
    limit: float
    at_least: bool = False
    skipped: str | None = None

    @property
    def passed(self) -> bool:
        if self.skipped is not None:
            return True
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        if self.skipped is not None:
            return f"not checked: {self.name} ({self.skipped})"
        wanted = f"{'at least' if self.at_least else 'at most'} {self.limit:g}"
        return f"{'ok    ' if self.passed else 'FAILED'} {self.name}: {self.value:.3g} ({wanted})"


def check_folder(folder: str | Path, *, weights: bool = False) -> list[Check]:
    """Check the converted checkpoint `folder`.

    Args:
        folder (`str` or `Path`): a converted checkpoint, also after a training.
        weights (`bool`): check on its own weights, which loads them, not on a slice.

    Raises:
        UserError: the folder is not a converted checkpoint, or its architecture cannot be built or inspected.
    """
    folder = Path(folder)
    raw = read_json(folder / "config.json")
    if RECORD not in raw:
        raise UserError(f"{folder} is not a converted checkpoint: its config.json has no `drope` record.")
    check_record(raw, folder / "config.json")
    new, old = original_and_converted(raw, folder)
    pair = None
    if not weights:
        pair = small_pair(new.get_text_config(), old.get_text_config(), parameters(folder))
        new, old = pair
    text = new.get_text_config()
    dropped = _dropped_layers(raw[RECORD]["layers"], text)
    is_whole = len(dropped) == text.num_hidden_layers
    checks = []
    try:
        for dtype in (torch.float32, torch.bfloat16):
            checks += _exact_checks(new, old, dropped if not is_whole else None, folder if weights else None, dtype)
    except UserError:
        raise
    # a class that cannot compute with the new rope parameters may fail with any error
    except Exception as error:
        raise UserError(f"{text.model_type} cannot be checked, its class fails: {one_line(error)}") from error
    if is_whole:
        pair = pair or small_pair(new.get_text_config(), old.get_text_config(), parameters(folder))
        checks.append(_order(*pair))
    return checks


def original_and_converted(raw: dict[str, Any], where: str | Path) -> tuple[PretrainedConfig, PretrainedConfig]:
    """Return the configurations of a converted config.json's content: the converted one, and the original one."""
    new = read_config(raw, where)
    return new, read_config(_with_temperature_of(new, original_config(raw)), where)


def parameters(folder: Path) -> int:
    """Return the number of elements of all tensors of a checkpoint; reads headers only."""
    files = [name for name in carried_files(folder)[0] if name.endswith(".safetensors")]
    total = 0
    for file in files:
        for tensor in read_header(folder / file)[0].values():
            count = 1
            for side in tensor.shape:
                count *= side
            total += count
    return total


def _exact_checks(
    new: PretrainedConfig,
    old: PretrainedConfig,
    dropped: set[int] | None,
    folder: Path | None,
    dtype: torch.dtype,
) -> list[Check]:
    """Check identity, control and shift in one dtype; `dropped` None stands for all layers."""
    name = str(dtype).removeprefix("torch.")
    model, reference = _pair(new, old, folder, dtype)
    ids = tokens(new.get_text_config())
    got = logits(model, ids)
    far = torch.arange(ids.shape[1]) + _SHIFT
    with identity_rotation(reference, dropped):
        straight = logits(reference, ids)
        sees_positions = dropped is None and _difference(straight, logits(reference, ids, far)) > 0.0
    checks = [Check(f"equal to the identity rotation, {name}", _difference(got, straight), 0.0)]
    if dtype is torch.float32:
        difference = _difference(got, logits(reference, ids))
        checks.append(Check("control: differs from the rotation as it was", difference, CONTROL, at_least=True))
    if dropped is None:
        # Ministral-3's own temperature uses positions, and is not a rotation
        still = _without_temperature(new)
        if still is not new:
            model, sees_positions = _pair(still, old, folder, dtype)[0], False
        if not sees_positions:
            difference = _difference(logits(model, ids), logits(model, ids, far))
            checks.append(Check(f"unchanged by a shift of positions, {name}", difference, 0.0))
    return checks


def _order(new: PretrainedConfig, old: PretrainedConfig) -> Check:
    """Check the order on the first layer without linear attention, as a model of one layer.

    The check is skipped if no such model can be built, or if the layer sees the order without any rotation. The exact checks,
    which were made before, hold by themselves.
    """
    name = "one layer does not see the order of tokens"
    new = _without_temperature(new)
    kinds = getattr(new, "layer_types", None) or []
    layer = next((i for i in range(new.num_hidden_layers) if not (kinds and "linear" in kinds[i])), None)
    if layer is None:
        return Check(name, math.nan, _ORDER_LIMIT, skipped="every layer has linear attention")
    try:
        one, original = one_layer(new, layer), one_layer(old, layer)
        with identity_rotation(reference := random_model(original)):
            sees_order = _order_difference(reference, original) > _ORDER_LIMIT
        difference = _order_difference(random_model(one), one)
    # a class that requires several layers, or layers of several kinds, may fail with any error
    except Exception as error:
        reason = f"a model of one layer cannot be built: {one_line(error)}"
        return Check(name, math.nan, _ORDER_LIMIT, skipped=reason)
    if sees_order:
        return Check(name, math.nan, _ORDER_LIMIT, skipped="the layer sees the order without any rotation")
    return Check(name, difference, _ORDER_LIMIT)


def _order_difference(model: PreTrainedModel, config: PretrainedConfig) -> float:
    window = getattr(config, "sliding_window", None)
    ids = tokens(config, rows=1)
    ids = ids[:, : min(ids.shape[1], window or ids.shape[1])]
    length = ids.shape[1]
    mixed = torch.cat([ids[:, torch.randperm(length - 1, generator=seeded())], ids[:, -1:]], dim=1)
    return _difference(logits(model, ids)[:, -1], logits(model, mixed)[:, -1])


def _dropped_layers(wanted: str, config: PretrainedConfig) -> set[int]:
    """Return the numbers of the layers without rotation, as the record lists them.

    Those of SmolLM3 that never had a rotation are among them: the identity changes nothing there.
    """
    if wanted == "all":
        return set(range(config.num_hidden_layers))
    if hasattr(config, "no_rope_layers"):
        return {index for index, rotates in enumerate(config.no_rope_layers) if not rotates}
    return {index for index, kind in enumerate(config.layer_types) if kind in wanted.split(",")}


def _with_temperature_of(new: PretrainedConfig, raw: dict[str, Any]) -> dict[str, Any]:
    """Return `raw` with Ministral-3's temperature by position as in `new`: it is not part of the rotation."""
    rope = new.get_text_config().rope_parameters
    part = text_part(raw)
    if "llama_4_scaling_beta" in rope:
        kept = {key: rope[key] for key in ("llama_4_scaling_beta", "original_max_position_embeddings")}
        part["rope_parameters"] = {**(part.get("rope_parameters") or {"rope_type": "default"}), **kept}
        part.setdefault("rope_theta", rope["rope_theta"])
    return raw


def _without_temperature(config: PretrainedConfig) -> PretrainedConfig:
    text = config.get_text_config()
    if not text.rope_parameters.get("llama_4_scaling_beta"):
        return config
    still = copy.deepcopy(config)
    still.get_text_config().rope_parameters["llama_4_scaling_beta"] = 0.0
    return still


def _pair(
    new: PretrainedConfig, old: PretrainedConfig, folder: Path | None, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Build two models of the same weights: of the converted configuration and of the original one."""
    model = random_model(new, dtype) if folder is None else _loaded(new, folder, dtype)
    reference = type(model)._from_config(copy.deepcopy(old), dtype=dtype, attn_implementation="eager").eval()
    # shares the tensors: the second model needs no memory beyond its buffers
    reference.load_state_dict(model.state_dict(), assign=True)
    # a factor on the scores that belongs to YaRN's type (DeepSeek) is not a rotation: see `temperature`
    modules = attention_modules(model)
    for name, module in attention_modules(reference).items():
        set_scaling(module, scaling_of(modules[name]))
    return model, reference


def _loaded(config: PretrainedConfig, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load the checkpoint itself: a multimodal one as the class in its configuration, whose text part is then checked."""
    named = getattr(transformers, (config.architectures or [""])[0], transformers.AutoModelForCausalLM)
    try:
        model, info = named.from_pretrained(
            folder, config=copy.deepcopy(config), dtype=dtype, attn_implementation="eager", output_loading_info=True
        )
    # a loader's errors are of many kinds (a missing package of a quantisation, a damaged file)
    except Exception as error:
        raise UserError(f"the weights of {folder} cannot be loaded: {one_line(error)}") from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise UserError(f"{folder} lacks weights of {type(model).__name__}: {missing}, ...")
    return model.eval()


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()
