"""`apply_eaft(model)`: the gated loss for any loop that calls `model(**batch).loss`.

The patch is an instance-level `forward`. With labels it runs the backbone, passes the hidden states and the head to the
fused operator and returns the loss; without labels it is the model's own forward, so generation is unchanged. In training
there are no logits; in evaluation (`model.eval()`) the loss is plain cross-entropy and the logits are returned, unless
`skip_logits=True` is passed (the convention of Liger's patched models).

`token_weights=` beside `labels=` (`[B, T]`, not shifted) weights the loss of each label in training: a factor on its gate, or
the weight itself, negated, for a label that is exempt from the gate.

Legend: B rows of a batch, T tokens of a row, D hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
import inspect
import types
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, ModelOutput, MoeCausalLMOutputWithPast

# the load-balancing loss that every mixture-of-experts family copies from Mixtral
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from eaftdrope.errors import UserError
from eaftdrope.loss.anchor import Anchor, resolve_anchor
from eaftdrope.loss.fused import LossDetails, linear_loss
from eaftdrope.loss.gates import Gate, GateLike, NoGate, resolve_gate
from eaftdrope.loss.landscape import Landscape
from eaftdrope.loss.settings import LossSettings

from .base_forward import BaseRows, base_rows, check_base
from .head import backbone, check_head, head_module, loss_head
from .meter import Latest, Meter, Reduce, log_names
from .targets import sequence_ids, shifted_targets

_ATTRIBUTE = "_eaft"
# The attributes from which a plain Trainer decides how to count the tokens that the loss is divided by, as they are for the
# patched forward: some classes (Qwen2.5-VL, Gemma 3n) declare that they accept no count, others (GPT-2) another loss type.
_READ_BY_TRAINER = {"accepts_loss_kwargs": True, "loss_type": "ForCausalLM"}
# A mean gate below this indicates a mistake in the gate's options.
_CLOSED = 1e-6

_Model = TypeVar("_Model", bound=nn.Module)


@dataclass
class _State:
    """The state of a patched model."""

    settings: LossSettings
    original_forward: Callable
    # instance attributes that _READ_BY_TRAINER replaced, without those of the class
    replaced: dict[str, Any]
    # the base of an anchor; None: the model with its adapters off
    base_model: PreTrainedModel | None = None
    meter: dict[bool, Meter] = field(default_factory=lambda: {True: Meter(), False: Meter()})
    warned: bool = False
    warned_of_gate: bool = False


def apply_eaft(
    model: _Model,
    gate: GateLike = "eaft",
    *,
    backend: str = "auto",
    tile_bytes: int | None = None,
    tail: str = "exact",
    tail_threshold: float = LossSettings.tail_threshold,
    gate_threshold: float = 0.0,
    recompute: bool = False,
    anchor: Anchor | Mapping[str, object] | None = None,
    base_model: PreTrainedModel | None = None,
    **gate_options: object,
) -> _Model:
    """Make `model(..., labels=labels).loss` the entropy-gated loss, in place; return the model.

    For the plain `transformers.Trainer` (created after this call: it reads from the model how the loss is divided), an
    accelerate loop or your own. In a TRL script use [`EAFTTrainer`] instead: `SFTTrainer` calls a head of its own and
    would bypass this patch.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A causal language model.
        gate (`str`, [`~eaftdrope.loss.gates.Gate`] or callable, *optional*, defaults to `"eaft"`):
            Weight of a token; options of a named gate are further keyword arguments, e.g. `alpha=0.5`.
        backend, tile_bytes, tail, tail_threshold, gate_threshold, recompute:
            Settings of the fused operator, see [`fused_linear_eaft`].
        anchor ([`~eaftdrope.loss.Anchor`] or `dict`, *optional*):
            Divergence from the base model, e.g. `{"kl": 0.1, "direction": "forward", "mask_target": True}`. In evaluation
            it is not part of the loss.
        base_model ([`~transformers.PreTrainedModel`], *optional*):
            The base of the anchor, on the model's device: the model before training. With adapters it is not needed: the
            base is then the model with its adapters off.

    Raises:
        UserError: the model is already patched (by this function, TRL or Liger), wrapped for distribution, an
            encoder-decoder, or computes its logits in a way that the fused operator does not support; an anchor whose base
            cannot be computed.
        ValueError: an unknown gate, option, backend, tail or anchor.
    """
    _refuse_foreign_patches(_base(model))
    how = (backend, tile_bytes, tail, tail_threshold, gate_threshold, recompute, resolve_anchor(anchor))
    settings = LossSettings(resolve_gate(gate, **gate_options), *how)
    return install(model, settings, base_model)


def install(model: _Model, settings: LossSettings, base_model: PreTrainedModel | None = None) -> _Model:
    """[`apply_eaft`] without the check for other patches: the model's present forward becomes the one without labels."""
    base = _base(model)
    refuse_applied(base)
    if base.config.is_encoder_decoder:
        raise UserError(f"{type(base).__name__} is an encoder-decoder; EAFT is defined for causal language models.")
    check_head(base)
    if settings.anchor is not None:
        check_base(base, base_model)
    elif base_model is not None:
        raise UserError("a base_model was passed without an anchor, and nothing reads it. Pass anchor={'kl': 0.1}.")
    replaced = {name: vars(base)[name] for name in _READ_BY_TRAINER if name in vars(base)}
    state = _State(settings, base.forward, replaced, base_model)
    setattr(base, _ATTRIBUTE, state)
    vars(base).update(_READ_BY_TRAINER)
    base.forward = types.MethodType(_make_forward(type(base)), base)
    return model


