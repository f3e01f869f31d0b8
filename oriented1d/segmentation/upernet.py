"""UPerNet: a pyramid of pooled features on the coarsest stage, a feature pyramid over all stages, one classifier.

The modules are named as in mmsegmentation, so that its checkpoints load: ``backbone``, ``decode_head``,
``auxiliary_head``.

Source: "Unified Perceptual Parsing for Scene Understanding" (ECCV 2018), with the settings of the original's configs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from oriented1d.models.features import create_backbone

POOL_SCALES = (1, 2, 3, 6)


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """``(N, C, H, W)`` to ``(N, C, *size)``, bilinear between the centres of pixels."""
    if x.shape[2:] == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


class ConvNormAct(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Head(nn.Module):
    """What both heads end with: dropout of whole channels and a 1x1 convolution to class logits."""

    def __init__(self, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        assert self.conv_seg.bias is not None
        nn.init.zeros_(self.conv_seg.bias)

    def classify(self, x: Tensor) -> Tensor:
        return self.conv_seg(self.dropout(x))


class UPerHead(Head):
    """Feature maps of all stages to logits at the resolution of the first.

    Args:
        in_channels: of each stage, from the finest.
        num_classes: number of classes.
        channels: of everything inside.
        dropout: probability that a channel before the classifier is dropped.
    """

    def __init__(self, in_channels: Sequence[int], num_classes: int, channels: int = 512, dropout: float = 0.1) -> None:
        super().__init__(channels, num_classes, dropout)
        *finer, coarsest = in_channels
        # Index 0 has no weights: its place keeps the names of those that have.
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvNormAct(coarsest, channels, 1)) for scale in POOL_SCALES
        )
        self.bottleneck = ConvNormAct(coarsest + len(POOL_SCALES) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvNormAct(width, channels, 1) for width in finer)
        self.fpn_convs = nn.ModuleList(ConvNormAct(channels, channels, 3) for _ in finer)
        self.fpn_bottleneck = ConvNormAct(len(in_channels) * channels, channels, 3)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        *finer, coarsest = features
        pooled = [resize(module(coarsest), coarsest.shape[2:]) for module in self.psp_modules]
        levels = [conv(x) for conv, x in zip(self.lateral_convs, finer, strict=True)]
        levels.append(self.bottleneck(torch.cat([coarsest, *pooled], dim=1)))
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + resize(levels[i], levels[i - 1].shape[2:])
        maps = [conv(x) for conv, x in zip(self.fpn_convs, levels[:-1], strict=True)] + levels[-1:]
        merged = torch.cat([resize(x, maps[0].shape[2:]) for x in maps], dim=1)
        return self.classify(self.fpn_bottleneck(merged))


class FCNHead(Head):
    """One stage to logits at its own resolution: the auxiliary head of training."""

    def __init__(self, in_channels: int, num_classes: int, channels: int = 256, dropout: float = 0.1) -> None:
        super().__init__(channels, num_classes, dropout)
        self.convs = nn.Sequential(ConvNormAct(in_channels, channels, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.convs(x))


class UPerNet(nn.Module):
    """A backbone with both heads.

    Args:
        backbone: network of ours or of timm that has ``features_only``, with four feature maps.
        backbone_args: further arguments of ``timm.create_model``.
        num_classes: number of classes.
        drop_path_rate: stochastic depth of the backbone.
        channels: of the decode head (512 in the paper).
        auxiliary_channels: of the auxiliary head, on the third stage.
        dropout: of both heads.

    Raises:
        UserError: there is no such backbone, or it has not four feature maps.
    """

    def __init__(
        self,
        backbone: str = "convnext_tiny_1d",
        backbone_args: dict[str, Any] | None = None,
        num_classes: int = 150,
        drop_path_rate: float = 0.4,
        channels: int = 512,
        auxiliary_channels: int = 256,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone = create_backbone(backbone, drop_path_rate, **(backbone_args or {}))
        widths = self.backbone.feature_info.channels()
        self.decode_head = UPerHead(widths, num_classes, channels, dropout)
        self.auxiliary_head = FCNHead(widths[2], num_classes, auxiliary_channels, dropout)

    def forward(self, images: Tensor) -> Tensor:
        """``(N, 3, H, W)`` normalised images to ``(N, num_classes, H/4, W/4)`` logits."""
        return self.decode_head(self.backbone(images))

    def losses(self, images: Tensor, labels: Tensor, auxiliary_weight: float = 0.4) -> tuple[Tensor, Tensor]:
        """Losses of the decode head and, weighted, of the auxiliary head.

        Args:
            images: ``(N, 3, H, W)``, normalised.
            labels: ``(N, H, W)``, int64; 255 is ignored.
            auxiliary_weight: factor of the second loss.
        """
        features = self.backbone(images)
        return (
            pixel_loss(self.decode_head(features), labels),
            pixel_loss(self.auxiliary_head(features[2]), labels) * auxiliary_weight,
        )


def pixel_loss(logits: Tensor, labels: Tensor, ignored: int = 255) -> Tensor:
    """Cross entropy of logits resized to the labels, divided by the number of *all* pixels, ignored ones included.

    That is mmsegmentation's default (``avg_non_ignore=False``), with which the published networks were trained.
    """
    logits = resize(logits, labels.shape[1:]).float()
    return F.cross_entropy(logits, labels, ignore_index=ignored, reduction="sum") / labels.numel()
