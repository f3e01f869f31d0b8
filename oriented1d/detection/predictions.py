"""What ``oriented1d predict`` writes: pictures of detections, and a list of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torchvision.io import write_png
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from oriented1d.detection.cascade import Detections, paste
from oriented1d.detection.results import to_coco, write_json
from oriented1d.files import unfinished
from oriented1d.training.images import read_image
from oriented1d.training.predictions import FolderWriter, palette


def draw(image: Tensor, found: Detections, names: list[str], shown: float) -> Tensor:
    """``(3, H, W)`` uint8 with masks, boxes, names and scores of the detections from the score ``shown`` on."""
    sure = found.scores >= shown
    boxes, labels, scores = found.boxes[sure].cpu(), found.labels[sure].tolist(), found.scores[sure].tolist()
    if not labels:
        return image
    colours = [tuple(int(value) for value in palette(len(names))[label]) for label in labels]
    masks = paste(found.masks[sure].cpu(), boxes, (image.shape[1], image.shape[2]))
    image = draw_segmentation_masks(image, masks, alpha=0.45, colors=colours)
    texts = [f"{names[label]} {score:.2f}" for label, score in zip(labels, scores, strict=True)]
    return draw_bounding_boxes(image, boxes, texts, colours, width=2, label_colors="white", fill_labels=True)


class PredictionWriter(FolderWriter):
    """Writes ``{name}.png`` for each image, and ``detections.json`` in COCO's format with their file names."""

    def __init__(self, folder: str, shown: float) -> None:
        super().__init__(folder)
        self.shown = shown

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_predict_start(trainer, pl_module)
        self._results: list[dict[str, Any]] = []

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        number: int = pl_module.num_classes  # type: ignore[assignment]
        names: list[str] = pl_module.class_names or [str(i) for i in range(number)]  # type: ignore[assignment]
        for found, file, image_id, size in zip(outputs, batch["files"], batch["ids"], batch["originals"], strict=True):
            for result in to_coco(found, image_id, size, list(range(number))):
                self._results.append({"file": file, "class": names[result["category_id"]], **result})
            pixels = torch.from_numpy(read_image(Path(file))).permute(2, 0, 1)
            with unfinished(self.folder / f"{self.name(file)}.png") as partial:
                write_png(draw(pixels, found, names, self.shown), str(partial))

    def on_predict_end(self, trainer: L.Trainer, *args: Any) -> None:
        write_json(self._results, self.folder / "detections.json")
        super().on_predict_end(trainer, *args)