def remove_eaft(model: _Model) -> _Model:
    """Restore the model's own forward; return the model.

    Raises:
        UserError: EAFT is not applied, or something else (accelerate, TRL, Liger) has wrapped the forward since.
    """
    base = _base(model)
    if not is_applied(base):
        raise UserError(f"EAFT is not applied to this {type(base).__name__}.")
    if not _is_patched(base.__dict__.get("forward")):
        raise UserError(
            f"the forward of this {type(base).__name__} was wrapped after apply_eaft. Undo that first, e.g. "
            "accelerator.unwrap_model(model, keep_fp32_wrapper=False)."
        )
    state: _State = getattr(base, _ATTRIBUTE)
    del base.forward
    if base.forward != state.original_forward:
        base.forward = state.original_forward
    for name in _READ_BY_TRAINER:
        del vars(base)[name]
    vars(base).update(state.replaced)
    delattr(base, _ATTRIBUTE)
    return model


def pop_metrics(model: nn.Module, *, training: bool = True, reduce: Reduce | None = None) -> dict[str, float]:
    """Return the metrics since the last call, under the names that [`EAFTTrainer`] logs; for loops of your own.

    Args:
        training (`bool`, *optional*, defaults to `True`): of the training calls, or of the evaluation calls.
        reduce (callable, *optional*): sums a tensor over processes, e.g. `accelerator.reduce`.
    """
    metrics = pop_meter(model, training=training, reduce=reduce)
    return {**log_names(metrics), "eaft/trained_tokens": metrics["tokens"]} if metrics else {}


def pop_meter(model: nn.Module, *, training: bool, reduce: Reduce | None = None) -> dict[str, float]:
    """[`Meter.pop`] of a patched model; warns once if its gate trains nothing."""
    state: _State = getattr(_base(model), _ATTRIBUTE)
    metrics = state.meter[training].pop(reduce)
    trains_by_gate_only = training and state.settings.anchor is None and not state.warned_of_gate
    if trains_by_gate_only and metrics and metrics["tokens"] and metrics["gate"] < _CLOSED:
        state.warned_of_gate = True
        warnings.warn(
            f"the gate {state.settings.gate.formula} gave the last {metrics['tokens']:,.0f} trained tokens a mean weight of "
            f"{metrics['gate']:.1e} (and cross-entropy is {metrics['nll']:.3g}): nothing is trained. Check its options; if "
            "the cross-entropy rose, the training diverged, and the first suspect is the learning rate.",
            stacklevel=3,
        )
    return metrics


def log_positions(model: nn.Module, edges: tuple[int, ...]) -> None:
    """Let the metrics of a patched model include its loss by position in the row, in the bins of [`Meter`]'s `edges`."""
    getattr(_base(model), _ATTRIBUTE).meter = {training: Meter(edges) for training in (True, False)}


def gate_of(model: nn.Module) -> Gate:
    """The gate of a patched model."""
    return getattr(_base(model), _ATTRIBUTE).settings.gate


