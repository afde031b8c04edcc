"""The head of a causal language model: its last linear layer, and the transform of its output.

    logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)       (no tanh without a softcap)

The head is read at every forward, because FSDP and PEFT replace modules after the model was patched. `check_head`
compares the formula with the model's own logits on a few tokens, so an architecture that computes something else is
refused instead of being trained wrongly.

Legend: B rows of a batch, T tokens of a row, D hidden size, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Shard
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from eaftdrope.errors import UserError
from eaftdrope.loaded_model import evaluating
from eaftdrope.loss.backends.tile import LogitsTransform
from eaftdrope.loss.vocabulary import VocabularyShard

from .finite import refuse_non_finite_weights
from .optimizer import reshard

# Largest difference between the formula's logits and the model's own, relative to the largest of them.
_HEAD_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Head:
    """Weight `[V, D]`, bias `[V]` or None, and the transform of the projections; with a shard, its part of both."""

    weight: Tensor
    bias: Tensor | None
    transform: LogitsTransform
    shard: VocabularyShard | None = None

    def part(self, shard: VocabularyShard | None) -> Head:
        """Return the part of a whole head that belongs to a shard.

        Raises:
            UserError: the head is sharded otherwise.
        """
        if self.shard == shard:
            return self
        if self.shard is not None or shard is None:
            raise UserError(
                "base_model is sharded by vocabulary otherwise than the model is. Load both with the same "
                "distributed_config, or base_model without one."
            )
        bias = None if self.bias is None else self.bias[shard.columns]
        return Head(self.weight[shard.columns], bias, self.transform, shard)


def head_module(model: PreTrainedModel) -> nn.Linear:
    """Return the output embedding of a causal language model.

    Raises:
        UserError: the model has none, or it is not a plain linear layer (a LoRA adapter on it, a quantised layer).
    """
    name = type(model).__name__
    if getattr(getattr(model.config, "distributed_config", None), "pp_size", None) not in (None, 1):
        raise UserError(
            f"{name} is split by pipeline parallelism (pp_size), so no process holds both its backbone and its head, which "
            "the fused loss needs. Load it with pp_size=1: fsdp_size and tp_size are supported."
        )
    head: Any = model.get_output_embeddings()
    if head is None:
        raise UserError(f"{name} has no output embedding (get_output_embeddings() is None): EAFT trains causal LMs.")
    if _is_adapter(head):
        raise UserError(
            f"{name} has an adapter on the head (lm_head). The fused loss multiplies by the head's weight directly, so "
            "the adapter would be ignored and never trained. Remove 'lm_head' from target_modules; to train the head "
            "itself use modules_to_save=['lm_head']."
        )
    if not head.weight.is_floating_point():
        raise UserError(
            f"{name}: the head is quantised ({type(head).__name__}, {head.weight.dtype}). Keep it in bfloat16, e.g. "
            "BitsAndBytesConfig(llm_int8_skip_modules=['lm_head'])."
        )
    return head


def _is_adapter(layer: nn.Module) -> bool:
    # a layer of PEFT exists only if PEFT has been imported; it is optional
    peft = sys.modules.get("peft.tuners.tuners_utils")
    return peft is not None and isinstance(layer, peft.BaseTunerLayer)


@contextmanager
def gathered_head(model: PreTrainedModel) -> Iterator[Head]:
    """Yield the whole head: DTensors (FSDP2) and ZeRO-3 shards are gathered for the duration of the block."""
    module = head_module(model)
    weight: Any = module.weight
    bias: Any = getattr(module, "bias", None)
    if isinstance(weight, DTensor):
        weight, bias = _whole(weight), _whole(bias) if isinstance(bias, DTensor) else None
    gathered = nullcontext()
    if is_deepspeed_zero3_enabled():
        from trl.trainer.utils import maybe_gather_lm_head_ctx

        gathered = maybe_gather_lm_head_ctx(weight, bias)
    with gathered:
        yield Head(weight, bias, logits_transform(model.config))


@contextmanager
def loss_head(model: PreTrainedModel) -> Iterator[Head]:
    """Yield the head as the loss reads it: this rank's part where tensor parallelism shards it by vocabulary, otherwise the
    whole one, as [`gathered_head`] does. Inside torch.compile it is whole."""
    module = head_module(model)
    weight: Any = module.weight
    bias: Any = getattr(module, "bias", None)
    by_vocabulary = _is_sharded_by_vocabulary(weight) and (bias is None or _is_sharded_by_vocabulary(bias))
    if not by_vocabulary or torch.compiler.is_compiling():
        with gathered_head(model) as head:
            yield head
        return
    shard = VocabularyShard.chunked(weight.shape[0], weight.device_mesh.get_group())
    # the gradient of the part belongs to this rank; no other rank has any of it
    weight_part = weight.to_local(grad_placements=[Shard(0)])
    bias_part = None if bias is None else bias.to_local(grad_placements=[Shard(0)])
    yield Head(weight_part, bias_part, logits_transform(model.config), shard)


def _is_sharded_by_vocabulary(parameter: Any) -> bool:
    """True for a DTensor sharded along its first dimension over ranks with the same batch. A mesh of FSDP shards the same way
    over ranks with different batches; transformers and accelerate name the dimension of tensor parallelism `tp`."""
    if not isinstance(parameter, DTensor) or parameter.device_mesh.mesh_dim_names != ("tp",):
        return False
    return parameter.placements == (Shard(0),)


def _whole(parameter: DTensor) -> Tensor:
    """Return the full tensor of a head that FSDP2 shards separately, with its gradient averaged over the ranks as FSDP
    averages all others. By default DTensor assumes the gradient of a full tensor to be the same on every rank, and each
    rank would keep only the gradient of its own batch."""
    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)


def logits_transform(config: PretrainedConfig) -> LogitsTransform:
    """Return the scale and softcap that a configuration declares.

    Cohere has `logit_scale`, Falcon-H1 `lm_head_multiplier`, Granite divides by `logits_scaling` while HyperCLOVA X
    multiplies by it; Gemma caps with `final_logit_softcapping`.
    """
    text = config.get_text_config()
    softcap = getattr(text, "final_logit_softcapping", None)
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale = getattr(text, name, None)
        if scale is not None:
            return LogitsTransform(float(scale), softcap)
    scaling = getattr(text, "logits_scaling", None)
    if scaling is None:
        return LogitsTransform(1.0, softcap)
    return LogitsTransform(float(scaling) if text.model_type == "hyperclovax" else 1 / float(scaling), softcap)


def backbone(model: PreTrainedModel) -> nn.Module:
    """Return the model without its head."""
    return model.base_model


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Compare the formula of this module with the model's own logits on four tokens.

    Raises:
        UserError: the weights contain NaN or infinity, or the logits differ, so the fused loss would train a different
            model.
    """
    weight = head_module(model).weight
    if weight.is_meta or weight.numel() == 0:
        # not materialised yet (meta device, ZeRO-3): no weights to compare with before training
        return
    refuse_non_finite_weights(model)
    with evaluating(model):
        device = next(model.get_input_embeddings().parameters()).device
        ids = torch.arange(1, 5, device=device)[None] % weight.shape[0]
        expected, hidden = _logits_and_hidden(model, ids)
        with gathered_head(model) as head:
            raw = nn.functional.linear(hidden.to(head.weight), head.weight, head.bias).float()
        actual = head.transform.apply(raw)
    # an optimiser or wrapper created next must get the shards
    reshard(model)
    name = type(model).__name__
    if not expected.isfinite().all():
        raise UserError(
            f"{name} gives logits that are NaN or infinite for a test input, although all of its weights are finite: its "
            f"activations overflow in {weight.dtype}. Load it in bfloat16 or float32."
        )
    error = (actual.to(expected.device) - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
    if not error <= _HEAD_TOLERANCE[weight.dtype]:
        raise UserError(
            f"{name} computes its logits differently from softcap(scale * (hidden @ weight.T + bias)): "
            f"relative difference {error:.1e} on a test input. The fused loss would train a different model. Please "
            "report the architecture; until it is supported use eaft_loss on the model's own logits."
        )


def _logits_and_hidden(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return float32 logits `[B, T, V]` and the hidden states that the head receives, `[B, T, D]`, of one forward.

    A separate forward of the backbone without its root would leave FSDP2 in the middle of a forward: the gathered head and
    norm would stay in place of their shards, and an optimiser created then would train neither.
    """
    seen: list[Tensor] = []
    hook = backbone(model).register_forward_hook(lambda module, arguments, output: seen.append(output[0]))
    try:
        logits = model(input_ids=ids, use_cache=False).logits.float()
    finally:
        hook.remove()
    # a class may call its backbone's forward directly, without hooks
    hidden = seen[-1] if seen else backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
    return logits, hidden
