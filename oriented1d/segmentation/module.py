"""The network, how it is trained, and how it is evaluated."""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table
from torch import Tensor

from oriented1d.models.checkpoints import load_dense_checkpoint
from oriented1d.segmentation import inference
from oriented1d.segmentation.metrics import SegmentationScores
from oriented1d.segmentation.predictions import PredictionWriter
from oriented1d.segmentation.upernet import UPerNet
from oriented1d.training.errors import UserError, blamed_on
from oriented1d.training.optimizer import adamw_options, parameter_groups
from oriented1d.training.schedule import warmup_poly_scheduler


class SemanticSegmenter(L.LightningModule):
    """A UPerNet trained to name pixels.

    The defaults are the paper's recipe for ADE20K, as in the original's configs; docs/segmentation.md has it as a
    table.

    Args:
        network: backbone, of ours or any timm network that has ``features_only`` with four feature maps.
        network_args: further arguments of ``timm.create_model``.
        num_classes: number of classes; must be that of the data.
        drop_path_rate: stochastic depth of the backbone.
        channels, auxiliary_channels: widths of the two heads.
        pretrained: file of weights to start from: a classification checkpoint (official or ours; its oriented kernels
            are cropped), a converted backbone, or a whole segmentation checkpoint of ours or of mmsegmentation.
        lr: peak learning rate, for ``data.total_batch_size`` images a step.
        weight_decay: weight decay, none on biases and one-dimensional parameters.
        layer_decay: factor on the learning rate from one stage to the one before it; None is off, as for backbones that
            are not ours.
        num_layers: of that decay: 6 for tiny, 12 for base.
        warmup_steps: steps of linear warm-up.
        auxiliary_weight: factor of the auxiliary head's loss.
        mode: evaluate images ``whole``, or in windows (``slide``).
        window, window_stride: side of the windows and distance between them, pixels.
        predictions: folder that ``oriented1d predict`` writes.

    Raises:
        UserError: a file or a name does not exist.
    """

    def __init__(
        self,
        network: str = "convnext_tiny_1d",
        network_args: dict[str, Any] | None = None,
        num_classes: int = 150,
        drop_path_rate: float = 0.4,
        channels: int = 512,
        auxiliary_channels: int = 256,
        pretrained: str | None = None,
        lr: float = 1e-4,
        weight_decay: float = 0.05,
        layer_decay: float | None = 0.9,
        num_layers: int = 6,
        warmup_steps: int = 1500,
        auxiliary_weight: float = 0.4,
        mode: Literal["whole", "slide"] = "whole",
        window: int = 512,
        window_stride: int = 341,
        predictions: str = "predictions",
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.lr = lr
        self.weight_decay = weight_decay
        self.layer_decay = layer_decay
        self.num_layers = num_layers
        self.warmup_steps = warmup_steps
        self.auxiliary_weight = auxiliary_weight
        self.infer = (
            inference.whole
            if mode == "whole"
            else functools.partial(inference.slide, window=window, stride=window_stride)
        )
        self.predictions = predictions
        self.class_names: list[str] | None = None
        self.model = UPerNet(network, network_args, num_classes, drop_path_rate, channels, auxiliary_channels)
        if pretrained is not None:
            with blamed_on("model.pretrained"):
                load_dense_checkpoint(self.model, pretrained)
        self.scores = SegmentationScores(num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """``(N, 3, H, W)`` normalised images to ``(N, num_classes, H/4, W/4)`` logits."""
        return self.model(images)

    @property
    def monitors(self) -> dict[str, str]:
        """Checkpoints to keep: name of the file, and the metric whose highest value it is kept for."""
        return {"best": "val/miou"}

    def configure_callbacks(self) -> list[Callback]:
        return [PredictionWriter(self.predictions)]

    def setup(self, stage: str) -> None:
        """Check the data against the network.

        Raises:
            UserError: the numbers of classes differ.
        """
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if data.num_classes != self.num_classes:
            raise UserError(
                f"model.num_classes: expected {data.num_classes}, as data.num_classes, got {self.num_classes}"
            )
        self.class_names = data.class_names or self.class_names

    def configure_optimizers(self) -> Any:
        groups = parameter_groups(
            self.model,
            self.lr,
            self.weight_decay,
            layer_decay=self.layer_decay,
            scheme="stage_wise",
            num_layers=self.num_layers,
        )
        optimizer = torch.optim.AdamW(groups, self.lr, weight_decay=self.weight_decay, **adamw_options(self.trainer))
        self.trainer.fit_loop.setup_data()  # otherwise the batches of an epoch are unknown
        total = self.trainer.estimated_stepping_batches
        if math.isinf(total):
            raise UserError("trainer.max_steps: the schedule needs an end, got neither max_steps nor max_epochs")
        scheduler = warmup_poly_scheduler(optimizer, int(total), self.warmup_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        decode, auxiliary = self.model.losses(*batch, self.auxiliary_weight)
        self.log("train/loss", decode + auxiliary)
        self.log("train/loss_decode", decode)
        self.log("train/loss_auxiliary", auxiliary)
        return decode + auxiliary

    def labels(self, images: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Labels ``(H, W)`` of one image.

        Args:
            images: it at one size, or at several for multi-scale testing with mirror images; ``(3, H, W)`` each.
            size: of the result, pixels.
        """
        batches = [image[None] for image in images]
        if len(batches) == 1:
            return inference.most_likely(self.infer(self.model, batches[0]), size)
        return inference.probabilities(self.model, batches, size, self.infer).argmax(dim=0).to(self.device)

    def validation_step(self, sample: dict[str, Any], batch_idx: int) -> None:
        self.scores.update(self.labels(sample["images"], sample["size"]), sample["labels"])

    def on_validation_epoch_end(self) -> None:
        scores = self.scores.compute()
        self.scores.reset()
        for name in ("miou", "mean_accuracy", "pixel_accuracy"):
            self.log(f"val/{name}", scores[name].float(), prog_bar=name == "miou", sync_dist=True)
        if self.trainer.state.fn == "validate" and self.trainer.is_global_zero:
            self._print(scores)

    def _print(self, scores: dict[str, Tensor]) -> None:
        table = Table(title="Scores of each class, %")
        for column in ("class", "IoU", "accuracy"):
            table.add_column(column, justify="left" if column == "class" else "right")
        names = self.class_names or [str(i) for i in range(self.num_classes)]
        for name, iou, accuracy in zip(names, scores["iou"].tolist(), scores["accuracy"].tolist(), strict=True):
            table.add_row(name, *("-" if math.isnan(value) else f"{100 * value:.2f}" for value in (iou, accuracy)))
        means = (100 * float(scores[name]) for name in ("miou", "mean_accuracy", "pixel_accuracy"))
        table.caption = "mIoU {:.2f}, mean accuracy {:.2f}, pixel accuracy {:.2f}".format(*means)
        Console().print(table)

    def predict_step(self, sample: dict[str, Any], batch_idx: int) -> Tensor:
        """Labels ``(H, W)`` of one image, at its own size."""
        return self.labels(sample["images"], sample["size"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["class_names"] = self.class_names

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.class_names = self.class_names or checkpoint.get("class_names")
