"""The Triton kernels compiled for GPUs that are not there, against budgets.json.

A figure that grew fails. One that shrank warns: write it down with

    python -m tests.loss.triton.compiled --update

Not checked: time, occupancy, whether the code is right.
"""

import warnings

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed: the GPU kernels were NOT compiled")

# ruff: noqa: E402
from tests.gpuless.triton_compiler import SHARED_LIMIT
from tests.loss.triton.compiled import COVERING, EVERYTHING, Variant, launches, measure, read_budgets
from tests.loss.triton.mutants import mutant

VARIANTS = [pytest.param(variant, id=str(variant)) for variant in COVERING] + [
    pytest.param(variant, id=str(variant), marks=pytest.mark.exhaustive)
    for variant in EVERYTHING
    if variant not in COVERING
]
MAIN_LOOPS = ("row_statistics_kernel", "row_gradient_kernel", "column_kernel")


@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_within_its_budget(variant):
    found = measure(variant)
    for kernel, figures in found.items():
        assert figures["shared"] <= SHARED_LIMIT[variant.target], (kernel, figures)
        assert figures["loop_spills"] == 0, (kernel, figures)
        # rows that start anywhere are the slow path: a register that waits on the stack while a row ends is let pass
        assert figures["spills"] == 0 or variant.layout == "odd", (kernel, figures)
        if kernel in MAIN_LOOPS and variant.layout != "odd" and variant.vocab != 1000:
            check_loads(kernel, figures["loop_loads"], variant)
    compare(str(variant), found, read_budgets())


def check_loads(kernel, loads, variant):
    """Whatever V is, loops read 16 bytes at a time, except that of the last columns."""
    assert loads.get("16", 0) >= 1, (kernel, loads)
    narrow = sum(count for width, count in loads.items() if width != "16")
    if kernel == "column_kernel" and variant.layout == "padded":
        # its last block has a loop of its own, 8 elements a thread
        narrow -= 8
    # AMD's blocks lie in an order that puts the load of the label between two parts of a loop
    assert narrow <= (1 if variant.target == "gfx942" else 0), (kernel, loads)


def compare(variant, found, budgets):
    if budgets["triton"] != triton.__version__:
        pytest.skip(
            f"budgets.json is of triton {budgets['triton']}, installed is {triton.__version__}: growth NOT checked"
        )
    budget = budgets["figures"][variant]
    grown, shrunk = [], []
    for kernel, figures in found.items():
        for name in ("registers", "spills", "shared"):
            line = f"{variant} {kernel}: {name} {budget[kernel][name]} -> {figures[name]}"
            if figures[name] > budget[kernel][name]:
                grown.append(line)
            elif figures[name] < budget[kernel][name]:
                shrunk.append(line)
    if shrunk:
        warnings.warn(f"better than budgets.json, write it down (see the top of this file): {shrunk}", stacklevel=2)
    assert not grown, "\n".join(grown)


def test_a_growth_is_caught():
    figures = {"registers": 40, "spills": 0, "shared": 128}
    budgets = {"triton": triton.__version__, "figures": {"v": {"k": figures}}}
    compare("v", {"k": dict(figures)}, budgets)
    for name in figures:
        with pytest.raises(AssertionError, match=f"v k: {name}"):
            compare("v", {"k": {**figures, name: figures[name] + 1}}, budgets)
        if figures[name]:
            with pytest.warns(UserWarning, match="write it down"):
                compare("v", {"k": {**figures, name: figures[name] - 1}}, budgets)


@pytest.mark.exhaustive
def test_a_mask_in_the_main_loop_is_caught():
    """What a kernel without the peeled block compiles to: V that is not divisible by 16 takes its wide loads away."""
    variant = Variant("sm_90")
    loads = measure(variant, mutant("every step is masked"))["row_statistics_kernel"]["loop_loads"]
    with pytest.raises(AssertionError):
        check_loads("row_statistics_kernel", loads, variant)


def test_other_rows_are_not_compiled_anew():
    variant = Variant("sm_90", vocab=1000)
    keys = {
        (name, launch.key())
        for rows, at in ((16, 0), (2, 0), (3, 1), (5, 2), (1, 3))
        for name, launch in launches(variant, rows=rows, at=at).items()
    }
    assert len(keys) == 4


def test_every_variant_has_a_budget():
    assert {str(variant) for variant in EVERYTHING} == set(read_budgets()["figures"])