def latest(model: nn.Module) -> Latest | None:
    """[`Meter.latest`] of a patched model's training calls."""
    return getattr(_base(model), _ATTRIBUTE).meter[True].latest


def pop_landscape(model: nn.Module, *, reduce: Reduce | None = None) -> Landscape | None:
    """[`Meter.pop_landscape`] of a patched model's training calls."""
    return getattr(_base(model), _ATTRIBUTE).meter[True].pop_landscape(reduce)


def refuse_applied(model: nn.Module) -> None:
    """Raise UserError for a model to which EAFT is already applied."""
    if is_applied(model):
        raise UserError(
            f"EAFT is already applied to this {type(_base(model)).__name__}. Call remove_eaft(model) first to change the "
            "gate; EAFTTrainer applies it automatically."
        )


def is_applied(model: nn.Module) -> bool:
    return hasattr(_base(model), _ATTRIBUTE)


def is_active(model: nn.Module) -> bool:
    """True if calling the model still runs the patched forward: directly, or through wrappers that call it (accelerate's
    autocast and conversion of outputs, with bf16)."""
    forward = _base(model).__dict__.get("forward")
    while forward is not None and not _is_patched(forward):
        forward = getattr(forward, "__wrapped__", None)
    return forward is not None


def _is_patched(forward: Callable | None) -> bool:
    function = getattr(forward, "__func__", forward)
    # functools.wraps copies attributes to wrappers, so the attribute holds the function that set it
    return function is not None and getattr(function, "eaft_forward", None) is function


def _base(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside a PEFT model; distributed wrappers are refused."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise UserError(
            f"apply_eaft before wrapping: got {type(model).__name__}. nn.DataParallel is not supported at all; launch "
            "with accelerate or torchrun instead."
        )
    get_base_model: Any = getattr(model, "get_base_model", None)
    base: Any = model if get_base_model is None else get_base_model()
    if not hasattr(base, "get_output_embeddings"):
        raise UserError(f"expected a transformers causal language model or a PEFT model, got {type(base).__name__}.")
    return base


def _refuse_foreign_patches(base: PreTrainedModel) -> None:
    # a forward that accelerate has wrapped (device_map, mixed precision) is an object without __globals__
    home = getattr(getattr(base.forward, "__func__", base.forward), "__globals__", {}).get("__name__", "")
    if home.startswith("trl."):
        raise UserError(
            "this model has TRL's fused head (it was passed to an SFTTrainer). SFTTrainer never calls the patched loss: "
            "use `from eaftdrope import EAFTTrainer as SFTTrainer`, or load the model again."
        )
    if home.startswith("liger_kernel."):
        raise UserError(
            "this model has Liger's fused cross-entropy, which would train plain cross-entropy. Apply Liger with "
            "fused_linear_cross_entropy=False: its other kernels can be combined with EAFT."
        )


def _make_forward(model_class: type[PreTrainedModel]) -> Callable:
    own_forward = model_class.forward
    parameter_names = list(inspect.signature(own_forward).parameters)[1:]

    # the signature of the original: generate and Trainer inspect it
    @functools.wraps(own_forward)
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        kwargs.update(zip(parameter_names, args, strict=False))
        labels, shift_labels = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
        num_items, skip_logits = kwargs.pop("num_items_in_batch", None), kwargs.pop("skip_logits", None)
        token_weights = kwargs.pop("token_weights", None)
        state: _State = getattr(self, _ATTRIBUTE)
        if labels is None and shift_labels is None:
            _warn_without_labels(self, state)
            return state.original_forward(**kwargs)
        targets = shifted_targets(labels, shift_labels, token_weights)
        return _forward_with_loss(self, state, kwargs, *targets, num_items, skip_logits)

    forward.__signature__ = _with_token_weights(own_forward)  # pyrefly: ignore[missing-attribute]
    forward.eaft_forward = forward  # pyrefly: ignore[missing-attribute]  # a mark on the function itself
    return forward


def _with_token_weights(own_forward: Callable) -> inspect.Signature:
    """The signature of a forward, with `token_weights`: a Trainer removes the columns that its model's forward has not."""
    signature = inspect.signature(own_forward)
    parameters = list(signature.parameters.values())
    at = next((i for i, known in enumerate(parameters) if known.kind is known.VAR_KEYWORD), len(parameters))
    parameters.insert(at, inspect.Parameter("token_weights", inspect.Parameter.KEYWORD_ONLY, default=None))
    return signature.replace(parameters=parameters)


