"""The network, how it is trained, and how it is evaluated."""

from __future__ import annotations

import math
from typing import Any, Literal

import lightning as L
import timm
import torch
from lightning.pytorch.callbacks import Callback
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from oriented1d.classification.data import in_one_only
from oriented1d.classification.predictions import PredictionWriter
from oriented1d.models import load_checkpoint  # importing the networks makes them known to timm
from oriented1d.training.errors import UserError, blamed_on
from oriented1d.training.optimizer import adamw_options, parameter_groups
from oriented1d.training.schedule import warmup_cosine_scheduler
from oriented1d.training.sharding import FullySharded, shard


class ImageClassifier(L.LightningModule):
    """A timm network trained to name images.

    The defaults are the paper's recipe for ImageNet, as in the original's training script; docs/classification.md has
    it as a table.

    A checkpoint holds the network under ``model.`` and its moving average under ``ema.module.``.

    Args:
        network: name of the network in timm, ours included.
        network_args: further arguments of ``timm.create_model``.
        num_classes: number of classes; must be that of the data.
        drop_path_rate: stochastic depth (0.1 for tiny, 0.5 for base).
        pretrained: file of weights to start from: an official file, a plain state dict, safetensors, or a checkpoint of
            ours.
        use_ema: take the moving average, where there is one, from ``pretrained``, and to predict.
        optimizer: timm's name of the optimizer.
        lr: peak learning rate, for ``data.total_batch_size`` images a step.
        weight_decay: weight decay, none on biases and one-dimensional parameters.
        layer_decay: factor on the learning rate from one layer to the one before it; None is off.
        warmup_epochs: epochs of linear warm-up from 0.
        final_lr: learning rate at the end of the cosine.
        label_smoothing: weight of the uniform distribution in the targets.
        mixup, cutmix: alphas of the two; 0 is off.
        mix_switch_prob: probability of cutmix where both are on.
        ema_decay: decay of the moving average, updated once an optimizer step; None is off.
        compile: compile the network with ``torch.compile`` for ``fit``: faster steps on a GPU, after up to a minute at
            the start. ``reduce-overhead`` and ``max-autotune`` record CUDA graphs, for when the host cannot keep up.
            Weights and checkpoints are the same.
        predictions: CSV file that ``oriented1d predict`` writes.

    Raises:
        UserError: a file or a name does not exist.
    """

    def __init__(
        self,
        network: str = "convnext_tiny_1d",
        network_args: dict[str, Any] | None = None,
        num_classes: int = 1000,
        drop_path_rate: float = 0.1,
        pretrained: str | None = None,
        use_ema: bool = False,
        optimizer: str = "adamw",
        lr: float = 4e-3,
        weight_decay: float = 0.05,
        layer_decay: float | None = None,
        warmup_epochs: float = 20,
        final_lr: float = 1e-6,
        label_smoothing: float = 0.1,
        mixup: float = 0.8,
        cutmix: float = 1.0,
        mix_switch_prob: float = 0.5,
        ema_decay: float | None = 0.9999,
        compile: bool | Literal["reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = False,
        predictions: str = "predictions.csv",
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.optimizer = optimizer
        self.lr = lr
        self.weight_decay = weight_decay
        self.layer_decay = layer_decay
        self.warmup_epochs = warmup_epochs
        self.final_lr = final_lr
        self.ema_decay = ema_decay
        self.compiled = compile
        self.pretrained = pretrained
        self.use_ema = use_ema
        self.predictions = predictions
        self.class_names: list[str] | None = None

        try:
            self.model: nn.Module = timm.create_model(
                network, num_classes=num_classes, drop_path_rate=drop_path_rate, **(network_args or {})
            )
        except (RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"model.network: cannot make {network} with {network_args or {}}: {error}") from error
        if pretrained is not None:
            with blamed_on("model.pretrained"):
                load_checkpoint(self.model, pretrained, ema=use_ema)
        self.ema: ModelEmaV3 | None = None
        self.mix: Mixup | None = None
        self.loss: nn.Module
        if mixup > 0 or cutmix > 0:
            self.mix = Mixup(
                mixup, cutmix, switch_prob=mix_switch_prob, label_smoothing=label_smoothing, num_classes=num_classes
            )
            self.loss = SoftTargetCrossEntropy()
        else:
            self.loss = LabelSmoothingCrossEntropy(label_smoothing)
        self.metrics = nn.ModuleDict(
            {
                f"top{k}{suffix}": MulticlassAccuracy(num_classes, top_k=min(k, num_classes), average="micro")
                for k in (1, 5)
                for suffix in ("", "_ema")
            }
        )

    def forward(self, images: Tensor) -> Tensor:
        """``(N, 3, H, W)`` normalised images to ``(N, num_classes)`` logits."""
        return self.model(images)

    @property
    def monitors(self) -> dict[str, str]:
        """Checkpoints to keep: name of the file, and the metric whose highest value it is kept for."""
        return {"best": "val/top1"} | ({"best_ema": "val/top1_ema"} if self.ema_decay is not None else {})

    def configure_callbacks(self) -> list[Callback]:
        return [PredictionWriter(self.predictions)]

    def setup(self, stage: str) -> None:
        """Check the data against the network, and start the moving average.

        Raises:
            UserError: the number of classes is not that of the data, or batches cannot be mixed.
        """
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if data.class_names is not None and len(data.class_names) != self.num_classes:
            raise UserError(
                f"model.num_classes: expected {len(data.class_names)}, the number of classes of the data, "
                f"got {self.num_classes}"
            )
        if stage == "fit":
            if self.mix is not None and data.batch_size % 2:
                raise UserError(f"data.batch_size: mixup and cutmix need an even number, got {data.batch_size}")
            if self.ema_decay is not None:
                if str(self.trainer.precision).endswith("16-true"):
                    raise UserError(
                        f"trainer.precision: a moving average needs float32 weights, got {self.trainer.precision}; "
                        "use bf16-mixed, or --model.ema_decay null"
                    )
                self.ema = _average(self.model, self.ema_decay, isinstance(self.trainer.strategy, FullySharded))
            self.class_names = data.class_names
            accumulated = self.trainer.accumulate_grad_batches
            if self.compiled in ("reduce-overhead", "max-autotune") and accumulated > 1:
                raise UserError(
                    "trainer.accumulate_grad_batches: expected 1 with the CUDA graphs of --model.compile "
                    f"{self.compiled}, got {accumulated}"
                )
            if self.compiled:
                # Else the network is compiled in the parts that DDP averages together, to average during the backward
                # pass: that costs the host more than it saves.
                torch._dynamo.config.optimize_ddp = False
                self.model.compile(mode=self.compiled if isinstance(self.compiled, str) else None)

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, FullySharded):
            if self.compiled:
                raise UserError("model.compile: expected false with trainer.strategy fsdp, got true")
            for network in [self.model] + ([self.ema.module] if self.ema is not None else []):
                shard(network, self.trainer.strategy.device_mesh["data_parallel"])

    def configure_optimizers(self) -> Any:
        groups = parameter_groups(self.model, self.lr, self.weight_decay, layer_decay=self.layer_decay)
        options = adamw_options(self.trainer) if self.optimizer == "adamw" else {}
        optimizer = create_optimizer_v2(groups, self.optimizer, lr=self.lr, weight_decay=self.weight_decay, **options)
        self.trainer.fit_loop.setup_data()  # otherwise the batches of an epoch are unknown when max_steps ends the run
        total_steps = self.trainer.estimated_stepping_batches
        if math.isinf(total_steps):
            raise UserError("trainer.max_epochs: the schedule needs an end, got neither max_epochs nor max_steps")
        steps_per_epoch = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
        scheduler = warmup_cosine_scheduler(
            optimizer, int(total_steps), round(self.warmup_epochs * steps_per_epoch), self.lr, self.final_lr
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        if self.mix is not None:
            images, labels = self.mix(images, labels)
        loss = self.loss(self.model(images), labels)
        self.log("train/loss", loss)
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            self.ema.update(self.model)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        networks = {"": self.model} | ({"_ema": self.ema.module} if self.ema is not None else {})
        for suffix, network in networks.items():
            logits = network(images)
            self.log(f"val/loss{suffix}", F.cross_entropy(logits, labels), batch_size=len(labels), sync_dist=True)
            for k in (1, 5):
                metric = self.metrics[f"top{k}{suffix}"]
                assert isinstance(metric, MulticlassAccuracy)
                metric.update(logits, labels)
                self.log(f"val/top{k}{suffix}", metric, batch_size=len(labels), prog_bar=k == 1)

    def predict_step(self, batch: tuple[Tensor, Tensor, list[str]], batch_idx: int) -> tuple[Tensor, Tensor]:
        """Most likely class and its probability, ``(N,)`` each."""
        network = self.ema.module if self.ema is not None and self.use_ema else self.model
        probability, label = network(batch[0]).float().softmax(dim=-1).max(dim=-1)
        return label, probability

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["class_names"] = self.class_names

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        names, found = checkpoint.get("class_names"), self.trainer.datamodule.class_names  # type: ignore[attr-defined]
        if names is not None and found is not None and names != found:
            raise UserError(
                "data.root: expected the classes that the checkpoint was trained on, got others; in one of the two "
                f"only: {in_one_only(names, found)}"
            )
        self.class_names = names
        if self.trainer.state.fn != "fit":
            has_ema = any(key.startswith("ema.") for key in checkpoint["state_dict"])
            if self.use_ema and not has_ema:
                raise UserError("model.use_ema: expected a checkpoint with a moving average, got one without")
            self.ema = _average(self.model, 0.0) if has_ema else None


def _average(model: nn.Module, decay: float, sharded: bool = False) -> ModelEmaV3:
    # PyTorch takes no list of tensors of which some (weights) are sharded and some (angles) are not.
    ema = ModelEmaV3(model, decay, foreach=not sharded)
    ema.requires_grad_(False)  # DDP would wait for its gradients
    return ema
