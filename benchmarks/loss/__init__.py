"""What the gated loss costs: `fused_linear_eaft` and its peers against three bare matrix products (the floor).

    python -m benchmarks.loss --output results/

- `cases`    what is measured: shapes, dtypes, logits, and what is trained of them
- `methods`  who is measured, and what each of them computes
- `inputs`   the hidden states, head and labels of a case, and its gradients in float64
- `worker`   one method on one case, in a process of its own: memory, gradient error, time
- `runner`   every method on every case, one process after the other
- `table`, `results`, `figure`   what comes out

Only `worker`, `inputs`, `methods` and `peers` import torch, and `worker` alone touches tensors of a measured size: the
process that runs the others stays small.
"""
