"""Peak memory of the operator, in a process of its own."""

import sys

import pytest

from tests import forked

MEASURE = """
import sys, torch
from eaftdrope.loss import fused_linear_eaft

def status(name):
    for line in open("/proc/self/status"):
        if line.startswith(name):
            return int(line.split()[1]) * 1024

N, V, D = 1024, 151_936, 128
torch.manual_seed(0)
hidden = torch.randn(N, D).bfloat16().requires_grad_()
weight = (torch.randn(V, D) * 0.03).bfloat16().requires_grad_()
labels = torch.randint(0, V, (N,))
fused_linear_eaft(hidden[:8], weight[:1000], labels[:8] % 1000)
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
fused_linear_eaft(hidden, weight, labels, gate=sys.argv[1]).backward()
print(status("VmHWM") - before - hidden.grad.nbytes - weight.grad.nbytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("gate", ["eaft", "conflict-mask"])
def test_extra_memory_at_a_vocabulary_of_151936(gate):
    """Beyond the gradients: one tile (148 MiB) and scratch. Full float32 logits alone take 622 MB."""
    run = forked.run_source(MEASURE, gate)
    assert run.code == 0, run.err
    assert int(run.out) <= 256e6, f"{int(run.out) / 1e6:.0f} MB"
