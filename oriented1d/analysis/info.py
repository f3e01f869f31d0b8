"""What a network is made of: ``oriented1d info``."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from oriented1d.analysis import networks
from oriented1d.analysis.flops import detector_multiply_adds, multiply_adds, run_on_meta
from oriented1d.layers import OrientedConv1d
from oriented1d.training.errors import UserError


@dataclasses.dataclass(frozen=True)
class Published:
    """A line of the paper's tables.

    Attributes:
        network: its name here.
        parameters: trainable parameters of the original's network; None where they are not known.
        gflops: multiply-adds of one image, in 1e9; None where they are not known.
        score: what the table measures, in percent.
    """

    network: str
    parameters: int | None
    gflops: float | None
    score: str


# ImageNet at 224 x 224, top-1 of the moving average of the weights.
CLASSIFICATION = (
    Published("convnext_tiny_2d", 28_589_128, 4.5, "82.0"),
    Published("convnext_tiny_1d", 28_476_040, 4.4, "82.2"),
    Published("convnext_tiny_1dpp", 29_215_880, 4.7, "82.7"),
    Published("convnext_tiny_2dpp", 29_437_000, 4.8, "82.5"),
    Published("convnext_base_2d", 88_591_464, 15.4, "83.7"),
    Published("convnext_base_1d", 88_273_256, 15.3, "83.8"),
    Published("convnext_base_1dpp", 90_292_584, 15.8, "83.8"),
    Published("convnext_base_2dpp", 90_901_608, 15.9, "84.0"),
)

# COCO, GFLOPs at 1280 x 800, AP of boxes and masks of Cascade Mask R-CNN.
DETECTION = (
    Published("convnext_tiny_2d", None, 741, "50.2 / 43.6"),
    Published("convnext_tiny_1d", None, 739, "50.3 / 43.6"),
    Published("convnext_tiny_1dpp", None, 739, "51.3 / 44.5"),
    Published("convnext_tiny_2dpp", None, 741, "51.2 / 44.4"),
    Published("convnext_base_2d", None, 964, "52.4 / 45.2"),
    Published("convnext_base_1d", None, 960, "52.8 / 45.7"),
    Published("convnext_base_1dpp", None, 960, "52.9 / 46.0"),
    Published("convnext_base_2dpp", None, 964, "52.9 / 45.8"),
)
# ADE20K, multi-scale mIoU of UPerNet.
SEGMENTATION = (
    Published("convnext_tiny_2d", None, None, "46.6"),
    Published("convnext_tiny_1d", None, None, "45.2"),
    Published("convnext_tiny_1dpp", None, None, "47.4"),
    Published("convnext_tiny_2dpp", None, None, "48.1"),
    Published("convnext_base_2d", None, None, "49.4"),
    Published("convnext_base_1d", None, None, "49.4"),
    Published("convnext_base_1dpp", None, None, "50.7"),
    Published("convnext_base_2dpp", None, None, "50.2"),
)


def parameters(model: nn.Module) -> int:
    """Number of trainable parameters. Angles are not: they are buffers."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def feature_shapes(model: nn.Module, size: int | tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Shapes, without the batch, of the features that a network of timm or ours names in ``feature_info``.

    Args:
        model: a classifier, or a backbone made with ``features_only=True``. Others have no such features.
        size: height and width of the image in pixels; one number for both.
    """
    info: Any = getattr(model, "feature_info", [])
    shapes: dict[str, tuple[int, ...]] = {}

    def keep(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda module, inputs, output: shapes.update({name: tuple(output.shape[1:])})

    modules = dict(model.named_modules())
    hooks = [
        modules[name].register_forward_hook(keep(name))
        for name in (feature["module"] for feature in info)
        if name in modules
    ]
    try:
        output = run_on_meta(model, size)
    finally:
        for hook in hooks:
            hook.remove()
    if isinstance(output, list):  # a backbone: timm renames its modules and may turn its outputs to (N, C, H, W)
        return {name: tuple(feature.shape[1:]) for name, feature in zip(info.module_name(), output, strict=True)}
    return shapes


def kernel_rows(model: nn.Module) -> list[dict[str, str]]:
    """Layers that see more than one pixel: convolutions and oriented layers, in the order of the modules.

    Keys: ``layer``, ``kind``, ``channels``, ``kernel``, ``stride``, and ``angles`` in degrees, in the order of the
    channels.
    """
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, OrientedConv1d):
            rows.append(
                {
                    "layer": name,
                    "kind": "oriented + identity" if module.residual else "oriented",
                    "channels": str(module.channels),
                    "kernel": str(module.kernel_size),
                    "stride": str(module.stride),
                    "angles": " ".join(f"{math.degrees(angle):g}" for angle in module.angles.angles),
                }
            )
        elif isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1:
            inside, outside = module.in_channels, module.out_channels
            rows.append(
                {
                    "layer": name,
                    "kind": "depthwise" if module.groups == inside == outside > 1 else "convolution",
                    "channels": str(inside) if inside == outside else f"{inside} to {outside}",
                    "kernel": "x".join(map(str, module.kernel_size)),
                    "stride": str(module.stride[0]) if len(set(module.stride)) == 1 else str(module.stride),
                    "angles": "",
                }
            )
    return rows


def comparison(
    published: Sequence[Published], create: Callable[[str], nn.Module], count: Callable[[nn.Module], int]
) -> list[dict[str, object]]:
    """The published numbers of networks beside ours.

    Args:
        published: lines of a table of the paper.
        create: makes our network of a name; the meta device will do.
        count: its multiply-adds at the size of the table.

    Returns:
        For each line ``network``, ``parameters_paper``, ``parameters``, ``gflops_paper``, ``gflops``, ``score_paper``.
    """
    rows: list[dict[str, object]] = []
    for line in published:
        model = create(line.network)
        rows.append(
            {
                "network": line.network,
                "parameters_paper": line.parameters,
                "parameters": parameters(model),
                "gflops_paper": line.gflops,
                "gflops": count(model) / 1e9,
                "score_paper": line.score,
            }
        )
    return rows


def _print_comparison(rows: Sequence[dict[str, object]], title: str, score: str, digits: int) -> None:
    table = Table(title=title)
    table.add_column("network")
    for column in ("parameters, paper", "here", "GFLOPs, paper", "here", f"{score}, paper"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            str(row["network"]),
            "" if row["parameters_paper"] is None else f"{row['parameters_paper']:,}",
            f"{row['parameters']:,}",
            "" if row["gflops_paper"] is None else f"{row['gflops_paper']:.{digits}f}",
            f"{row['gflops']:.{digits + 2}f}",
            str(row["score_paper"]),
        )
    console = Console(width=120)
    console.print(table)
    odd = [
        str(row["network"])
        for row in rows
        if row["gflops_paper"] is not None and f"{row['gflops']:.{digits}f}" != f"{row['gflops_paper']:.{digits}f}"
    ]
    if odd:
        console.print(f"GFLOPs that do not round to the paper's: {', '.join(odd)} (see docs/benchmarks.md)")


def _print_all() -> None:
    from oriented1d.detection import CascadeMaskRCNN
    from oriented1d.segmentation import UPerNet

    with torch.device("meta"):
        rows = comparison(CLASSIFICATION, networks.create, lambda model: multiply_adds(model, 224))
        _print_comparison(rows, "Classification at 224x224 (ImageNet)", "top-1 %", 1)
        rows = comparison(
            DETECTION,
            lambda name: CascadeMaskRCNN(name).eval(),
            lambda model: detector_multiply_adds(model, (800, 1280)),  # type: ignore[arg-type]
        )
        _print_comparison(rows, "Cascade Mask R-CNN at 1280x800 (COCO)", "box / mask AP %", 0)
        rows = comparison(
            SEGMENTATION, lambda name: UPerNet(name).eval(), lambda model: multiply_adds(model, (512, 2048))
        )
        _print_comparison(rows, "UPerNet at 2048x512 (ADE20K)", "mIoU %", 0)


def _print_network(name: str, size: tuple[int, int], features: bool) -> None:
    model = networks.create(name, features_only=True) if features else networks.create(name)
    image = f"{size[0]}x{size[1]}"
    try:
        shapes = feature_shapes(model, size)
        gflops = multiply_adds(model, size) / 1e9
    except (AssertionError, RuntimeError, ValueError) as error:
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"--size: expected a size of images that {name} takes, got {image} ({first_line})") from error
    facts = Table(title=f"{name}, one image of {image}", show_header=False)
    facts.add_row("trainable parameters", f"{parameters(model):,}")
    facts.add_row("GFLOPs (multiply-adds)", f"{gflops:.3f}")
    for feature, shape in shapes.items():
        facts.add_row(f"features of {feature}", " x ".join(map(str, shape)))
    console = Console(width=140)
    console.print(facts)
    rows = kernel_rows(model)
    if not rows:
        return
    layers = Table(title="Kernels of more than one pixel; degrees in the order of the channels")
    for column in rows[0]:
        layers.add_column(column, justify="right" if column in ("channels", "kernel", "stride") else "left")
    for row in rows:
        layers.add_row(*row.values())
    console.print(layers)


def _size(text: str) -> tuple[int, int]:
    parts = text.split("x")
    if len(parts) not in (1, 2) or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"expected pixels, as in 224, or height x width, as in 512x2048, got {text}")
    return int(parts[0]), int(parts[-1])


def main(argv: Sequence[str] | None = None) -> int:
    """``oriented1d info``."""
    parser = argparse.ArgumentParser(
        prog="oriented1d info",
        description="Parameters, GFLOPs, shapes of features, kernel sizes and angles of a network.",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="name of a network of ours or of timm")
    parser.add_argument("--all", action="store_true", help="the paper's tables beside our numbers")
    parser.add_argument("--size", type=_size, help="pixels, as in 224 (the default) or 512x2048, height first")
    parser.add_argument("--features", action="store_true", help="the network as a backbone, without its classifier")
    options = parser.parse_args(argv)
    if options.all == (options.model is not None):
        parser.error("expected the name of a network, or --all")
    if not options.all:
        _print_network(options.model, options.size or (224, 224), options.features)
        return 0
    if options.size or options.features:
        parser.error("--all: the paper's tables have sizes of their own; expected no --size and no --features")
    _print_all()
    return 0
