"""From a network's logits at a quarter of the size to labels of the image: whole, in windows, at several scales.

The rules are mmsegmentation's, so that the published numbers can be reproduced. Logits at the size of the original
image are only ever made for a few classes at a time: memory on the device does not grow with classes times pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from oriented1d.segmentation.upernet import resize

Network = Callable[[Tensor], Tensor]
_NUMBERS_AT_ONCE = 2**26  # 256 MiB of logits at the size of the original image


def whole(network: Network, image: Tensor) -> Tensor:
    """Logits ``(N, K, H, W)`` of images ``(N, 3, H, W)`` in one go."""
    return resize(network(image), image.shape[2:])


def slide(network: Network, image: Tensor, window: int = 512, stride: int = 341) -> Tensor:
    """Logits ``(N, K, H, W)`` of images ``(N, 3, H, W)``, averaged over overlapping windows.

    Windows at the right and lower border are moved back into the image; an image smaller than a window is taken as it
    is, without padding. Only one window is on its way at a time.

    Args:
        network: images to logits of any smaller size.
        image: normalised images.
        window: side of the windows, pixels.
        stride: distance between their corners, pixels.
    """
    height, width = image.shape[2:]
    total: Tensor | None = None
    counts = image.new_zeros(1, 1, height, width)
    for top in _corners(height, window, stride):
        for left in _corners(width, window, stride):
            area = (..., slice(top, min(top + window, height)), slice(left, min(left + window, width)))
            logits = whole(network, image[area])
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], height, width)
            total[area] += logits
            counts[area] += 1
    assert total is not None
    return total / counts


def _corners(size: int, window: int, stride: int) -> list[int]:
    steps = max(size - window + stride - 1, 0) // stride + 1
    return [max(min(i * stride + window, size) - window, 0) for i in range(steps)]


def _resized(logits: Tensor, size: Sequence[int]) -> Iterator[tuple[slice, Tensor]]:
    """``(1, K, H, W)`` logits in float32 at another size, a few classes at a time."""
    at_once = max(1, _NUMBERS_AT_ONCE // (size[0] * size[1]))
    for first in range(0, logits.shape[1], at_once):
        part = slice(first, min(first + at_once, logits.shape[1]))
        yield part, resize(logits[:, part].float(), size)


def most_likely(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Labels ``(H, W)``, int64, at ``size`` of the logits ``(1, K, h, w)`` of one image."""
    best = torch.full(tuple(size), -torch.inf, device=logits.device)
    labels = torch.zeros(tuple(size), dtype=torch.int64, device=logits.device)
    for part, resized in _resized(logits, size):
        value, label = resized[0].max(dim=0)
        better = value > best
        best = torch.where(better, value, best)
        labels = torch.where(better, label + part.start, labels)
    return labels


def probabilities(
    network: Network, images: Sequence[Tensor], size: Sequence[int], infer: Callable[[Network, Tensor], Tensor] = whole
) -> Tensor:
    """Probabilities ``(K, *size)`` of one image, in host memory: averaged over scales, each with its mirror image.

    Args:
        network: images to logits.
        images: the image at several sizes, ``(1, 3, H, W)`` each.
        size: of the result, pixels.
        infer: :func:`whole` or :func:`slide`.
    """
    total = torch.zeros(0)
    for image in images:
        for mirrored in (False, True):
            logits = infer(network, image.flip(3) if mirrored else image)
            logits = logits.flip(3) if mirrored else logits
            if not total.numel():
                total = torch.zeros(logits.shape[1], *size)
            norm = torch.full(tuple(size), -torch.inf, device=logits.device)
            for _, resized in _resized(logits, size):
                norm = torch.logaddexp(norm, resized[0].logsumexp(dim=0))
            for part, resized in _resized(logits, size):
                total[part] += (resized[0] - norm).exp().cpu()
    return total / (2 * len(images))
