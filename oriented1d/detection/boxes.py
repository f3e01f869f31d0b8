"""Boxes: anchors, overlaps, the code of a box relative to another, and which ground truth a box belongs to.

Boxes are float tensors ``(..., 4)``: left, top, right, bottom in pixels. The rules are mmdetection's, so that its
numbers can be reproduced.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
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
    ys, xs = (torch.arange(0, side * stride, stride, device=device) for side in size)
    shifts = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), dim=-1).reshape(-1, 1, 1, 2)
    return (shifts + _base_anchors_on(device, stride).unflatten(1, (2, 2))).reshape(-1, 4)


def area(boxes: Tensor) -> Tensor:
    """``(...)``, square pixels, of ``(..., 4)``."""
    low, high = boxes.split(2, dim=-1)
    return _product(high - low)


def _product(sides: Tensor) -> Tensor:
    width, height = sides.unbind(-1)
    return width * height


def overlaps(first: Tensor, second: Tensor) -> Tensor:
    """``(..., M, N)`` intersection over union of ``(..., M, 4)`` and ``(..., N, 4)``."""
    first, second = first[..., :, None, :], second[..., None, :, :]
    (low, high), (other_low, other_high) = (boxes.split(2, dim=-1) for boxes in (first, second))
    shared = _product((torch.min(high, other_high) - torch.max(low, other_low)).clamp(min=0))
    return shared / (area(first) + area(second) - shared).clamp(min=1e-6)


def giou(first: Tensor, second: Tensor) -> Tensor:
    """``(N,)`` generalised intersection over union of pairs of boxes ``(N, 4)``."""
    (low, high), (other_low, other_high) = (boxes.split(2, dim=-1) for boxes in (first, second))
    shared = _product((torch.min(high, other_high) - torch.max(low, other_low)).clamp(min=0))
    hull = _product((torch.max(high, other_high) - torch.min(low, other_low)).clamp(min=0)).clamp(min=1e-6)
    union = (_product(high - low) + area(second) - shared).clamp(min=1e-6)
    return shared / union - (hull - union) / hull


def clip(boxes: Tensor, sides: Tensor) -> Tensor:
    """Boxes moved into their images, whose width and height are ``sides`` ``(..., 2)``."""
    return boxes.clamp(min=0).unflatten(-1, (2, 2)).minimum(sides[..., None, :]).flatten(-2)


def encode(boxes: Tensor, targets: Tensor, stds: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """Steps ``(N, 4)`` that lead from ``boxes`` to ``targets``: of the centre in sides, of the sides as logarithms.

    ``stds`` are the units of the former and the latter.
    """
    (low, high), (target_low, target_high) = (b.split(2, dim=-1) for b in (boxes, targets))
    side, target_side = high - low, target_high - target_low
    shift = ((target_high + target_low) / 2 - (high + low) / 2) / side / stds[0]
    return torch.cat([shift, (target_side / side).log() / stds[1]], dim=-1)


def decode(boxes: Tensor, steps: Tensor, stds: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """Where ``steps`` ``(..., 4)`` lead from ``boxes``; sides change at most by a factor of 1000 / 16. Not clipped."""
    (low, high), (shift, growth) = (x.split(2, dim=-1) for x in (boxes, steps))
    side = high - low
    centre = (high + low) / 2 + side * (shift * stds[0])
    half = side * (growth * stds[1]).clamp(-_LARGEST_STEP, _LARGEST_STEP).exp() / 2
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

    def __call__(self, boxes: Tensor, truths: Tensor, exist: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Match the boxes of each set with its ground truths, without waiting for the device.

        Args:
            boxes: ``(..., A, 4)``.
            truths: ``(..., G, 4)``, of the same sets; G is at least 1.
            exist: ``(..., G)`` bool; the other truths are padding.
            allowed: ``(..., A)`` bool; the other boxes are neither.

        Returns:
            ``(..., A)`` int64: index of the ground truth, -1 for background, -2 for neither.
        """
        valid = exist[..., None] if allowed is None else exist[..., None] & allowed[..., None, :]
        table = overlaps(truths, boxes).masked_fill_(~valid, -1)
        most, which = table.max(dim=-2)
        matches = which.where(most >= self.positive, (most < self.negative).long() - 2)
        if self.lowest is not None:
            best = table.amax(dim=-1, keepdim=True)
            # From 1, so that 0 is none. Nothing overlaps by 2.
            places = torch.arange(1, truths.shape[-2] + 1, dtype=torch.int32, device=boxes.device)[:, None]
            own = ((table == best.masked_fill(best < self.lowest, 2)) * places).amax(dim=-2).long()
            matches = matches.where(own == 0, own - 1)
        return matches if allowed is None else matches.masked_fill(~allowed, -2)


def sample(
    matches: Tensor, image: Tensor, images: int, number: int, positive_part: float
) -> tuple[Tensor, list[int], list[int]]:
    """Positives and negatives of all images, at most ``number`` of each image, at random.

    At most ``positive_part`` of them are positives; negatives fill up. The device is waited for once.

    Args:
        matches: of all images, as :class:`Matcher` gives them.
        image: int64, which image each belongs to; of the shape of ``matches``, or broadcastable to it.
        images: how many there are.
        number: of an image.
        positive_part: of ``number``.

    Returns:
        ``(S,)`` int64 indices of the flat ``matches``: the positives of one image after the other, then the negatives
        likewise; and the numbers of positives and of negatives of each image.
    """
    # Sorted by group, at random within it: positives of each image, negatives of each image, and what is neither.
    group = (image + images * (matches < 0)).masked_fill(matches < -1, 2 * images).flatten()
    key, order = (group * 2**32 + torch.randint(2**32, group.shape, device=group.device)).sort()
    starts = torch.searchsorted(key, torch.arange(0, (2 * images + 1) * 2**32, 2**32, device=key.device)).tolist()
    counts = [end - start for start, end in itertools.pairwise(starts)]
    positives = [min(count, int(number * positive_part)) for count in counts[:images]]
    negatives = [min(count, number - taken) for count, taken in zip(counts[images:], positives, strict=True)]
    parts = [(taken, count - taken) for taken, count in zip(positives + negatives, counts, strict=True)]
    return torch.cat(order[: starts[-1]].split(list(itertools.chain(*parts)))[::2]), positives, negatives
