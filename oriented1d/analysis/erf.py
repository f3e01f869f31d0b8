"""Effective receptive fields: which pixels of an image move the centre of a network's last feature map, and how much.

The score of a pixel is the gradient of the centre's features with respect to it, averaged over images. This is the
measure of RepLKNet (Ding et al., CVPR 2022, section 5 and appendix D), which the original's scripts use too.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import json
import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from matplotlib import patheffects
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from timm.data import create_transform, get_img_extensions, resolve_model_data_config
from torch import Tensor, nn

import oriented1d
from oriented1d.analysis import figures, networks
from oriented1d.files import unfinished
from oriented1d.training.errors import UserError
from oriented1d.training.files import check_writable
from oriented1d.training.images import read_image

SHARES = (0.2, 0.3, 0.5, 0.99)
"""Parts of the contribution whose squares are reported, as in RepLKNet's table of receptive fields."""

SAVE_SECONDS = 10.0
"""How often a run saves what it has."""

_LINE_STYLES = ((0, (1, 1)), "-.", "--", "-")  # one for each of SHARES


def last_feature_map(model: nn.Module, images: Tensor) -> Tensor:
    """``model.forward_features(images)`` as ``(N, C, h, w)``.

    Networks of timm that give ``(N, h, w, C)``, such as Swin, say so in their attribute ``output_fmt``.

    Raises:
        UserError: the model has no ``forward_features``, or its features are tokens or a list rather than a map.
    """
    forward_features: Any = getattr(model, "forward_features", None)
    if forward_features is None:
        raise UserError(f"model: expected a network with forward_features, got {type(model).__name__} without it")
    features = forward_features(images)
    if not isinstance(features, Tensor) or features.dim() != 4:
        got = f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else f"a {type(features).__name__}"
        raise UserError(
            f"model: expected a network whose last features are a map (N, C, h, w) or (N, h, w, C), got {got} "
            f"from {type(model).__name__}; networks of tokens have no centre position"
        )
    return features.permute(0, 3, 1, 2) if getattr(model, "output_fmt", "NCHW") == "NHWC" else features


def contributions(model: nn.Module, images: Tensor) -> Tensor:
    """Scores of the pixels of each image.

    The features of the position ``(h // 2, w // 2)`` go through relu and are summed; the gradient of that sum with
    respect to the image goes through relu and is summed over the image's channels.

    Args:
        model: network in evaluation mode.
        images: ``(N, channels, H, W)``.

    Returns:
        ``(N, H, W)``, nothing negative; NaN for an image whose features at the centre are not finite.

    Source: ``get_input_grad`` of the original's ``visualize_erf.py``.
    """
    images = images.detach().requires_grad_()
    features = last_feature_map(model, images)
    centre = features[:, :, features.shape[2] // 2, features.shape[3] // 2].relu().sum(1)
    (gradient,) = torch.autograd.grad(centre.sum(), images)
    # The derivative of relu at NaN is 0: such an image must not pass for one without contributions.
    return gradient.relu().sum(1).where(centre.isfinite()[:, None, None], torch.nan)


class Images(Sequence[Tensor]):
    """Images of a folder or scikit-learn's digits: each resized, cropped in the centre and normalised for a network.

    Args:
        data: ``"digits"`` for the 1,797 digits of scikit-learn, otherwise a folder. All images in it and below are
            taken in the order of their names, so a folder with one folder for each class is fine too.
        model: its timm data configuration has the normalisation and how images are resized.
        size: the shorter side is resized to this, and the longer one cropped, pixels.

    Attributes:
        names: of the images; files relative to the folder.

    Raises:
        UserError: there is no such folder, or no image in it; from ``images[i]``, if that file cannot be read.
    """

    def __init__(self, data: str, model: nn.Module, size: int) -> None:
        self._sources: list[Path] | list[Image.Image]
        if data == "digits":
            from sklearn.datasets import load_digits

            grey = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)
            self._sources = [Image.fromarray(pixels) for pixels in grey]
            self.names = [f"digit {i}" for i in range(len(grey))]
        else:
            self._sources = _image_files(Path(data))
            self.names = [file.relative_to(data).as_posix() for file in self._sources]
        config = resolve_model_data_config(model)
        self._transform = create_transform(
            size,
            interpolation=config["interpolation"],
            mean=config["mean"],
            std=config["std"],
            crop_pct=1.0,
            crop_mode="center",
        )

    def __len__(self) -> int:
        return len(self._sources)

    def __getitem__(self, index: Any) -> Any:
        source = self._sources[index]
        if isinstance(source, Image.Image):
            return self._transform(source.convert("RGB"))
        return self._transform(Image.fromarray(read_image(source)))


