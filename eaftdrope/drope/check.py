"""Is a converted checkpoint really without rotary embedding? Measured on the architecture's own class, not believed.

    identity   logits equal those of the unconverted configuration whose dropped layers are handed cos = 1, sin = 0
    shift      logits do not change when all positions move by 100,000           (every layer dropped)
    order      with one layer, the last token's logits do not depend on the order of those before it
    control    the unconverted configuration, untouched, gives other logits: the checks above can fail

The first two are asked to the last bit, in float32 and bfloat16. They run on a slice (`slices`), or on the weights
themselves. Shift and order are left out where the reference itself, without any rotation, fails them: where a class looks
at positions in another way as well (convolutions, linear attention, a temperature by position).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from eaftdrope.errors import UserError

from .checkpoint import carried_files, read_header, read_json
from .config import RECORD, before, check_record
from .identity import attention_modules, identity_rotation
from .reading import one_line, read_config, text_part
from .slices import CONTROL, logits, one_layer, random_model, seeded, small_pair, tokens

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig

_SHIFT = 100_000
_ORDER_LIMIT = 1e-4


@dataclass(frozen=True)
class Check:
    """`value` is a largest difference of logits; it passes within `limit`, or beyond it for a control."""

    name: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def passed(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        wanted = f"{'at least' if self.at_least else 'at most'} {self.limit:g}"
        return f"{'ok    ' if self.passed else 'FAILED'} {self.name}: {self.value:.3g} ({wanted})"


def check_folder(folder: str | Path, *, weights: bool = False) -> list[Check]:
    """The checks on the converted checkpoint `folder`; on its own weights where asked, which loads them.

    Raises:
        UserError: the folder is no converted checkpoint, or its architecture cannot be built or looked into.
    """
    import torch

    folder = Path(folder)
    raw = read_json(folder / "config.json")
    if RECORD not in raw:
        raise UserError(f"{folder} is not a converted checkpoint: its config.json has no `drope` record.")
    check_record(raw, folder / "config.json")
    new, old = configs(raw, folder)
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
    # a class that cannot compute with the new rope parameters fails in a way of its own
    except Exception as error:
        raise UserError(f"{text.model_type} cannot be checked, its class fails: {one_line(error)}") from error
    if is_whole:
        pair = pair or small_pair(new.get_text_config(), old.get_text_config(), parameters(folder))
        checks += _order(*pair)
    return checks


def configs(raw: dict, where: str | Path) -> tuple[PretrainedConfig, PretrainedConfig]:
    """Of a converted config.json's content: the configuration as it is, and as it was before."""
    new = read_config(raw, where)
    return new, read_config(_with_temperature_of(new, before(raw)), where)


def parameters(folder: Path) -> int:
    """Elements of all tensors of a checkpoint; reads headers only."""
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
    """Identity, control and shift in one dtype; `dropped` None: all layers."""
    import torch

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
        # Ministral-3's own temperature looks at positions, and is no rotation
        still = _without_temperature(new)
        if still is not new:
            model, sees_positions = _pair(still, old, folder, dtype)[0], False
        if not sees_positions:
            difference = _difference(logits(model, ids), logits(model, ids, far))
            checks.append(Check(f"unchanged by a shift of positions, {name}", difference, 0.0))
    return checks


def _order(new: PretrainedConfig, old: PretrainedConfig) -> list[Check]:
    """On the first layer that can stand alone and attends to all tokens alike. Without such a layer there is no check of the
    order, and none in the list: the exact ones, which were made before, hold by themselves."""
    new = _without_temperature(new)
    kinds = getattr(new, "layer_types", None) or []
    for layer in range(new.num_hidden_layers):
        if kinds and "linear" in kinds[layer]:
            continue
        one, was = one_layer(new, layer), one_layer(old, layer)
        try:
            with identity_rotation(reference := random_model(was)):
                applies = _order_difference(reference, was) <= _ORDER_LIMIT
            difference = _order_difference(random_model(one), one)
        # a class that wants several layers, or layers of several kinds
        except Exception:
            return []
        return [Check("one layer does not see the order of tokens", difference, _ORDER_LIMIT)] if applies else []
    return []


def _order_difference(model: nn.Module, config: PretrainedConfig) -> float:
    import torch

    window = getattr(config, "sliding_window", None)
    ids = tokens(config, rows=1)
    ids = ids[:, : min(ids.shape[1], window or ids.shape[1])]
    length = ids.shape[1]
    mixed = torch.cat([ids[:, torch.randperm(length - 1, generator=seeded())], ids[:, -1:]], dim=1)
    return _difference(logits(model, ids)[:, -1], logits(model, mixed)[:, -1])


def _dropped_layers(wanted: str, config: PretrainedConfig) -> set[int]:
    """Numbers of the layers without rotation, by the record's words. (Those of SmolLM3 that never had one are among
    them: handing them the identity changes nothing.)"""
    if wanted == "all":
        return set(range(config.num_hidden_layers))
    if hasattr(config, "no_rope_layers"):
        return {index for index, rotates in enumerate(config.no_rope_layers) if not rotates}
    return {index for index, kind in enumerate(config.layer_types) if kind in wanted.split(",")}


def _with_temperature_of(new: PretrainedConfig, raw: dict) -> dict:
    """`raw` with Ministral-3's temperature by position as in `new`: it is no part of the rotation."""
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


def _pair(new: PretrainedConfig, old: PretrainedConfig, folder: Path | None, dtype) -> tuple[nn.Module, nn.Module]:
    """Two models of the same weights: the converted configuration's, and the one before it."""
    model = random_model(new, dtype) if folder is None else _loaded(new, folder, dtype)
    reference = type(model)._from_config(copy.deepcopy(old), dtype=dtype, attn_implementation="eager").eval()
    # takes the tensors themselves: the second model costs no memory beyond its buffers
    reference.load_state_dict(model.state_dict(), assign=True)
    # a factor on the scores that belongs to YaRN's type (DeepSeek) is no rotation: see `inherited`
    scalings = attention_modules(model)
    for name, module in attention_modules(reference).items():
        module.scaling = scalings[name].scaling
    return model, reference


def _loaded(config: PretrainedConfig, folder: Path, dtype) -> nn.Module:
    """The checkpoint itself: a multimodal one as the class that it names, whose text part is then checked."""
    import transformers

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
