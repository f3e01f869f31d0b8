"""Augmentation of images with boxes and masks, as in the original's detection config.

Images are uint8 arrays ``(H, W, 3)`` in RGB. What is random comes from a generator that the caller gives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor
from torch.nn import functional as F

from oriented1d.detection.cascade import Truth
from oriented1d.training.images import MEAN, STD, resize_image, scaled_size, to_tensor

SHORT_SIDES = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)


@dataclasses.dataclass
class Sample:
    """An image with its objects: ``boxes`` ``(G, 4)`` float32, ``labels`` ``(G,)``, ``masks`` ``(G, H, W)`` uint8."""

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    masks: np.ndarray


def resize(sample: Sample, longest: int, shortest: int) -> Sample:
    """Scaled in its own proportions, as large as both bounds (pixels) allow."""
    height, width = sample.image.shape[:2]
    size = scaled_size(height, width, longest, shortest)
    boxes = sample.boxes * np.tile(np.array([size[1] / width, size[0] / height], np.float32), 2)
    boxes[:, 0::2] = boxes[:, 0::2].clip(0, size[1])
    boxes[:, 1::2] = boxes[:, 1::2].clip(0, size[0])
    masks = torch.from_numpy(np.ascontiguousarray(sample.masks))
    if len(masks):
        masks = F.interpolate(masks[:, None], size=size, mode="nearest")[:, 0]
    else:
        masks = masks.new_zeros(0, *size)
    return Sample(resize_image(sample.image, *size), boxes, sample.labels, masks.numpy())


def crop(sample: Sample, top: int, left: int, height: int, width: int) -> Sample:
    """A part of the image; objects without a pixel of their box in it are left out."""
    boxes = sample.boxes - np.array([left, top, left, top], np.float32)
    boxes[:, 0::2] = boxes[:, 0::2].clip(0, width)
    boxes[:, 1::2] = boxes[:, 1::2].clip(0, height)
    kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    area = (slice(top, top + height), slice(left, left + width))
    return Sample(sample.image[area], boxes[kept], sample.labels[kept], sample.masks[kept][(slice(None), *area)])


def mirror(sample: Sample) -> Sample:
    """The mirror image."""
    width = sample.image.shape[1]
    boxes = sample.boxes.copy()
    boxes[:, 0], boxes[:, 2] = width - sample.boxes[:, 2], width - sample.boxes[:, 0]
    return Sample(sample.image[:, ::-1], boxes, sample.labels, sample.masks[:, :, ::-1])


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """Mirror image; then one of two policies: a random scale, or a random scale, a crop and another random scale.

    Attributes:
        short_sides: of the final scale, pixels.
        longest: side that no scale makes longer.
        before_crop: shorter sides before the crop.
        crop: smallest and largest side of the crop.
        mirror: probability of the mirror image.
        mean, std: of the channels, for values from 0 to 1.
    """

    short_sides: Sequence[int] = SHORT_SIDES
    longest: int = 1333
    before_crop: Sequence[int] = (400, 500, 600)
    crop: tuple[int, int] = (384, 600)
    mirror: float = 0.5
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD

    def __call__(self, sample: Sample, random: Generator) -> tuple[Tensor, Truth]:
        """``(3, H, W)`` float32 and its objects."""
        if random.random() < self.mirror:
            sample = mirror(sample)
        if random.random() < 0.5:
            sample = resize(sample, self.longest, int(random.choice(self.before_crop)))
            height, width = (
                int(random.integers(min(side, self.crop[0]), min(side, self.crop[1]) + 1))
                for side in sample.image.shape[:2]
            )
            top = int(random.integers(sample.image.shape[0] - height + 1))
            left = int(random.integers(sample.image.shape[1] - width + 1))
            sample = crop(sample, top, left, height, width)
        sample = resize(sample, self.longest, int(random.choice(self.short_sides)))
        truth = Truth(
            torch.from_numpy(np.ascontiguousarray(sample.boxes)),
            torch.from_numpy(np.ascontiguousarray(sample.labels)),
            torch.from_numpy(np.ascontiguousarray(sample.masks)),
        )
        return to_tensor(sample.image, self.mean, self.std), truth


def pad(images: Sequence[Tensor], multiple: int = 32) -> Tensor:
    """Images ``(3, H_i, W_i)`` to a batch, with zeros at the right and below up to a multiple."""
    height, width = (-(-max(image.shape[i] for image in images) // multiple) * multiple for i in (1, 2))
    batch = images[0].new_zeros(len(images), images[0].shape[0], height, width)
    for place, image in zip(batch, images, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
    return batch


def pad_masks(masks: Tensor, height: int, width: int) -> Tensor:
    """``(G, h, w)`` to ``(G, height, width)`` with zeros."""
    return F.pad(masks, (0, width - masks.shape[2], 0, height - masks.shape[1]))