def _image_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"data: expected a folder of images or 'digits', got {folder}, which is no folder")
    extensions = get_img_extensions(as_set=True)
    # Unlike Path.rglob, os.walk can follow links: folders of classes are often linked to.
    files = [Path(root, name) for root, _, names in os.walk(folder, followlinks=True) for name in names]
    images = sorted(file for file in files if file.suffix.lower() in extensions)
    if not images:
        raise UserError(f"data: no image files in {folder} and below")
    return images


@dataclasses.dataclass
class Scores:
    """What a run has added up: ``total`` is float64 ``(H, W)``, the sum over ``count`` of the first ``seen`` images."""

    total: np.ndarray
    count: int
    seen: int

    @property
    def left_out(self) -> int:
        """Images that could not be read, or whose scores were not finite."""
        return self.seen - self.count


def compute(
    model: nn.Module,
    images: Sequence[Tensor],
    number: int = 50,
    batch_size: int = 1,
    partial: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Scores:
    """Add up the contributions of the first ``number`` images, or of as many as there are.

    An image that raises :class:`UserError`, or whose scores are not finite, is named, left out, and replaced by the
    next one. Images are added one at a time in float64, in their order.

    Args:
        model: network in evaluation mode; its device is used.
        images: each ``(channels, H, W)``, all of one size.
        number: images wanted.
        batch_size: images of one backward pass. It affects the result by rounding only.
        partial: file that the run is saved in every :data:`SAVE_SECONDS` and goes on from if it is there. It is left
            when the run is done: remove it once the result is safe.
        settings: plain values that say what is computed; a partial file must have the same ones.
        progress: show a bar.

    Returns:
        The sum. Going on from a partial file gives the same bits as running without a stop.

    Raises:
        UserError: the model has no feature map, the partial file is of other settings, or no image can be used.
    """
    if model.training:
        raise UserError("model: expected evaluation mode, got training mode (call model.eval())")
    settings = dict(settings or {})
    scores = _read_partial(partial, settings) if partial is not None and partial.exists() else None
    device = next(model.parameters()).device
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not progress) as bar:
        task = bar.add_task("images", total=min(number, len(images)), completed=scores.count if scores else 0)
        count, seen = (scores.count, scores.seen) if scores else (0, 0)
        saved = time.monotonic()
        while count < number and seen < len(images):
            batch: dict[int, Tensor] = {}
            while len(batch) < min(batch_size, number - count) and seen < len(images):
                try:
                    batch[seen] = images[seen]
                except UserError as error:
                    print(f"image {seen + 1} left out: {error}")
                seen += 1
            if not batch:
                break
            parts = contributions(model, torch.stack(list(batch.values())).to(device)).double().cpu().numpy()
            if scores is None:
                scores = Scores(np.zeros(parts.shape[1:]), 0, 0)
            for index, part in zip(batch, parts, strict=True):
                if np.isfinite(part).all():
                    scores.total += part
                    count += 1
                else:
                    print(f"image {index + 1} left out: expected finite features and gradients, got NaN or infinity")
            scores.count, scores.seen = count, seen
            bar.update(task, completed=count)
            if partial is not None and time.monotonic() - saved >= SAVE_SECONDS:
                _write_partial(partial, scores, settings)
                saved = time.monotonic()
    if scores is None or not scores.count:
        raise UserError(f"data: none of the {seen} images could be used")
    scores.seen = seen
    return scores


def _write_npz(path: Path, **arrays: Any) -> None:
    with unfinished(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)


def _write_partial(path: Path, scores: Scores, settings: Mapping[str, Any]) -> None:
    _write_npz(path, total=scores.total, count=scores.count, seen=scores.seen, settings=json.dumps(settings))


def _read_partial(path: Path, settings: Mapping[str, Any]) -> Scores:
    try:
        with np.load(path) as file:
            scores = Scores(file["total"], int(file["count"]), int(file["seen"]))
            before = json.loads(str(file["settings"]))
    except PermissionError:
        raise
    except Exception as error:  # what numpy raises for a file that is something else depends on its bytes
        raise UserError(f"output: {path} is no unfinished run that can be read; remove it to start over") from error
    for key in [*settings, *(key for key in before if key not in settings)]:
        if before.get(key) != settings.get(key):
            raise UserError(
                f"output: {path} is an unfinished run with {key} {before.get(key)}, expected {settings.get(key)}; "
                f"go on with the options of that run, or remove the file to start over"
            )
    return scores


@dataclasses.dataclass(frozen=True, eq=False)
class Erf:
    """An effective receptive field: ``matrix`` is float64 ``(S, S)``, the average of the contributions; ``metadata``
    has plain values only (docs/erf.md lists them)."""

    matrix: np.ndarray
    metadata: dict[str, Any]


