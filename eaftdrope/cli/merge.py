"""`eaftdrope merge`: one ordinary checkpoint from a trained model and its base."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from eaftdrope.errors import UserError

from .terminal import silence_libraries


def merge(
    trained: Annotated[
        Path,
        typer.Argument(
            metavar="TRAINED_DIR",
            help="Folder with an adapter; or a whole model, with --share and --base.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, typer.Argument(metavar="OUTPUT_DIR", help="New folder for the merged model.", show_default=False)
    ],
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16; by default the base model's own.", show_default=False),
    ] = None,
    share: Annotated[
        float,
        typer.Option(help="Position between the base model (0) and the trained one (1).", show_default=True),
    ] = 1.0,
    base: Annotated[
        str | None,
        typer.Option(help="Base of a fully trained model; an adapter records its own.", show_default=False),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of --base on the hub.", show_default=False)
    ] = None,
) -> None:
    """Merge an adapter into its base model, save an ordinary checkpoint, reload it with stock transformers and compare
    the logits. OUTPUT_DIR is written only if they agree. --share interpolates between the base model and the trained one:
    `compare --match target` reports the share at which a run has gained as much as another, and forgotten less."""
    from eaftdrope.checkpoints.merge import draw_back, merge_adapter
    from eaftdrope.ttt.saved import CONFIG_FILE, copy_ttt

    silence_libraries(bars=sys.stdout.isatty())
    if base is None and revision is not None:
        raise UserError("--revision belongs to --base, which is not set; an adapter records its base model.")
    learns = (trained / CONFIG_FILE).is_file()
    if learns and (share != 1 or base is not None):
        raise UserError(
            f"{trained} learns as it reads, and its fast MLPs have no counterpart in the base model, so it cannot go a part "
            "of the way. Leave --share and --base out."
        )
    if base is None:
        report = merge_adapter(trained, output, dtype=dtype, share=share)
        typer.echo(f"merged     {trained} into {report.base_model}")
    else:
        report = draw_back(trained, base, output, share=share, dtype=dtype, revision=revision)
        typer.echo(f"read       {trained} and {report.base_model}")
    if learns:
        copy_ttt(trained, output)
    if share != 1:
        typer.echo(f"share      {share:g} of the way from the base model")
    typer.echo(f"written    {report.output_dir}: {report.parameters / 1e6:,.1f} M parameters in {report.dtype}")
    typer.echo(
        f"checked    reloaded logits differ from the live model's by at most {report.max_abs_difference:.1e}, "
        f"KL {max(report.kl, 0):.1e} nats"
        + ("" if report.dtype == "float32" else " (rounding of the weights included)")
    )
    if report.untied:
        typer.echo("untied     the adapter changed only one of the tied embeddings; the head is now stored separately")
