"""Figures of benchmarks, drawn from their rows. ``device`` is the name of what they were measured on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure

from oriented1d.analysis.figures import COLOURS, HATCHES, MARKERS

Row = dict[str, object]

FILE_TYPES = frozenset(FigureCanvasBase.get_supported_filetypes())
_ANGLES = range(0, 180, 45)
_COPY = {"color": "black", "linestyle": ":", "label": "copy of the images"}


def _style(i: int) -> dict[str, str]:
    return {"color": COLOURS[i], "marker": MARKERS[i]}


def _different(rows: Sequence[Row], *columns: str) -> list[tuple[object, ...]]:
    return list(dict.fromkeys(tuple(row[column] for column in columns) for row in rows))


def _numbers(rows: Sequence[Row], column: str) -> list[float]:
    return [float(str(row[column])) for row in rows]


def _panels(rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(max(6.0, 3.6 * columns), 1.0 + 2.8 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _legend(figure: Figure, ax: Axes) -> None:
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 3), fontsize=9)


def _against_angle(ax: Axes) -> None:
    ax.set(xlabel="angle (degrees)", xticks=_ANGLES)
    ax.grid(alpha=0.3)


def operator_figure(rows: Sequence[Row], device: str) -> Figure:
    """Medians of ``benchmark operator``: a line for each direction and one for the copy.

    Rows of one angle each are drawn against the angle, with a panel for each shape, dtype and layout. Rows of layers
    are drawn against the size of the images, with a panel for each dtype and layout.
    """
    if all(row["angle"] == "8 directions" for row in rows):
        return _operator_against_size(rows, device)
    shapes, formats = _different(rows, "shape"), _different(rows, "dtype", "layout")
    figure, axes = _panels(len(shapes), len(formats))
    for (shape,), line in zip(shapes, axes, strict=True):
        for (dtype, layout), ax in zip(formats, line, strict=True):
            shown = [row for row in rows if (row["shape"], row["dtype"], row["layout"]) == (shape, dtype, layout)]
            for i, (direction,) in enumerate(_different(shown, "direction")):
                part = [row for row in shown if row["direction"] == direction]
                ax.plot(_numbers(part, "angle"), _numbers(part, "ms_p50"), label=direction, **_style(i))
            once = [row for row in shown if row["direction"] == "forward"]
            ax.plot(_numbers(once, "angle"), _numbers(once, "copy_ms"), **_COPY)
            _against_angle(ax)
            ax.set(title=f"{shape}, {dtype}, {layout}", ylabel="ms")
            ax.title.set_fontsize(9)
            ax.set_ylim(bottom=0)
    figure.suptitle(f"{_kernel_of(rows)}, one angle at a time\n{device}", fontsize=11)
    _legend(figure, axes[0, 0])
    return figure


def _operator_against_size(rows: Sequence[Row], device: str) -> Figure:
    formats = _different(rows, "dtype", "layout")
    figure, axes = _panels(1, len(formats))
    for (dtype, layout), ax in zip(formats, axes[0], strict=True):
        shown = [row for row in rows if (row["dtype"], row["layout"]) == (dtype, layout)]
        shown.sort(key=lambda row: _numel(row["shape"]))
        for i, (direction,) in enumerate(_different(shown, "direction")):
            part = [row for row in shown if row["direction"] == direction]
            ax.plot([_numel(row["shape"]) for row in part], _numbers(part, "ms_p50"), label=direction, **_style(i))
        once = [row for row in shown if row["direction"] == "forward"]
        sizes = [_numel(row["shape"]) for row in once]
        ax.plot(sizes, _numbers(once, "copy_ms"), **_COPY)
        ax.set(title=f"{dtype}, {layout}", xlabel="images (N x C x H x W)", ylabel="ms", xscale="log", yscale="log")
        ax.set_xticks(sizes, [str(row["shape"]) for row in once], rotation=30, ha="right", fontsize=8)
        ax.set_xticks([], minor=True)
        ax.grid(alpha=0.3, which="both")
    figure.suptitle(f"{_kernel_of(rows)}, 8 directions\n{device}", fontsize=11)
    _legend(figure, axes[0, 0])
    return figure


def _numel(shape: object) -> int:
    return math.prod(int(part) for part in str(shape).split("x"))


def _kernel_of(rows: Sequence[Row]) -> str:
    return f"Oriented convolution, kernel size {rows[0]['kernel_size']}, stride {rows[0]['stride']}"


def table5_figure(rows: Sequence[Row], device: str) -> Figure:
    """Medians of ``benchmark table5`` against the angle: a panel for each size of image and of kernel."""
    lines: list[tuple[str, dict[str, str]]] = [
        ("forward_ms", {**_style(0), "label": "forward"}),
        ("forward_backward_without_grad_input_ms", {**_style(1), "label": "forward + gradient of the weights"}),
        ("forward_backward_ms", {**_style(2), "label": "forward + backward"}),
        (
            "pytorch_horizontal_forward_ms",
            {"color": COLOURS[0], "linestyle": "--", "label": "PyTorch, horizontal: forward"},
        ),
        (
            "pytorch_horizontal_forward_backward_ms",
            {"color": COLOURS[2], "linestyle": "-.", "label": "PyTorch, horizontal: forward + backward"},
        ),
        ("copy_ms", _COPY),
    ]
    sizes, kernel_sizes = _different(rows, "size"), _different(rows, "kernel_size")
    figure, axes = _panels(len(sizes), len(kernel_sizes))
    for (size,), across in zip(sizes, axes, strict=True):
        for (kernel_size,), ax in zip(kernel_sizes, across, strict=True):
            part = [row for row in rows if (row["size"], row["kernel_size"]) == (size, kernel_size)]
            for column, style in lines:
                ax.plot(_numbers(part, "angle"), _numbers(part, column), **style)
            _against_angle(ax)
            ax.set(title=f"{size}x{size}, kernel size {kernel_size}", ylabel="ms", yscale="log")
    figure.suptitle(f"One angle at a time, float32, contiguous\n{device}", fontsize=11)
    _legend(figure, axes[0, 0])
    return figure


def network_figure(rows: Sequence[Row], device: str) -> Figure:
    """Median images/s of ``benchmark network`` as bars: the modes of a network side by side, values on the bars."""
    models, modes = _different(rows, "model"), _different(rows, "mode")
    rates = {(row["model"], row["mode"]): row["img_per_s_p50"] for row in rows}
    figure = Figure(figsize=(max(6.0, 1.5 + 0.9 * len(models) * len(modes)), 4.5), layout="constrained")
    ax = figure.subplots()
    width = 0.8 / len(modes)
    for i, (mode,) in enumerate(modes):
        centres = np.arange(len(models)) + (i - (len(modes) - 1) / 2) * width
        values = [rates[model, mode] for (model,) in models]
        heights = [float(str(value)) if value != "" else 0.0 for value in values]
        bars = ax.bar(
            centres, heights, width, label=str(mode), color=COLOURS[i], hatch=HATCHES[i], edgecolor="black", lw=0.6
        )
        labels = ["failed" if value == "" else _rounded(height) for value, height in zip(values, heights, strict=True)]
        ax.bar_label(bars, labels, fontsize=8, padding=2)
    first = rows[0]
    ax.set_xticks(range(len(models)), [str(model) for (model,) in models], rotation=20, ha="right")
    how = (f"batch {first['batch']}", f"{first['size']}x{first['size']}", first["dtype"], first["layout"])
    compiled = {"none": "not compiled", "default": "compiled"}.get(str(first["compile"]), first["compile"])
    ax.set(ylabel="images/s", title=f"{', '.join(map(str, how))}, {compiled}\n{device}")
    ax.title.set_fontsize(11)
    ax.margins(y=0.12)
    ax.legend()
    return figure


def _rounded(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"
