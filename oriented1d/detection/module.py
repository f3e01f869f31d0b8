"""The network, how it is trained, and how it is evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table
from torch import Tensor

from oriented1d.detection.cascade import CascadeMaskRCNN, Detections, Settings, Truth
from oriented1d.detection.predictions import PredictionWriter
from oriented1d.detection.results import NAMES, evaluate, to_coco, write_json
from oriented1d.models.checkpoints import load_dense_checkpoint
from oriented1d.training.callbacks import run_folder
from oriented1d.training.errors import UserError, blamed_on
from oriented1d.training.optimizer import adamw_options, parameter_groups
from oriented1d.training.schedule import warmup_steps_down_scheduler


class ObjectDetector(L.LightningModule):
    """A Cascade Mask R-CNN trained to find objects.

    The defaults are the paper's recipe for COCO, as in the original's configs; docs/detection.md has it as a table.

    Args:
        network: backbone, of ours or any timm network that has ``features_only`` with four feature maps.
        network_args: further arguments of ``timm.create_model``.
        num_classes: number of classes; must be that of the data.
        drop_path_rate: stochastic depth of the backbone (0.4 for tiny, 0.7 for base).
        channels, hidden: widths of the pyramid and of the box heads' linear layer.
        settings: numbers of boxes and thresholds.
        pretrained: file of weights to start from: a classification checkpoint (official or ours; its oriented kernels
            are cropped), a converted backbone, or a whole detection checkpoint of ours or of mmdetection.
        lr: peak learning rate, for ``data.total_batch_size`` images a step.
        weight_decay: weight decay, none on biases and one-dimensional parameters.
        layer_decay: factor on the learning rate from one layer to the one before it (0.7 for tiny, 0.8 for base); None
            is off, as for backbones that are not ours.
        num_layers: of that decay: 6 for tiny, 12 for base.
        warmup_steps: steps of linear warm-up.
        milestones: epochs after which the learning rate is a tenth of what it was.
        results: JSON file in COCO's format that ``oriented1d validate`` writes; None for none.
        predictions: folder that ``oriented1d predict`` writes.
        shown: score from which on ``oriented1d predict`` draws a detection.

    Raises:
        UserError: a file or a name does not exist.
    """

    def __init__(
        self,
        network: str = "convnext_tiny_1d",
        network_args: dict[str, Any] | None = None,
        num_classes: int = 80,
        drop_path_rate: float = 0.4,
        channels: int = 256,
        hidden: int = 1024,
        settings: Settings | None = None,
        pretrained: str | None = None,
        lr: float = 2e-4,
        weight_decay: float = 0.05,
        layer_decay: float | None = 0.7,
        num_layers: int = 6,
        warmup_steps: int = 500,
        milestones: tuple[int, ...] = (27, 33),
        results: str | None = "detections.json",
        predictions: str = "predictions",
        shown: float = 0.5,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.lr = lr
        self.weight_decay = weight_decay
        self.layer_decay = layer_decay
        self.num_layers = num_layers
        self.warmup_steps = warmup_steps
        self.milestones = milestones
        self.results = results
        self.predictions = predictions
        self.shown = shown
        self.class_names: list[str] | None = None
        self.model = CascadeMaskRCNN(network, network_args, num_classes, drop_path_rate, channels, hidden, settings)
        if pretrained is not None:
            with blamed_on("model.pretrained"):
                load_dense_checkpoint(self.model, pretrained)
        self._found: list[dict[str, Any]] = []
        self._seen: list[int] = []

    @property
    def monitors(self) -> dict[str, str]:
        """Checkpoints to keep: name of the file, and the metric whose highest value it is kept for."""
        return {"best": "val/bbox_AP"}

    def configure_callbacks(self) -> list[Callback]:
        return [PredictionWriter(self.predictions, self.shown)]

    def setup(self, stage: str) -> None:
        """Check the data against the network.

        Raises:
            UserError: the numbers of classes differ.
        """
        names = self.trainer.datamodule.class_names  # type: ignore[attr-defined]
        if names is not None and len(names) != self.num_classes:
            raise UserError(
                f"model.num_classes: expected {len(names)}, the categories of the data, got {self.num_classes}"
            )
        self.class_names = names or self.class_names

    def configure_optimizers(self) -> Any:
        groups = parameter_groups(
            self.model, self.lr, self.weight_decay, layer_decay=self.layer_decay, num_layers=self.num_layers
        )
        optimizer = torch.optim.AdamW(groups, self.lr, weight_decay=self.weight_decay, **adamw_options(self.trainer))
        self.trainer.fit_loop.setup_data()  # otherwise the batches of an epoch are unknown
        steps = self.trainer.num_training_batches // self.trainer.accumulate_grad_batches
        scheduler = warmup_steps_down_scheduler(
            optimizer, self.warmup_steps, [int(epoch * steps) for epoch in self.milestones]
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        truths = [Truth(*parts) for parts in zip(batch["boxes"], batch["labels"], batch["masks"], strict=True)]
        losses = self.model.losses(batch["images"], batch["sizes"], truths)
        total = torch.stack(list(losses.values())).sum()
        number = len(batch["sizes"])
        self.log("train/loss", total, batch_size=number)
        self.log_dict({f"train/{name}": loss for name, loss in losses.items()}, batch_size=number)
        return total

    def detect(self, batch: dict[str, Any]) -> list[Detections]:
        """Detections of each image of a batch, in pixels of the original images."""
        return self.model(batch["images"], batch["sizes"], batch["scales"])

    def on_validation_epoch_start(self) -> None:
        self._found, self._seen = [], []

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        categories = sorted(self.trainer.datamodule.annotations.cats)  # type: ignore[attr-defined]
        for found, number, size in zip(self.detect(batch), batch["ids"], batch["originals"], strict=True):
            self._found += to_coco(found, number, size, categories)
            self._seen.append(number)

    def on_validation_epoch_end(self) -> None:
        found, seen = self._found, self._seen
        scores: dict[str, float] = {}
        if self.trainer.world_size > 1:
            gathered: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(gathered, (found, seen))
            found = [result for part, _ in gathered for result in part]
            seen = [number for _, part in gathered for number in part]
        if self.trainer.is_global_zero:
            scores = evaluate(self.trainer.datamodule.annotations, found, sorted(seen))  # type: ignore[attr-defined]
        if self.trainer.world_size > 1:
            shared = [scores]
            torch.distributed.broadcast_object_list(shared)
            scores = shared[0]
        for name, value in scores.items():
            self.log(f"val/{name}", value, prog_bar=name.endswith("_AP"), sync_dist=True)
        if self.trainer.is_global_zero and not self.trainer.sanity_checking:
            self._report(found, scores)

    def _report(self, found: list[dict[str, Any]], scores: dict[str, float]) -> None:
        if self.trainer.state.fn != "validate":
            folder = run_folder(self.trainer)
            if folder is not None and folder.is_dir():
                write_json(found, folder / "detections.json")
            return
        table = Table(title="COCO's average precision, %")
        table.add_column("")
        for name in NAMES:
            table.add_column(name, justify="right")
        for kind in ("bbox", "segm"):
            values = [scores[f"{kind}_{name}"] for name in NAMES]
            table.add_row(kind, *("-" if value < 0 else f"{100 * value:.2f}" for value in values))
        Console().print(table)
        if self.results is not None:
            write_json(found, Path(self.results))
            print(f"wrote {self.results}")

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[Detections]:
        return self.detect(batch)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["class_names"] = self.class_names

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.class_names = self.class_names or checkpoint.get("class_names")
