"""The end of a run: model card, merged model, table, report, upload."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from eaftdrope.errors import UserError
from eaftdrope.recipe.schema import Recipe

from .interrupts import LOCK_FILE
from .machine import precision_line, training_device, uses_bfloat16
from .probing import CAPTURE_FILE
from .recovery import read_curve, recovery_markdown, show_recovery
from .result import loaded_by_one_process
from .stages.chain import Stage

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from eaftdrope.evaluate import Score

_PACKAGES = ("eaftdrope", "torch", "transformers", "trl", "peft", "accelerate", "datasets")


def about_run(stage: Stage, recipe: Recipe, command: str) -> dict[str, str]:
    """When and how a run was made, for its card and its report."""
    device = training_device()
    return {
        "command": command,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": f"{device.name}, {precision_line(recipe, uses_bfloat16(recipe), device)}",
        "method": _method(stage, recipe),
    }


def finish(stage: Stage, recipe: Recipe, before: list[Score], after: list[Score], console: Console) -> None:
    """Card, merged model, table, report and upload of a stage whose result and scores are there; then, as the last thing,
    records that it is finished. A start that is killed in between is completed by the next.

    Raises:
        UserError: the adapter cannot be merged, or the result cannot be uploaded.
    """
    from eaftdrope.checkpoints.merge import merge_adapter
    from eaftdrope.evaluate import comparison
    from eaftdrope.report.page import try_write_report

    folder, merged = stage.folder, stage.folder.path / "merged"
    _write_card(stage, recipe, before, after)
    if recipe.output.merge and recipe.lora and not merged.is_dir():
        with loaded_by_one_process():
            report = merge_adapter(folder.path, merged)
        console.print(
            f"merged into {report.output_dir}: reloaded logits differ by at most {report.max_abs_difference:.1e}",
            highlight=False,
            markup=False,
        )
    if stage.name == "recalibrate":
        show_recovery(folder, console)
    if after:
        console.print()
        console.print(comparison(before, after))
    # the run is complete, whether or not its report can be drawn
    try_write_report(folder.path, console)
    (folder.path / CAPTURE_FILE).unlink(missing_ok=True)
    if folder.uploads:
        _push(recipe, folder.path)
    folder.finish()


def _write_card(stage: Stage, recipe: Recipe, before: list[Score], after: list[Score]) -> None:
    from eaftdrope.report.card import CardContent, write_model_card

    folder, recalibrated, about = stage.folder, stage.name == "recalibrate", stage.folder.about
    is_adapter = recipe.lora is not None
    content = CardContent(
        recipe_yaml=(folder.path / "recipe.yaml").read_text(encoding="utf-8"),
        # adapters fit the model that they were trained on and no other, even where that is a stage of ours
        base_model=recipe.model.reference if is_adapter else stage.record.model.reference,
        method=about["method"],
        before=before,
        after=after,
        versions=folder.versions,
        hardware=about["device"],
        command=about["command"],
        is_adapter=is_adapter,
        datasets=[source.path for source in recipe.data.train],
        title=f"{folder.path.resolve().parent.name}: {stage.name}" if stage.heading else None,
        tags=[] if recalibrated and recipe.loss.gate == "none" else ["eaft"],
        sections=[recovery_markdown(read_curve(folder))] if recalibrated else [],
    )
    write_model_card(folder.path, content)


def _method(stage: Stage, recipe: Recipe) -> str:
    from eaftdrope.loss.gates import resolve_gate

    gate = resolve_gate(recipe.loss.gate, **recipe.loss.gate_kwargs())
    tuned = f"LoRA (r = {recipe.lora.r}, alpha = {recipe.lora.alpha:g})" if recipe.lora else "full fine-tune"
    if stage.name == "recalibrate":
        return _recalibration(recipe, gate.formula)
    # what is not the exact gradient is part of the method
    tail = "; gradients of the head's input and weight from the vocabulary columns that matter (sparse tail)"
    return f"{tuned}, each token's cross-entropy weighted by the gate {gate.formula}" + (
        tail if recipe.loss.tail == "sparse" else ""
    )


def _recalibration(recipe: Recipe, formula: str) -> str:
    train, data = recipe.train, recipe.data
    weighted = "plain cross-entropy" if recipe.loss.gate == "none" else f"cross-entropy weighted by the gate {formula}"
    return (
        f"Recalibration after dropping rotary embeddings (DroPE): all weights trained with {weighted} on text in blocks of "
        f"{data.max_length:,} tokens (documents {data.documents}), {train.batch_size * train.accumulation} blocks a step "
        f"and device, peak learning rate {train.learning_rate:g}, {train.scheduler}"
    )


def _push(recipe: Recipe, folder: Path) -> None:
    """Uploads the result, without what only a resumed run or this machine needs."""
    from huggingface_hub import HfApi

    repository = recipe.output.push_to_hub
    left_out = ["checkpoints/*", "merged/*", "run.json"]
    try:
        api = HfApi()
        name = api.create_repo(repository, private=recipe.output.private, exist_ok=True).repo_id
        api.upload_folder(repo_id=name, folder_path=folder, ignore_patterns=[*left_out, LOCK_FILE])
    # an HTTP library's errors pass through the hub's client, and which library that is depends on its version
    except Exception as error:
        options = " ".join(f"--exclude '{pattern}'" for pattern in left_out)
        raise UserError(
            f"the run is complete in {folder}, but uploading it to {repository!r} failed: {error} Once the hub can "
            "be reached and `hf auth login` was done, run the same command again, which only uploads, or: hf upload "
            f"{repository} {folder} {options}"
        ) from error


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in _PACKAGES}
