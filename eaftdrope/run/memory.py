"""Memory of a training step on one device, estimated from shapes before anything is loaded; and GPUs that it fits on.

    total = weights + gradients + optimizer + activations + loss tile (+ fast weights, see fast_weights.py; + base model)

Not counted: the process itself (Python, torch, a CUDA context: 0.5 to 1 GB), short-lived buffers and fragmentation.

Notation: N = batch_size x max_length tokens of one batch (at most), P parameters, L layers, D hidden size, a query heads of
size d, c key/value heads, F intermediate size, V vocabulary. Sizes in bytes: e is the element size (4 in float32, 2 in
bfloat16).

On n devices under FSDP (full shard, one decoder layer per unit) each holds

    (weights + gradients + optimizer) / n + gathered + activations + loss tile

`gathered` is held whole for a moment: two layers (the current one, and the next fetched ahead), the gradient of one, and
everything outside the layers (embeddings and head), with gradients where these are trained. It is in bfloat16 under autocast,
except for the head's gradient, which the loss accumulates in float32. Each device has its own batch, so activations and tile
are not divided; nor is a second model, the base of an anchor, which every device holds whole.

Under tensor parallelism of t the weights, with those of the head, are divided by t n. Activations between the products of a
block are divided by t, its inputs are not: the estimate divides none of them, and is an upper bound.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from eaftdrope.loss.compute import default_tile_bytes
from eaftdrope.recipe.training_sections import Lora

from .degrees import Degrees
from .fast_weights import FastWeights, fast_weights
from .machine import format_bytes
from .settings import TrainingSettings

SIZES = (16, 24, 40, 48, 80, 141)
"""Memory of common GPUs in GB, as advertised; in powers of 1024 they have slightly more."""
COUNTS = (1, 2, 4, 8)
USABLE = 0.9
"""The rest is for what the estimate leaves out: the CUDA context, short-lived buffers, fragmentation."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak of a training step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss_tile: int
    fast_weights: int = 0
    base_model: int = 0
    gathered: int = 0

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def estimate(
    settings: TrainingSettings, config: PretrainedConfig, model: PreTrainedModel, *, device: str, autocast: bool
) -> Memory:
    """The estimate of a training.

    Args:
        model: on the meta device, with its adapters.
        device: torch's device type.
        autocast: the arithmetic is bfloat16 while the weights keep their own type.
    """
    train, tokens = settings.train, settings.train.batch_size * settings.max_length
    recompute, quantized = train.gradient_checkpointing, settings.model.quantization == "4bit"
    element = 2 if autocast else element_size(model)
    fast = fast_weights_of(settings, config, model, autocast=autocast)
    layers = config.get_text_config().num_hidden_layers - fast.blocks if fast else None
    return Memory(
        weights=weight_bytes(model, autocast=autocast, quantized=quantized, recompute=recompute),
        gradients=sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad),
        optimizer=optimizer_bytes(train.optimizer, model),
        activations=activation_bytes(
            config,
            model,
            tokens=tokens,
            lora=settings.lora,
            autocast=autocast,
            recompute=recompute,
            layers=layers,
        )
        + (fast.activation_bytes if fast else 0),
        loss_tile=(2 if settings.anchor else 1)
        * loss_tile_bytes(config, tokens=tokens, tile_mb=settings.loss.tile_mb, device=device, element=element),
        fast_weights=fast.bytes if fast else 0,
        base_model=base_model_bytes(model) if settings.needs_second_model else 0,
    )


def fast_weights_of(
    settings: TrainingSettings, config: PretrainedConfig, model: PreTrainedModel, *, autocast: bool
) -> FastWeights | None:
    """The fast weights of a training; None for a model that does not learn as it reads."""
    if settings.ttt is None:
        return None
    layer = layer_bytes(config, model, autocast=autocast, lora=settings.lora)
    element = 2 if autocast else element_size(model)
    return fast_weights(settings, config, model, layer=layer, element=element, autocast=autocast)


def weight_bytes(model: PreTrainedModel, *, autocast: bool, quantized: bool = False, recompute: bool = False) -> int:
    """P e.

    In 4 bits a linear weight has 0.5 bytes and 0.127 bits of scales (QLoRA, arXiv 2305.14314, section 3: blocks of 64,
    scales quantised again). Under autocast a bfloat16 copy of every float32 linear weight lives from the forward to the
    backward (2 bytes each); with gradient checkpointing (`recompute`) only the copies of one layer at a time.
    """
    total = 0.0
    linear = {id(module.weight) for module in _linears(model)}
    copies = 0
    for parameter in model.parameters():
        size, element = parameter.numel(), parameter.element_size()
        if id(parameter) in linear:
            if quantized and not parameter.requires_grad:
                total += size * (0.5 + 0.127 / 8)
                continue
            copies += 2 * size if autocast and element == 4 else 0
        total += size * element
    if recompute:
        copies //= max(1, model.config.get_text_config().num_hidden_layers)
    return int(total) + copies


