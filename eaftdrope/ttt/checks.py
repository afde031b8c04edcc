"""What a model with TTT refuses, each with its reason: architectures before anything is changed, inputs at every call.

Families that the tests cover pass by name. Any other is accepted if it passes two checks on a few tokens, to the last bit:
with a window longer than the text it is the original model, and with a shorter one it is the model under that window's mask.

Legend: B rows, T tokens of a row.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eaftdrope.errors import UserError
from eaftdrope.loaded_model import evaluating
from eaftdrope.trainer.head import backbone, logits_transform

from .chunk import scan
from .config import TTTConfig
from .fast_mlps import FastMLPs, fast_mlps, norm_before_mlp
from .inner import TWICE_REFUSED
from .state import TTTState
from .window import MASKED_ATTENTION, has_own_window, window_mask

_VERIFIED = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
# of these the table of angles depends on how much was read
_LENGTH_DEPENDENT = ("dynamic", "longrope")


def check_model(model: PreTrainedModel, config: TTTConfig) -> None:
    """
    Raises:
        UserError: TTT cannot be applied to the model with these settings.
    """
    name = type(model).__name__
    if not hasattr(model, "get_output_embeddings") or getattr(model.config, "is_encoder_decoder", False):
        raise UserError(f"{name} is not a causal language model, which test-time training needs.")
    text, blocks = model.config.get_text_config(), getattr(backbone(model), "layers", None)
    if not isinstance(blocks, nn.ModuleList):
        raise UserError(
            f"{name} has no list of blocks at base_model.layers, so its last blocks cannot be run on their own."
        )
    if config.fast_blocks is not None and config.fast_blocks > len(blocks):
        raise UserError(f"fast_blocks={config.fast_blocks}, and {name} has {len(blocks)} blocks.")
    first = len(blocks) - (config.fast_blocks or max(1, round(len(blocks) / 4)))
    for number, block in enumerate(blocks[first:], first):
        _check_block(name, number, block)
    _check_attention(model, config, text)
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if config.horizon != 1 and (bias is not None or logits_transform(model.config).softcap is not None):
        raise UserError(f"horizon={config.horizon}: {TWICE_REFUSED}")


def _check_block(name: str, number: int, block: Any) -> None:
    mlp = getattr(block, "mlp", None)
    projections: list[Any] = [getattr(mlp, part, None) for part in ("gate_proj", "up_proj", "down_proj")]
    if not all(isinstance(getattr(layer, "weight", None), Tensor) for layer in projections):
        raise UserError(
            f"block {number} of {name} has no gated MLP (mlp.gate_proj, up_proj, down_proj): a mixture of experts, or "
            "another kind of MLP, cannot learn at test time. Choose fast_blocks so that the last blocks have one."
        )
    if any(getattr(layer, "bias", None) is not None for layer in projections):
        raise UserError(f"the MLP of block {number} of {name} has biases, which test-time training does not support.")
    if any(not layer.weight.is_floating_point() for layer in projections):
        raise UserError(f"the MLP of block {number} of {name} is quantised: what learns at test time must not be.")
    if not hasattr(block, norm_before_mlp(block)):
        raise UserError(
            f"block {number} of {name} has no norm before its MLP (post_attention_layernorm or pre_feedforward_layernorm), "
            "where the MLP that learns stands."
        )


def _check_attention(model: PreTrainedModel, config: TTTConfig, text: Any) -> None:
    name = type(model).__name__
    attention = model.config._attn_implementation
    if config.window is not None and attention not in MASKED_ATTENTION:
        raise UserError(
            f"a window with a sink is a mask, which attn_implementation={attention!r} does not use. Load the model with "
            "sdpa, or use `sliding(model, window)` and TTTConfig(window=None)."
        )
    if config.horizon != 1 and attention not in MASKED_ATTENTION:
        raise UserError(
            f"horizon={config.horizon}: attn_implementation={attention!r} has no second derivative. Load the model with sdpa."
        )
    kinds = sorted(set(getattr(text, "layer_types", None) or []))
    if len(kinds) > 1:
        raise UserError(
            f"{name} mixes kinds of attention ({', '.join(kinds)}), and parts of it cannot be run on their own: its layers "
            "are numbered from the first."
        )
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kind = rope.get("rope_type", rope.get("type"))
    if kind in _LENGTH_DEPENDENT:
        raise UserError(
            f"{name} has a rotary embedding of the type {kind}, whose angles depend on how much was read: what a window kept "
            "would no longer fit."
        )
    own = getattr(text, "sliding_window", None)
    if config.window is not None and has_own_window(model) and own is not None and config.window > own:
        raise UserError(
            f"window={config.window:,}, and {name} was trained with a window of {own:,}. Use a window of at most that, or "
            "window=None for the model's own."
        )


def check_inputs(
    input_ids: Tensor | None,
    attention_mask: Any,
    position_ids: Tensor | None,
    cache: Any,
    inputs_embeds: Tensor | None,
    kwargs: dict[str, Any],
) -> None:
    """
    Raises:
        ValueError: an input that a model with TTT cannot honour.
    """
    if input_ids is None or inputs_embeds is not None:
        raise ValueError("a model with TTT learns from token ids: pass input_ids, and no inputs_embeds.")
    if not input_ids.numel():
        raise ValueError("input_ids has no tokens.")
    if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2):
        raise ValueError("a model with TTT builds its own masks: pass attention_mask as [rows, tokens], or none.")
    if attention_mask is not None and _has_holes(attention_mask):
        raise ValueError("attention_mask: padding between the tokens of a row. Pad rows at the right or at the left.")
    check_cache(cache)
    packed = [name for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx") if kwargs.get(name) is not None]
    if packed or (position_ids is not None and _restarts(position_ids, attention_mask)):
        raise ValueError(
            "packed rows: what was learned from one sequence would be used in the next one of the row. Train with one "
            "sequence per row (packing=False, padding_free=False)."
        )
    for name in ("output_hidden_states", "output_attentions"):
        if kwargs.get(name):
            raise ValueError(f"{name}: a model with TTT runs in parts, which do not collect them.")


def check_cache(cache: Any) -> None:
    """
    Raises:
        ValueError: a cache that is not a `TTTState`.
    """
    if cache is not None and not isinstance(cache, TTTState):
        raise ValueError(
            f"a model with TTT keeps what it has read in a TTTState, and not in a {type(cache).__name__}: pass "
            "past_key_values=TTTState(model)."
        )


def check_prompt(state: TTTState, ids_BT: Tensor, attention_mask: Tensor | None) -> None:
    """Check that a prompt of `generate` begins with what the state has read: as many of its tokens are skipped.

    Of these the state has only the chunk under way to compare with. A mask for all tokens marks a prompt of new ones.

    Raises:
        ValueError: the prompt does not begin with what was read, or ends there.
    """
    position, total = state.position, ids_BT.shape[1]
    new_only = attention_mask is not None and attention_mask.shape[1] == position + total
    # another number of rows is refused where they are read
    if state.ids is None or new_only or state.rows not in (1, ids_BT.shape[0]):
        return
    if total <= position or not bool((ids_BT[:, position - state.pending : position] == state.ids).all()):
        raise ValueError(
            f"the state has read {position:,} tokens, which are not the beginning of this prompt. Pass all tokens, those "
            "that were read and those that follow, or only the latter with attention_mask=torch.ones(rows, all tokens)."
        )


def _has_holes(mask_BT: Tensor) -> bool:
    """True if a row of a mask changes more than once between tokens and padding."""
    return bool(((mask_BT[:, 1:] != mask_BT[:, :-1]).sum(1) > 1).any())


def _restarts(position_ids: Tensor, attention_mask: Tensor | None) -> bool:
    """True if the positions of a row fall, or stay, where no padding explains it."""
    rising = position_ids[..., 1:] > position_ids[..., :-1]
    if attention_mask is None:
        return not bool(rising.all())
    # the positions of padding may be anything
    mask = attention_mask[:, -position_ids.shape[-1] :].bool()
    return bool((~rising & mask[:, 1:] & mask[:, :-1]).any())


@torch.no_grad()
def check_unchanged(model: PreTrainedModel) -> None:
    """Compare a model to which TTT was just applied with itself without it, on a few tokens.

    Raises:
        UserError: names the check that failed.
    """
    fast, base = fast_mlps(model), backbone(model)
    if model.config.get_text_config().model_type in _VERIFIED or next(model.parameters()).is_meta:
        return
    name, config = type(model).__name__, fast.config
    embedding: Any = model.get_input_embeddings()
    ids_BT = (torch.arange(1, 13, device=embedding.weight.device) % embedding.weight.shape[0])[None]
    total, window, sink = ids_BT.shape[1], 5, 2
    try:
        with evaluating(model):
            _check_series(model, fast, ids_BT)
            if config.window is None:
                fast.config = replace(config, chunk=total, lr=0.0)
                mask, what = None, "with its own attention it is not the original model"
                _compare(name, what, scan(model, ids_BT), _stock(model, fast, base, ids_BT, mask))
                return
            fast.config = replace(config, window=total, chunk=total, sink=0, lr=0.0)
            what = "with a window longer than the text it is not the original model"
            _compare(name, what, scan(model, ids_BT), _stock(model, fast, base, ids_BT, None))
            fast.config = replace(config, window=window, chunk=window, sink=sink, lr=0.0)
            what = "without learning it is not the model under the mask of its window"
            mask = window_mask(model, fast.config, None, 0, total)
            windowed = _stock(model, fast, base, ids_BT, mask)
            if torch.equal(windowed, _stock(model, fast, base, ids_BT, None)):
                raise UserError(f"test-time training does not fit {name}: the mask of a window has no effect on it.")
            _compare(name, what, _in_one_piece(model, ids_BT), windowed)
    finally:
        fast.config = config


def _stock(model: Any, fast: FastMLPs, base: Any, ids_BT: Tensor, mask: Tensor | None) -> Tensor:
    """The final hidden states of the stock class, with the initial fast weights."""
    with fast.using(fast.w0()):
        return type(base).forward(base, input_ids=ids_BT, attention_mask=mask, use_cache=False).last_hidden_state


def _in_one_piece(model: Any, ids_BT: Tensor) -> Tensor:
    """The first and the last blocks, each over the whole text under the window's mask."""
    from .views import run_first, run_last
    from .window import WindowLayer

    fast = fast_mlps(model)
    hidden = run_first(model, ids_BT, None, 0)
    # a layer that keeps everything sees the text in one piece
    layers = [WindowLayer(fast.config.window or 0, fast.config.sink) for _ in range(fast.fast_blocks)]
    with fast.using(fast.w0()):
        return run_last(model, hidden, layers, 0)


