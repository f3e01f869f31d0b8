"""Training speed of the dense tasks: ``oriented1d benchmark segmentation`` and ``detection``.

A step is what ``oriented1d fit`` does with a batch that is already on the device: losses under autocast, gradients,
AdamW, on a GPU the fused one. Images are random. Truths are drawn, the same for every network: seven objects an image,
as COCO has. So are the boxes that the stages of a detector get: see :func:`proposals_replaced`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import random
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from oriented1d.analysis.benchmark.network import Measurement, autocast, isolated, speed, times
from oriented1d.analysis.benchmark.results import quantiles
from oriented1d.operator.layout import memory_format

if TYPE_CHECKING:
    from oriented1d.detection.cascade import CascadeMaskRCNN, RPNHead, Truth

OBJECTS = 7  # of an image
PROPOSALS = 2000  # of an image


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the benchmark.

    Attributes:
        task: ``"segmentation"`` (UPerNet, 150 classes) or ``"detection"`` (Cascade Mask R-CNN, 80 classes).
        model: name of a network of ours or of timm, the backbone.
        batch: images.
        height, width: pixels.
        dtype: of autocast; ``"float32"`` for none. Weights are float32.
        layout: of images and weights, ``"contiguous"`` or ``"channels_last"``.
        device: ``"cpu"`` or ``"cuda"``, with or without a number.
        warmup: steps before those that are timed.
        runs: timed steps.
        sizes: steps with changing sizes, before all others; 0 for none.
    """

    task: str
    model: str
    batch: int
    height: int
    width: int
    dtype: str
    layout: str
    device: str
    warmup: int
    runs: int
    sizes: int


@dataclasses.dataclass(frozen=True)
class DenseMeasurement(Measurement):
    """What one line gave.

    Attributes:
        changing: seconds of ``Case.sizes`` steps, each with another size, in a process that had none before; and of the
            same steps again.
    """

    changing: tuple[float, float] | None


def measure(case: Case) -> DenseMeasurement:
    """Measure one line in this process."""
    torch.manual_seed(0)
    device = torch.device(case.device)
    model = _model(case).to(device, memory_format=memory_format(case.layout == "channels_last")).train()  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=device.type == "cuda")
    losses: dict[str, Callable[..., Tensor]] = {"segmentation": _segmentation_loss, "detection": _detection_loss}

    def train(batch: tuple[object, ...]) -> None:
        optimizer.zero_grad()
        with autocast(device, case.dtype):
            total = losses[case.task](model, *batch)
        total.backward()
        optimizer.step()

    changing = None
    if case.sizes:
        train(_batch(case, 64, 64, device))  # the libraries start
        first, second = (_seconds(train, case, device) for _ in range(2))
        changing = first, second
    batch = _batch(case, case.height, case.width, device)

    def step() -> None:
        train(batch)

    times(step, device, case.warmup)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    ms = times(step, device, case.runs)
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    return DenseMeasurement(ms, peak, changing)


def _seconds(train: Callable[[tuple[object, ...]], None], case: Case, device: torch.device) -> float:
    total = 0.0
    for height, width in sizes(case.sizes, case.height, case.width):
        batch = _batch(case, height, width, device)
        _wait(device)
        start = time.perf_counter()
        train(batch)
        _wait(device)
        total += time.perf_counter() - start
    return total


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def sizes(number: int, height: int, width: int) -> Iterator[tuple[int, int]]:
    """Sizes of padded batches, pixels: from 0.6 of the largest to it, multiples of 32, upright and wide."""
    draw = random.Random(0)
    for _ in range(number):
        scale = draw.uniform(0.6, 1)
        sides = (max(32, round(side * scale * draw.uniform(0.8, 1) / 32) * 32) for side in (height, width))
        h, w = sides
        yield (h, w) if draw.random() < 0.7 else (w, h)


def _model(case: Case) -> nn.Module:
    if case.task == "segmentation":
        from oriented1d.segmentation.upernet import UPerNet

        return UPerNet(case.model)
    from oriented1d.detection.cascade import CascadeMaskRCNN

    return CascadeMaskRCNN(case.model)


def _batch(case: Case, height: int, width: int, device: torch.device) -> tuple[Any, ...]:
    """Images and labels, or images, truths and proposals: what the loss of the task takes."""
    images = torch.randn(case.batch, 3, height, width, device=device)
    images = images.contiguous(memory_format=memory_format(case.layout == "channels_last"))
    draw = torch.Generator().manual_seed(0)  # the making of a network draws from the common one
    if case.task == "segmentation":
        return images, torch.randint(150, (case.batch, height, width), generator=draw).to(device)
    from oriented1d.detection.cascade import Truth

    truths, rois = [], []
    sides = torch.tensor([width, height])
    for i in range(case.batch):
        corners = torch.rand(OBJECTS, 2, generator=draw) * sides * 0.6
        boxes = torch.cat([corners, corners + (0.05 + 0.35 * torch.rand(OBJECTS, 2, generator=draw)) * sides], 1)
        rois.append(F.pad(_proposals(boxes, sides, draw), (1, 0), value=i))
        labels, boxes = torch.randint(80, (OBJECTS,), generator=draw).to(device), boxes.to(device)
        x, y = torch.arange(width, device=device), torch.arange(height, device=device)[:, None]
        left, top, right, bottom = boxes[:, :, None, None].unbind(1)
        masks = (x >= left) & (x < right) & (y >= top) & (y < bottom)
        truths.append(Truth(boxes, labels, masks.to(torch.uint8)))
    return images, truths, torch.cat(rois).to(device)


