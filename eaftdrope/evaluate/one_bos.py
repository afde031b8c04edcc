"""lm-eval's model, corrected so that no sequence begins with more than one BOS. Importing it requires lm-eval."""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.models.huggingface import HFLM


class OneBos(HFLM):
    """HFLM, corrected in two places where it writes BOS twice or not at all.

    In a rolling likelihood lm-eval adds the prefix token (BOS, or EOS without a BOS), and a tokenizer may add BOS too:
    [bos, bos, text]. `add_bos_token=False` would correct that but remove BOS from the contexts of multiple choice. In a
    batch of prompts lm-eval checks only the first for a BOS written by a chat template.
    """

    _is_rolling = False

    def tok_encode(self, string: str, *arguments: Any, **options: Any) -> list[int]:
        """Return the token ids of a text, with BOS if the tokenizer adds it and the text does not begin with it."""
        ids = super().tok_encode(string, *arguments, **options)
        return ids[1:] if self._is_rolling and ids[:1] == [self.prefix_token_id] else ids

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text, in nats."""
        self._is_rolling = True
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        finally:
            self._is_rolling = False

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return token ids and attention mask, int64 [B, S], of prompts for generation; S is at most `left_truncate_len`,
        cut on the left. `truncation`, which `run_tasks` never sets, is the tokenizer's own."""
        if truncation:
            return super().tok_batch_encode(strings, padding_side, left_truncate_len, truncation)
        rows = {"input_ids": [self.tok_encode(string) for string in strings]}
        batch = self.tokenizer.pad(rows, padding_side=padding_side, return_attention_mask=True, return_tensors="pt")
        cut = slice(-left_truncate_len, None) if left_truncate_len else slice(None)
        return batch["input_ids"][:, cut], batch["attention_mask"][:, cut]
