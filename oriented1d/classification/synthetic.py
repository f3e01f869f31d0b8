"""Random images that lie on the device already: the speed of training without that of the input."""

from __future__ import annotations

from collections.abc import Iterator

import lightning as L
import torch
from torch import Tensor

from oriented1d.training.errors import UserError


class RandomImages(L.LightningDataModule):
    """The same random batch again and again, ``(batch_size, 3, image_size, image_size)`` with random labels.

    There is nothing to learn from it, and no validation. ``train/images_per_second`` and the line of each epoch say how
    fast a network trains.

    Args:
        image_size: pixels of a side.
        num_classes: number of labels.
        batch_size: images of a step of one device.
        steps: batches of an epoch.

    Raises:
        UserError: (from ``setup``) for ``validate`` and ``predict``.
    """

    class_names = None

    def __init__(self, image_size: int = 224, num_classes: int = 1000, batch_size: int = 128, steps: int = 100) -> None:
        super().__init__()
        self.image_size = image_size
        self.num_classes = num_classes
        self.batch_size = batch_size
        self.steps = steps

    def setup(self, stage: str) -> None:
        if stage != "fit":
            raise UserError("data: random images are for oriented1d fit alone")

    def train_dataloader(self) -> Batches:
        assert self.trainer is not None
        return Batches(self, self.trainer.strategy.root_device)

    def val_dataloader(self) -> list[tuple[Tensor, Tensor]]:
        return []


class Batches:
    """One batch on a device, ``data.steps`` times."""

    def __init__(self, data: RandomImages, device: torch.device) -> None:
        self.steps = data.steps
        self.images = torch.randn(data.batch_size, 3, data.image_size, data.image_size, device=device)
        self.labels = torch.randint(data.num_classes, (data.batch_size,), device=device)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.steps):
            yield self.images.clone(), self.labels  # mixup works in place
