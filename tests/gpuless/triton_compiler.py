"""Compiles Triton kernels ahead of time for GPUs that are not there, and reads what the compiler did.

    launch = Launch.recorded(kernel, args, kwargs)      # what the host code would launch, arguments and options
    compile_for(launch, NVIDIA[90]), figures(...)       # registers, spills, shared memory, loads in loops

Arguments are specialised as a real launch does it: integers and pointers divisible by 16 are known to be, an integer 1 is
a constant. Must not run in a process that was started with TRITON_INTERPRET=1. The Triton wheel brings every tool that is
used. Static counts are not time, and a kernel over the shared-memory limit compiles without complaint and fails at
launch: compare with SHARED_LIMIT.
"""

import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)

# Bytes of shared memory (LDS) that one block may ask for.
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "sm_120": 101_376, "gfx942": 65_536}

_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}
_TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")


@dataclass(frozen=True)
class Launch:
    """A kernel with the types, constants and options of one launch."""

    kernel: object
    signature: dict
    constants: dict
    attributes: dict
    options: dict

    @staticmethod
    def recorded(kernel, args, kwargs):
        """From the arguments of `kernel[grid](*args, **kwargs)`; what the kernel does not take is an option."""
        names = kernel.arg_names
        options = {name: value for name, value in kwargs.items() if name not in names}
        values = {**dict(zip(names, args)), **{name: value for name, value in kwargs.items() if name in names}}
        signature, constants, attributes = {}, {}, {}
        for index, name in enumerate(names):
            value, parameter = values[name], kernel.params[index]
            special = not parameter.do_not_specialize
            if parameter.is_constexpr or (special and type(value) is int and value == 1):
                signature[name], constants[name] = "constexpr", value
                continue
            if isinstance(value, torch.Tensor):
                # allocators align to at least 16 bytes; this one's rows may not be
                signature[name], divisible = "*" + _TYPES[value.dtype], value.data_ptr() % 16 == 0
            elif isinstance(value, float):
                signature[name], divisible = "fp32", False
            else:
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                divisible = value % 16 == 0
            if divisible and special and not parameter.do_not_specialize_on_alignment:
                attributes[(index,)] = [["tt.divisibility", 16]]
        return Launch(kernel, signature, constants, attributes, options)

    def key(self):
        """Equal for launches that compile to the same code."""
        parts = (self.signature, self.constants, self.attributes, self.options)
        return (id(self.kernel), *(str(sorted(part.items())) for part in parts))


def compile_for(launch, target):
    """The launch compiled for a name of TARGETS."""
    source = ASTSource(
        fn=launch.kernel, signature=launch.signature, constexprs=launch.constants, attrs=launch.attributes
    )
    return triton.compile(source, target=TARGETS[target], options=launch.options)


def figures(compiled, target):
    """What the compiler did:

    registers: of a thread (VGPRs on AMD)
    spills: bytes of stack, plus instructions that move a register there or back (AMD: registers)
    loop_spills: such instructions inside of loops
    shared: bytes of shared memory
    loop_loads: loads of global memory inside of loops by their width in bytes; {"16": 1} is one 16-byte load a step
    """
    if target == "gfx942":
        text = compiled.asm["amdgcn"]
        loops = _loop_lines(text, r"^(\.LBB\w+):", r"\bs_c?branch\w*\s+(\.LBB\w+)")
        spill, width = r"\bscratch_(?:load|store)", _amd_width
        names = ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
        spills = sum(int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in names)
    else:
        usage, text = _disassemble(compiled.asm["cubin"])
        loops = _loop_lines(text, r"^(\.L_x_\d+):", r"\bBRA\b.*`\((\.L_x_\d+)\)")
        spill, width = r"\b(?:LDL|STL)\b", _nvidia_width
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        # LOCAL stays 0 where a kernel spills: the stack and the local loads and stores tell
        spills = stack + len(re.findall(spill, text))
    widths = Counter(filter(None, map(width, loops)))
    return {
        "registers": registers,
        "spills": spills,
        "loop_spills": sum(1 for line in loops if re.search(spill, line)),
        "shared": compiled.metadata.shared,
        "loop_loads": {str(width): widths[width] for width in sorted(widths)},
    }


def _disassemble(cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _tool("cuobjdump", "--dump-resource-usage", file.name), _tool("nvdisasm", "-c", file.name)


def _tool(name, *args):
    return subprocess.run([os.path.join(_TOOLS, name), *args], capture_output=True, text=True, check=True).stdout


def _nvidia_width(line):
    load = re.search(r"\bLDG\.E(\S*)", line)
    bits = load and re.search(r"\.[US]?(8|16|64|128)\b", load[1])
    return load and (int(bits[1]) // 8 if bits else 4)


_AMD_WIDTHS = {
    "ubyte": 1,
    "sbyte": 1,
    "ushort": 2,
    "sshort": 2,
    "short": 2,
    "dword": 4,
    "dwordx2": 8,
    "dwordx3": 12,
    "dwordx4": 16,
}


def _amd_width(line):
    load = re.search(r"\b(?:global|buffer|flat)_load_(dwordx\d|[a-z]+)", line)
    return load and _AMD_WIDTHS[load[1]]


def _loop_lines(text, label, branch):
    """Lines between a label and a branch back to it, each once however many loops surround it."""
    lines = text.splitlines()
    labels, inside = {}, set()
    for number, line in enumerate(lines):
        if found := re.match(label, line):
            labels[found[1]] = number
        elif (found := re.search(branch, line)) and found[1] in labels:
            inside.update(range(labels[found[1]], number + 1))
    return [lines[number] for number in sorted(inside)]
