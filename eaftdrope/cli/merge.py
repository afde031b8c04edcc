"""`eaftdrope merge`: an adapter and its base model become one ordinary checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from eaftdrope.cli.quiet import quieten


def merge(
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER_DIR", help="Folder with adapter_config.json.", show_default=False)
    ],
    output: Annotated[
        Path, typer.Argument(metavar="OUTPUT_DIR", help="New folder for the merged model.", show_default=False)
    ],
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16; by default the base model's own.", show_default=False),
    ] = None,
) -> None:
    """Merge an adapter into its base model, save an ordinary checkpoint, reload it with stock transformers and compare
    the logits. Nothing is left under OUTPUT_DIR unless they agree."""
    from eaftdrope.trainer.merge import merge_adapter

    quieten(bars=sys.stdout.isatty())
    report = merge_adapter(adapter, output, dtype=dtype)
    typer.echo(f"merged     {adapter} into {report.base_model}")
    typer.echo(f"written    {report.output_dir}: {report.parameters / 1e6:,.1f} M parameters in {report.dtype}")
    typer.echo(
        f"checked    reloaded logits differ from base + adapter by at most {report.max_abs_difference:.1e}, "
        f"KL {max(report.kl, 0):.1e} nats"
        + ("" if report.dtype == "float32" else " (rounding of the weights included)")
    )
    if report.untied:
        typer.echo("untied     the adapter changed only one of the tied embeddings; the head is now stored by itself")
