"""What is asked of the C library for training on a processor."""

import subprocess
import sys

import pytest

COUNT = """
import resource, sys
import torch
from eaftdrope.recipe.machine import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(3):
    torch.zeros(50_000_000)
before = faults()
for _ in range(20):
    torch.zeros(50_000_000)
print(faults() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_freed_memory_is_not_mapped_again():
    """Twenty tensors of 200 MB: without the setting every one brings its pages in anew, with it one or two may."""

    def page_faults(how):
        run = subprocess.run([sys.executable, "-c", COUNT, how], capture_output=True, text=True, check=True)
        return int(run.stdout)

    assert page_faults("kept") < page_faults("plain") / 5
