"""The end of a training stage: model card, merged model, table, report, upload."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from huggingface_hub import HfApi
from rich.console import Console

from eaftdrope.checkpoints.merge import merge_adapter
from eaftdrope.errors import UserError
from eaftdrope.evaluate import Score, comparison
from eaftdrope.report import page
from eaftdrope.report.card import CardContent, write_model_card
from eaftdrope.ttt.saved import copy_ttt

from .folder import CAPTURE_FILE, MERGED, RunFolder
from .interrupts import LOCK_FILE
from .machine import precision_line, training_device
from .result import loaded_by_one_process
from .settings import TrainingSettings


@dataclass(frozen=True)
class Card:
    """What a stage puts on its model card besides its scores.

    Args:
        base_model: reference of the model that the result is based on; None for a new one.
        title: None for the folder's name.
        sections: markdown sections of its kind.
        learns: the model learns as it reads.
    """

    base_model: str | None
    is_adapter: bool
    datasets: list[str]
    title: str | None
    tags: list[str]
    sections: list[str]
    learns: bool = False


def about_run(settings: TrainingSettings, method: str, command: str) -> dict[str, str]:
    """When and how a run was made, for its card and its report."""
    device = training_device()
    return {
        "command": command,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": f"{device.name}, {precision_line(settings.model.dtype, settings.autocast, device)}",
        "method": method,
    }


def finish(
    folder: RunFolder,
    card: Card,
    before: list[Score],
    after: list[Score],
    console: Console,
    *,
    merge: bool,
    private: bool,
    show_result: Callable[[Console], None],
) -> None:
    """Write what follows from a result and its scores; then, as the last entry, that the run is finished.

    A start that is killed in between is completed by the next one.

    Args:
        merge: write the model with the adapters merged.
        private: make the repository private if the upload creates it.
        show_result: called before the table of scores is printed.

    Raises:
        UserError: the adapters cannot be merged, or the result cannot be uploaded.
    """
    merged = folder.path / MERGED
    _write_card(folder, card, before, after)
    if merge and not merged.is_dir():
        with loaded_by_one_process():
            report = merge_adapter(folder.path, merged)
        console.print(
            f"merged into {report.output_dir}: reloaded logits differ by at most {report.max_abs_difference:.1e}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    if merge and card.learns:
        # also after a kill between the two
        copy_ttt(folder.path, merged)
    show_result(console)
    if after:
        console.print()
        console.print(comparison(before, after))
    # the run is complete, whether or not its report can be drawn
    page.try_write_report(folder.path, console)
    (folder.path / CAPTURE_FILE).unlink(missing_ok=True)
    if folder.uploads:
        _upload(folder, folder.uploads, private=private)
    folder.finish()


def _write_card(folder: RunFolder, card: Card, before: list[Score], after: list[Score]) -> None:
    about = folder.about
    content = CardContent(
        recipe_yaml=(folder.path / "recipe.yaml").read_text(encoding="utf-8"),
        base_model=card.base_model,
        method=about["method"],
        before=before,
        after=after,
        versions=folder.versions,
        hardware=about["device"],
        command=about["command"],
        is_adapter=card.is_adapter,
        datasets=card.datasets,
        title=card.title,
        tags=card.tags,
        sections=card.sections,
        learns=card.learns,
    )
    write_model_card(folder.path, content)


def _upload(folder: RunFolder, repository: str, *, private: bool) -> None:
    """Upload the result, without files that only a resumed run or this machine needs."""
    # states and journals of `eaftdrope ask` hold the texts that were asked about
    excluded = ["checkpoints/*", f"{MERGED}/*", "run.json", "ask/*"]
    try:
        api = HfApi()
        name = api.create_repo(repository, private=private, exist_ok=True).repo_id
        api.upload_folder(repo_id=name, folder_path=folder.path, ignore_patterns=[*excluded, LOCK_FILE])
    # errors of an HTTP library pass through the hub's client, and which library that is depends on its version
    except Exception as error:
        options = " ".join(f"--exclude '{pattern}'" for pattern in excluded)
        raise UserError(
            f"the run is complete in {folder.path}, but uploading it to {repository!r} failed: {error} Once the hub can "
            "be reached and `hf auth login` was done, run the same command again, which only uploads, or: hf upload "
            f"{repository} {folder.path} {options}"
        ) from error
