"""Augmentation and scaling of images with their label maps, as in mmsegmentation's pipeline for ADE20K.

Images are uint8 arrays ``(H, W, 3)`` in RGB, labels uint8 arrays ``(H, W)`` where 255 is ignored. What is random comes
from a generator that the caller gives.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image
from torch import Tensor

from oriented1d.training.images import MEAN, STD, resize_image, scaled_size, to_tensor

IGNORED = 255


def resize_labels(labels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Nearest pixel."""
    return np.array(Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST))


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """Random scale, crop, mirror image and distortion of colours.

    Attributes:
        scale: longer and shorter side, in pixels, that an image is made to fit at ratio 1.
        ratios: range of the random factor on ``scale``.
        crop: side of the square crop, pixels; smaller images are filled up, with labels that are ignored.
        most_of_a_class: a crop in which one class has more than this part of the labelled pixels is drawn again, up to
            ten times.
        mirror: probability of the mirror image.
        distort: whether colours are distorted.
        mean, std: of the channels, for values from 0 to 1.
    """

    scale: tuple[int, int] = (2048, 512)
    ratios: tuple[float, float] = (0.5, 2.0)
    crop: int = 512
    most_of_a_class: float = 0.75
    mirror: float = 0.5
    distort: bool = True
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD

    def __call__(self, image: np.ndarray, labels: np.ndarray, random: Generator) -> tuple[Tensor, Tensor]:
        """``(3, crop, crop)`` float32 and ``(crop, crop)`` int64."""
        ratio = random.uniform(*self.ratios)
        longest, shortest = (int(side * ratio) for side in self.scale)
        size = scaled_size(image.shape[0], image.shape[1], longest, shortest)
        image, labels = resize_image(image, *size), resize_labels(labels, *size)
        area = self._area(labels, random)
        image, labels = image[area], labels[area]
        if random.random() < self.mirror:
            image, labels = image[:, ::-1], labels[:, ::-1]
        if self.distort:
            image = distort(image, random)
        pixels = torch.zeros(3, self.crop, self.crop)
        targets = torch.full((self.crop, self.crop), IGNORED, dtype=torch.int64)
        height, width = labels.shape
        pixels[:, :height, :width] = to_tensor(image, self.mean, self.std)
        targets[:height, :width] = torch.from_numpy(np.ascontiguousarray(labels)).long()
        return pixels, targets

    def _area(self, labels: np.ndarray, random: Generator) -> tuple[slice, slice]:
        for _ in range(11):
            top, left = (int(random.integers(max(side - self.crop, 0) + 1)) for side in labels.shape)
            area = slice(top, top + self.crop), slice(left, left + self.crop)
            counts = np.bincount(labels[area].ravel(), minlength=256)[:IGNORED]
            if np.count_nonzero(counts) > 1 and counts.max() < self.most_of_a_class * counts.sum():
                break
        return area


def distort(image: np.ndarray, random: Generator) -> np.ndarray:
    """Brightness, contrast, saturation and hue, each with probability 1/2; contrast before or after the two of colour.

    Brightness adds up to 32 grey levels, contrast and saturation are factors from 0.5 to 1.5, hue turns by up to 18 of
    180 degrees.
    """

    def half() -> bool:
        return bool(random.random() < 0.5)

    def affine(pixels: np.ndarray, factor: float, add: float) -> np.ndarray:
        return np.clip(pixels.astype(np.float32) * factor + add, 0, 255).astype(np.uint8)

    if half():
        image = affine(image, 1.0, random.uniform(-32, 32))
    contrast_first = half()
    if contrast_first and half():
        image = affine(image, random.uniform(0.5, 1.5), 0.0)
    saturation = random.uniform(0.5, 1.5) if half() else 1.0
    turn = round(random.integers(-18, 18) * 256 / 180) if half() else 0
    if saturation != 1.0 or turn:
        hsv = np.array(Image.fromarray(np.ascontiguousarray(image)).convert("HSV"))
        hsv[..., 0] += np.uint8(turn % 256)  # wraps around
        hsv[..., 1] = affine(hsv[..., 1], saturation, 0.0)
        image = np.array(Image.merge("HSV", [Image.fromarray(hsv[..., i]) for i in range(3)]).convert("RGB"))
    if not contrast_first and half():
        image = affine(image, random.uniform(0.5, 1.5), 0.0)
    return image