def base_model_bytes(model: PreTrainedModel) -> int:
    """P e: the frozen second model of an anchor. Autocast keeps no copies of weights without a gradient."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def optimizer_bytes(optimizer: str, model: nn.Module) -> int:
    """State of the trained parameters, as torch and bitsandbytes allocate it.

    adamw: two moments in the parameter's type (torch.optim.AdamW: `zeros_like(p)`), 8bit: one byte each, 32bit: four.
    lion: one moment. adagrad, rmsprop: one accumulator. sgd (transformers uses no momentum): none.
    adafactor: a row and a column of float32 per matrix (arXiv 1804.04235, section 3), a vector as it is.
    bitsandbytes keeps tensors under 4,096 elements in 32 bits: too small to count.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if optimizer == "sgd":
        return 0
    if optimizer == "adafactor":
        return sum(4 * (sum(p.shape[-2:]) if p.dim() >= 2 else p.numel()) for p in trained)
    moments = 1 if "lion" in optimizer or optimizer in ("adagrad", "rmsprop") else 2
    if optimizer.endswith("8bit"):
        return sum(moments * p.numel() for p in trained)
    if optimizer.endswith("32bit"):
        return sum(moments * 4 * p.numel() for p in trained)
    return sum(moments * p.numel() * p.element_size() for p in trained)


def activation_bytes(
    config: PretrainedConfig,
    model: nn.Module,
    *,
    tokens: int,
    autocast: bool,
    lora: Lora | None = None,
    recompute: bool = False,
    layers: int | None = None,
) -> int:
    """Tensors that the forward keeps for the backward, for a decoder with RMSNorm, SwiGLU and attention that does not store
    its N x N weights.

    The accounting of arXiv 2205.05198, section 4.1, repeated for this architecture and checked against torch's own saved
    tensors (tests/run/test_memory.py). Bytes per token and layer; e_w is the element size of the weights, e that of the
    arithmetic:

        two norms        2 (4 D + e_w D)     the float32 input; the normalised input, only if the norm is trained
        linear inputs    2 e D               one for q, k, v, one for gate and up; under autocast from float32 each of
                                             the five makes its own copy: 5 e D
        attention        e (2 a d + 2 c d)   q, k, v, output
        feed-forward     4 e F               gate, its SiLU, up, their product
        adapters         e r each            the rank-r output

    If an adapter changes its input x first, that is kept in place of the two e D and the product: with dropout the result
    and its mask (2 e x), on bfloat16 weights the cast to the adapter's float32 (4 x, under autocast 2 x).

    With gradient checkpointing (`recompute`) each layer keeps its input, e_w D, and one layer at a time is recomputed in
    full. The last norm adds (4 + e_w) D. With `layers` only so many of them are counted.
    """
    text, element_w = config.get_text_config(), element_size(model)
    layers = text.num_hidden_layers if layers is None else layers
    layer = layer_bytes(config, model, autocast=autocast, lora=lora)
    kept = layers * element_w * text.hidden_size + layer if recompute else layers * layer
    return int(tokens * (kept + (4 + element_w) * text.hidden_size))


def layer_bytes(config: PretrainedConfig, model: nn.Module, *, autocast: bool, lora: Lora | None = None) -> float:
    """Bytes per token of one layer, as `activation_bytes` counts them."""
    text, element_w = config.get_text_config(), element_size(model)
    element = 2 if autocast else element_w
    hidden, layers, heads = text.hidden_size, text.num_hidden_layers, text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or hidden // heads
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    norms = 2 * (4 + (0 if lora else element_w)) * hidden
    inputs = (5 if element < element_w else 2) * element * hidden
    attention = element * 2 * (heads + key_heads) * head_size
    feed_forward = 4 * element * inner
    adapters = 0.0
    if lora:
        shapes = [parameter.shape for name, parameter in model.named_parameters() if "lora_A" in name]
        width, rank = sum(shape[-1] for shape in shapes) / layers, sum(shape[0] for shape in shapes) / layers
        changed = 2 * element if lora.dropout else 0
        if element_w == 2:
            changed += 2 if autocast else 4
        if changed:
            inputs, feed_forward = 0, 3 * element * inner
        adapters = element * rank + changed * width
    return norms + inputs + attention + feed_forward + adapters


