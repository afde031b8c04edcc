"""The host twin as a program of its own, under sanitizers, in shuffled orders, and with bugs planted in its sources: each
must be caught by the check that is there for its kind, or that check checks nothing.

What a sanitizer does not report is compared to the last bit with the twin in this process, which test_host_twin.py
holds against float64.
"""

from dataclasses import dataclass, replace

import pytest
import torch

from eaftdrope.loss.backends.tile import LogitsTransform
from tests.loss.cuda.replay import Record, compute, differences, read_results, run_driver
from tests.loss.cuda.toolchain import compile_driver, need_host_compiler, plant
from tests.loss.tile_cases import make_case, tile_cases

PLAIN = ("-O2",)
ADDRESS = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
THREAD = ("-O1", "-g1", "-fsanitize=thread")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def many() -> list[Record]:
    """Every small tile in every dtype, at the start of memory and one element later, rows at changing alignments."""
    records = []
    for dtype in DTYPES:
        for case in tile_cases(dtype, small=True):
            records += [Record(case), Record(case, offset=1, row_stride=case.logits.shape[1] + 3)]
        records.append(Record(make_case("k-search", 2, 900, dtype, topk=600), offset=3))
    return records


def few() -> list[Record]:
    """For executors that need a tenth of a second a row: each path once."""
    return [
        Record(make_case("ragged", 2, 257, torch.bfloat16), offset=3),
        Record(make_case("rounds", 1, 8201, torch.float32)),
        Record(make_case("capped", 1, 150, torch.float16, transform=LogitsTransform(scale=1.7, softcap=15.0))),
        Record(make_case("k-search", 1, 700, torch.bfloat16, topk=600)),
    ]


def far() -> list[Record]:
    """The third row starts beyond 2^31 elements; the memory between the rows is never touched."""
    return [Record(make_case("far", 3, 300, dtype), row_stride=2**30 + 64) for dtype in (torch.bfloat16, torch.float32)]


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    need_host_compiler()
    return compile_driver(tmp_path_factory.mktemp("driver") / "driver", *PLAIN)


@pytest.fixture(scope="module")
def of_twin(twin):
    """From a record to what the twin in this process makes of it, each computed once."""
    known = {}

    def results(record: Record):
        # rows that are far apart are computed near: where they lie must not matter
        near = replace(record, row_stride=min(record.stride, 10_000))
        key = (str(near), near.case.logits.dtype)
        if key not in known:
            known[key] = compute(twin, near)
        return known[key]

    return results


def assert_equal_to_twin(done, folder, records, of_twin) -> None:
    assert done.returncode == 0, done.stderr[:4000]
    results = read_results(folder / "results", records)
    wrong = [name for record, found in zip(records, results) for name in differences(record, found, of_twin(record))]
    assert not wrong


@pytest.mark.parametrize("seed", ["7", "8"])
def test_no_order_of_threads_or_blocks_changes_a_bit(driver, of_twin, tmp_path, seed):
    """Seeds shuffle which thread and which block goes first: what must not depend on it, does not."""
    records = many() + far()
    assert_equal_to_twin(run_driver(driver, tmp_path, records, GOC_SEED=seed), tmp_path, records, of_twin)


def test_nothing_out_of_bounds_misaligned_or_undefined(of_twin, tmp_path):
    driver = compile_driver(tmp_path / "driver", *ADDRESS)
    records = many()
    assert_equal_to_twin(run_driver(driver, tmp_path, records), tmp_path, records, of_twin)


def test_no_race(of_twin, tmp_path):
    driver = compile_driver(tmp_path / "driver", *THREAD)
    records = few()
    assert_equal_to_twin(run_driver(driver, tmp_path, records), tmp_path, records, of_twin)


# --- planted bugs -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bug:
    """`right` becomes `wrong` in a copy of the kernels; the driver, built with `flags`, must die saying `message`."""

    name: str
    right: str
    wrong: str
    flags: tuple[str, ...]
    message: str
    times: int = 1

    def __str__(self) -> str:
        return self.name


