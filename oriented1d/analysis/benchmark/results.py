"""Rows of a benchmark: where they were measured, as a table, as a CSV file."""

from __future__ import annotations

import csv
import datetime
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import oriented1d
from oriented1d.files import unfinished

_TEXT = ("shape", "layout", "dtype", "direction", "model", "mode", "error")


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    ordered = sorted(values)
    p20, p50, p80 = (ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))] for q in (0.2, 0.5, 0.8))
    return p20, p50, p80


def environment(device: torch.device) -> dict[str, object]:
    """Columns that say when, on what and with what a row was measured."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {
        "date": datetime.date.today().isoformat(),
        "device": name,
        "torch": torch.__version__,
        "timm": metadata.version("timm"),
        "numba": metadata.version("numba"),
        "python": platform.python_version(),
        "oriented1d": oriented1d.__version__,
    }


def write_csv(rows: Sequence[dict[str, object]], output: str | os.PathLike[str], device: torch.device) -> None:
    """Write rows with the columns of :func:`environment` before their own, whole or not at all."""
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    where = environment(device)
    with unfinished(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*where, *rows[0]])
        writer.writeheader()
        writer.writerows({**where, **row} for row in rows)


def print_table(rows: Sequence[dict[str, object]], title: str) -> None:
    """Print rows, without the columns that are empty everywhere."""
    shown = [column for column in rows[0] if any(row[column] != "" for row in rows)]
    table = Table(title=title)
    for column in shown:
        table.add_column(column, justify="left" if column in _TEXT else "right")
    for row in rows:
        table.add_row(*(str(row[column]) for column in shown))
    Console(width=200, markup=False).print(table)
