"""Check that packed sequences do not attend to each other, on the model itself: attention implementations differ."""

from __future__ import annotations

import torch
from torch import nn

from eaftdrope.errors import UserError
from eaftdrope.loaded_model import evaluating

from .head import backbone

_TOLERANCE = 1e-2


@torch.no_grad()
def check_packing(model: nn.Module) -> None:
    """Compare two short sequences packed into one row, as the padding-free collator packs them, with each separately.

    Flash attention is not checked: its kernels need a GPU, where the model may not be yet, and separate sequences by
    construction.

    Raises:
        UserError: the hidden states differ, so packed samples would attend to each other.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    attention = str(base.config._attn_implementation)
    if "flash" in attention:
        return
    with evaluating(base):
        device = base.get_input_embeddings().weight.device
        lengths = (3, 4)
        ids = torch.arange(1, 1 + sum(lengths), device=device)[None] % base.config.get_text_config().vocab_size
        positions = torch.cat([torch.arange(length, device=device) for length in lengths])[None]
        packed = backbone(base)(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        separate = [
            backbone(base)(input_ids=part, use_cache=False).last_hidden_state for part in ids.split(lengths, dim=1)
        ]
        expected = torch.cat(separate, dim=1)
    error = (packed - expected).abs().max() / expected.abs().max()
    if not error <= _TOLERANCE:
        raise UserError(
            f"packing: {type(base).__name__} with attn_implementation={attention!r} lets packed sequences attend to each "
            f"other (hidden states differ by {error:.0%}). Disable packing, or load the model with "
            "attn_implementation='flash_attention_2' on a GPU."
        )
