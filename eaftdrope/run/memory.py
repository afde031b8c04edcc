"""How much memory a training step takes on one device, from shapes alone: an estimate, made before anything is loaded.

    total = weights + gradients + optimizer + activations + loss tile

Not counted: the process itself (Python, torch, a CUDA context: 0.5 to 1 GB), short-lived buffers and fragmentation.

Notation: P parameters, P_t trained parameters, N = batch_size x max_length tokens of one batch (the longest it can
be), L layers, h hidden size, a q heads of size d, c key/value heads, f intermediate size, V vocabulary. Bytes in units
of the element size e (4 in float32, 2 in bfloat16).

Which common GPUs a run fits on: the estimate of `memory.py`, on one of them or sharded over several with FSDP.

One device holds everything. Of n devices under FSDP (full shard, one decoder layer a unit) each holds

    (weights + gradients + optimizer) / n + gathered + activations + loss tile

`gathered` is what is whole for a moment: two layers (one at work, the next fetched ahead) and the gradient of one, and
what is in no layer, embeddings and head, with their gradients where they are trained. It is in bfloat16 under autocast,
but for the head's gradient, which the loss adds up in float32. Each device has a batch of its own, so activations and
tile stay as they are.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

    from eaftdrope.recipe.schema import Recipe
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

    from eaftdrope.recipe.schema import Recipe


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak of a training step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss_tile: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def estimate(recipe: Recipe, config: PretrainedConfig, model: nn.Module, *, device: str, autocast: bool) -> Memory:
    """The estimate for `model` (on meta, adapters attached) trained as the recipe says on a `device` of torch's kinds.

    `autocast` says that the arithmetic is bfloat16 while the weights keep their own type.
    """
    return Memory(
        weights=weight_bytes(recipe, model, autocast=autocast),
        gradients=sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad),
        optimizer=optimizer_bytes(recipe.train.optimizer, model),
        activations=activation_bytes(recipe, config, model, autocast=autocast),
        loss_tile=loss_tile_bytes(recipe, config, device=device, element=2 if autocast else _element(model)),
    )


def weight_bytes(recipe: Recipe, model: nn.Module, *, autocast: bool) -> int:
    """P e. In 4 bits a linear weight takes 0.5 bytes and 0.127 bits of scales (QLoRA, arXiv 2305.14314, section 3:
    blocks of 64, scales quantised again). Under autocast a bfloat16 copy of every float32 linear weight lives from the
    forward to the backward (2 bytes each), unless layers are recomputed: then one layer's copies at a time."""
    total = 0.0
    linear = {id(module.weight) for module in _linears(model)}
    quantised = recipe.model.quantization == "4bit"
    copies = 0
    for parameter in model.parameters():
        size, element = parameter.numel(), parameter.element_size()
        if id(parameter) in linear:
            if quantised and not parameter.requires_grad:
                total += size * (0.5 + 0.127 / 8)
                continue
            copies += 2 * size if autocast and element == 4 else 0
        total += size * element
    if recipe.train.gradient_checkpointing:
        copies //= max(1, _layers(model))
    return int(total) + copies


