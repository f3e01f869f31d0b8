"""Boxes: anchors, overlaps, the code of a box relative to another, and which ground truth a box belongs to.

Boxes are float tensors ``(..., 4)``: left, top, right, bottom in pixels. The rules are mmdetection's, so that its
numbers can be reproduced.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

Size = tuple[int, int]  # height and width, pixels

_LARGEST_STEP = abs(math.log(16 / 1000))


def base_anchors(stride: int, scale: float = 8.0, ratios: Sequence[float] = (0.5, 1.0, 2.0)) -> Tensor:
    """``(A, 4)`` anchors around the origin, of area ``(scale * stride)**2``; ``ratios`` are height over width."""
    roots = torch.tensor(ratios).sqrt()
    half = torch.stack([stride * scale / roots, stride * scale * roots], dim=1) / 2
    return torch.cat([-half, half], dim=1)


@functools.cache
def _base_anchors_on(device: torch.device, stride: int) -> Tensor:
    return base_anchors(stride).to(device)


def grid_anchors(size: Sequence[int], stride: int, device: torch.device) -> Tensor:
    """``(H * W * A, 4)`` anchors of a feature map of ``size``: by row, then by column, then by ratio; not rounded."""
    ys, xs = (torch.arange(side, device=device) * stride for side in size)
    shifts = torch.stack([xs.repeat(len(ys)), ys.repeat_interleave(len(xs))], dim=1).repeat(1, 2)
    return (shifts[:, None] + _base_anchors_on(device, stride)).flatten(0, 1)


def overlaps(first: Tensor, second: Tensor) -> Tensor:
    """``(M, N)`` intersection over union of ``(M, 4)`` and ``(N, 4)``."""
    areas = [(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) for boxes in (first, second)]
    corner = torch.max(first[:, None, :2], second[None, :, :2])
    sides = (torch.min(first[:, None, 2:], second[None, :, 2:]) - corner).clamp(min=0)
    shared = sides[..., 0] * sides[..., 1]
    return shared / (areas[0][:, None] + areas[1] - shared).clamp(min=1e-6)


def giou(first: Tensor, second: Tensor) -> Tensor:
    """``(N,)`` generalised intersection over union of pairs of boxes ``(N, 4)``."""
    areas = [(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) for boxes in (first, second)]
    inner = (torch.min(first[:, 2:], second[:, 2:]) - torch.max(first[:, :2], second[:, :2])).clamp(min=0)
    outer = (torch.max(first[:, 2:], second[:, 2:]) - torch.min(first[:, :2], second[:, :2])).clamp(min=0)
    shared, hull = inner.prod(1), outer.prod(1).clamp(min=1e-6)
    union = (areas[0] + areas[1] - shared).clamp(min=1e-6)
    return shared / union - (hull - union) / hull


def clip(boxes: Tensor, size: Size) -> Tensor:
    """Boxes moved into an image of ``size``."""
    height, width = size
    xs, ys = boxes[..., 0::2].clamp(min=0, max=width), boxes[..., 1::2].clamp(min=0, max=height)
    return torch.stack([xs, ys], dim=-1).flatten(-2)


def encode(boxes: Tensor, targets: Tensor, stds: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """Steps ``(N, 4)`` that lead from ``boxes`` to ``targets``: of the centre in sides, of the sides as logarithms.

    ``stds`` are the units of the former and the latter.
    """
    centres, sides = ([(b[..., 2:] + b[..., :2]) / 2, b[..., 2:] - b[..., :2]] for b in (boxes, targets))
    (centre, side), (target_centre, target_side) = centres, sides
    return torch.cat([(target_centre - centre) / side / stds[0], (target_side / side).log() / stds[1]], dim=-1)


def decode(boxes: Tensor, steps: Tensor, stds: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """Where ``steps`` ``(..., 4)`` lead from ``boxes``; sides change at most by a factor of 1000 / 16. Not clipped."""
    centre, side = (boxes[..., 2:] + boxes[..., :2]) / 2, boxes[..., 2:] - boxes[..., :2]
    centre = centre + side * (steps[..., :2] * stds[0])
    half = side * (steps[..., 2:] * stds[1]).clamp(-_LARGEST_STEP, _LARGEST_STEP).exp() / 2
    return torch.cat([centre - half, centre + half], dim=-1)


@dataclasses.dataclass(frozen=True)
class Matcher:
    """Which ground truth a box belongs to.

    Attributes:
        positive: overlap from which on a box belongs to the ground truth that it overlaps most.
        negative: overlap below which it is background; in between it is neither.
        lowest: if given, the boxes that overlap a ground truth most (every one of them, in a tie) belong to it from
            this overlap on; of several such ground truths the last counts.
    """

    positive: float
    negative: float
    lowest: float | None = None

    def __call__(self, boxes: Tensor, truths: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Match without waiting for the device.

        Args:
            boxes: ``(N, 4)``.
            truths: ``(G, 4)``.
            allowed: ``(N,)`` bool; the others are neither.

        Returns:
            ``(N,)`` int64: index of the ground truth, -1 for background, -2 for neither.
        """
        if not len(truths) or not len(boxes):
            matches = torch.full((len(boxes),), -1, device=boxes.device)
        else:
            table = overlaps(truths, boxes)
            if allowed is not None:
                table = table.where(allowed, -1.0)
            most, which = table.max(dim=0)
            matches = torch.where(most < self.negative, -1, -2)
            matches = torch.where(most >= self.positive, which, matches)
            if self.lowest is not None:
                best = table.max(dim=1, keepdim=True).values
                indices = torch.arange(len(truths), device=boxes.device)[:, None]
                own = torch.where((table == best) & (best >= self.lowest), indices, -1).max(dim=0).values
                matches = torch.where(own >= 0, own, matches)
        return matches if allowed is None else matches.where(allowed, -2)


def sample(matches: Sequence[Tensor], number: int, positive_part: float) -> list[tuple[Tensor, Tensor]]:
    """Indices of positives and negatives of each image among its ``matches``, at most ``number``, at random.

    At most ``positive_part`` of them are positives; negatives fill up. Both are sorted. The device is waited for once.
    """
    most = int(number * positive_part)
    chosen, counts = [], []
    for match in matches:
        # The largest of random numbers; what does not take part has a negative one.
        chance = torch.rand(len(match), device=match.device)
        for part, limit in ((match >= 0, most), (match == -1, number)):
            chosen.append(torch.where(part, chance, -1.0).topk(min(limit, len(match))).indices)
            counts.append(part.sum())
    numbers = torch.stack(counts).tolist() if counts else []
    result = []
    for i in range(0, len(chosen), 2):
        positives = min(numbers[i], most)
        negatives = min(numbers[i + 1], number - positives)
        result.append((chosen[i][:positives].sort().values, chosen[i + 1][:negatives].sort().values))
    return result