def _warn_without_labels(model: nn.Module, state: _State) -> None:
    if model.training and torch.is_grad_enabled() and not state.warned:
        state.warned = True
        warnings.warn(
            "A model with EAFT was called in training mode without labels, so it returns logits and no gated loss. If a "
            "trainer removed the labels (label_smoothing_factor, compute_loss_func), EAFT is NOT what it trains: "
            "disable that option.",
            stacklevel=4,
        )


def _forward_with_loss(
    model: PreTrainedModel,
    state: _State,
    kwargs: dict[str, Any],
    targets: Tensor,
    token_weights: Tensor | None,
    num_items: int | Tensor | None,
    skip_logits: bool | None,
) -> ModelOutput | tuple:
    if kwargs.pop("logits_to_keep", 0):
        raise UserError("logits_to_keep cannot be combined with labels on a model with EAFT: the loss needs no logits.")
    return_dict = kwargs.pop("return_dict", None)
    router_logits = _wants_router_logits(model, kwargs)
    rows_of_base = None
    if model.training and state.settings.anchor is not None:
        rows_of_base = base_rows(model, state.base_model, kwargs)
    outputs = backbone(model)(**{**kwargs, "use_cache": False})
    hidden = outputs.last_hidden_state
    position_ids = kwargs.get("position_ids")
    loss, details = _gated_loss(model, state, hidden, rows_of_base, targets, token_weights, position_ids, num_items)
    state.meter[model.training].add(details, targets.shape[-1])
    logits = None
    if not (model.training if skip_logits is None else skip_logits):
        logits = _logits(model, hidden)
    if router_logits:
        output = _with_router_loss(model, loss, logits, outputs.router_logits, kwargs.get("attention_mask"))
    else:
        output = CausalLMOutputWithPast(loss=loss, logits=logits)
    return output.to_tuple() if return_dict is False else output


def _gated_loss(
    model: PreTrainedModel,
    state: _State,
    hidden: Tensor,
    rows_of_base: BaseRows | None,
    targets: Tensor,
    token_weights: Tensor | None,
    position_ids: Tensor | None,
    num_items: int | Tensor | None,
) -> tuple[Tensor, LossDetails]:
    """The loss of targets `[B, T]` that are aligned with hidden states `[B, T, D]`; plain cross-entropy in evaluation."""
    settings = state.settings
    if not model.training:
        settings, token_weights = replace(settings, gate=NoGate(), anchor=None), None
    with loss_head(model) as head:
        return linear_loss(
            hidden.to(head.weight.device),
            head.weight,
            targets,
            settings,
            bias=head.bias,
            num_items=num_items,
            transform=head.transform,
            sequence_ids=sequence_ids(targets, position_ids),
            token_weights=token_weights,
            base=None if rows_of_base is None else rows_of_base.logits(head),
            shard=head.shard,
        )


def _logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Full logits, as the model's own forward returns them."""
    with loss_head(model) as head:
        return head.transform.apply(head_module(model)(hidden.to(head.weight.device)))


def _wants_router_logits(model: PreTrainedModel, kwargs: dict[str, Any]) -> bool:
    """Decide as the model's own forward does: mixture-of-experts models return them on request or by configuration."""
    configured = getattr(model.config.get_text_config(), "output_router_logits", False)
    wanted = kwargs.get("output_router_logits")
    wanted = configured if wanted is None else wanted
    if wanted:
        kwargs["output_router_logits"] = True
    return bool(wanted)


def _with_router_loss(
    model: PreTrainedModel, loss: Tensor, logits: Tensor | None, router_logits: Any, attention_mask: Tensor | None
) -> MoeCausalLMOutputWithPast:
    """The output of a mixture-of-experts model: the loss plus the load-balancing loss of its routers."""
    text = model.config.get_text_config()
    experts = getattr(text, "num_experts", None) or text.num_local_experts
    aux_loss: Any = load_balancing_loss_func(router_logits, experts, text.num_experts_per_tok, attention_mask)
    loss = loss + text.router_aux_loss_coef * aux_loss.to(loss.device)
    return MoeCausalLMOutputWithPast(loss=loss, aux_loss=aux_loss, logits=logits)
