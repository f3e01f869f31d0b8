"""Pictures of oriented kernels: which pixels the taps are, and what weights a network has learned on them."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize, PowerNorm
from matplotlib.figure import Figure
from torch import nn

from oriented1d import geometry
from oriented1d.analysis import figures, networks
from oriented1d.layers import OrientedConv1d
from oriented1d.training.errors import UserError

# Lightness grows with the weight, so that signs are told apart in grey and by colour-blind readers too.
_SIGNED = LinearSegmentedColormap.from_list("signed", ("#00204c", "#8a8a8a", "#ffb000"))
# Its lightest tone is darker than the background, so that a weight of zero is told apart from no tap.
_MAGNITUDE = LinearSegmentedColormap.from_list("magnitude", ("#b3cde3", "#08306b"))


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
        _grid(ax, image, "Blues", Normalize(0.0, 2.5))
        degrees = math.degrees(run.angle)
        ax.set_title(f"{degrees:g}°: {len(run.distinct)} pixels", fontsize=10)
    figure.suptitle(f"{kernel_size} taps at {num_directions} angles (dark: taps that share a pixel)", fontsize=11)
    figures.save(figure, output)


def direction_images(layer: OrientedConv1d) -> dict[float, np.ndarray]:
    """Where, and how strongly, each direction of a layer looks.

    Returns:
        by angle (radians, ascending), float64 ``(K, K)``: the mean over the channels of that angle of the absolute
        weight on each pixel, NaN where there is no tap. Weights of taps that share a pixel are added up first; the
        identity of a ``residual`` layer is left out.
    """
    weights = _weights(layer)
    images = {}
    for angle, runs in _by_angle(layer).items():
        kernels = [kernel_image(weights[channel], run) for run in runs for channel in range(run.start, run.stop)]
        images[angle] = np.mean(np.abs(kernels), axis=0)
    return images


def sum_over_directions(layer: OrientedConv1d) -> np.ndarray:
    """The 2D kernel that a layer acts like: the sum of its :func:`direction_images`.

    Channels of all directions meet in the pointwise layers around an oriented one, so this is where, and how strongly,
    a block looks. Magnitudes are summed, because the signs of different channels have nothing to do with each other.

    Returns:
        float64 ``(K, K)``, NaN where no direction has a tap.
    """
    images = np.array(list(direction_images(layer).values()))
    return np.where(np.isnan(images).all(axis=0), np.nan, np.nansum(images, axis=0))


def draw_kernels(
    model: nn.Module,
    output: str | os.PathLike[str],
    kernels_per_direction: int = 4,
    layer: str | None = None,
    title: str | None = None,
) -> None:
    """Draw kernels along their directions: two rows for each oriented layer, a column for each angle and one for all.

    The upper row has, of each direction, the ``kernels_per_direction`` channels with the largest norms, side by side,
    each scaled to its own largest weight. The lower row has the :func:`direction_images`, on one scale, and at its end
    the :func:`sum_over_directions`, on its own scale. Their tones follow the square root: all directions meet in the
    centre, which would outshine the rest.

    Args:
        model: network with oriented layers.
        output: any file type that matplotlib writes.
        kernels_per_direction: number of channels in each picture of the upper row.
        layer: name of the layer to draw; the first, a middle and the last oriented layer if None.
        title: first line of the figure.

    Raises:
        UserError: ``model`` has no oriented layer, or none of that name.
    """
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, OrientedConv1d)]
    if not layers:
        raise UserError(f"model: expected a network with oriented layers, got {type(model).__name__} without any")
    shown = [layers[i] for i in sorted({0, len(layers) // 2, len(layers) - 1})]
    if layer is not None:
        shown = [(name, m) for name, m in layers if name == layer]
        if not shown:
            raise UserError(f"layer: expected one of {', '.join(name for name, _ in layers)}; got {layer}")
    columns = 1 + max(len(_by_angle(module)) for _, module in shown)
    figure = Figure(figsize=(1.7 * columns + 0.4, 3.8 * len(shown) + 0.8), layout="constrained")
    axes = figure.subplots(2 * len(shown), columns, squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for (name, module), upper, lower in zip(shown, axes[::2], axes[1::2], strict=True):
        weights = _weights(module)
        means = direction_images(module)
        largest = max(float(np.nanmax(image)) for image in means.values())
        for ax, mean_ax, (angle, runs) in zip(upper, lower, _by_angle(module).items(), strict=False):
            of_channel = {channel: run for run in runs for channel in range(run.start, run.stop)}
            strongest = sorted(of_channel, key=lambda c: -np.linalg.norm(weights[c]))[:kernels_per_direction]
            _grid(ax, _tiled([_scaled(weights[c], of_channel[c]) for c in strongest]), _SIGNED, Normalize(-1.0, 1.0))
            ax.set_title(f"{math.degrees(angle):g}°", fontsize=9)
            _grid(mean_ax, means[angle], _MAGNITUDE, _square_root(largest))
        total = sum_over_directions(module)
        _grid(lower[-1], total, _MAGNITUDE, _square_root(float(np.nanmax(total))))
        lower[-1].set_title("sum of this row", fontsize=9)
        label = f"{name or 'layer'}\nK={module.kernel_size}"
        for ax, text in ((upper[0], f"{label}, weights"), (lower[0], "mean magnitude")):
            ax.set_ylabel(text, fontsize=8)
    lines = [
        "upper rows: strongest kernels (light orange: positive, dark blue: negative, each to its own scale)",
        "lower rows: all kernels (darker: stronger; tones follow the square root)",
    ]
    figure.suptitle("\n".join(lines if title is None else [title, *lines]), fontsize=11)
    figures.save(figure, output)


def _weights(layer: OrientedConv1d) -> np.ndarray:
    return layer.weight.detach().to("cpu", torch.float64).flatten(1).numpy()


def _by_angle(layer: OrientedConv1d) -> dict[float, list[geometry.DirectionTaps]]:
    runs: dict[float, list[geometry.DirectionTaps]] = {}
    for run in geometry.layer_taps(layer.angles, layer.kernel_size).runs:
        runs.setdefault(run.angle, []).append(run)
    return dict(sorted(runs.items()))


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


def _square_root(largest: float) -> Normalize:
    return PowerNorm(0.5, 0.0, largest or 1.0)


def _grid(ax: Axes, image: np.ndarray, colours: str | Colormap, norm: Normalize) -> None:
    ax.set_facecolor("#f0f0f0")
    ax.axis("on")
    ax.set(xticks=[], yticks=[])
    ax.imshow(image, cmap=colours, norm=norm, interpolation="nearest")


def main(argv: Sequence[str] | None = None) -> int:
    """``oriented1d draw``."""
    parser = argparse.ArgumentParser(
        prog="oriented1d draw", description="Draw the taps of a kernel at every angle, or the kernels of a network."
    )
    parser.add_argument("model", nargs="?", help="network of ours, such as convnext_tiny_1d (default: draw taps)")
    parser.add_argument("--weights", help="with a network: its checkpoint (default: random, seed 0)")
    parser.add_argument("--ema", action="store_true", help="take the moving average of the weights in the checkpoint")
    parser.add_argument("--layer", help="with a network: the layer to draw (default: the first, a middle and the last)")
    parser.add_argument("--kernel-size", type=int, help="without a network: odd number of taps (default 31)")
    parser.add_argument("--num-directions", type=int, help="without a network: angles in half a turn (default 8)")
    parser.add_argument("--output", help="picture to write (default taps.png; kernels.png with a network)")
    options = parser.parse_args(argv)
    for name in ("kernel_size", "num_directions") if options.model else ("weights", "ema", "layer"):
        if getattr(options, name):
            without = "no network" if options.model else "a network"
            parser.error(f"--{name.replace('_', '-')}: expected {without} beside it")
    if options.model:
        output = options.output or "kernels.png"
        torch.manual_seed(0)
        model = networks.create(options.model, options.weights, options.ema)
        weights = "random weights" if options.weights is None else f"weights of {os.path.basename(options.weights)}"
        average = ", moving average" if options.ema else ""
        draw_kernels(model, output, layer=options.layer, title=f"{options.model}, {weights}{average}")
    else:
        kernel_size = 31 if options.kernel_size is None else options.kernel_size
        num_directions = 8 if options.num_directions is None else options.num_directions
        if kernel_size < 1 or kernel_size % 2 == 0:
            parser.error(f"--kernel-size: expected an odd number, got {kernel_size}")
        if num_directions < 1:
            parser.error(f"--num-directions: expected at least 1, got {num_directions}")
        output = options.output or "taps.png"
        draw_taps(kernel_size, output, num_directions)
    print(f"wrote {output}")
    return 0
