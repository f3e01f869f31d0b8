"""What ``oriented1d predict`` of the dense tasks writes: files for each image, in one folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import Callback

from oriented1d.training.errors import UserError
from oriented1d.training.files import check_writable


def palette(num_classes: int) -> np.ndarray:
    """``(num_classes, 3)`` uint8 colours, always the same, neighbours far apart in hue and lightness."""
    hues = np.arange(num_classes) * 0.61803399 % 1.0  # the golden ratio spreads any number of them
    lightness = np.array([0.95, 0.65, 0.8])[np.arange(num_classes) % 3]
    sector = hues[:, None] * 6 + np.array([0, 4, 2])
    channels = np.clip(np.abs(sector % 6 - 3) - 1, 0, 1)
    return np.rint(255 * lightness[:, None] * (0.25 + 0.75 * channels)).astype(np.uint8)


class FolderWriter(Callback):
    """Writes files into ``folder``; what a subclass writes of a batch, it writes in ``on_predict_batch_end``."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.world_size > 1:
            raise UserError(f"trainer.devices: predict runs on one device, got {trainer.world_size}")
        check_writable(self.folder, "model.predictions")
        self._names: dict[str, int] = {}

    def name(self, file: str) -> str:
        """Name for what is written of an image, without its ending. Call it once for each image."""
        name = Path(file).stem
        self._names[name] = self._names.get(name, 0) + 1
        # Several folders may have files of one name.
        return name if self._names[name] == 1 else f"{name}_{self._names[name]}"

    def on_predict_end(self, trainer: L.Trainer, *args: Any) -> None:
        print(f"{sum(self._names.values())} images predicted: {self.folder}")
