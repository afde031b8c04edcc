"""lm-eval's model whose every sequence begins with one BOS at most; imported only where lm-eval is."""

from __future__ import annotations

import torch
from lm_eval.models.huggingface import HFLM


class OneBos(HFLM):
    """HFLM, corrected in two places where it writes BOS twice or not at all.

    A text of a rolling likelihood gets the prefix token (BOS, or EOS where there is none) from lm-eval, and BOS from a
    tokenizer that writes it by itself: [bos, bos, text]. `add_bos_token=False` would correct that and take BOS from the
    contexts of multiple choice. Of a batch of prompts lm-eval looks at the first only, for a BOS that a chat template has
    written.
    """

    _is_rolling = False

    def tok_encode(self, string: str, *arguments, **options) -> list[int]:
        """Token ids of a text, with BOS where the tokenizer writes it and the text does not begin with it already."""
        ids = super().tok_encode(string, *arguments, **options)
        return ids[1:] if self._is_rolling and ids[:1] == [self.prefix_token_id] else ids

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, in nats."""
        self._is_rolling = True
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        finally:
            self._is_rolling = False

    def tok_batch_encode(
        self, strings, padding_side: str = "left", left_truncate_len: int | None = None, truncation: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and attention mask, int64 [B, T], of the prompts that answers are generated from; T is at most
        `left_truncate_len`, cut on the left. `truncation`, which our bridge never sets, is the tokenizer's own."""
        if truncation:
            return super().tok_batch_encode(strings, padding_side, left_truncate_len, truncation)
        rows = {"input_ids": [self.tok_encode(string) for string in strings]}
        batch = self.tokenizer.pad(rows, padding_side=padding_side, return_attention_mask=True, return_tensors="pt")
        cut = slice(-left_truncate_len, None) if left_truncate_len else slice(None)
        return batch["input_ids"][:, cut], batch["attention_mask"][:, cut]
