"""Intersection over union and accuracies, from areas summed over all images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class SegmentationScores(Metric):
    """Areas of intersection, union and label of each class, summed over images and devices before any ratio.

    Pixels labelled 255 count for nothing. Classes that occur nowhere have no IoU, classes without labels no accuracy;
    means leave them out. The numbers are those of mmsegmentation's ``IoUMetric``.

    Args:
        num_classes: number of classes.
    """

    full_state_update = False
    confusion: Tensor

    def __init__(self, num_classes: int, **options: Any) -> None:
        super().__init__(**options)
        self.num_classes = num_classes
        # Row: label, column: prediction.
        self.add_state("confusion", torch.zeros(num_classes, num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Add labels ``0 <= label < num_classes`` or 255, and predictions, both integer and of one shape."""
        seen = labels != 255
        pairs = labels[seen].long() * self.num_classes + predictions[seen].long()
        counts = torch.bincount(pairs.flatten(), minlength=self.num_classes**2)
        self.confusion += counts.view(self.num_classes, self.num_classes)

    def compute(self) -> dict[str, Tensor]:
        """``miou``, ``mean_accuracy`` and ``pixel_accuracy``, and ``iou`` and ``accuracy`` of each class, ``(K,)``."""
        areas = self.confusion.double()
        hit, label, predicted = areas.diagonal(), areas.sum(1), areas.sum(0)
        iou, accuracy = hit / (label + predicted - hit), hit / label  # 0 / 0 is nan
        return {
            "miou": iou.nanmean(),
            "mean_accuracy": accuracy.nanmean(),
            "pixel_accuracy": hit.sum() / label.sum(),
            "iou": iou,
            "accuracy": accuracy,
        }