BUGS = [
    Bug(
        "missing-barrier",
        "if (lane == 0) shared.warp[warp] = own;\n  __syncthreads();",
        "if (lane == 0) shared.warp[warp] = own;",
        THREAD,
        "data race",
    ),
    Bug(
        "unsynchronised-count",
        "const int slot = atomicAdd(&shared.count, 1);",
        "const int slot = shared.count++;",
        THREAD,
        "data race",
    ),
    Bug(
        "overrun-by-one",
        "tail = vocab - head - vectors * WIDTH;",
        "tail = vocab - head - vectors * WIDTH + 1;",
        ADDRESS,
        "heap-buffer-overflow",
    ),
    Bug(
        "missing-mask",
        "if (first + u * THREADS < row.vectors) packed[u] =",
        "packed[u] =",
        ADDRESS,
        "heap-buffer-overflow",
        times=2,
    ),
    Bug(
        "misaligned-store",
        "row.body()[vector] = Storage<T>::pack(values);",
        "reinterpret_cast<uint4*>(row.data)[vector] = Storage<T>::pack(values);",
        ADDRESS,
        "store to misaligned address",
    ),
    Bug(
        "divergent-barrier",
        "Online::empty());\n  __syncthreads();\n  return own;",
        "Online::empty()), __syncthreads();\n  return own;",
        PLAIN,
        "GPU_ON_CPU",
    ),
]


@pytest.mark.exhaustive
@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_a_planted_bug_is_caught(bug, tmp_path):
    need_host_compiler()
    driver = compile_driver(
        tmp_path / "driver", *bug.flags, sources=plant(tmp_path, bug.right, bug.wrong, times=bug.times)
    )
    done = run_driver(driver, tmp_path, few())
    assert done.returncode != 0
    assert bug.message in done.stderr, done.stderr[:2000]


@pytest.mark.exhaustive
def test_planted_32_bit_offsets_are_caught(of_twin, tmp_path):
    """They wrap below the tile: a crash, or values that are not those of the rows."""
    need_host_compiler()
    sources = plant(tmp_path, "r * row_stride", "(int)(r * row_stride)", times=3)
    driver = compile_driver(tmp_path / "driver", *PLAIN, sources=sources)
    done = run_driver(driver, tmp_path, far())
    with pytest.raises(AssertionError):
        assert_equal_to_twin(done, tmp_path, far(), of_twin)
    # and it is the distance that it is caught by
    near = [Record(record.case) for record in far()]
    assert_equal_to_twin(run_driver(driver, tmp_path, near), tmp_path, near, of_twin)


@pytest.mark.exhaustive
def test_planted_use_of_unwritten_shared_memory_is_caught(of_twin, tmp_path):
    """Shared memory starts as NaN bytes, not as the zeros that hide a missing initialisation."""
    need_host_compiler()
    sources = plant(tmp_path, "    if (thread == 0) shared.count = 0;\n", "")
    driver = compile_driver(tmp_path / "driver", *PLAIN, sources=sources)
    done = run_driver(driver, tmp_path, few())
    with pytest.raises(AssertionError):
        assert_equal_to_twin(done, tmp_path, few(), of_twin)


@pytest.mark.exhaustive
def test_planted_order_of_arrival_is_caught(tmp_path):
    """Candidates summed as they arrive, not by rank: another order of threads gives other bits."""
    need_host_compiler()
    sources = plant(tmp_path, "rank += other > own || (other == own && j < i);", "rank = i;")
    driver = compile_driver(tmp_path / "driver", *PLAIN, sources=sources)
    results = []
    for seed in ("0", "7"):
        assert run_driver(driver, tmp_path, few(), GOC_SEED=seed).returncode == 0
        results.append(read_results(tmp_path / "results", few()))
    assert any(differences(record, one, other) for record, one, other in zip(few(), *results))
