"""Cost of the gated loss: `fused_linear_eaft` and its peers against three bare matrix products (the floor).

    python -m benchmarks.loss --output results/

- `cases`    workloads: shapes, dtypes, logits, and the trained tensors
- `methods`  the methods that are measured, and the loss that each computes
- `peers`    the losses of other projects
- `inputs`   hidden states, head and labels of a case, and its gradients in float64
- `worker`   one method on one case, in its own process: memory, gradient error, time
- `runner`   every method on every case, one process at a time
- `table`, `results`, `figure`, `report`   output

`anchored` and `tensor_parallel` are programs of their own: the loss with an anchor, and on a head shared by several ranks.

Only `worker`, `inputs`, `methods` and `peers` import torch, and of the programs above only `worker` allocates
tensors of a measured size: the process that starts the others stays small.
"""
