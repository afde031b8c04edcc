"""The rows of one case as a table for the terminal. A method that could not be measured is listed with the reason."""

from __future__ import annotations

import statistics

from rich.markup import escape
from rich.table import Table

from eaftdrope.run.machine import format_bytes

from .cases import Case

_STYLES = {"ours": "bold cyan", "peer": ""}


def case_table(case: Case, rows: list[dict]) -> Table:
    table = Table(title=f"{case}{_floor(case, rows)}", title_justify="left", title_style="bold", expand=False)
    table.add_column("method", no_wrap=True)
    table.add_column("computes", min_width=30, overflow="fold")
    table.add_column("x floor", justify="right", no_wrap=True)
    table.add_column("lowest-highest", justify="right", no_wrap=True)
    table.add_column("seconds", justify="right", no_wrap=True)
    table.add_column("extra memory", justify="right", no_wrap=True)
    table.add_column("loss err", justify="right", no_wrap=True)
    table.add_column("dX err", justify="right", no_wrap=True)
    table.add_column("dW err", justify="right", no_wrap=True)
    for row in rows:
        style = _STYLES[row["family"]]
        if row["status"] == "ok":
            backend = f" ({row['backend']})" if row["backend"] else ""
            table.add_row(row["method"], row["computes"] + backend, *_figures(row), style=style)
        else:
            reason = f"{escape(row['computes'])}\n[red]{escape(row['reason'])}[/red]"
            table.add_row(row["method"], reason, f"[red]{row['status']}[/red]", style=style)
    return table


def _figures(row: dict) -> list[str]:
    return [
        f"{row['ratio']:.2f}",
        f"{row['ratio_low']:.2f}-{row['ratio_high']:.2f}",
        f"{seconds(row):.3g}",
        "not known" if row["extra_bytes"] is None else format_bytes(row["extra_bytes"]),
        *(_error(row[name]) for name in ("loss_error", "hidden_error", "weight_error")),
    ]


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def seconds(row: dict, who: str = "") -> float:
    """Return seconds by the clock of the row; `who` is "floor_" for the bare products."""
    return row[f"{who}{row['clock']}_seconds"]


def _floor(case: Case, rows: list[dict]) -> str:
    done = [row for row in rows if row["status"] == "ok"]
    if not done:
        return ""
    time = statistics.median(seconds(row, "floor_") for row in done)
    speed = statistics.median(row["floor_gflops"] for row in done)
    clock = {"cpu": "CPU", "wall": "wall", "device": "device"}[done[0]["clock"]]
    number = {2: "two", 3: "three"}[case.products]
    return f"\nfloor: {number} bare matrix products, {time:.3g} {clock} seconds, {speed:,.0f} GFLOP/s"


def place(about: dict) -> str:
    """Return the hardware in one line."""
    where, settings = about["environment"], about["settings"]
    if settings["device"] == "cpu":
        isa = f", oneDNN held to {where['onednn_max_cpu_isa']}" if where["onednn_max_cpu_isa"] else ""
        features = ", ".join(where["processor_features"])
        return f"{where['processor']} ({features}){isa}, {settings['threads']} of {where['cores']} cores"
    index = int(settings["device"].partition(":")[2] or 0)
    device = [device for device in where["devices"] if device["kind"] == "cuda"][index]
    runtime = f"CUDA {where['cuda']}" if where["cuda"] else f"ROCm {where['rocm']}"
    return f"{device['name']}, driver {where['driver']}, {runtime}"
