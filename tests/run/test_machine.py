"""What is asked of the C library for training on a processor."""

import os
import subprocess
import sys

import pytest

from tests import forked

COUNT = """
import resource, sys
import torch
from eaftdrope.run.machine import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(3):
    torch.zeros(10_000_000)
before = faults()
for _ in range(20):
    torch.zeros(10_000_000)
print(faults() - before)
"""


PLACES = """
import sys
if sys.argv[1] == "verb":
    from eaftdrope.cli import main
    try:
        main(["--version"])
    except SystemExit:
        pass
import torch
kept = [torch.empty(2**20) for _ in range(8)]
print(max(tensor.data_ptr() % 4096 for tensor in kept))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of torch on Linux")
def test_large_tensors_of_a_verb_begin_at_a_page():
    """Otherwise their holes are not filled again: two steps of the quickstart in float32 take 9.1 GiB instead of 6.7."""
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}

    def beyond_a_page(how):
        command = [sys.executable, "-c", PLACES, how]
        run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        return int(run.stdout.split()[-1])

    assert beyond_a_page("verb") == 0 < beyond_a_page("plain")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_freed_memory_is_not_mapped_again():
    """Twenty tensors of 40 MB, which glibc maps one by one: without the setting every one brings its pages in anew, with
    it one or two may."""

    def page_faults(how):
        run = forked.run_source(COUNT, how)
        assert run.code == 0, run.err
        return int(run.out)

    assert page_faults("kept") < page_faults("plain") / 5
