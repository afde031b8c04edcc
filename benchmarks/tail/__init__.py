"""The safety of `tail="sparse"`: the error of its gradients, and its effect on training.

    python -m benchmarks.tail errors --data medical.jsonl --out tail_errors.json --figure tail_errors.png
    python -m benchmarks.tail curves --data train.jsonl --held-out test.jsonl --out tail_curves.json

- `inputs`   hidden states, head and labels of a real model over real rows
- `kept`     counts the columns that the operator keeps, from outside
- `errors`   one pass: columns kept, FLOPs, and gradient errors against float64, by threshold, group height and row order
- `curves`   full fine-tuning, exact and sparse, on the same rows in the same orders; held-out cross-entropy
- `verdict`  the rule that decides if the two differ
- `figure`   figures of both
"""
