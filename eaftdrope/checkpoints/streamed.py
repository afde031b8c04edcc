"""Repair a model whose weights were all trained, tensor by tensor: its files are read beside those of its base model and
written again with the same names, shapes and types.

Neither model is ever in memory: the change of one tensor is, in float32, and four matrices of its shorter side in float64
where it is denoised. Tensors of which nothing is removed are copied bit by bit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from eaftdrope.errors import UserError
from eaftdrope.files import atomic_folder
from eaftdrope.models import load_config, load_tokenizer

from .adapters import CONFIG
from .output import DTYPES, check_output, check_space
from .repair import Kept, repair_change
from .repair_options import Repair, check_repair, check_restored
from .tensor_files import INDEX, SINGLE, TensorPlace, TensorWriter, find_tensors

_COPIED = ("config.json", "generation_config.json")


@dataclass(frozen=True)
class RepairReport:
    """The saved model, and what was kept of each tensor that training had changed."""

    output_dir: str
    base_model: str
    parameters: int
    tensors: int
    dtype: str
    kept: tuple[Kept, ...]


def repair_files(
    model_dir: str | Path,
    base: str,
    output_dir: str | Path,
    repair: Repair,
    *,
    dtype: str | None = None,
    revision: str | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> RepairReport:
    """Save a repaired copy of a model whose weights were all trained.

    The folder gets its name only when it is complete; on any error nothing is left there.

    Args:
        model_dir: folder with config.json and safetensors.
        base: reference of the model it was trained from.
        output_dir: must not exist, or be empty.
        repair: what to do.
        dtype: "float32", "bfloat16" or "float16" for every tensor; None keeps the type of each.
        revision: branch, tag or commit of a base on the hub.
        progress: called with the parameters done and their total.

    Raises:
        UserError: no such model, another architecture than its base, weights in another form than safetensors, an output
            that is occupied or too large for its disk, a share that is out of range, a module to restore that does not
            exist, or weights that are not numbers.
    """
    model_dir, output_dir = Path(model_dir), Path(output_dir)
    check_output(output_dir, dtype)
    check_repair(repair)
    if (model_dir / CONFIG).is_file():
        raise UserError(f"{model_dir} is an adapter, and its configuration has the base model: remove --base.")
    config = load_config(str(model_dir))
    tokenizer = load_tokenizer(str(model_dir))
    trained, start = find_tensors(str(model_dir)), find_tensors(base, revision=revision)
    origins = _origins(trained, start, config, model_dir, base)
    check_restored(repair, trained, str(model_dir))
    types = {name: DTYPES[dtype] if dtype else place.dtype for name, place in trained.items()}
    total = sum(torch.Size(place.shape).numel() for place in trained.values())
    check_space(output_dir, sum(torch.Size(p.shape).numel() * types[n].itemsize for n, p in trained.items()))
    with atomic_folder(output_dir) as partial:
        for name in _COPIED:
            if (model_dir / name).is_file():
                shutil.copyfile(model_dir / name, partial / name)
        if dtype:
            _set_dtype(partial / "config.json", dtype)
        tokenizer.save_pretrained(partial)
        kept = _repair_all(partial, trained, origins, repair, types, lambda done: progress(done, total))
        _write_index(partial, trained, types)
        _check_files(partial, trained, types)
    used = sorted({str(found).removeprefix("torch.") for found in types.values()})
    return RepairReport(str(output_dir), base, total, len(trained), ", ".join(used), tuple(kept))


def _repair_all(
    folder: Path,
    trained: dict[str, TensorPlace],
    origins: dict[str, TensorPlace],
    repair: Repair,
    types: dict[str, torch.dtype],
    progress: Callable[[int], object],
) -> list[Kept]:
    """Write the files of the repaired model; returns what was kept of each tensor that training had changed."""
    kept, done = [], 0
    for file in dict.fromkeys(place.file for place in trained.values()):
        names = [name for name, place in trained.items() if place.file == file]
        with open(folder / _file_name(file, trained), "wb") as opened:
            writer = TensorWriter(opened, {name: (types[name], trained[name].shape) for name in names})
            for name in names:
                one = _repair_tensor(writer, trained[name], origins[name], repair, types[name])
                kept += [one] if one else []
                done += torch.Size(trained[name].shape).numel()
                progress(done)
    return kept


def _file_name(file: Path, trained: dict[str, TensorPlace]) -> str:
    """Return the name of a file in the new folder: the same, and the usual one if it is the only file."""
    return file.name if len({place.file for place in trained.values()}) > 1 else SINGLE


@torch.no_grad()
def _repair_tensor(
    writer: TensorWriter, trained: TensorPlace, base: TensorPlace, repair: Repair, dtype: torch.dtype
) -> Kept | None:
    """Write the repaired rows of a tensor; returns what was kept, None if training had not changed it."""
    change, changed, finite = _change(trained, base)
    if not finite:
        raise UserError(f"{trained.name} in {trained.file} has values that are not numbers. Use an earlier checkpoint.")
    if not changed:
        _copy(writer, trained, dtype)
        return None
    kept = repair_change(change, repair, trained.name)
    if kept.norm == 1.0 or kept.norm == 0.0:
        # bit by bit, without the rounding of base + change
        _copy(writer, trained if kept.norm else base, dtype)
        return kept
    for first, rows in base.rows():
        part = change[first : first + len(rows)]
        writer.write(part.add_(rows.float()).to(dtype))
    return kept


def _change(trained: TensorPlace, base: TensorPlace) -> tuple[Tensor, bool, bool]:
    """Return trained minus base in float32, whether they differ, and whether every value is finite."""
    change = torch.empty(trained.shape or (1,), dtype=torch.float32)
    changed, finite = False, True
    for (first, rows), (_, start) in zip(trained.rows(), base.rows()):
        part = change[first : first + len(rows)]
        torch.sub(rows.float(), start.float(), out=part)
        changed = changed or bool(part.any())
        finite = finite and bool(part.isfinite().all())
    return change, changed, finite


def _copy(writer: TensorWriter, place: TensorPlace, dtype: torch.dtype) -> None:
    for _, rows in place.rows():
        writer.write(rows.to(dtype))


def _origins(
    trained: dict[str, TensorPlace],
    start: dict[str, TensorPlace],
    config: PretrainedConfig,
    model_dir: Path,
    base: str,
) -> dict[str, TensorPlace]:
    """Return the base model's counterpart of every trained tensor.

    A model with tied embeddings may or may not have its head in the file; buffers of older checkpoints are in one of them
    only. Any other difference means that the base is another model.
    """
    head, embeddings = _names(config)
    ties = {head: embeddings, embeddings: head}
    found, differing = {}, []
    for name, place in trained.items():
        origin = start.get(name) or start.get(ties.get(name, ""))
        if origin is None or origin.shape != place.shape or None in (origin.dtype, place.dtype):
            differing.append(name)
        else:
            found[name] = origin
    beyond = [name for name in start if name not in trained and ties.get(name) not in trained]
    differing += [name for name in beyond if name.split(".")[-1] in ("weight", "bias")]
    if differing:
        raise UserError(
            f"{model_dir} was not trained from {base!r}: {len(differing)} of their tensors differ in name, shape or type, "
            f"{sorted(differing)[0]} among them. Pass the model that it was trained from."
        )
    return found


def _names(config: PretrainedConfig) -> tuple[str, str]:
    """Return the names of the weights of the head and of the input embeddings."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = {id(module): name for name, module in model.named_modules()}
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    return f"{names.get(id(head), '')}.weight", f"{names[id(embeddings)]}.weight"


def _set_dtype(file: Path, dtype: str) -> None:
    config = json.loads(file.read_text(encoding="utf-8"))
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = dtype
    config.setdefault("dtype", dtype)
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_index(folder: Path, trained: dict[str, TensorPlace], types: dict[str, torch.dtype]) -> None:
    files = {name: _file_name(place.file, trained) for name, place in trained.items()}
    if set(files.values()) == {SINGLE}:
        return
    size = sum(torch.Size(place.shape).numel() * types[name].itemsize for name, place in trained.items())
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _check_files(folder: Path, trained: dict[str, TensorPlace], types: dict[str, torch.dtype]) -> None:
    """Check by reading that the folder has every tensor in its shape and type."""
    written = find_tensors(str(folder))
    assert written.keys() == trained.keys(), "every tensor is written once"
    for name, place in written.items():
        assert (place.shape, place.dtype) == (trained[name].shape, types[name]), name
        with safe_open(place.file, "pt") as opened:
            assert opened.get_slice(name).get_shape() == list(place.shape)
