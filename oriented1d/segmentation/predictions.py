"""What ``oriented1d predict`` writes: label maps and pictures of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch import Tensor

from oriented1d.files import unfinished
from oriented1d.training.errors import UserError
from oriented1d.training.files import check_writable
from oriented1d.training.images import read_image


def palette(num_classes: int) -> np.ndarray:
    """``(num_classes, 3)`` uint8 colours, always the same, neighbours far apart in hue and lightness."""
    hues = np.arange(num_classes) * 0.61803399 % 1.0  # the golden ratio spreads any number of them
    lightness = np.array([0.95, 0.65, 0.8])[np.arange(num_classes) % 3]
    sector = hues[:, None] * 6 + np.array([0, 4, 2])
    channels = np.clip(np.abs(sector % 6 - 3) - 1, 0, 1)
    return np.rint(255 * lightness[:, None] * (0.25 + 0.75 * channels)).astype(np.uint8)


def overlay(image: np.ndarray, labels: np.ndarray, num_classes: int, opacity: float = 0.5) -> np.ndarray:
    """The image ``(H, W, 3)`` under the colours of its labels ``(H, W)``; labels 255 leave it as it is."""
    colours = palette(num_classes)
    known = labels < num_classes
    mixed = image.astype(np.float32)
    mixed[known] = (1 - opacity) * mixed[known] + opacity * colours[labels[known]]
    return np.rint(mixed).astype(np.uint8)


class PredictionWriter(Callback):
    """Writes ``{name}_labels.png`` (the class of each pixel, from 0) and ``{name}_overlay.png`` for each image."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.world_size > 1:
            raise UserError(f"trainer.devices: predict runs on one device, got {trainer.world_size}")
        check_writable(self.folder, "model.predictions")
        self._names: dict[str, int] = {}

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
        name = Path(batch["file"]).stem
        self._names[name] = self._names.get(name, 0) + 1
        if self._names[name] > 1:  # files of one name in several folders
            name = f"{name}_{self._names[name]}"
        self._save(labels, f"{name}_labels.png")
        self._save(overlay(read_image(Path(batch["file"])), labels, num_classes), f"{name}_overlay.png")

    def _save(self, pixels: np.ndarray, name: str) -> None:
        with unfinished(self.folder / name) as partial:
            Image.fromarray(pixels).save(partial)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        print(f"{sum(self._names.values())} images predicted: {self.folder}")
