"""`eaftdrope merge`: one ordinary checkpoint from a trained model and its base, repaired on request."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eaftdrope.errors import UserError

from .terminal import echo, make_console, silence_libraries

if TYPE_CHECKING:
    from rich.table import Table

    from eaftdrope.checkpoints.merge import MergeReport
    from eaftdrope.checkpoints.repair import Kept
    from eaftdrope.checkpoints.repair_options import Repair
    from eaftdrope.checkpoints.streamed import RepairReport

REPAIR_FILE = "repair.json"
"""What was kept of each tensor, beside the repaired model."""


def merge(
    trained: Annotated[
        Path,
        typer.Argument(
            metavar="TRAINED_DIR",
            help="Folder with an adapter; or a whole model, with --base and a repair.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, typer.Argument(metavar="OUTPUT_DIR", help="New folder for the merged model.", show_default=False)
    ],
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float16; by default the base model's own, of a whole model each tensor's.",
            show_default=False,
        ),
    ] = None,
    share: Annotated[
        float,
        typer.Option(help="Repair: position between the base model (0) and the trained one (1).", show_default=True),
    ] = 1.0,
    denoise: Annotated[
        bool, typer.Option("--denoise", help="Repair: keep the singular values of each change that are not noise.")
    ] = False,
    restore: Annotated[
        str | None,
        typer.Option(
            help="Repair: modules that get the base model's weights back, such as q_proj,k_proj.", show_default=False
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Base of a fully trained model; an adapter records its own.", show_default=False),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of --base on the hub.", show_default=False)
    ] = None,
) -> None:
    """Merge an adapter into its base model, save an ordinary checkpoint, reload it with stock transformers and compare
    the logits; OUTPUT_DIR is written only if they agree. A repair is applied before: --share interpolates between the base
    model and the trained one (`compare --match target` reports the share at which a run has gained as much as another, and
    forgotten less), --denoise keeps the part of each weight's change that stands out from noise, and --restore undoes the
    training of some modules. A whole model is repaired tensor by tensor, so it need not fit in memory."""
    from eaftdrope.checkpoints.repair_options import Repair
    from eaftdrope.ttt.saved import CONFIG_FILE, copy_ttt

    silence_libraries(bars=sys.stdout.isatty())
    repair = Repair(share, denoise, _modules(restore))
    if base is None and revision is not None:
        raise UserError("--revision belongs to --base, which is not set; an adapter records its base model.")
    if (trained / CONFIG_FILE).is_file():
        _refuse_repair(trained, repair, base)
        kept = _merge_adapter(trained, output, dtype, repair)
        copy_ttt(trained, output)
    elif base is None:
        kept = _merge_adapter(trained, output, dtype, repair)
    else:
        kept = _repair_model(trained, base, output, dtype, repair, revision)
    if kept:
        make_console().print(kept_table(kept))
        (output / REPAIR_FILE).write_text(json.dumps([asdict(one) for one in kept], indent=1) + "\n", encoding="utf-8")
        echo(f"kept       of every tensor: {output / REPAIR_FILE}")


def _modules(restore: str | None) -> tuple[str, ...]:
    modules = tuple(filter(None, (name.strip() for name in (restore or "").split(","))))
    if restore is not None and not modules:
        raise UserError("--restore: pass at least one module, such as q_proj,k_proj.")
    return modules


def _refuse_repair(trained: Path, repair: Repair, base: str | None) -> None:
    """Refuse what cannot be done to a model that learns as it reads."""
    if repair or base is not None:
        raise UserError(
            f"{trained} learns as it reads, and its fast MLPs have no counterpart in the base model, so it cannot be "
            "repaired. Leave --share, --denoise, --restore and --base out."
        )


def _merge_adapter(trained: Path, output: Path, dtype: str | None, repair: Repair) -> Sequence[Kept]:
    from eaftdrope.checkpoints.merge import merge_adapter

    report = merge_adapter(trained, output, dtype=dtype, repair=repair)
    echo(f"merged     {trained} into {report.base_model}")
    _print_written(report, repair)
    echo(
        f"checked    reloaded logits differ from the live model's by at most {report.max_abs_difference:.1e}, "
        f"KL {max(report.kl, 0):.1e} nats"
        + ("" if report.dtype == "float32" else " (rounding of the weights included)")
    )
    if report.untied:
        echo("untied     the adapter changed only one of the tied embeddings; the head is now stored separately")
    return report.kept


def _repair_model(
    trained: Path, base: str, output: Path, dtype: str | None, repair: Repair, revision: str | None
) -> Sequence[Kept]:
    from eaftdrope.checkpoints.streamed import repair_files

    from .measure import bars

    echo(f"read       {trained} and {base}")
    with bars(make_console()) as start:
        report = repair_files(
            trained, base, output, repair, dtype=dtype, revision=revision, progress=start("repairing")
        )
    _print_written(report, repair)
    echo(f"checked    {report.tensors} tensors with the names and shapes of the trained model's, all finite")
    return report.kept


def _print_written(report: MergeReport | RepairReport, repair: Repair) -> None:
    if repair.share != 1:
        echo(f"share      {repair.share:g} of the way from the base model")
    if repair.denoise:
        echo("denoised   singular values of each change below the Donoho-Gavish threshold were removed")
    if repair.restore:
        echo(f"restored   {', '.join(repair.restore)} of the base model")
    echo(f"written    {report.output_dir}: {report.parameters / 1e6:,.1f} M parameters in {report.dtype}")


def kept_table(kept: Sequence[Kept]) -> Table:
    """Return what was kept of the changes, one row for the tensors of the same name in all layers."""
    from rich.table import Table

    table = Table(caption="Shares of the Frobenius norm of a change; lowest to highest over the layers.")
    for name in ("tensors", "number", "singular values kept", "norm kept"):
        table.add_column(name, justify="left" if name == "tensors" else "right", overflow="fold")
    kinds: dict[str, list[Kept]] = {}
    for one in kept:
        kinds.setdefault(".".join(one.tensor.split(".")[-2:]), []).append(one)
    for kind, ones in kinds.items():
        spectra = [one.spectrum for one in ones if one.spectrum]
        values = f"{_range([s.kept for s in spectra])} of {_range([s.total for s in spectra])}" if spectra else "-"
        norms = [one.norm for one in ones]
        low, high = f"{min(norms):.1%}", f"{max(norms):.1%}"
        table.add_row(kind, str(len(ones)), values, low if low == high else f"{low} to {high}")
    return table


def _range(counts: list[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