def optimizer_bytes(optimizer: str, model: nn.Module) -> int:
    """State of the trained parameters, as torch and bitsandbytes allocate it.

    adamw: two moments in the parameter's type (torch.optim.AdamW: `zeros_like(p)`), 8bit: one byte each, 32bit: four.
    lion: one moment. adagrad, rmsprop: one accumulator. sgd (no momentum in transformers' choice): none.
    adafactor: a row and a column of float32 for each matrix (arXiv 1804.04235, section 3), a vector as it is.
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


def activation_bytes(recipe: Recipe, config: PretrainedConfig, model: nn.Module, *, autocast: bool) -> int:
    """What the forward keeps for the backward, for a decoder with RMSNorm, SwiGLU and attention that does not store
    its N x N weights: the bookkeeping of arXiv 2205.05198, section 4.1, done over for this architecture and checked
    against torch's own saved tensors (tests/recipe/test_memory.py). Bytes a token and layer; e_w is the element size
    of the weights, e that of the arithmetic:

        two norms        2 (4 h + e_w h)     the float32 input; the normalised input, only if the norm is trained
        linear inputs    2 e h               one for q, k, v, one for gate and up; under autocast from float32 each of
                                             the five makes its own copy: 5 e h
        attention        e (2 a d + 2 c d)   q, k, v, output
        feed-forward     4 e f               gate, its SiLU, up, their product
        adapters         e r each            the rank-r output

    An adapter's input x that is changed on its way is kept in place of the two e h and the product: with dropout the
    result and its mask (2 e x), on bfloat16 weights the cast to the adapter's float32 (4 x, under autocast 2 x).

    With gradient checkpointing each layer keeps its input, e_w h, and one layer at a time is recomputed in full. The
    last norm adds (4 + e_w) h.
    """
    text = config.get_text_config()
    element_w = _element(model)
    element = 2 if autocast else element_w
    tokens = recipe.train.batch_size * recipe.data.max_length
    hidden, layers, heads = text.hidden_size, text.num_hidden_layers, text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or hidden // heads
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    norms = 2 * (4 + (0 if recipe.lora else element_w)) * hidden
    inputs = (5 if element < element_w else 2) * element * hidden
    attention = element * 2 * (heads + key_heads) * head_size
    feed_forward = 4 * element * inner
    adapters = 0.0
    if recipe.lora:
        shapes = [parameter.shape for name, parameter in model.named_parameters() if "lora_A" in name]
        width, rank = sum(shape[-1] for shape in shapes) / layers, sum(shape[0] for shape in shapes) / layers
        changed = 2 * element if recipe.lora.dropout else 0
        if element_w == 2:
            changed += 2 if autocast else 4
        if changed:
            inputs, feed_forward = 0, 3 * element * inner
        adapters = element * rank + changed * width
    layer = norms + inputs + attention + feed_forward + adapters
    kept = layers * element_w * hidden + layer if recipe.train.gradient_checkpointing else layers * layer
    return int(tokens * (kept + (4 + element_w) * hidden))


def loss_tile_bytes(recipe: Recipe, config: PretrainedConfig, *, device: str, element: int) -> int:
    """One tile of logits (never N x V), and the gradient of the hidden states, e N h, which the forward already makes.
    The tile is the recipe's tile_mb, or the operator's own budget."""
    import torch

    from eaftdrope.loss.compute import default_tile_bytes

    text = config.get_text_config()
    tokens = recipe.train.batch_size * recipe.data.max_length
    asked = None if recipe.loss.tile_mb is None else recipe.loss.tile_mb * 2**20
    budget = default_tile_bytes(asked, torch.device(device), text.vocab_size)
    row = text.vocab_size * element
    rows = min(tokens, max(1, budget // row))
    return rows * row + tokens * text.hidden_size * element


def _element(model: nn.Module) -> int:
    """Bytes of an element of the (frozen or trained) weights: the type most parameters have."""
    sizes: dict[int, int] = {}
    for parameter in model.parameters():
        sizes[parameter.element_size()] = sizes.get(parameter.element_size(), 0) + parameter.numel()
    return max(sizes, key=sizes.get)


def _linears(model: nn.Module) -> list[nn.Module]:
    """The linear layers of the body. The head is the loss's own, and may share its weight with the embedding."""
    from torch import nn

    head = model.get_output_embeddings()
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and "lora_" not in name
    ]


def _layers(model: nn.Module) -> int:
    return model.config.get_text_config().num_hidden_layers


SIZES = (16, 24, 40, 48, 80, 141)
"""Memory of common GPUs in GB, as they are sold; a little more, in powers of 1024, is really there."""
COUNTS = (1, 2, 4, 8)
USABLE = 0.9
"""The rest is for what the estimate leaves out: the CUDA context, short-lived buffers, fragmentation."""


@dataclass(frozen=True)
class Fit:
    """`devices` GPUs of `size` GB, the smallest that will do; each needs `needed` bytes. None: no common size will."""

    devices: int
    needed: int
    size: int | None


def fits(recipe: Recipe, config: PretrainedConfig, model: nn.Module, *, autocast: bool) -> tuple[Fit, ...]:
    """One entry for each number of devices, up to the one that the smallest GPU is enough for.

    A base in 4 bits is never sharded: bitsandbytes' bytes are not.
    """
    whole = estimate(recipe, config, model, device="cuda", autocast=autocast)
    shared = gathered_bytes(model, autocast=autocast)
    found = []
    for devices in COUNTS if recipe.model.quantization == "none" else (1,):
        needed = whole.total if devices == 1 else on_each(whole, shared, devices)
        found.append(Fit(devices, needed, smallest(needed)))
        if found[-1].size == SIZES[0]:
            break
    return tuple(found)


def on_each(whole: Memory, gathered: int, devices: int) -> int:
    """Bytes on each of several devices, as above."""
    return (
        (whole.weights + whole.gradients + whole.optimizer) // devices + gathered + whole.activations + whole.loss_tile
    )


def smallest(needed: int) -> int | None:
    """The smallest common size, in GB, that has room for this many bytes."""
    return next((size for size in SIZES if needed <= USABLE * size * 1e9), None)


def gathered_bytes(model: nn.Module, *, autocast: bool) -> int:
    """What FSDP has whole on every device for a moment."""
    from torch import nn

    blocks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = max(blocks, key=_size)
    layer = max(layers, key=_size)
    inside = {id(parameter) for parameter in layers.parameters()}
    outside = [parameter for parameter in model.parameters() if id(parameter) not in inside]

    def held(parameters) -> int:
        return sum(parameter.numel() * (2 if autocast else parameter.element_size()) for parameter in parameters)

    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    head = model.get_output_embeddings().weight
    gradients = sum(4 * p.numel() if p is head else held([p]) for p in outside if p.requires_grad)
    return 2 * held(layer.parameters()) + held(trained) + held(outside) + gradients


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def fit_lines(found: tuple[Fit, ...]) -> list[str]:
    """The table, a line for each number of devices."""
    from .machine import gib

    lines = []
    for fit in found:
        gpus = "1 GPU" if fit.devices == 1 else f"{fit.devices} GPUs with FSDP"
        if fit.size is None:
            lines.append(f"{gpus}: no, {gib(fit.needed)} needed on each")
        else:
            lines.append(f"{gpus}: from {fit.size} GB ({gib(fit.needed)} needed on each)")
    return lines
