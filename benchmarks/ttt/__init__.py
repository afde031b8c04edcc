"""Test-time training (`eaftdrope.ttt`) beside its controls: research programs, and their committed results with LOG.md.

    python -m benchmarks.ttt toy --output DIR
    python -m benchmarks.ttt smollm2 run --text TRAIN.jsonl --test-text TEST.jsonl

- `toy`       tiny models on sequences that each hide their own successor table, beside exact ceilings
- `smollm2`   SmolLM2-135M on natural text: untrained, meta-trained, and the fine-tuned control
"""