def _compare(name: str, what: str, found: Tensor, expected: Tensor) -> None:
    if not torch.equal(found, expected):
        error = (found - expected).abs().max().item()
        raise UserError(
            f"test-time training does not fit {name}: {what} (hidden states differ by {error:.1e}). A class that scales its "
            "embeddings, or whose blocks depend on their place, cannot be run in parts."
        )


def _check_series(model: Any, fast: FastMLPs, ids_BT: Tensor) -> None:
    """The last block adds its MLP of the norm's output to the norm's input, so a further MLP can stand before it."""
    base: Any = backbone(model)
    block: Any = base.layers[-1]
    seen: dict[str, Tensor] = {}
    norm = getattr(block, norm_before_mlp(block))
    hooks = [
        norm.register_forward_hook(lambda _, args, output: seen.update(x=args[0], norm=output)),
        block.mlp.register_forward_hook(lambda _, args, output: seen.update(input=args[0], mlp=output)),
        block.register_forward_hook(
            lambda _, args, output: seen.update(block=output[0] if isinstance(output, tuple) else output)
        ),
    ]
    try:
        with fast.using(fast.w0()):
            type(base).forward(base, input_ids=ids_BT, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if not (torch.equal(seen["norm"], seen["input"]) and torch.equal(seen["x"] + seen["mlp"], seen["block"])):
        raise UserError(
            f"test-time training does not fit {type(model).__name__}: its blocks do not compute h + mlp(norm(h)), so no MLP "
            "can stand in series before theirs."
        )
    # the layout in_place has replaced the forward of the MLP
    if not torch.equal(type(block.mlp).forward(block.mlp, seen["input"]), seen["mlp"]):
        raise UserError(
            f"test-time training does not fit {type(model).__name__}: its MLP is not down(act(gate(x)) * up(x)), so it "
            "cannot learn in place. Use the layout prime."
        )