def _proposals(truths: Tensor, sides: Tensor, draw: torch.Generator) -> Tensor:
    """``(PROPOSALS, 4)`` boxes in an image of width and height ``sides``.

    A quarter are ``truths`` ``(G, 4)``, moved and scaled a little: they overlap them by 0.5 to 1. The others are
    anywhere, of sizes much as COCO's objects have: 4 in 10 small, 3 in 10 medium.
    """
    from oriented1d.detection.boxes import clip

    def between(low: float, high: float, number: int, columns: int = 2) -> Tensor:
        return low + (high - low) * torch.rand(number, columns, generator=draw)

    near = truths[torch.randint(len(truths), (PROPOSALS // 4,), generator=draw)]
    near_sides = near[:, 2:] - near[:, :2]
    near_centres = (near[:, 2:] + near[:, :2]) / 2 + near_sides * between(-0.15, 0.15, len(near))
    number = PROPOSALS - len(near)
    side = sides.prod().sqrt() * between(math.log(1 / 80), math.log(0.6), number, 1).exp()
    root = between(-0.35, 0.35, number, 1).exp()  # of the ratio of height and width
    centres = torch.cat([near_centres, between(0, 1, number) * sides])
    half = torch.cat([near_sides * between(-0.2, 0.2, len(near)).exp(), torch.cat([side / root, side * root], 1)]) / 2
    return clip(torch.cat([centres - half, centres + half], 1), sides)


@contextlib.contextmanager
def proposals_replaced(head: RPNHead, rois: Tensor) -> Iterator[None]:
    """Proposals are computed and suppressed as ever, and then ``rois`` ``(R, 5)`` take their place.

    The proposals of random weights lie on top of each other for one backbone and apart for another. The gradient of
    RoIAlign adds up by atomics, which wait for each other where boxes overlap: 22 or 40 ms a step, by chance.
    """
    compute = head.proposals

    def replaced(*arguments: Any) -> tuple[Tensor, Tensor]:
        compute(*arguments)
        return rois, rois.new_ones(len(rois))

    head.proposals = replaced  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del head.proposals


def _segmentation_loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return sum(model.losses(images, labels, 0.4))  # type: ignore[operator, return-value]


def _detection_loss(model: CascadeMaskRCNN, images: Tensor, truths: list[Truth], rois: Tensor) -> Tensor:
    size = (images.shape[2], images.shape[3])
    with proposals_replaced(model.rpn_head, rois):
        losses = model.losses(images, [size] * len(images), truths)
    return torch.stack(list(losses.values())).sum()


def run(options: argparse.Namespace) -> list[dict[str, object]]:
    """One row for each network and layout, in the order given."""
    rows = []
    height, width = options.size
    for model in options.models:
        for layout in options.layouts:
            case = Case(
                options.command,
                model,
                options.batch_size,
                height,
                width,
                options.dtype,
                layout,
                str(options.device),
                options.warmup,
                options.runs,
                options.changing_sizes,
            )
            row = row_of(case, isolated(measure, case))
            print(f"{model} {layout}: {row['error'] or str(row['img_per_s_p50']) + ' images/s'}", flush=True)
            if row["changing_first_s"]:
                print("  {changing_sizes} sizes: {changing_first_s} s, again {changing_again_s} s".format(**row))
            rows.append(row)
    return rows


def row_of(case: Case, result: DenseMeasurement | str) -> dict[str, object]:
    """A line of the table and the CSV file; ``result`` is a measurement, or what went wrong.

    ``steady_s`` is what as many steps of the size of the timed ones take, which is the largest.
    """
    first = again = steady = ""
    if not isinstance(result, str) and result.changing is not None:
        first, again = (f"{seconds:.2f}" for seconds in result.changing)
        steady = f"{case.sizes * quantiles(result.ms)[1] / 1e3:.2f}"
    return {
        "task": case.task,
        "model": case.model,
        "batch": case.batch,
        "size": f"{case.height}x{case.width}",
        "dtype": case.dtype,
        "layout": case.layout,
        "warmup": case.warmup,
        "runs": case.runs,
        **speed(case.batch, result),
        "changing_sizes": case.sizes or "",
        "changing_first_s": first,
        "changing_again_s": again,
        "steady_s": steady,
        "error": result if isinstance(result, str) else "",
    }
