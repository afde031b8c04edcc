"""Memory and time of `eaftdrope merge --denoise` on the tensors of a 7B model: embeddings, head and two layers.

    python -m benchmarks.repair --output DIR

The base model is random; the trained one is it plus a change of rank 8 in noise, in bfloat16. The peak is that of resident
pages above the memory of the process before the repair (Linux). Its limit is three times the largest tensor in float32 plus
1 GB. The time of all 32 layers is extrapolated.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig

from eaftdrope.checkpoints.repair_options import Repair
from eaftdrope.checkpoints.streamed import repair_files
from eaftdrope.checkpoints.tensor_files import SINGLE, TensorWriter, find_tensors
from eaftdrope.files import write_atomically
from eaftdrope.peak_memory import peak_of

HIDDEN, MIDDLE, VOCABULARY, LAYERS = 4096, 11008, 32000, 2
FULL_LAYERS = 32
RANK, NOISE = 8, 1e-4


def shapes(hidden: int, middle: int, vocabulary: int, layers: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors of a Llama, the head last."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        place = f"model.layers.{layer}"
        found |= {f"{place}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        found |= {f"{place}.mlp.{name}_proj.weight": (middle, hidden) for name in ("gate", "up")}
        found |= {f"{place}.mlp.down_proj.weight": (hidden, middle)}
        found |= {f"{place}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def make_models(folder: Path, tokenizer, *, hidden=HIDDEN, middle=MIDDLE, vocabulary=VOCABULARY, layers=LAYERS) -> None:
    """Write `base` and `trained` into a folder."""
    tensors = shapes(hidden, middle, vocabulary, layers)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=middle,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 128),
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    for name in ("base", "trained"):
        place = folder / name
        config.save_pretrained(place)
        tokenizer.save_pretrained(place)
        with open(place / SINGLE, "wb") as file:
            writer = TensorWriter(file, {tensor: (torch.bfloat16, shape) for tensor, shape in tensors.items()})
            for number, shape in enumerate(tensors.values()):
                torch.manual_seed(number)
                weight = 0.02 * torch.randn(shape)
                if name == "trained":
                    weight += NOISE * torch.randn(shape)
                    if len(shape) == 2:
                        weight += 1e-3 * torch.randn(shape[0], RANK) @ torch.randn(RANK, shape[1])
                writer.write(weight.bfloat16())


def measure(folder: Path, between: Callable[[], object] = lambda: None) -> dict:
    """Repair `trained` into `repaired`; return peak memory, seconds, and what was kept.

    Args:
        between: called after each tensor; its time is not counted.
    """
    spent: list[float] = []
    clock = [time.process_time()]

    def progress(done: int, total: int) -> None:
        spent.append(time.process_time() - clock[0])
        between()
        clock[0] = time.process_time()

    reports = []
    repair = Repair(denoise=True)
    peak = peak_of(
        lambda: reports.append(
            repair_files(folder / "trained", str(folder / "base"), folder / "repaired", repair, progress=progress)
        ),
        "cpu",
    )
    (report,) = reports
    by_name = {one.tensor: one for one in report.kept}
    # in the order of the file
    tensors = find_tensors(str(folder / "trained"))
    largest = max(torch.Size(place.shape).numel() for place in tensors.values())
    outside = sum(seconds for name, seconds in zip(tensors, spent, strict=True) if ".layers." not in name)
    layers = len({name.split(".")[2] for name in tensors if ".layers." in name})
    return {
        "peak_bytes": peak,
        "limit_bytes": 3 * 4 * largest + 10**9,
        "largest_tensor_float32_bytes": 4 * largest,
        "parameters": report.parameters,
        "cpu_seconds": round(sum(spent), 3),
        "extrapolated_cpu_seconds_of_32_layers": round(outside + (sum(spent) - outside) / layers * FULL_LAYERS, 3),
        "kept": {
            name: [by_name[name].spectrum.kept, by_name[name].spectrum.total, round(by_name[name].norm, 4)]
            for name in by_name
            if by_name[name].spectrum
        },
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the models (5 GB) and of repair.json")
    parser.add_argument("--tokenizer", default="package:smollm2-135m-instruct", help="any; it is only copied")
    chosen = parser.parse_args()
    from eaftdrope.models import load_tokenizer

    if not (chosen.output / "trained" / SINGLE).is_file():
        make_models(chosen.output, load_tokenizer(chosen.tokenizer))
    found = measure(chosen.output)
    write_atomically(chosen.output / "repair.json", json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
