"""What ``oriented1d predict`` writes: label maps and pictures of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from PIL import Image
from torch import Tensor

from oriented1d.files import unfinished
from oriented1d.training.images import read_image
from oriented1d.training.predictions import FolderWriter, palette


def overlay(image: np.ndarray, labels: np.ndarray, num_classes: int, opacity: float = 0.5) -> np.ndarray:
    """The image ``(H, W, 3)`` under the colours of its labels ``(H, W)``; labels 255 leave it as it is."""
    colours = palette(num_classes)
    known = labels < num_classes
    mixed = image.astype(np.float32)
    mixed[known] = (1 - opacity) * mixed[known] + opacity * colours[labels[known]]
    return np.rint(mixed).astype(np.uint8)


class PredictionWriter(FolderWriter):
    """Writes ``{name}_labels.png`` (the class of each pixel, from 0) and ``{name}_overlay.png`` for each image.

    For those with labels also ``{name}_comparison.png``: the image, its labels and the prediction side by side.
    """

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert isinstance(outputs, Tensor)
        num_classes: int = pl_module.num_classes  # type: ignore[assignment]
        labels = outputs.cpu().numpy().astype(np.uint8 if num_classes <= 256 else np.uint16)
        name = self.name(batch["file"])
        self._save(labels, f"{name}_labels.png")
        image = read_image(Path(batch["file"]))
        predicted = overlay(image, labels, num_classes)
        self._save(predicted, f"{name}_overlay.png")
        if "labels" in batch:
            truth = overlay(image, batch["labels"].cpu().numpy(), num_classes)
            self._save(np.concatenate([image, truth, predicted], axis=1), f"{name}_comparison.png")

    def _save(self, pixels: np.ndarray, name: str) -> None:
        with unfinished(self.folder / name) as partial:
            Image.fromarray(pixels).save(partial)
