"""Pictures of oriented kernels: which pixels the taps are, and what weights a network has learned on them."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from oriented1d import geometry
from oriented1d.layers import OrientedConv1d

# Blue to white to red keeps its meaning for colour-blind readers; signs are also told apart by the light grey of zero.
_SIGNED = "RdBu_r"


def kernel_image(weight: np.ndarray, run: geometry.DirectionTaps) -> np.ndarray:
    """One oriented kernel on its pixel grid.

    Args:
        weight: ``(K,)`` weights of a channel.
        run: the taps of that channel's direction.

    Returns:
        float64 array ``(K, K)``: the sum of the weights on each pixel, NaN where the kernel has no tap.
    """
    size = len(weight)
    image = np.full((size, size), np.nan)
    rows, columns = (run.offsets + size // 2).T
    image[rows, columns] = 0.0
    np.add.at(image, (rows, columns), weight)
    return image


def draw_taps(kernel_size: int, output: str | os.PathLike[str], num_directions: int = 8) -> None:
    """Draw the pixels that a kernel of ``kernel_size`` taps reads at each of ``num_directions`` angles.

    Pixels that two taps share are darker. ``output`` is any file type that matplotlib writes.
    """
    layer = geometry.directions(geometry.layer_angles(num_directions, num_directions))
    columns = min(4, num_directions)
    rows = math.ceil(num_directions / columns)
    figure = Figure(figsize=(2.6 * columns, 2.8 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for ax in axes:
        ax.axis("off")
    for ax, run in zip(figure.axes, geometry.layer_taps(layer, kernel_size).runs, strict=False):
        image = kernel_image(np.ones(kernel_size), run)
        _grid(ax, image, "Blues", 0.0, 2.5)
        degrees = math.degrees(run.angle)
        ax.set_title(f"{degrees:g}°: {len(run.distinct)} pixels", fontsize=10)
    figure.suptitle(f"{kernel_size} taps at {num_directions} angles (dark: taps that share a pixel)", fontsize=11)
    _save(figure, output)


def draw_kernels(model: nn.Module, output: str | os.PathLike[str], kernels_per_direction: int = 4) -> None:
    """Draw learned kernels along their directions: a row for each oriented layer, a column for each angle.

    Shows the first, a middle and the last oriented layer of ``model``; of each direction, the
    ``kernels_per_direction`` channels with the largest norms, side by side, each scaled to its own largest weight.

    Raises:
        ValueError: ``model`` has no oriented layer.
    """
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, OrientedConv1d)]
    if not layers:
        raise ValueError(f"model: expected a network with oriented layers, got {type(model).__name__} without any")
    shown = [layers[i] for i in sorted({0, len(layers) // 2, len(layers) - 1})]
    runs_of = [geometry.layer_taps(layer.angles, layer.kernel_size).runs for _, layer in shown]
    columns = max(len(runs) for runs in runs_of)
    figure = Figure(figsize=(1.9 * columns, 2.2 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), columns, squeeze=False)
    for row, ((name, layer), runs) in enumerate(zip(shown, runs_of, strict=True)):
        weights = layer.weight.detach().to("cpu", torch.float64).flatten(1).numpy()
        for ax in axes[row]:
            ax.axis("off")
        for ax, run in zip(axes[row], sorted(runs, key=lambda r: r.angle), strict=False):
            part = weights[run.start : run.stop]
            strongest = np.argsort(-np.linalg.norm(part, axis=1), kind="stable")[:kernels_per_direction]
            _grid(ax, _tiled([_scaled(part[i], run) for i in strongest]), _SIGNED, -1.0, 1.0)
            ax.set_title(f"{math.degrees(run.angle):g}°", fontsize=9)
        axes[row][0].text(
            -0.08, 0.5, f"{name or 'layer'}\nK={layer.kernel_size}", rotation=90, fontsize=8, ha="right", va="center",
            transform=axes[row][0].transAxes,
        )  # fmt: skip
    figure.suptitle("Kernels along their directions (red: positive, blue: negative)", fontsize=11)
    _save(figure, output)


def _scaled(weight: np.ndarray, run: geometry.DirectionTaps) -> np.ndarray:
    image = kernel_image(weight, run)
    largest = np.nanmax(np.abs(image))
    return image / largest if largest > 0 else image


def _tiled(images: Sequence[np.ndarray]) -> np.ndarray:
    """Images on a square of tiles with a gap of two pixels."""
    size = len(images[0])
    side = math.ceil(math.sqrt(len(images)))
    step = size + 2
    sheet = np.full((side * step - 2, side * step - 2), np.nan)
    for i, image in enumerate(images):
        y, x = divmod(i, side)
        sheet[y * step : y * step + size, x * step : x * step + size] = image
    return sheet


def _grid(ax: Axes, image: np.ndarray, colours: str, low: float, high: float) -> None:
    ax.set_facecolor("#f0f0f0")
    ax.axis("on")
    ax.set(xticks=[], yticks=[])
    ax.imshow(image, cmap=colours, vmin=low, vmax=high, interpolation="nearest")


def _save(figure: Figure, output: str | os.PathLike[str]) -> None:
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        figure.savefig(unfinished, dpi=130)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> int:
    """``oriented1d draw``."""
    parser = argparse.ArgumentParser(prog="oriented1d draw", description="Draw the taps of a kernel at every angle.")
    parser.add_argument("--kernel-size", type=int, default=31, help="odd number of taps (default 31)")
    parser.add_argument("--num-directions", type=int, default=8, help="number of angles in half a turn (default 8)")
    parser.add_argument("--output", default="taps.png", help="picture to write (default taps.png)")
    options = parser.parse_args(argv)
    if options.kernel_size < 1 or options.kernel_size % 2 == 0:
        parser.error(f"--kernel-size: expected an odd number, got {options.kernel_size}")
    if options.num_directions < 1:
        parser.error(f"--num-directions: expected at least 1, got {options.num_directions}")
    draw_taps(options.kernel_size, options.output, options.num_directions)
    print(f"wrote {options.output}")
    return 0
