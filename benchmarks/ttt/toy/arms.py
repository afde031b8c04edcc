"""The arms of the toy, their models (stock transformers classes) and their training.

Every step of a training is determined by (seed, step): all arms of a seed see the same batches.

Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Mamba2Config, Mamba2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from . import task

HIDDEN, LAYERS, HEADS, WINDOW = 48, 3, 2, 16
BATCH, WARM_UP, MAX_GRAD_NORM = 16, 20, 1.0
# points of the validation curve of a training
POINTS = 10
# fields of TTTConfig
TTT = {"window": WINDOW, "sink": 0, "chunk": WINDOW, "fast_blocks": 1, "lr": 1.0, "clip": 1.0}


@dataclass(frozen=True)
class Arm:
    """A model, its training, and how it reads.

    Attributes:
        name (`str`): identifies the arm in files.
        title (`str`): row of the table.
        kind (`str`): "full" or "window" (Qwen 3), "mamba2", "ttt" (Qwen 3 trained with TTT), or "naive" (TTT on the trained
            model of the arm "window", with an inner learning rate chosen on validation sequences).
        steps (`int`): training steps; the learning rate falls to 0 along a cosine.
        rate (`float`): peak learning rate of AdamW.
        ttt (`dict`): fields of `TTTConfig` that differ from `TTT`.
        init (`str`): gate and up projections of the prime MLP: "copied" from the block's own MLP, or "random".
        seeds (`int`): the arm is trained with this many seeds at most.
    """

    name: str
    title: str
    kind: str
    steps: int = 0
    rate: float = 3e-3
    ttt: dict = field(default_factory=dict)
    init: str = "random"
    seeds: int = 3

    @property
    def settings(self) -> dict:
        """What determines the result, as in JSON."""
        return {name: value for name, value in asdict(self).items() if name not in ("name", "title", "seeds")}


# the window reaches its ceiling in its steps, full attention in two of three seeds
_WINDOW, _FULL, _TTT, _LONG = 883, 1128, 238, 700
ARMS = (
    Arm("window", "window only", "window", _WINDOW),
    Arm("full", "full attention", "full", _FULL),
    Arm("mamba2", "Mamba 2", "mamba2", _LONG, rate=3e-2),
    Arm("mamba2_3e-3", "Mamba 2, rate 3e-3", "mamba2", _LONG, rate=3e-3, seeds=1),
    Arm("mamba2_1e-2", "Mamba 2, rate 1e-2", "mamba2", _LONG, rate=1e-2, seeds=1),
    Arm("first_long", f"TTT-E2E, first order, {_LONG} steps", "ttt", _LONG, ttt={"horizon": 1}, seeds=1),
    Arm("first_long_1e-2", "the same, rate 1e-2", "ttt", _LONG, rate=1e-2, ttt={"horizon": 1}, seeds=1),
    Arm("first", "TTT-E2E, first order", "ttt", _TTT, ttt={"horizon": 1}),
    Arm("second", "TTT-E2E, second order", "ttt", _TTT, ttt={"horizon": None}),
    Arm("naive", "naive TTT on window only", "naive", init="copied"),
    Arm("naive_random", "naive TTT, random gate and up", "naive", init="random"),
    Arm("naive_in_place", "naive TTT, in place", "naive", ttt={"layout": "in_place"}),
    Arm("in_place", "TTT-E2E, first order, in place", "ttt", _TTT, ttt={"layout": "in_place"}),
    Arm("horizon2", "TTT-E2E, horizon 2", "ttt", _TTT, ttt={"horizon": 2}),
)
# a test of the program
QUICK = (
    Arm("window", "window only", "window", 4),
    Arm("mamba2", "Mamba 2", "mamba2", 4),
    Arm("first", "TTT-E2E, first order", "ttt", 4),
    Arm("naive", "naive TTT on window only", "naive", init="copied"),
)
NAIVE_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


def new_model(kind: str) -> nn.Module:
    """Return an untrained model of some 72 thousand parameters; torch's seed determines its weights."""
    if kind == "mamba2":
        config = Mamba2Config(
            vocab_size=task.SYMBOLS,
            hidden_size=HIDDEN,
            num_hidden_layers=4,
            state_size=32,
            num_heads=4,
            head_dim=2 * HIDDEN // 4,
            n_groups=1,
            chunk_size=WINDOW,
            use_cache=False,
        )
        return Mamba2ForCausalLM._from_config(config)
    window = {
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 0,
        "layer_types": ["sliding_attention"] * LAYERS,
    }
    config = Qwen3Config(
        vocab_size=task.SYMBOLS,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HIDDEN // HEADS,
        max_position_embeddings=task.LENGTH,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        # TTT brings its own window
        **(window if kind == "window" else {}),
    )
    return Qwen3ForCausalLM._from_config(config)


def stock_nll(model: nn.Module, tokens_BT: Tensor) -> Tensor:
    """Return the negative log-likelihood of every token after the first, `[B, T - 1]`."""
    logits_BTV = model(tokens_BT).logits[:, :-1]
    return cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten(), reduction="none").view(
        len(tokens_BT), -1
    )


def train(
    model: nn.Module,
    loss: Callable[[Tensor], Tensor],
    measure: Callable[[], float],
    *,
    arm: Arm,
    seed: int,
    batch: Callable[[int, int, int], np.ndarray] = task.training_batch,
) -> dict:
    """Train with AdamW; return the CPU seconds and the validation curve, whose evaluation is not part of the seconds.

    Args:
        model (`nn.Module`): trained in place, all of it that requires a gradient.
        loss (`Callable`): from a batch of tokens `[B, T]` to the loss.
        measure (`Callable`): the validation loss.
        arm (`Arm`): its steps and rate are used.
        seed (`int`): determines the batches.
        batch (`Callable`, *optional*): sequences `[B, T]` of a seed, a step and a count.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=arm.rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1, (step + 1) / WARM_UP) * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / arm.steps)).item())
        ),
    )
    seconds, curve = 0.0, []
    for step in range(arm.steps):
        tokens_BT = torch.from_numpy(batch(seed, step, BATCH))
        started = time.process_time()
        loss(tokens_BT).backward()
        nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seconds += time.process_time() - started
        if (step + 1) % max(1, arm.steps // POINTS) == 0:
            curve.append({"step": step + 1, "cpu_seconds": round(seconds, 1), "nll": round(measure(), 4)})
    return {"cpu_seconds": round(seconds, 1), "curve": curve}
