"""Boxes: anchors, overlaps, the code of a box relative to another, and which ground truth a box belongs to.

Boxes are float tensors ``(..., 4)``: left, top, right, bottom in pixels. The rules are mmdetection's, so that its
numbers can be reproduced.
"""

from __future__ import annotations

import dataclasses
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


def grid_anchors(size: Sequence[int], stride: int, device: torch.device) -> Tensor:
    """``(H * W * A, 4)`` anchors of a feature map of ``size``: by row, then by column, then by ratio; not rounded."""
    ys, xs = (torch.arange(side, device=device) * stride for side in size)
    shifts = torch.stack([xs.repeat(len(ys)), ys.repeat_interleave(len(xs))], dim=1).repeat(1, 2)
    return (shifts[:, None] + base_anchors(stride).to(device)).flatten(0, 1)


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
    return torch.stack([boxes[..., i].clamp(min=0, max=width if i % 2 == 0 else height) for i in range(4)], dim=-1)


def encode(boxes: Tensor, targets: Tensor, stds: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Steps ``(N, 4)`` that lead from ``boxes`` to ``targets``: of the centre in sides, of the sides as logarithms."""
    centres, sides = ([(b[..., 2:] + b[..., :2]) / 2, b[..., 2:] - b[..., :2]] for b in (boxes, targets))
    (centre, side), (target_centre, target_side) = centres, sides
    steps = torch.cat([(target_centre - centre) / side, (target_side / side).log()], dim=-1)
    return steps / steps.new_tensor(stds)


def decode(boxes: Tensor, steps: Tensor, stds: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Where ``steps`` ``(..., 4)`` lead from ``boxes``; sides change at most by a factor of 1000 / 16. Not clipped."""
    steps = steps * steps.new_tensor(stds)
    centre, side = (boxes[..., 2:] + boxes[..., :2]) / 2, boxes[..., 2:] - boxes[..., :2]
    centre = centre + side * steps[..., :2]
    half = side * steps[..., 2:].clamp(-_LARGEST_STEP, _LARGEST_STEP).exp() / 2
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

    def __call__(self, boxes: Tensor, truths: Tensor) -> Tensor:
        """``(N,)`` int64: index of the ground truth, -1 for background, -2 for neither."""
        if not len(truths) or not len(boxes):
            return torch.full((len(boxes),), -1, device=boxes.device)
        table = overlaps(truths, boxes)
        most, which = table.max(dim=0)
        matches = torch.full_like(which, -2)
        matches[most < self.negative] = -1
        matches = torch.where(most >= self.positive, which, matches)
        if self.lowest is not None:
            best = table.max(dim=1).values
            for index in (best >= self.lowest).nonzero().flatten().tolist():
                matches[table[index] == best[index]] = index
        return matches


def sample(matches: Tensor, number: int, positive_part: float) -> tuple[Tensor, Tensor]:
    """Indices of positives and negatives among ``matches``, at most ``number``, at random.

    At most ``positive_part`` of them are positives; negatives fill up.
    """

    def some(indices: Tensor, count: int) -> Tensor:
        if len(indices) <= count:
            return indices
        return indices[torch.randperm(len(indices), device=indices.device)[:count]]

    positives = some((matches >= 0).nonzero().flatten(), int(number * positive_part))
    negatives = some((matches == -1).nonzero().flatten(), number - len(positives))
    return positives, negatives
