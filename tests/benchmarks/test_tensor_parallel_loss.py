"""The benchmark of tensor parallelism: both ways compute the same loss, and the bytes are those of the formula."""

import pytest

from tests.trainer.processes import run_two

WORKER = """
import torch
import torch.distributed as dist
from benchmarks.loss.tensor_parallel import GATHERED, PARALLEL, measure, received
from tests.forked import end_together

dist.init_process_group("gloo")
found = measure(40, 16, 101, torch.float32, 1)
assert all(error < 2e-6 for error in found[PARALLEL]["difference"].values()), found
counted = {name: found[PARALLEL][name] for name in ("merge_bytes", "gradient_bytes")}
assert counted == received(40, 16, torch.float32, 2) == {"merge_bytes": 40 * 96 + 16, "gradient_bytes": 40 * 16 * 4}
assert found[GATHERED].keys() == {"peak_bytes", "cpu_seconds"} and found[GATHERED]["cpu_seconds"] > 0
end_together()
"""


@pytest.mark.slow
def test_both_ways_are_the_same_loss():
    run_two(WORKER)