def save(erf: Erf, output: str | os.PathLike[str]) -> None:
    """Write one ``.npz`` with the arrays ``matrix`` and ``metadata`` (a string of JSON), whole or not at all."""
    _write_npz(Path(output), matrix=erf.matrix, metadata=json.dumps(erf.metadata))


def load(path: str | os.PathLike[str]) -> Erf:
    """Read what :func:`save` wrote.

    Raises:
        UserError: the file is not there or is something else.
    """
    try:
        with np.load(path) as file:
            erf = Erf(file["matrix"], json.loads(str(file["metadata"])))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # what numpy raises for a file that is something else depends on its bytes
        raise UserError(f"{path}: expected a file of `oriented1d erf compute`, got something else") from error
    if erf.matrix.ndim != 2 or erf.matrix.shape[0] != erf.matrix.shape[1]:
        raise UserError(f"{path}: expected a square matrix, got shape {erf.matrix.shape}")
    return erf


def rescaled(matrix: np.ndarray, raw: bool = False) -> np.ndarray:
    """``log10(x + 1)`` of the scores, or the scores as they are if ``raw``, divided by the largest.

    Args:
        matrix: nothing negative.

    Returns:
        float64 of the same shape, in 0 to 1.

    Raises:
        ValueError: the matrix is zero everywhere.

    Source: ``analyze_erf.py`` of the original.
    """
    # log1p keeps scores far below 1, which log10(x + 1) rounds away.
    values = matrix.astype(np.float64) if raw else np.log1p(matrix.astype(np.float64)) / np.log(10)
    if not values.max() > 0:
        raise ValueError("matrix: expected a positive score somewhere, got none")
    return values / values.max()


