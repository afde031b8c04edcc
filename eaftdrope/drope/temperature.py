"""The softmax temperature: scores times beta, because attention over more tokens is flatter.

    beta = 1 + slope * ln(s),  s = length / trained length       (arXiv 2512.12167, appendix C.2)

A factor on the scores is a factor on the queries, and a factor on the queries can be folded into the weights that make
them: the checkpoint then carries its temperature to every engine. Which tensor holds it depends on the architecture:
the query norm's weight where queries are normalised, else the query projection, alone or within a fused one.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from eaftdrope.errors import UserError

from .identity import OTHER_TOWERS, attention_modules

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig

PAPER_SLOPES = {"SmolLM-360M, recalibrated": 0.103, "a 494M model trained for it": 0.412}
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


def beta_for(length: int, trained_length: int, slope: float) -> float:
    """1 + slope * ln(length / trained_length); 1 where the length is not above the trained one."""
    return 1.0 + slope * math.log(max(1.0, length / trained_length))


@contextlib.contextmanager
def scaled_queries(model: nn.Module, beta: float) -> Iterator[None]:
    """Every attention score of the live `model` times `beta`, put back in the end. No weight is touched: transformers'
    attention modules keep the factor on their scores as `scaling`.

    Raises:
        UserError: the model has no such modules.
    """
    modules = list(attention_modules(model).values())
    if not modules:
        raise UserError(f"{type(model).__name__} keeps no `scaling` of its attention scores, so they cannot be scaled.")
    own = [module.scaling for module in modules]
    try:
        for module in modules:
            module.scaling = module.scaling * beta
        yield
    finally:
        for module, scaling in zip(modules, own):
            module.scaling = scaling


def query_tensors(names: list[str], config: PretrainedConfig) -> list[str]:
    """Of a checkpoint's tensor names, those that set the length of the queries: norms where there are any, else
    projections.

    Raises:
        UserError: none is known by its name.
    """
    names = [name for name in names if not OTHER_TOWERS.search(name)]
    for pattern in (_NORM, _PROJECTION, _FUSED):
        found = [name for name in names if pattern.search(name)]
        if found:
            return found
    raise UserError(
        f"no query projection is known by its name in this {config.model_type} checkpoint (q_proj, q_norm, qkv_proj, "
        "query_key_value), so a temperature cannot be folded into its weights. Leave the temperature out."
    )


def query_rows(name: str, rows: int, config: PretrainedConfig) -> list[range]:
    """Of the `rows` of a tensor of `query_tensors` (along its first dimension), those that make queries."""
    if not _FUSED.search(name):
        return [range(rows)]
    text = config.get_text_config()
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    if ".qkv_proj." in name:
        return [range(heads * head_dim)]
    # query, key and value of one head after another
    return [range(start, start + head_dim) for start in range(0, rows, 3 * head_dim)]


def scaled_rows(name: str, rows: Tensor, beta: float, config: PretrainedConfig) -> Tensor:
    """Such rows with every query made `beta` times as long, rounded once to their own dtype."""
    wide = rows.double()
    if _NORM.search(name) and config.get_text_config().model_type in _OFFSET_NORMS:
        return ((1.0 + wide) * beta - 1.0).to(rows.dtype)
    return (wide * beta).to(rows.dtype)
