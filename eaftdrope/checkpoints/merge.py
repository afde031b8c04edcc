"""Merging: one checkpoint from an adapter and its base model, checked to be the same model after saving.

    live      base + adapter                in float32
    merged    base with W + scale * B A     in float32; live and merged logits must agree
    saved     merged in the chosen dtype    reloaded with stock transformers; its logits must agree with what was saved

An adapter may be repaired first (repair.py). A model without an adapter needs no merging; streamed.py repairs it.

Tied embeddings need care. If the input embeddings and the head are one tensor, an adapter that changes one of them
changes both on merging; and with a configuration of "tied", loaders drop a separate head. So the two are separated before
merging, compared afterwards, and the configuration is set accordingly.

Legend: T tokens of the prompt, V vocabulary.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from eaftdrope.drope.config import restore_v4_keys
from eaftdrope.errors import UserError
from eaftdrope.files import atomic_folder, honour_umask
from eaftdrope.models import load_config, load_model

from .adapters import CONFIG, adapter_settings, adapter_tokenizer, attach
from .mergeable import check_biases, check_mergeable
from .output import DTYPES, check_output, check_space
from .repair import Kept, repair_adapter
from .repair_options import NOTHING, Repair, check_repair

TOLERANCE = 1e-4
_PROMPT = (
    "The quick brown fox jumps over the lazy dog. 1 + 2 = 3; print('hello, world')\nQuestion: what is the capital?"
)


@dataclass(frozen=True)
class MergeReport:
    """The saved checkpoint, and the distance of its logits `[T, V]` on a fixed prompt from the live model's, in float32.

    `kl` is the mean over T of KL(live || reloaded) in nats. In a half-precision folder both figures contain the
    rounding of the weights. `untied`: the base's tied embeddings had to become two tensors. `kept`: what a repair left of
    the adapter.
    """

    output_dir: str
    base_model: str
    dtype: str
    parameters: int
    untied: bool
    max_abs_difference: float
    kl: float
    kept: tuple[Kept, ...] = ()


@dataclass(frozen=True)
class _Merged:
    """A merged model in memory: from which folder and base, and its logits on the prompt before merging."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source_dir: Path
    base_model: str
    prompt: Tensor
    live: Tensor
    untied: bool
    kept: tuple[Kept, ...]


def merge_adapter(
    adapter_dir: str | Path, output_dir: str | Path, *, dtype: str | None = None, repair: Repair = NOTHING
) -> MergeReport:
    """Merge the adapter into its base model and save an ordinary checkpoint (safetensors, tokenizer with template).

    The folder gets its name only after the check; on any error nothing is left there. Needs memory for one
    float32 copy of the model.

    Args:
        adapter_dir: folder with adapter_config.json; its `base_model_name_or_path` is any model reference.
        output_dir: must not exist, or be empty.
        dtype: "float32", "bfloat16" or "float16"; None keeps the base model's own.
        repair: what is done to the adapter before it is merged.

    Raises:
        UserError: not a mergeable adapter, a quantised base, an output that is occupied or too large for its disk, a
            repair that the adapter does not allow, or logits that differ.
    """
    adapter_dir, output_dir = Path(adapter_dir), Path(output_dir)
    check_output(output_dir, dtype)
    check_repair(repair)
    settings = _adapter_settings(adapter_dir)
    check_mergeable(adapter_dir, settings, repaired=bool(repair))
    reference, revision = settings["base_model_name_or_path"], settings.get("revision")
    config = load_config(reference, revision=revision)
    _check_not_quantised(adapter_dir, reference, config)
    check_biases(adapter_dir, settings, config)
    saved_dtype = _saved_dtype(config, dtype)

    tokenizer = adapter_tokenizer(adapter_dir, reference, revision)
    prompt = _prompt(tokenizer)
    base = load_model(reference, dtype="float32", revision=revision).eval()
    model, live, untied, kept = _merge(base, adapter_dir, prompt, repair)
    return _write(
        _Merged(model, tokenizer, adapter_dir, reference, prompt, live, untied, kept), output_dir, saved_dtype
    )


def _write(merged: _Merged, output_dir: Path, dtype: torch.dtype) -> MergeReport:
    """Save the merged model, reload it and compare; the folder gets its name last."""
    model, prompt = merged.model, merged.prompt
    parameters = sum(parameter.numel() for parameter in model.parameters())
    check_space(output_dir, parameters * dtype.itemsize)
    with atomic_folder(output_dir) as partial:
        _cast(model, dtype)
        _save(model, merged.tokenizer, merged.source_dir, partial)
        _cast(model, torch.float32)
        saved = _logits(model, prompt)
        model.to("meta")  # callers still have a reference, and a second float32 copy would double the memory needed
        reloaded = _reloaded_logits(partial, prompt)
        difference = _largest(saved - reloaded)
        if not difference <= TOLERANCE:
            raise UserError(
                f"the merged model of {merged.source_dir} changes on saving: reloaded from disk its logits differ by "
                f"{difference:.2g} (limit {TOLERANCE:g}). Nothing was written to {output_dir}; use {merged.source_dir} as it "
                "is, an adapter with peft, and please report the model type."
            )
    name = str(dtype).removeprefix("torch.")
    return MergeReport(
        output_dir=str(output_dir),
        base_model=merged.base_model,
        dtype=name,
        parameters=parameters,
        untied=merged.untied,
        max_abs_difference=_largest(merged.live - reloaded),
        kl=_mean_kl(merged.live, reloaded),
        kept=merged.kept,
    )


