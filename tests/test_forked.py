"""The server that test processes are forked from loads all that it is asked for: what it cannot import it leaves out in
silence, and each process would then load it anew."""

import importlib
import os
import threading

from tests import forked


def test_every_preloaded_module_can_be_imported():
    for name in forked.PRELOADED:
        importlib.import_module(name)


def _report():
    import sys

    loaded = [name for name in forked.PRELOADED if name in sys.modules]
    print(len(loaded), threading.active_count(), os.environ["MINE"], os.getcwd())
    sys.exit(7)


def test_a_process_has_them_loaded_and_its_own_environment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = forked.run(_report, MINE="yours")
    assert ended == (7, f"{len(forked.PRELOADED)} 1 yours {tmp_path}\n", "")


def test_ranks_find_each_other():
    program = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
sum_of_ranks = torch.tensor(dist.get_rank() + 1)
dist.all_reduce(sum_of_ranks)
print(dist.get_rank(), sum_of_ranks.item())
from tests.forked import end_together
end_together()
"""
    ended = forked.run_ranks(3, forked.program, program)
    assert [(one.code, one.out) for one in ended] == [(0, f"{rank} 6\n") for rank in range(3)]
