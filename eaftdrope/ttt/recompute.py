"""A chunk whose activations are recomputed in the backward pass: checkpointing through time.

torch's own checkpointing would compute a chunk three times: the gradient of its inner loss unpacks what it had saved while
the forward still runs. Here the forward keeps the graph of the chunk until the step is taken, then drops it, and the
backward computes the chunk once more; in first order without the inner gradient, which does not depend on the parameters.

The parameters of the last blocks are arguments of the autograd function, so their gradients reach whoever waits for them
(accumulation, DistributedDataParallel) as usual.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eaftdrope.trainer.head import backbone

from .fast_mlps import fast_mlps


@dataclass
class _Call:
    """One chunk's arguments that are not tensors with a gradient, and the autocast it ran under."""

    step: Callable[..., Any]
    model: PreTrainedModel
    chunk: Any
    targets: Tensor | None
    learns: Tensor | None
    head: Any
    second_order: bool
    device: str
    autocast: bool
    dtype: torch.dtype
    blocks: int

    def run(self, tensors: tuple[Tensor | None, ...], *, learn: bool) -> tuple[Tensor, ...]:
        """The chunk on flat arguments (hidden, keys and values, delta) -> hidden, keys and values, and delta if it learns."""
        pairs = tensors[1 : 1 + 2 * self.blocks]
        delta: Any = list(tensors[1 + 2 * self.blocks :]) or None
        hidden: Any = tensors[0]
        chunk = replace(self.chunk, hidden=hidden, kept=list(zip(pairs[::2], pairs[1::2], strict=True)), delta=delta)
        with torch.autocast(self.device, dtype=self.dtype, enabled=self.autocast):
            hidden, kept, delta = self.step(
                self.model,
                chunk,
                self.targets if learn else None,
                self.learns,
                head=self.head,
                second_order=self.second_order,
                per_row=self.targets is not None,
            )
        return hidden, *(tensor for pair in kept for tensor in pair), *(delta if learn else ())


def recomputed(
    step: Callable[..., Any],
    model: PreTrainedModel,
    chunk: Any,
    targets_Bn: Tensor | None,
    learns_B: Tensor | None = None,
    *,
    head: Any = None,
    second_order: bool = False,
) -> tuple[Tensor, list[Any], list[Tensor] | None]:
    """`step` (`chunk_step`) with its activations recomputed in the backward pass; the same results and gradients."""
    device = chunk.hidden.device.type
    call = _Call(
        step,
        model,
        replace(chunk, hidden=None, kept=[], delta=None),
        targets_Bn,
        learns_B,
        head,
        second_order,
        device,
        torch.is_autocast_enabled(device),
        torch.get_autocast_dtype(device),
        len(chunk.kept),
    )
    tensors = (chunk.hidden, *(tensor for pair in chunk.kept for tensor in pair), *(chunk.delta or ()))
    outputs = _Recomputed.apply(call, len(tensors), *tensors, *_trained(model))
    pairs = outputs[1 : 1 + 2 * call.blocks]
    delta = chunk.delta if targets_Bn is None else list(outputs[1 + 2 * call.blocks :])
    return outputs[0], list(zip(pairs[::2], pairs[1::2], strict=True)), delta


def _trained(model: PreTrainedModel) -> list[nn.Parameter]:
    """The parameters that a chunk depends on: of the fast MLPs, their blocks, the final norm and the head."""
    fast: Any = fast_mlps(model)
    base: Any = backbone(model)
    modules: list[Any] = [fast, *base.layers[fast.first :], base.norm, model.get_output_embeddings()]
    found = {id(parameter): parameter for module in modules for parameter in module.parameters()}
    return [parameter for parameter in found.values() if parameter.requires_grad]


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.call, ctx.count = call, count
        ctx.save_for_backward(*tensors)
        # gradients are off inside an autograd function: the chunk drops its graph after the step
        inputs = tuple(None if tensor is None else tensor.detach() for tensor in tensors[:count])
        outputs = call.run(inputs, learn=call.targets is not None)
        ctx.set_materialize_grads(False)
        if not call.second_order:
            # in first order delta has no gradient
            ctx.mark_non_differentiable(*outputs[1 + 2 * call.blocks :])
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        call, saved = ctx.call, ctx.saved_tensors
        needed = ctx.needs_input_grad[2:]
        inputs = [
            tensor.detach().requires_grad_(need) if index < ctx.count and tensor is not None else tensor
            for index, (tensor, need) in enumerate(zip(saved, needed, strict=True))
        ]
        with torch.enable_grad():
            outputs = call.run(tuple(inputs[: ctx.count]), learn=call.second_order)
        pairs = [
            (output, gradient)
            for output, gradient in zip(outputs, gradients, strict=False)
            if gradient is not None and output is not None and output.requires_grad
        ]
        wanted = [tensor for tensor, need in zip(inputs, needed, strict=True) if need]
        found = torch.autograd.grad(
            [output for output, _ in pairs], wanted, [gradient for _, gradient in pairs], allow_unused=True
        )
        results = iter(found)
        return None, None, *(next(results) if need else None for need in needed)
