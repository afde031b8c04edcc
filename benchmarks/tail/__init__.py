"""Is `tail="sparse"` safe? What its gradients lose, and what training with them loses.

    python -m benchmarks.tail errors --data medical.jsonl --out tail_errors.json --figure tail_errors.png
    python -m benchmarks.tail curves --data train.jsonl --held-out test.jsonl --out tail_curves.json

- `inputs`   hidden states, head and labels of a real model over real rows
- `kept`     how many columns the operator keeps, seen from outside
- `errors`   one look: columns kept, FLOPs, and gradient errors against float64, by threshold, group height and row order
- `curves`   full fine-tuning, exact and sparse, on the same rows in the same orders; held-out cross-entropy
- `verdict`  the rule that says whether the two differ
- `figure`   what they look like
"""
