"""The loss of every token of long windows, in flat memory: tokens pass through the model in chunks, over its cache.

Shapes: B windows, T tokens, V vocabulary. Logits exist for one chunk at a time, [B, chunk, V].
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

# Positions whose logits exist at once: 512 x 152k x 4 bytes = 311 MB.
CHUNK = 512
# Rows of logits turned to float32 at a time.
_ROWS = 256


@torch.no_grad()
def token_losses(model, input_ids: torch.Tensor, *, chunk: int = CHUNK) -> torch.Tensor:
    """Cross-entropy of every token given all before it in its window.

    Args:
        input_ids: int64 [B, T], no padding.
        chunk: positions of a forward.

    Returns:
        float64 [B, T - 1] in nats, on the CPU: entry t is of token t + 1.
    """
    cache = None
    losses = []
    width = input_ids.shape[1] - 1
    for start in range(0, width, chunk):
        stop = min(start + chunk, width)
        out = model(input_ids=input_ids[:, start:stop].to(model.device), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        losses.append(_cross_entropy(out.logits, input_ids[:, start + 1 : stop + 1]))
    return torch.cat(losses, dim=1)


def cropped_losses(model, input_ids: torch.Tensor, crop: int, *, begin: int = 0, chunk: int = CHUNK) -> torch.Tensor:
    """`token_losses` of a model that never sees more than `crop` tokens.

    A window that slides by one token would cost a forward of `crop` tokens for each loss, so it slides by half of them:
    beyond the first `crop`, every token is predicted from at least (crop - begin) / 2 and less than `crop` tokens before it.

    Args:
        input_ids: int64 [B, T].
        crop: tokens that the model sees, at least `begin` + 2.
        begin: how many tokens stand at the beginning of every text (BOS); a crop keeps them.
    """
    assert crop >= begin + 2
    losses = [token_losses(model, input_ids[:, :crop], chunk=chunk)]
    done, stride = min(crop, input_ids.shape[1]), max(1, (crop - begin) // 2)
    while done < input_ids.shape[1]:
        stop = min(done + stride, input_ids.shape[1])
        seen = torch.cat([input_ids[:, :begin], input_ids[:, stop - (crop - begin) : stop]], dim=1)
        losses.append(token_losses(model, seen, chunk=chunk)[:, done - stop :])
        done = stop
    return torch.cat(losses, dim=1)


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    flat, labels = logits.flatten(0, 1), targets.flatten().to(logits.device)
    parts = [
        F.cross_entropy(flat[i : i + _ROWS].float(), labels[i : i + _ROWS], reduction="none")
        for i in range(0, len(labels), _ROWS)
    ]
    return torch.cat(parts).view(targets.shape).double().cpu()