def loss_tile_bytes(config: PretrainedConfig, *, tokens: int, tile_mb: int | None, device: str, element: int) -> int:
    """One tile of logits (never N x V), and the gradient with respect to the hidden states, e N D, formed in the forward.
    With an anchor the base model needs as much: its tile, and its hidden states.

    Args:
        tile_mb: the recipe's size of a tile, None for the operator's default.
    """
    text = config.get_text_config()
    budget = default_tile_bytes(None if tile_mb is None else tile_mb << 20, torch.device(device), text.vocab_size)
    row = text.vocab_size * element
    rows = min(tokens, max(1, budget // row))
    return rows * row + tokens * text.hidden_size * element


def element_size(model: nn.Module) -> int:
    """Bytes per element of the weights, frozen or trained: of the type that most parameters have."""
    sizes: dict[int, int] = {}
    for parameter in model.parameters():
        sizes[parameter.element_size()] = sizes.get(parameter.element_size(), 0) + parameter.numel()
    return max(sizes, key=lambda size: sizes[size])


def _linears(model: PreTrainedModel) -> list[nn.Linear]:
    """The linear layers of the body. The head is the loss's own, and may share its weight with the embedding."""
    head = model.get_output_embeddings()
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and "lora_" not in name
    ]


# GPUs


@dataclass(frozen=True)
class Fit:
    """`devices` GPUs of `size` GB, the smallest sufficient size, None if no common one is; each needs `needed` bytes."""

    devices: int
    needed: int
    size: int | None


def fits(
    settings: TrainingSettings, config: PretrainedConfig, model: PreTrainedModel, *, autocast: bool
) -> tuple[Fit, ...]:
    """One entry per number of devices, up to the first for which the smallest GPU is enough.

    A base model in 4 bits is never sharded: FSDP does not shard bitsandbytes' bytes. Nor is one with fast weights.
    """
    whole = estimate(settings, config, model, device="cuda", autocast=autocast)
    gathered = gathered_bytes(model, autocast=autocast)
    found: list[Fit] = []
    for devices in COUNTS if settings.model.quantization == "none" and not settings.ttt else (1,):
        needed = whole.total if devices == 1 else sharded(whole, gathered, devices).total
        found.append(Fit(devices, needed, smallest(needed)))
        if found[-1].size == SIZES[0]:
            break
    return tuple(found)


def sharded(whole: Memory, gathered: int, devices: int) -> Memory:
    """The memory on each of several devices that the weights are sharded over; `gathered` is held whole for a moment."""
    return replace(
        whole,
        weights=whole.weights // devices,
        gradients=whole.gradients // devices,
        optimizer=whole.optimizer // devices,
        gathered=gathered,
    )


def on_each_device(whole: Memory, model: PreTrainedModel, degrees: Degrees, *, autocast: bool) -> Memory:
    """The memory of a training on each device of a launch, from that of one device with the whole model."""
    gathered = 0
    if degrees.fsdp > 1:
        gathered = gathered_bytes(model, autocast=autocast) // degrees.tp
    return sharded(whole, gathered, degrees.tp * degrees.fsdp)


def smallest(needed: int) -> int | None:
    """The smallest common size, in GB, that has room for this many bytes."""
    return next((size for size in SIZES if needed <= USABLE * size * 1e9), None)


def gathered_bytes(model: PreTrainedModel, *, autocast: bool) -> int:
    """Bytes that FSDP holds whole on every device for a moment."""
    blocks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = max(blocks, key=_size)
    layer = max(layers, key=_size)
    inside = {id(parameter) for parameter in layers.parameters()}
    outside = [parameter for parameter in model.parameters() if id(parameter) not in inside]

    def held(parameters: Iterable[nn.Parameter]) -> int:
        return sum(parameter.numel() * (2 if autocast else parameter.element_size()) for parameter in parameters)

    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    head = getattr(model.get_output_embeddings(), "weight", None)
    gradients = sum(4 * p.numel() if p is head else held([p]) for p in outside if p.requires_grad)
    return 2 * held(layer.parameters()) + held(trained) + held(outside) + gradients


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def fit_lines(found: tuple[Fit, ...]) -> list[str]:
    """The table: one line per number of devices."""
    lines = []
    for fit in found:
        gpus = "1 GPU" if fit.devices == 1 else f"{fit.devices} GPUs with FSDP"
        if fit.size is None:
            lines.append(f"{gpus}: no, {format_bytes(fit.needed)} needed on each")
        else:
            lines.append(f"{gpus}: from {fit.size} GB ({format_bytes(fit.needed)} needed on each)")
    return lines