def _merge(
    base: PreTrainedModel, adapter_dir: Path, prompt: Tensor, repair: Repair
) -> tuple[PreTrainedModel, Tensor, bool, tuple[Kept, ...]]:
    """Return the merged model, the live logits, True if tied embeddings had to be separated, and what the repair kept."""
    tied = _separate_tied_head(base)
    live_model = attach(base, adapter_dir).eval()
    kept = tuple(repair_adapter(live_model, repair)) if repair else ()
    live = _logits(live_model, prompt)
    try:
        with warnings.catch_warnings():
            # their values decide below if they are tied
            warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
            model = live_model.merge_and_unload(safe_merge=True)
    except ValueError as error:  # safe_merge found NaN or infinity
        raise UserError(f"{adapter_dir} cannot be merged: {error} Use an earlier checkpoint.") from error
    except (RuntimeError, NotImplementedError, AttributeError) as error:  # a layer that peft cannot merge
        raise UserError(f"{adapter_dir} cannot be merged: {error} Use it as it is, with peft.") from error
    untied = tied and not _tie_head_if_equal(model)
    # Float32 sums in another order differ in proportion to the logits (SmolLM2-135M: by 9e-5).
    limit = TOLERANCE * max(1.0, _largest(live))
    difference = _largest(live - _logits(model, prompt))
    if not difference <= limit:
        raise UserError(
            f"merging {adapter_dir} changes the model: its logits differ by {difference:.2g} from base + adapter "
            f"(limit {limit:.2g}). Nothing was written; use the adapter itself with peft."
        )
    return model, live, untied, kept


def _saved_dtype(config: PretrainedConfig, dtype: str | None) -> torch.dtype:
    if dtype is not None:
        return DTYPES[dtype]
    assert not isinstance(config.dtype, str), "transformers parses it"
    return config.dtype or torch.float32


def _separate_tied_head(model: PreTrainedModel) -> bool:
    """Give the head a tensor of its own if it shares that of the input embeddings; return True if it did."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embeddings.weight:
        return False
    # The configuration stays "tied" for now: peft reads from it which modules an adapter ties.
    head.weight = nn.Parameter(embeddings.weight.detach().clone())
    return True


def _tie_head_if_equal(model: PreTrainedModel) -> bool:
    """Tie the head again if it equals the input embeddings, set the configuration accordingly, and return the result.

    The values decide, not the storage: peft calls an untouched copy of the head "untied".
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    assert head is not None, "it was separated from the embeddings"
    equal = torch.equal(head.weight, embeddings.weight)
    model.config.tie_word_embeddings = equal
    if equal:
        head.weight = embeddings.weight
    return equal


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    # Not model.to(dtype): that also rounds the rotary frequencies, which no checkpoint stores and loaders compute again.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, adapter_dir: Path, folder: Path) -> None:
    if (adapter_dir / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(adapter_dir))
    model.save_pretrained(folder)
    honour_umask(folder)
    # transformers 4 needs keys of its own to load a base without rotary embedding
    restore_v4_keys(folder)
    tokenizer.save_pretrained(folder)


def _reloaded_logits(folder: Path, prompt: Tensor) -> Tensor:
    return _logits(AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval(), prompt)


def _prompt(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    return torch.tensor([tokenizer(_PROMPT)["input_ids"] + sorted(tokenizer.all_special_ids)])


@torch.no_grad()
def _logits(model: nn.Module, prompt: Tensor) -> Tensor:
    return model(input_ids=prompt).logits[0]


def _largest(values: Tensor) -> float:
    return values.abs().max().item()


def _mean_kl(live: Tensor, reloaded: Tensor) -> float:
    live, reloaded = (logits.double().log_softmax(-1) for logits in (live, reloaded))
    return (live.exp() * (live - reloaded)).sum(-1).mean().item()


# ---- refusals, before anything heavy is loaded ----


def _adapter_settings(adapter_dir: Path) -> dict[str, Any]:
    """Return adapter_config.json.

    Raises:
        UserError: the folder does not exist, has no adapter, or an incomplete one.
    """
    if not (adapter_dir / CONFIG).is_file():
        raise UserError(_no_adapter_text(adapter_dir))
    return adapter_settings(adapter_dir)


def _no_adapter_text(folder: Path) -> str:
    if not folder.is_dir():
        return f"the folder {folder} does not exist. Pass the folder that contains adapter_config.json."
    if (folder / "config.json").is_file():
        return (
            f"{folder} is a full model, not an adapter: it needs no merging. Use it as it is, or move it towards the model "
            "it was trained from: --share 0.5 --base MODEL."
        )
    inside = sorted(path.parent for path in folder.glob("*/adapter_config.json"))
    hint = f" Did you mean {inside[-1]}?" if inside else " Pass the folder that contains it."
    return f"{folder} is not an adapter: it has no adapter_config.json.{hint}"


def _check_not_quantised(adapter_dir: Path, reference: str, config: PretrainedConfig) -> None:
    quantisation = config.to_dict().get("quantization_config")
    if quantisation:
        raise UserError(
            f"the base model {reference!r} is quantised ({quantisation.get('quant_method', 'unknown method')}): merged "
            "into rounded weights, the adapter would be rounded away. Set `base_model_name_or_path` of "
            f"{adapter_dir / 'adapter_config.json'} to the unquantised model, or use the adapter with peft."
        )
