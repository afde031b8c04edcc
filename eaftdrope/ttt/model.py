"""`apply_ttt`: a stock causal language model that learns as it reads, and back.

The base model's forward becomes an instance attribute. Without a cache it reads its rows as in training; with a `TTTState`
it reads on from there. The causal language model around it is as it was: labels, fused losses, adapters and `generate` work
as before.

Legend: B rows, T tokens of a row.
"""

from __future__ import annotations

import types
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from eaftdrope.errors import UserError
from eaftdrope.trainer.head import backbone
from eaftdrope.versions import cache_argument

from .checks import check_cache, check_inputs, check_model, check_prompt, check_unchanged
from .chunk import scan
from .config import TTTConfig
from .fast_mlps import ATTRIBUTE, FastMLPs, causal_lm, fast_mlps, is_ttt
from .saved import save_pretrained
from .state import TTTState, feed


def apply_ttt(model: Any, config: TTTConfig | None = None) -> Any:
    """Let a causal language model learn as it reads, in place; return it.

    Without a cache, the model and its base model read each row in chunks and learn from every chunk that a further token
    follows: `model(ids).logits`, `model(ids, labels=labels).loss`. With `past_key_values=TTTState(model)` they read on from
    the state. `generate` uses a fresh state unless it is passed one. `save_pretrained` writes a stock checkpoint, which
    loads without eaftdrope as the model without TTT, and two files beside it, which [`load_ttt`] reads.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A causal language model of blocks with a norm before their gated MLP: Llama, Mistral, Qwen 2, Qwen 3, SmolLM3, and
            others that pass the checks.
        config ([`TTTConfig`], *optional*): the settings.

    Raises:
        UserError: TTT is applied already, or the architecture or its attention is not supported; names the check that failed.
    """
    config = TTTConfig() if config is None else config
    base_model = causal_lm(model)
    if is_ttt(base_model):
        raise UserError(
            f"TTT is already applied to this {type(base_model).__name__}. Call remove_ttt(model) first, or change "
            "model.ttt.config."
        )
    check_model(base_model, config)
    fast = FastMLPs(base_model, config)
    setattr(base_model, ATTRIBUTE, fast.train(base_model.training))
    _replace_methods(base_model)
    try:
        check_unchanged(base_model)
    except BaseException:
        remove_ttt(base_model)
        raise
    return model


def _replace_methods(model: PreTrainedModel) -> None:
    backbone(model).forward = _Forward(model)
    vars(model).update(
        generate=types.MethodType(_generate, model), save_pretrained=types.MethodType(save_pretrained, model)
    )


def remove_ttt(model: Any) -> Any:
    """Restore the model without TTT; return it. What the prime MLPs learned in training is dropped with them.

    Raises:
        UserError: TTT is not applied to the model.
    """
    base_model = causal_lm(model)
    fast_mlps(base_model).remove()
    del backbone(base_model).forward
    del base_model.generate, base_model.save_pretrained
    delattr(base_model, ATTRIBUTE)
    return model


# The base model's forward


class _Forward:
    """The forward of the base model of `model`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        # transformers has renamed the argument, and takes the older name for a while
        cache = past_key_values if cache is None else cache
        check_inputs(input_ids, attention_mask, position_ids, cache, inputs_embeds, kwargs)
        assert input_ids is not None
        if isinstance(cache, TTTState):
            hidden = feed(self.model, cache, input_ids, attention_mask)
        else:
            hidden = scan(self.model, input_ids, attention_mask)
        fields: dict[str, Any] = {"last_hidden_state": hidden, **cache_argument(cache)}
        output = BaseModelOutputWithPast(**fields)
        return output if kwargs.get("return_dict", True) is not False else output.to_tuple()


def _generate(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """`generate` of the model's class, with a fresh TTTState unless it is passed one.

    Raises:
        ValueError: assisted decoding, which would have to unread what was learned, another kind of cache, or a prompt that
            does not begin with what the state has read.
    """
    given = kwargs.get("generation_config") or self.generation_config
    looks_up, implementation = (
        kwargs.get(name, getattr(given, name, None)) for name in ("prompt_lookup_num_tokens", "cache_implementation")
    )
    if kwargs.get("assistant_model") is not None or looks_up:
        raise ValueError(
            "assisted decoding takes tokens back, and what a model with TTT has learned from them cannot be unlearned. "
            "Generate without assistant_model and prompt_lookup_num_tokens."
        )
    if implementation is not None:
        raise ValueError(
            f"cache_implementation={implementation!r}: a model with TTT keeps what it has read in a TTTState. "
            "Leave cache_implementation out."
        )
    cache = kwargs.pop("past_key_values", None)
    cache = kwargs.pop("cache", None) if cache is None else cache
    prompt = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
    check_cache(cache)
    if isinstance(cache, TTTState) and prompt is not None:
        check_prompt(cache, prompt, kwargs.get("attention_mask"))
    if cache is None and kwargs.get("use_cache", True):
        cache = TTTState(self)
    stock: Any = type(self)
    return stock.generate(self, *args, **kwargs, **({} if cache is None else cache_argument(cache)))
