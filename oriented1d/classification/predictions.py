"""What ``oriented1d predict`` writes."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any, TextIO

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from timm.data import ImageNetInfo
from torch import Tensor

from oriented1d.training.errors import UserError
from oriented1d.training.files import check_writable

COLUMNS = ("file", "class", "probability", "error")


def class_names(module: Any) -> list[str]:
    """Names by label: those of the checkpoint, ImageNet's for 1000 classes, otherwise the numbers."""
    names = module.class_names
    if names is None and str(module.pretrained).endswith(".ckpt"):
        names = torch.load(module.pretrained, map_location="cpu", weights_only=True).get("class_names")
    if names is not None:
        return names
    if module.num_classes == 1000:
        info = ImageNetInfo()
        return [info.index_to_description(label) for label in range(1000)]
    return [str(label) for label in range(module.num_classes)]


class PredictionWriter(Callback):
    """Writes one row for each image: ``file,class,probability,error``.

    An image that cannot be read has its error in the row and is named on the screen; the run goes on. The file is
    written beside ``path`` and renamed when it is complete.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._stream: TextIO | None = None

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.world_size > 1:
            raise UserError(f"trainer.devices: predict runs on one device, got {trainer.world_size}")
        check_writable(self.path.parent, "model.predictions")
        self._names = class_names(pl_module)
        self._good = self._bad = 0
        self._stream = self._partial.open("w", newline="", encoding="utf-8")
        self._rows = csv.writer(self._stream)
        self._rows.writerow(COLUMNS)

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: tuple[Tensor, Tensor, list[str]],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        labels, probabilities = (values.tolist() for values in outputs)
        files = trainer.datamodule.predict_set.files  # type: ignore[attr-defined]
        for index, error, label, probability in zip(batch[1].tolist(), batch[2], labels, probabilities, strict=True):
            if error:
                self._bad += 1
                print(f"{files[index]}: cannot be read ({error})", flush=True)
                self._rows.writerow([files[index], "", "", error])
            else:
                self._good += 1
                self._rows.writerow([files[index], self._names[label], f"{probability:.6f}", ""])

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self._stream is not None
        self._stream.close()
        os.replace(self._partial, self.path)
        print(f"{self._good} images predicted, {self._bad} could not be read: {self.path}")
        if not self._good:
            raise UserError("data.images: none of the images could be read")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self._stream is not None and not self._stream.closed:
            self._stream.close()
            self._partial.unlink()