def square_side(values: np.ndarray, share: float) -> int:
    """Side of the smallest square around the pixel ``(S // 2, S // 2)`` that holds more than ``share`` of the sum.

    Args:
        values: ``(S, S)``, nothing negative.
        share: between 0 and 1.

    Returns:
        pixels: an odd number, or ``S`` if it takes the whole image.

    Source: ``get_rectangle`` of the original, which starts at side 3 and has no answer for the whole image.
    """
    size = len(values)
    distance = np.abs(np.arange(size) - size // 2)
    rings = np.maximum(distance[:, None], distance)
    held = np.cumsum(np.bincount(rings.ravel(), values.ravel()))
    radius = int(np.argmax(held / held[-1] > share))
    return min(2 * radius + 1, size)


def draw(
    fields: Sequence[Erf], names: Sequence[str], output: str | os.PathLike[str], raw: bool = False
) -> list[list[int]]:
    """Draw receptive fields side by side, in pixels of the same size and one scale of colours from 0 to 1.

    The squares of :data:`SHARES` are outlined. ``output`` is any file type that matplotlib writes.

    Returns:
        for each field the sides of its squares, pixels.

    Raises:
        UserError: a field is zero everywhere.
    """
    figure = Figure(figsize=(3.6 * len(fields) + 1.2, 4.4), layout="constrained")
    axes = figure.subplots(1, len(fields), squeeze=False)[0]
    largest = max(len(erf.matrix) for erf in fields)
    outline = [patheffects.withStroke(linewidth=2.6, foreground="black")]
    sides = []
    for ax, erf, name in zip(axes, fields, names, strict=True):
        try:
            values = rescaled(erf.matrix, raw)
        except ValueError as error:
            raise UserError(f"{name}: {error}") from error
        sides.append([square_side(values, share) for share in SHARES])
        first, last = _edges(len(values))
        image = ax.imshow(values, cmap="viridis", vmin=0.0, vmax=1.0, extent=(first, last, last, first))
        for side, style in zip(sides[-1], _LINE_STYLES, strict=True):
            corner = -(side // 2) - 0.5
            ax.add_patch(
                Rectangle((corner, corner), side, side, fill=False, ec="w", lw=1.2, ls=style, path_effects=outline)
            )
        ax.set(xlim=_edges(largest), ylim=_edges(largest)[::-1], title=name, xlabel="pixels from the centre")
    figure.colorbar(image, ax=axes, shrink=0.8, label="score / largest" if raw else "log10(score + 1) / largest")
    handles = [
        Line2D([], [], color="w", lw=1.2, ls=style, path_effects=outline, label=f"{share:.0%}")
        for share, style in zip(SHARES, _LINE_STYLES, strict=True)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(SHARES), title="smallest square that holds")
    figures.save(figure, output)
    return sides


def _edges(size: int) -> tuple[float, float]:
    """Where an image of this side begins and ends when its centre pixel is at 0."""
    return -(size // 2) - 0.5, size - size // 2 - 0.5


def _digest(parts: Iterable[bytes]) -> str:
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(part)
    return hashed.hexdigest()[:16]


def _compute(options: argparse.Namespace) -> int:
    output = Path(options.output)
    check_writable(output.parent, "output")
    # Random weights must be the same when an interrupted run goes on.
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False
    model = networks.create(options.model, options.weights, options.ema, **_size_option(options.model, options.size))
    model.to(options.device).requires_grad_(False)
    images = Images(options.data, model, options.size)
    settings = {
        "model": options.model,
        "weights": options.weights or "random, seed 0",
        "ema": options.ema,
        "size": options.size,
        "data": options.data,
        "images_asked": options.images,
        "device": torch.device(options.device).type,
        "dtype": "float32",
        "names_of_images_sha256": _digest(f"{name}\n".encode() for name in images.names),
        "weights_sha256": _digest(tensor.cpu().numpy().tobytes() for tensor in model.state_dict().values()),
    }
    if len(images) < options.images:
        print(f"data: {options.data} has {len(images)} images, fewer than the {options.images} asked for; all are used")
    partial = output.with_name(output.name + ".partial")
    if partial.exists():
        print(f"going on from {partial}")
    scores = compute(model, images, options.images, options.batch_size, partial, settings, progress=True)
    metadata = {
        **settings,
        "images": scores.count,
        "images_left_out": scores.left_out,
        "versions": {
            "oriented1d": oriented1d.__version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    save(Erf(scores.total / scores.count, metadata), output)
    partial.unlink(missing_ok=True)
    print(f"wrote {output}: {options.model} at {options.size}, average of {scores.count} images")
    return 0


def _size_option(model: str, size: int) -> dict[str, int]:
    # Networks such as Swin are built for one size of images; the others take no such option.
    config = timm.get_pretrained_cfg(model) if timm.is_model(model) else None
    return {"img_size": size} if config is not None and config.fixed_input_size else {}


def _plot(options: argparse.Namespace) -> int:
    names = options.names or [Path(file).stem for file in options.files]
    if len(names) != len(options.files):
        raise UserError(f"names: expected one for each of the {len(options.files)} files, got {len(names)}")
    fields = [load(file) for file in options.files]
    sides = draw(fields, names, options.output, options.raw)
    scale = "raw scores" if options.raw else "log10(score + 1)"
    table = Table(title=f"Side in pixels (area ratio) of the smallest centred square, {scale}")
    for column in ("name", "size", "images", *(f"{share:.0%}" for share in SHARES)):
        table.add_column(column, justify="left" if column == "name" else "right")
    for name, erf, row in zip(names, fields, sides, strict=True):
        size = len(erf.matrix)
        squares = [f"{side} ({side**2 / size**2:.4f})" for side in row]
        table.add_row(name, str(size), str(erf.metadata.get("images", "")), *squares)
    Console(width=160).print(table)
    print(f"wrote {options.output}")
    return 0


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    """``oriented1d erf``."""
    parser = argparse.ArgumentParser(prog="oriented1d erf", description="Effective receptive fields of networks.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("compute", help="measure one network")
    run.add_argument("model", help="name of a network, ours or timm's")
    run.add_argument("--output", required=True, metavar="FILE.npz", help="file to write; the same command continues it")
    run.add_argument("--weights", help="checkpoint, or 'timm' for what timm downloads (default: random, seed 0)")
    run.add_argument("--ema", action="store_true", help="take the moving average of the weights in the checkpoint")
    run.add_argument("--data", default="digits", help="folder of images, or digits (default: %(default)s)")
    run.add_argument("--images", type=_positive, default=50, help="number of images (default: %(default)s)")
    run.add_argument("--size", type=_positive, default=1024, help="side of the images (default: %(default)s)")
    run.add_argument("--batch-size", type=_positive, default=1, help="images at once (default: %(default)s)")
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    run.add_argument("--device", default=default_device, help="cpu or cuda (default: cuda where there is one)")
    plot = commands.add_parser("plot", help="draw receptive fields and print the sizes of their squares")
    plot.add_argument("files", nargs="+", metavar="FILE.npz", help="what compute wrote")
    plot.add_argument("--output", required=True, metavar="FIGURE", help="picture to write")
    plot.add_argument("--raw", action="store_true", help="the scores themselves instead of log10(score + 1)")
    plot.add_argument("--names", nargs="+", help="titles (default: names of the files)")
    options = parser.parse_args(argv)
    if options.command == "plot":
        return _plot(options)
    if options.ema and options.weights in (None, "timm"):
        raise UserError(f"ema: expected a checkpoint file in --weights beside it, got {options.weights or 'none'}")
    return _compute(options)
