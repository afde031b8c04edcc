"""The small model and its training: stock transformers classes, Muon and AdamW, and branches that drop the rotation.

Notable:
- Every step is determined by (seed, step), so a branch sees the batches its trunk would have seen, and an interrupted run
  resumed from its last snapshot is identical to an uninterrupted one.
- Compiled, with explicit attention: at 64 tokens that takes half the time of a step in eager mode with fused attention.
- A branch starts from the trunk's weights and optimiser state. Only the configuration changes: `with_rope(config, "nope")`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, Qwen3Config, Qwen3ForCausalLM

from eaftdrope.drope.rope import with_rope

from . import data

HIDDEN, INTERMEDIATE, LAYERS, HEADS = 128, 256, 4, 4
WARM_UP = 40
# of a branch, whose optimiser state is warm already
REWARM_UP = 3
DECAYED_SHARE = 0.1


@dataclass(frozen=True)
class TrainingRecipe:
    """Settings of a training. `muon`: Muon on the matrices of the blocks and AdamW on the rest, with per-head QK-norm
    (Qwen3's class). Otherwise AdamW on everything, without QK-norm (Llama's class)."""

    theta: float
    seed: int
    steps: int
    batch: int
    muon: bool
    compiled: bool


def model_config(recipe: TrainingRecipe) -> PretrainedConfig:
    make = Qwen3Config if recipe.muon else LlamaConfig
    return make(
        vocab_size=data.VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HIDDEN // HEADS,
        max_position_embeddings=data.TRAINED_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.theta},
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=data.BOS,
        eos_token_id=None,
    )


def build(config: PretrainedConfig, attention: str) -> nn.Module:
    classes = {"qwen3": Qwen3ForCausalLM, "llama": LlamaForCausalLM}
    return classes[config.model_type]._from_config(config, attn_implementation=attention)


def trunk_rate(step: int, steps: int) -> float:
    """Return the share of the peak rate: warm-up, constant, and linear decay over the last tenth."""
    return min(1.0, (step + 1) / WARM_UP, (steps - step) / max(1, round(DECAYED_SHARE * steps)))


def branch_rate(step: int, start: int, steps: int) -> float:
    """Return the share of the peak rate of a branch: a short warm-up, then linear decay to 0."""
    return min((step - start + 1) / REWARM_UP, 1.0) * (steps - step) / (steps - start)


class Training:
    """A model in training. `dropped_at` is the first step without rotation; 0 is NoPE from scratch."""

    def __init__(self, recipe: TrainingRecipe, dropped_at: int | None = None):
        self.recipe, self.dropped_at = recipe, dropped_at
        self.step = 0
        torch.manual_seed(recipe.seed)
        config = model_config(recipe)
        self.model = build(config if dropped_at is None else with_rope(config, "nope"), "eager")
        self.forward = torch.compile(self.model.model, dynamic=False) if recipe.compiled else self.model.model
        self.optimisers = _optimisers(self.model, recipe.muon)
        length = data.TRAINED_LENGTH - 1
        self.mask_11TT = torch.full((1, 1, length, length), -1e9, dtype=torch.bfloat16).triu(1)
        self.losses: list[float] = []

    def snapshot(self) -> dict:
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser, _ in self.optimisers],
        }

    def restore(self, snapshot: dict) -> None:
        self.step = snapshot["step"]
        self.model.load_state_dict(snapshot["model"])
        for (optimiser, _), state in zip(self.optimisers, snapshot["optimisers"], strict=True):
            optimiser.load_state_dict(state)

    def run_to(self, last: int) -> None:
        """Train up to step `last` of the recipe."""
        self.model.train()
        while self.step < last:
            random = np.random.default_rng([self.recipe.seed, 0, self.step])
            loss = self._loss(data.training_batch(random, self.recipe.batch))
            loss.backward()
            is_branch = bool(self.dropped_at)
            rate = (
                branch_rate(self.step, self.dropped_at, self.recipe.steps)
                if is_branch
                else trunk_rate(self.step, self.recipe.steps)
            )
            for optimiser, peak in self.optimisers:
                optimiser.param_groups[0]["lr"] = peak * rate
                optimiser.step()
                optimiser.zero_grad()
            self.step += 1
            self.losses.append(loss.item())

    def _loss(self, batch: data.Batch) -> Tensor:
        """Return the mean cross-entropy of filler plus that of answers; one mean over both would neglect the few answers."""
        filler_BT, answer_BT = batch.filler_BT[:, 1:], batch.answer_BT[:, 1:]
        trained_BT = filler_BT | answer_BT
        weight_N = torch.where(answer_BT, 1 / answer_BT.sum(), 1 / filler_BT.sum())[trained_BT]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden_BTH = self.forward(
                input_ids=batch.tokens_BT[:, :-1],
                attention_mask={"full_attention": self.mask_11TT} if self.recipe.muon else self.mask_11TT,
                use_cache=False,
            ).last_hidden_state
            logits_NV = self.model.lm_head(hidden_BTH[trained_BT])
        return cross_entropy(logits_NV.float(), batch.tokens_BT[:, 1:][trained_BT], reduction="none") @ weight_N


def _optimisers(model: nn.Module, muon: bool) -> list[tuple[torch.optim.Optimizer, float]]:
    """Return (optimiser, peak rate) of each group of weights."""
    blocks = {name: weight for name, weight in model.named_parameters() if ".layers." in name and weight.ndim == 2}
    if not muon:
        blocks = {}
    rest = [weight for name, weight in model.named_parameters() if name not in blocks]
    # fused on the CPU, too
    found = [(torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.01, fused=True), 3e-3)]
    if muon:
        found.append((torch.optim.Muon(list(blocks.values()), weight_decay=0.01), 0.02))
    return found
