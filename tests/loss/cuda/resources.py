"""What the compiled kernels need, held against budgets.json.

    python tests/loss/cuda/resources.py     # prints the table; writes budgets.json anew: commit it with the reason

A register more can cost a block of every multiprocessor, a lost 16-byte load half of the bandwidth: neither happens
without being written down.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

BUDGETS = Path(__file__).parent / "budgets.json"

_KERNEL = re.compile(r"_ZN4eaft\d+(tile_[a-z]+)I(f|6__half|13__nv_bfloat16)(?:Lb([01])E)?E")
_DTYPES = {"f": "float32", "6__half": "float16", "13__nv_bfloat16": "bfloat16"}

Resources = dict[str, dict[str, dict[str, int]]]


def kernel_name(mangled: str) -> str:
    """`"tile_statistics bfloat16 softcap"`."""
    match = _KERNEL.match(mangled)
    assert match, f"a kernel with an unknown name: {mangled}"
    name, dtype, softcap = match.groups()
    return " ".join([name, _DTYPES[dtype], *(["softcap"] if softcap == "1" else [])])


def parse_ptxas(log: str) -> Resources:
    """architecture -> kernel -> registers, shared, stack, spilled, from `nvcc -Xptxas -v`."""
    found: Resources = {}
    entries = re.split(r"Compiling entry function '", log)[1:]
    for entry in entries:
        mangled, architecture = re.match(r"(\w+)' for '(sm_\w+)'", entry).groups()
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry
        ).groups()
        shared = re.search(r"(\d+) bytes smem", entry)
        found.setdefault(architecture, {})[kernel_name(mangled)] = {
            "registers": int(re.search(r"Used (\d+) registers", entry).group(1)),
            "shared": int(shared.group(1)) if shared else 0,
            "stack": int(stack),
            "spilled": int(stores) + int(loads),
        }
    return found


def find_cuobjdump() -> Path | None:
    """The one that Triton brings, with nvdisasm beside it: toolkits may lack both."""
    try:
        import triton
    except ImportError:
        return None
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return path if path.is_file() and path.with_name("nvdisasm").is_file() else None


def count_vector_accesses(cuobjdump: Path, library: Path) -> Resources:
    """architecture -> kernel -> how many 16-byte loads and stores of global memory stand in its machine code."""
    command = ["env", f"PATH={cuobjdump.parent}:/usr/bin:/bin", cuobjdump, "-sass", library]
    found: Resources = {}
    architecture, kernel = "", {}
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        if match := re.match(r"\s*arch = (sm_\w+)", line):
            architecture = match.group(1)
        elif match := re.match(r"\s*Function : (\w+)", line):
            kernel = found.setdefault(architecture, {}).setdefault(kernel_name(match.group(1)), {"ldg": 0, "stg": 0})
        elif match := re.search(r"\b(LDG|STG)\.E[.\w]*\.128\b", line):
            kernel[match.group(1).lower()] += 1
    return found


def measure(library: Path, log: str) -> Resources:
    """parse_ptxas and count_vector_accesses together; without cuobjdump only the former."""
    found = parse_ptxas(log)
    cuobjdump = find_cuobjdump()
    if cuobjdump is not None:
        for architecture, kernels in count_vector_accesses(cuobjdump, library).items():
            for kernel, counts in kernels.items():
                found[architecture][kernel].update(counts)
    return found


def table(resources: Resources) -> str:
    """One line a kernel, one column an architecture: registers / shared memory / 16-byte loads+stores."""
    architectures = list(resources)
    lines = [f"{'registers/shared/ldg+stg':34}" + "".join(f"{name:>16}" for name in architectures)]
    for kernel in sorted(resources[architectures[0]]):
        cells = (resources[name][kernel] for name in architectures)
        texts = (f"{c['registers']}/{c['shared']}/{c.get('ldg', '?')}+{c.get('stg', '?')}" for c in cells)
        lines.append(f"{kernel:34}" + "".join(f"{text:>16}" for text in texts))
    return "\n".join(lines)


def nvcc_release(nvcc: Path) -> str:
    """`"13.0"`"""
    printed = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release ([\d.]+)", printed).group(1)


def write_budgets() -> None:
    sys.path.insert(0, str(Path(__file__).parents[3]))
    from tests.loss.cuda.toolchain import build

    if find_cuobjdump() is None:
        sys.exit("error: no cuobjdump: install triton, so that the budget counts vector loads")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / build.LIBRARY_NAME
        resources = measure(library, build.build_library(library))
    budget = {"nvcc": nvcc_release(build.find_nvcc()), "kernels": resources}
    BUDGETS.write_text(json.dumps(budget, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(table(resources))


if __name__ == "__main__":
    write_budgets()
