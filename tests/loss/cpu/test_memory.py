"""Nothing is read or written outside what the functions were given, and torch's threads are the only ones."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eaftdrope.loss.backends import cpu as backend
from eaftdrope.loss.backends.tile import LogitsTransform
from eaftdrope.loss.native import build
from tests.gpuless.guard_pages import dies, guarded
from tests.loss.tile_cases import PLAIN, make_case

ROOT = Path(__file__).parents[3]
EVERY_FUNCTION = Path(__file__).parent / "every_function.py"


def need_compiler() -> list[str]:
    try:
        return build.find_compiler()
    except build.BuildError as error:
        pytest.skip(f"the C++ kernels for CPUs were NOT checked: {error}")


def compile_changed(folder: Path, *flags: str, file: str = "", old: str = "", new: str = "") -> Path:
    """A library from a copy of the sources, with one place of one file replaced."""
    compiler, changed = need_compiler(), 0
    for path in [*build.SOURCES.glob("*.cpp"), *build.SOURCES.glob("*.inc")]:
        text = path.read_text(encoding="utf-8")
        if path.name == file:
            assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {file}"
            text, changed = text.replace(old, new), 1
        (folder / path.name).write_text(text, encoding="utf-8")
    assert changed == bool(file)
    output = folder / "changed.so"
    command = [*compiler, *build.FLAGS, *flags, str(folder / "eaft_cpu.cpp"), "-o", str(output)]
    subprocess.run(command, check=True, capture_output=True)
    return output


def run_every_function(library: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(EVERY_FUNCTION), str(library)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


# --- guard pages ------------------------------------------------------------------------------------------------------


FUNCTIONS = ("tile_statistics", "tile_gradient_", "tile_columns", "gather_columns", "add_rows_", "accumulate", "scaled")


def touch_everything(monkeypatch, side: str, one_too_many: str = "") -> None:
    """Calls every function with all that it gets and allocates up against a page that must not be touched; one of them
    believes in a column too many."""
    torch.set_num_threads(1)
    wrong = False

    def on_guard(tensor):
        return guarded(tensor.shape, tensor.dtype, side).copy_(tensor)

    def call(name, *arguments):
        nonlocal wrong
        wrong = name == one_too_many
        return getattr(backend, name)(*arguments)

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, dtype: guarded(shape, dtype, side) if shape else empty(shape))
    monkeypatch.setattr(backend, "_check_tile", lambda tile: (tile.shape[0], tile.shape[1] + wrong))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for vocab in (1, 15, 16, 17, 63, 65, 257, 4096 + 33):
            for transform in (PLAIN, LogitsTransform(softcap=30.0)):
                case = make_case("guarded", 5, vocab, dtype)
                tile, labels, weight = map(on_guard, (case.logits, case.labels, case.weight))
                stats = call("tile_statistics", tile, labels, transform, 20)
                call("tile_gradient_", tile, labels, stats, weight, transform)
            call("tile_columns", tile, 0.1)
            columns = on_guard(torch.tensor([0, vocab - 1 + (one_too_many == "gather_columns")]))
            for rows in range(1, 6):
                call("gather_columns", tile[-rows:], columns)
            call("add_rows_", tile, on_guard(torch.tensor([0, 4])), on_guard(tile[:2]))
            call("accumulate", tile, on_guard(tile), False)
            call("scaled", tile, torch.tensor(0.5), tile.dtype)


@pytest.mark.parametrize("side", ["end", "start"])
def test_nothing_beyond_the_tile_is_touched(isa, monkeypatch, side):
    assert not dies(lambda: touch_everything(monkeypatch, side))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_guard_is_seen_to_bite(library, monkeypatch, function):
    assert dies(lambda: touch_everything(monkeypatch, "end", one_too_many=function))


# --- sanitizers and planted bugs ----------------------------------------------------------------------------------------

SANITIZERS = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def sanitizer_environment() -> dict[str, str]:
    runtimes = []
    for name in ("libasan.so", "libubsan.so"):
        command = [*build.find_compiler(), f"-print-file-name={name}"]
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        if not os.path.isabs(found):
            pytest.skip(
                f"{shlex.join(build.find_compiler())} has no {name}: the CPU kernels were NOT run under sanitizers"
            )
        runtimes.append(found)
    return {"LD_PRELOAD": " ".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}


@pytest.mark.exhaustive
def test_under_sanitizers(tmp_path):
    need_compiler()
    environment = sanitizer_environment()
    result = run_every_function(compile_changed(tmp_path, *SANITIZERS), **environment)
    assert result.returncode == 0 and "every function is right" in result.stdout, result.stderr[-3000:]


@pytest.mark.exhaustive
def test_sanitizers_see_a_read_beyond_the_end(tmp_path):
    need_compiler()
    environment = sanitizer_environment()
    library = compile_changed(
        tmp_path,
        *SANITIZERS,
        file="tile_kernels.inc",
        old="std::memcpy(rest, x + i, (n - i) * sizeof(T));\n    store(z + i",
        new="std::memcpy(rest, x + i, sizeof rest);\n    store(z + i",
    )
    result = run_every_function(library, **environment)
    assert result.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in result.stderr, result.stderr[-3000:]


KERNELS, ANCHOR = "tile_kernels.inc", "anchor_kernels.inc"
PLANTED = {
    "the maximum is summed like any other": (KERNELS, "sums.maxima - rises", "sums.maxima"),
    "ties with the bound are forgotten": (KERNELS, "threshold, k - count, m)", "threshold, 0, m)"),
    "-inf gets no care": (KERNELS, "if (careful) x = maximum(all(-1000.0f), x);", ""),
    "the spread stays with the old maximum": (KERNELS, "(row.spread - down * (1 + row.rest))", "row.spread"),
    "the target is forgotten": (KERNELS, "if (has_target) x[label] = target[0];", ""),
    "the end of a row is written too far": (KERNELS, "memcpy(x + i, rest, (n - i)", "memcpy(x + i, rest, (n - i + 1)"),
    "softcap without its derivative": (KERNELS, "(factor, z - m) * slope", "(factor, z - m)"),
    "every ninth row is left out": (KERNELS, "r += kRows) {", "r += kRows + 1) {"),
    "the label takes part in a masked divergence": (
        ANCHOR,
        "{{0, label + 1}, {label, vocab}}",
        "{{0, label}, {label, vocab}}",
    ),
    "what both exclude gets no care": (
        ANCHOR,
        "difference = choose(equal(first, zero), zero, difference)",
        "(void)zero",
    ),
    "the anchor's softcap without its derivative": (ANCHOR, "capped ? g * slope : g", "g"),
    "the label has no pull": (ANCHOR, "value += anchor * (p - std::exp(q) / base_sum);", ""),
    "the offset without the divergence": (ANCHOR, "job.anchor.divergence[r] + std::log(sum)", "std::log(sum)"),
    "the end of an anchored row is written too far": (
        ANCHOR,
        "memcpy(x + i, rest, (n - i)",
        "memcpy(x + i, rest, (n - i + 1)",
    ),
    "bfloat16 is truncated": ("isa_portable.inc", "(u + 0x7fff + ((u >> 16) & 1)) >> 16", "u >> 16"),
    "float16 rounds halves up": ("isa_portable.inc", "u + 0xfff + ((u >> 13) & 1)", "u + 0x1000"),
    "the exponential's last term": ("isa_avx2.inc", "0x1.5bba14p-10f", "0x1.0p-10f"),
    "odd and even bfloat16 swapped": ("isa_avx512.inc", "cvtne2ps_pbh(odd, even)", "cvtne2ps_pbh(even, odd)"),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_caught(library, tmp_path, bug):
    file, old, new = PLANTED[bug]
    needed = {"isa_avx2.inc": 1, "isa_avx512.inc": 3}.get(file, 0)
    if library.eaft_set_isa(-1) < needed:
        pytest.skip(f"this processor does not run {file}: that a bug in it is caught was NOT checked")
    result = run_every_function(compile_changed(tmp_path, "-O0", file=file, old=old, new=new))
    # wrong numbers, or a heap that was written over
    caught = "AssertionError" in result.stderr or result.returncode < 0
    assert result.returncode != 0 and caught, result.stdout + result.stderr[-3000:]


# --- threads ----------------------------------------------------------------------------------------------------------

USE_THREADS = """
import os, torch
from eaftdrope.loss.backends import cpu
from eaftdrope.loss.backends.tile import LogitsTransform
torch.set_num_threads(3)
x = torch.randn(3000, 1000)
(x * 2).sum()
before = len(os.listdir("/proc/self/task"))
labels = torch.zeros(3000, dtype=torch.int64)
for _ in range(3):
    cpu.tile_statistics(x, labels, LogitsTransform(), 20)
    (x * 2).sum()
print(before, len(os.listdir("/proc/self/task")))
print(*sorted({line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.split()[-1].rsplit("/", 1)[-1]}))
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc: the number of threads was NOT checked")
def test_it_works_with_torchs_threads_and_no_others(library):
    """A second OpenMP runtime would start threads of its own, which wait in a loop on the cores of torch's."""
    result = subprocess.run(
        [sys.executable, "-c", USE_THREADS],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    threads, runtimes = result.stdout.strip().split("\n")
    before, after = map(int, threads.split())
    assert before >= 3 and after == before
    found = [name for name in runtimes.split() if re.search(r"lib(g|i)?omp", name)]
    assert len(found) == 1, found
    assert library.parallel, "torch has an OpenMP runtime, but its GOMP_parallel was not found"
