"""The fast weights of a training in the plan: how many learn as the model reads, in how many chunks, and their memory.

Notation: F fast weights, B rows of a batch, N their tokens, n chunks of a row, b tokens of a chunk, k keys that attention
sees before a chunk, e bytes per element of the arithmetic. Each row has fast weights of its own. Kept from the forward to the
backward for each row:

    first order             (n - 1) e F      the fast weights that each chunk was read with
    horizon > 1             2 (n - 1) e F    and the gradient of the inner loss where a later loss runs through it
    with checkpoint: true   4 (n - 1) F      only what was learned before each chunk, in float32

and beside them 16 F while a chunk is learned: what was learned before and after it, its gradient and the step, in float32.

Blocks that learn keep what every block keeps (memory.py), the same once more for the added MLP and its norm, and the keys
and values that a chunk sees of those before it. The graph of a second derivative is some times as large (measured,
tests/run/test_memory.py). With checkpoint: true they keep the inputs of their chunks, and all else for one chunk at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig

from eaftdrope.ttt.fast_mlps import fast_mlps

from .settings import TrainingSettings

_WIDE = 4
_SECOND_ORDER, _SECOND_ORDER_AUTOCAST = 2.6, 3.2
# copies of the attention's weights in its plain form, which is the one with a second derivative
_ATTENTION_COPIES = 1.4


@dataclass(frozen=True)
class FastWeights:
    """The fast weights of a training.

    Args:
        parameters: F.
        added: parameters that TTT adds to the model (0 with the layout in_place).
        blocks: number of blocks whose MLPs learn.
        chunks: complete chunks of a row of full length.
        kept_bytes: bytes of fast weights kept for the backward, for a batch.
        activation_bytes: bytes of activations that the blocks that learn keep, for a batch.
    """

    parameters: int
    added: int
    blocks: int
    chunks: int
    rows: int
    kept_bytes: int
    activation_bytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row's fast weights while a chunk is learned."""
        return 4 * _WIDE * self.parameters

    @property
    def bytes(self) -> int:
        return self.kept_bytes + self.rows * self.row_bytes


def fast_weights(
    settings: TrainingSettings,
    config: PretrainedConfig,
    model: nn.Module,
    *,
    layer: float,
    element: int,
    autocast: bool,
) -> FastWeights:
    """The fast weights of a training of a model with TTT.

    Args:
        model: with TTT applied, on any device.
        layer: bytes per token that a block keeps for the backward.
        element: bytes per element of the arithmetic.
        autocast: the arithmetic is bfloat16 while the weights keep their own type.
    """
    ttt, fast, text = settings.ttt, fast_mlps(model), config.get_text_config()
    assert ttt is not None, "the training has the settings of test-time training"
    rows, length = settings.train.batch_size, settings.max_length
    parameters = sum(weight.numel() for weight in fast.w0())
    chunks, parts = length // ttt.chunk, math.ceil(length / ttt.chunk)
    # the last chunk is read and not learned; the last of a horizon is learned in first order
    learned = parts - 1
    second_order = learned - (0 if ttt.horizon is None else learned // ttt.horizon)
    # the first chunk reads W0 itself, of which one copy serves all rows, and none is needed in its own precision
    kept = element * (rows * (learned + second_order) + (element != _WIDE))
    if ttt.checkpoint:
        kept = _WIDE * rows * learned

    # keys and values of earlier chunks, at most a window; the first chunks have fewer
    window = ttt.window or getattr(text, "sliding_window", None) or length
    before = sum(min(index * ttt.chunk, window + ttt.sink) for index in range(parts)) / parts
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    keys = 2 * element * size * (getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * before
    added = 0.0
    if ttt.layout == "prime":
        width = fast.w0()[0].shape[0]
        added = (4 + _WIDE + 2 * element) * text.hidden_size + 4 * element * width
    per_token = layer + added + keys / ttt.chunk
    factor = _SECOND_ORDER_AUTOCAST if autocast else _SECOND_ORDER
    plain = _ATTENTION_COPIES * _WIDE * text.num_attention_heads * (before + ttt.chunk)
    per_token += second_order / parts * ((factor - 1) * per_token + plain)
    activations = rows * length * per_token
    if ttt.checkpoint:
        activations = rows * (parts * keys + ttt.chunk * per_token)
    return FastWeights(
        parameters=parameters,
        added=sum(parameter.numel() for parameter in fast.parameters()),
        blocks=fast.fast_blocks,
        chunks=chunks,
        rows=rows,
        kept_bytes=kept * parameters,
        activation_bytes=int(fast.fast_blocks * activations),
    )
