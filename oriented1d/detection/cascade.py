"""Cascade Mask R-CNN: a feature pyramid, region proposals, and three stages that refine boxes and draw masks.

The modules are named as in mmdetection, so that its checkpoints load: ``backbone``, ``neck``, ``rpn_head`` and
``roi_head``.

Source: "Cascade R-CNN: Delving into High Quality Object Detection" (CVPR 2018), with the settings of the original's
config.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import batched_nms, nms, roi_align

from oriented1d.detection.boxes import Matcher, Size, clip, decode, encode, giou, grid_anchors, sample
from oriented1d.models.features import create_backbone

STRIDES = (4, 8, 16, 32)
STAGE_WEIGHTS = (1.0, 0.5, 0.25)
STAGE_OVERLAPS = (0.5, 0.6, 0.7)
STAGE_STDS = ((0.1, 0.2), (0.05, 0.1), (0.033, 0.067))  # of the centre, of the sides
MASK_SIZE = 28


@dataclasses.dataclass
class Truth:
    """Objects of one training image.

    Attributes:
        boxes: ``(G, 4)`` float32, pixels.
        labels: ``(G,)`` int64, from 0.
        masks: ``(G, H, W)`` uint8 at the size of the padded batch.
    """

    boxes: Tensor
    labels: Tensor
    masks: Tensor


@dataclasses.dataclass
class Detections:
    """What was found in one image, the surest first.

    Attributes:
        boxes: ``(D, 4)`` float32, pixels.
        scores: ``(D,)`` float32.
        labels: ``(D,)`` int64, from 0.
        masks: ``(D, 28, 28)`` float32, probabilities inside the boxes; :func:`paste` puts them into the image.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor


@dataclasses.dataclass(frozen=True)
class Settings:
    """Numbers of boxes, and thresholds.

    Attributes:
        rpn_samples, roi_samples: anchors, and boxes of a stage, that an image contributes to the losses.
        train_proposals, test_proposals: proposals before (of each level) and after their suppression.
        score: detections below it are left out.
        overlap: detections of one class that overlap a surer one by more are left out.
        detections: of an image at most.
    """

    rpn_samples: int = 256
    roi_samples: int = 512
    train_proposals: tuple[int, int] = (2000, 2000)
    test_proposals: tuple[int, int] = (1000, 1000)
    score: float = 0.05
    overlap: float = 0.5
    detections: int = 100


class Convolution(nn.Module):
    """A convolution in the module ``conv``, with batch norm in ``bn`` and ReLU where asked for."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, norm: bool = False, act: bool = False
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=not norm)
        self.bn = nn.BatchNorm2d(out_channels) if norm else nn.Identity()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return F.relu(x) if self.act else x


class FPN(nn.Module):
    """Four feature maps to five of equal width; the fifth is every second pixel of the fourth."""

    def __init__(self, in_channels: Sequence[int], channels: int = 256) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(Convolution(width, channels, 1) for width in in_channels)
        self.fpn_convs = nn.ModuleList(Convolution(channels, channels, 3) for _ in in_channels)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        maps = [conv(x) for conv, x in zip(self.lateral_convs, features, strict=True)]
        for i in range(len(maps) - 1, 0, -1):
            maps[i - 1] = maps[i - 1] + F.interpolate(maps[i], size=maps[i - 1].shape[2:], mode="nearest")
        maps = [conv(x) for conv, x in zip(self.fpn_convs, maps, strict=True)]
        return [*maps, maps[-1][:, :, ::2, ::2]]


# Of each map: logits, steps, anchors.
RPNOutputs = tuple[list[Tensor], list[Tensor], list[Tensor]]


class RPNHead(nn.Module):
    """Whether there is an object at each anchor, and where."""

    matcher = Matcher(positive=0.7, negative=0.3, lowest=0.3)

    def __init__(self, channels: int = 256, anchors: int = 3) -> None:
        super().__init__()
        self.rpn_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.rpn_cls = nn.Conv2d(channels, anchors, 1)
        self.rpn_reg = nn.Conv2d(channels, 4 * anchors, 1)
        for module in (self.rpn_conv, self.rpn_cls, self.rpn_reg):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, maps: Sequence[Tensor]) -> RPNOutputs:
        """Logits ``(N, A)`` and steps ``(N, A, 4)`` of all anchors of each map, and the anchors ``(A, 4)``."""
        logits, steps, anchors = [], [], []
        for x, stride in zip(maps, (*STRIDES, 2 * STRIDES[-1]), strict=True):
            hidden = F.relu(self.rpn_conv(x))
            logits.append(self.rpn_cls(hidden).permute(0, 2, 3, 1).flatten(1).float())
            steps.append(self.rpn_reg(hidden).permute(0, 2, 3, 1).reshape(len(x), -1, 4).float())
            anchors.append(grid_anchors(x.shape[2:], stride, x.device))
        return logits, steps, anchors

    def losses(self, outputs: RPNOutputs, sizes: list[Size], truths: list[Truth], number: int) -> tuple[Tensor, Tensor]:
        """Losses of logits and steps, divided by the anchors that all images contribute: an image without positives
        counts as if it had one, and so for negatives."""
        logits, steps, anchors = outputs
        all_logits, all_steps, all_anchors = torch.cat(logits, 1), torch.cat(steps, 1), torch.cat(anchors)
        matches = []
        for truth, (height, width) in zip(truths, sizes, strict=True):
            # Anchors that cross the border of the image (not of the batch) are left out.
            inside = (all_anchors[:, :2] >= 0).all(1) & (all_anchors[:, 2] < width) & (all_anchors[:, 3] < height)
            matches.append(self.matcher(all_anchors, truth.boxes, inside))
        samples = sample(matches, number, 0.5)
        divisor = sum(max(len(positives), 1) + max(len(negatives), 1) for positives, negatives in samples)
        first = range(0, all_logits.numel(), len(all_anchors))
        at, away = (torch.cat([sample[kind] + i for sample, i in zip(samples, first, strict=True)]) for kind in (0, 1))
        found = [
            truth.boxes[match[positives]] for truth, match, (positives, _) in zip(truths, matches, samples, strict=True)
        ]
        target = encode(torch.cat([all_anchors[positives] for positives, _ in samples]), torch.cat(found))
        all_logits, all_steps = all_logits.flatten(), all_steps.flatten(0, 1)
        objectness = F.softplus(-all_logits[at]).sum() + F.softplus(all_logits[away]).sum()
        regression = F.smooth_l1_loss(all_steps[at], target, beta=1 / 9, reduction="sum")
        return objectness / divisor, regression / divisor

    @torch.no_grad()
    def proposals(
        self, outputs: RPNOutputs, sizes: list[Size], numbers: tuple[int, int]
    ) -> list[tuple[Tensor, Tensor]]:
        """Boxes ``(P, 4)`` and scores ``(P,)`` of each image, the surest first."""
        before, after = numbers
        boxes, scores = [], []
        for logit, step, anchor in zip(*outputs, strict=True):
            score, order = logit.sigmoid().sort(dim=1, descending=True)
            score, order = score[:, :before], order[:, :before]
            step = step.gather(1, order[..., None].expand(-1, -1, 4))
            boxes.append(decode(anchor[order], step))
            scores.append(score)
        parts = [score.shape[1] for score in scores]
        first = [0, *itertools.accumulate(parts)]
        result = []
        for image, score, size in zip(torch.cat(boxes, 1), torch.cat(scores, 1), sizes, strict=True):
            box = clip(image, size)
            # Boxes suppress those of their own level.
            levels = zip(box.split(parts), score.split(parts), first, strict=False)
            keep = torch.cat([nms(of_level, sure, 0.7) + start for of_level, sure, start in levels])
            # Boxes without area go: nothing suppresses them, and they suppress nothing.
            keep = keep[((box[:, 2:] - box[:, :2]) > 0).all(1)[keep]]
            keep = keep[score[keep].argsort(descending=True)[:after]]
            result.append((box[keep], score[keep]))
        return result


class BoxHead(nn.Module):
    """Pooled features of boxes to class logits (the last one is background) and steps for each class."""

    def __init__(self, num_classes: int, channels: int = 256, hidden: int = 1024) -> None:
        super().__init__()
        self.shared_convs = nn.ModuleList(Convolution(channels, channels, 3, norm=True, act=True) for _ in range(4))
        self.shared_fcs = nn.ModuleList([nn.Linear(channels * 7 * 7, hidden)])
        self.fc_cls = nn.Linear(hidden, num_classes + 1)
        self.fc_reg = nn.Linear(hidden, 4 * num_classes)
        for conv in self.shared_convs:
            nn.init.kaiming_normal_(conv.conv.weight, mode="fan_out", nonlinearity="relu")  # type: ignore[union-attr,arg-type]
        nn.init.xavier_uniform_(self.shared_fcs[0].weight)  # type: ignore[arg-type]
        nn.init.normal_(self.fc_cls.weight, std=0.01)
        nn.init.normal_(self.fc_reg.weight, std=0.001)
        for linear in (self.shared_fcs[0], self.fc_cls, self.fc_reg):
            nn.init.zeros_(linear.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(R, C, 7, 7)`` to ``(R, K + 1)`` and ``(R, K, 4)``."""
        for conv in self.shared_convs:
            x = conv(x)
        x = F.relu(self.shared_fcs[0](x.flatten(1)))
        return self.fc_cls(x).float(), self.fc_reg(x).float().reshape(len(x), -1, 4)


class MaskHead(nn.Module):
    """Pooled features of boxes to mask logits of each class."""

    def __init__(self, num_classes: int, channels: int = 256) -> None:
        super().__init__()
        self.convs = nn.ModuleList(Convolution(channels, channels, 3, act=True) for _ in range(4))
        self.upsample = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.conv_logits = nn.Conv2d(channels, num_classes, 1)
        for conv in [*(c.conv for c in self.convs), self.upsample, self.conv_logits]:
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")  # type: ignore[union-attr,arg-type]
            nn.init.zeros_(conv.bias)  # type: ignore[union-attr,arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """``(R, C, 14, 14)`` to ``(R, K, 28, 28)``."""
        for conv in self.convs:
            x = conv(x)
        return self.conv_logits(F.relu(self.upsample(x))).float()


def plain(maps: Sequence[Tensor]) -> list[Tensor]:
    """Maps as :func:`pool` takes them, in contiguous float32: in 16 bits a box would be off by pixels."""
    return [x.float().contiguous() for x in maps[: len(STRIDES)]]


def pool(maps: Sequence[Tensor], boxes: list[Tensor], size: int) -> Tensor:
    """Features ``(R, C, size, size)`` of the boxes ``(R_i, 4)`` of each image, from the map that suits a box's area."""
    rois = torch.cat([F.pad(box, (1, 0), value=i) for i, box in enumerate(boxes)])
    scale = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).sqrt()
    level = (scale / 56 + 1e-6).log2().floor().clamp(min=0, max=len(STRIDES) - 1).long()
    level, order = level.sort(stable=True)
    numbers = torch.stack([(level == i).sum() for i in range(len(STRIDES))]).tolist()
    pooled = [
        roi_align(x, part, size, 1 / stride, sampling_ratio=0, aligned=True)
        for x, stride, part in zip(maps, STRIDES, rois[order].split(numbers), strict=True)
    ]
    return torch.cat(pooled)[order.argsort()]


class RoIHead(nn.Module):
    """The three stages: each refines the boxes of the one before, with its own classes, steps and masks."""

    def __init__(self, num_classes: int, channels: int = 256, hidden: int = 1024) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.bbox_head = nn.ModuleList(BoxHead(num_classes, channels, hidden) for _ in STAGE_WEIGHTS)
        self.mask_head = nn.ModuleList(MaskHead(num_classes, channels) for _ in STAGE_WEIGHTS)

    def _refine(
        self, stage: int, boxes: list[Tensor], labels: Tensor, steps: Tensor, sizes: list[Size]
    ) -> list[Tensor]:
        """The boxes of each image, moved by the steps of their classes."""
        of_label = steps[torch.arange(len(steps), device=steps.device), labels]
        refined = decode(torch.cat(boxes), of_label, STAGE_STDS[stage]).split([len(box) for box in boxes])
        return [clip(box, size) for box, size in zip(refined, sizes, strict=True)]

    def losses(
        self, maps: Sequence[Tensor], proposals: list[Tensor], sizes: list[Size], truths: list[Truth], number: int
    ) -> dict[str, Tensor]:
        """Weighted losses of all stages: ``s0.loss_cls``, ``s0.loss_bbox``, ``s0.loss_mask`` and so on."""
        losses: dict[str, Tensor] = {}
        maps = plain(maps)
        for stage, weight in enumerate(STAGE_WEIGHTS):
            matcher = Matcher(STAGE_OVERLAPS[stage], STAGE_OVERLAPS[stage])
            matches = []
            for truth, proposal in zip(truths, proposals, strict=True):
                # Ground truth joins the proposals, as a match of itself.
                own = torch.arange(len(truth.boxes), device=proposal.device)
                matches.append(torch.cat([own, matcher(proposal, truth.boxes)]))
            samples = sample(matches, number, 0.25)
            boxes, labels, of_truth = [], [], []
            for truth, proposal, match, (at, away) in zip(truths, proposals, matches, samples, strict=True):
                boxes.append(torch.cat([truth.boxes, proposal])[torch.cat([at, away])])
                of_truth.append(match[at])
                classes = truth.labels[of_truth[-1]]
                labels.append(torch.cat([classes, classes.new_full((len(away),), self.num_classes)]))
            logits, steps = self.bbox_head[stage](pool(maps, boxes, 7))
            label, box = torch.cat(labels), torch.cat(boxes)
            losses[f"s{stage}.loss_cls"] = weight * F.cross_entropy(logits, label, reduction="sum") / max(len(label), 1)
            found = (label < self.num_classes).nonzero().flatten()
            target = torch.cat([truth.boxes[match] for truth, match in zip(truths, of_truth, strict=True)])
            decoded = decode(box[found], steps[found, label[found]], STAGE_STDS[stage])
            losses[f"s{stage}.loss_bbox"] = weight * 10 * (1 - giou(decoded, target)).sum() / max(len(label), 1)
            losses[f"s{stage}.loss_mask"] = weight * self._mask_loss(stage, maps, boxes, truths, of_truth)
            if stage + 1 < len(STAGE_WEIGHTS):
                with torch.no_grad():
                    likely = torch.where(label == self.num_classes, logits[:, :-1].argmax(1), label)
                    refined = self._refine(stage, boxes, likely, steps, sizes)
                    # Ground truth that joined leaves again: it comes first.
                    joined = [(at < len(truth.boxes)).sum() for truth, (at, _) in zip(truths, samples, strict=True)]
                    proposals = [box[k:] for box, k in zip(refined, torch.stack(joined).tolist(), strict=True)]
        return losses

    def _mask_loss(
        self, stage: int, maps: Sequence[Tensor], boxes: list[Tensor], truths: list[Truth], of_truth: list[Tensor]
    ) -> Tensor:
        positive = [box[: len(match)] for box, match in zip(boxes, of_truth, strict=True)]
        logits = self.mask_head[stage](pool(maps, positive, 14))
        if not len(logits):
            return logits.sum()
        labels = torch.cat([truth.labels[match] for truth, match in zip(truths, of_truth, strict=True)])
        # The masks of all images behind each other, and where those of each begin.
        first = itertools.accumulate((len(truth.masks) for truth in truths[:-1]), initial=0)
        of_all = torch.cat([match + i for match, i in zip(of_truth, first, strict=True)])
        targets = mask_targets(torch.cat([truth.masks for truth in truths]), of_all, torch.cat(positive))
        chosen = logits[torch.arange(len(logits), device=logits.device), labels]
        return F.binary_cross_entropy_with_logits(chosen, targets)

    @torch.no_grad()
    def detect(
        self, maps: Sequence[Tensor], proposals: list[Tensor], sizes: list[Size], scales: Tensor, settings: Settings
    ) -> list[Detections]:
        """Detections of each image.

        Args:
            maps: of the pyramid.
            proposals: ``(P, 4)`` of each image.
            sizes: height and width of each image in the batch; boxes are clipped to it.
            scales: ``(N, 2)`` width and height factors from the original images: boxes are divided by them before they
                suppress each other.
            settings: numbers and thresholds.
        """
        maps = plain(maps)
        parts = [len(boxes) for boxes in proposals]
        boxes, logits = list(proposals), []
        for stage in range(len(STAGE_WEIGHTS)):
            stage_logits, steps = self.bbox_head[stage](pool(maps, boxes, 7))
            logits.append(stage_logits)
            if stage + 1 < len(STAGE_WEIGHTS):
                likely = stage_logits[:, :-1].argmax(1)
                boxes = self._refine(stage, boxes, likely, steps, sizes)
        # The stages' logits are averaged, not their probabilities.
        scores = (sum(logits) / len(logits)).softmax(-1).split(parts)
        found = [
            self._suppress(decode(box[:, None], step, STAGE_STDS[-1]), score, size, scale, settings)
            for box, step, score, size, scale in zip(boxes, steps.split(parts), scores, sizes, scales, strict=True)
        ]
        masks = self._masks(maps, [f.boxes * scale.repeat(2) for f, scale in zip(found, scales, strict=True)], found)
        for detections, mask in zip(found, masks, strict=True):
            detections.masks = mask
        return found

    def _suppress(self, boxes: Tensor, scores: Tensor, size: Size, scale: Tensor, settings: Settings) -> Detections:
        boxes = clip(boxes, size) / scale.repeat(2)
        box, label = (scores[:, :-1] > settings.score).nonzero(as_tuple=True)
        boxes, scores = boxes[box, label], scores[box, label]
        keep = batched_nms(boxes, scores, label, settings.overlap)[: settings.detections]
        return Detections(boxes[keep], scores[keep], label[keep], boxes.new_zeros(0, MASK_SIZE, MASK_SIZE))

    def _masks(self, maps: Sequence[Tensor], boxes: list[Tensor], found: list[Detections]) -> Sequence[Tensor]:
        labels = torch.cat([detections.labels for detections in found])
        features = pool(maps, boxes, 14)
        index = torch.arange(len(labels), device=labels.device)
        masks = [head(features)[index, labels].sigmoid() for head in self.mask_head]
        return (sum(masks) / len(masks)).split([len(box) for box in boxes])


def mask_targets(masks: Tensor, matches: Tensor, boxes: Tensor) -> Tensor:
    """``(P, 28, 28)`` float32, 0 or 1: masks ``(G, H, W)`` of the ground truths ``(P,)`` inside boxes ``(P, 4)``."""
    rois = torch.cat([matches[:, None].to(boxes.dtype), boxes], dim=1)
    pooled = roi_align(masks[:, None].float(), rois.float(), MASK_SIZE, 1.0, sampling_ratio=0, aligned=True)
    return (pooled[:, 0] >= 0.5).float()


def paste(masks: Tensor, boxes: Tensor, size: Size, threshold: float = 0.5) -> Tensor:
    """Masks of boxes put into an image: ``(D, H, W)`` bool.

    Args:
        masks: ``(D, 28, 28)`` probabilities.
        boxes: ``(D, 4)`` pixels.
        size: height and width of the image.
        threshold: probability from which on a pixel belongs to the object.
    """
    height, width = size
    ys, xs = (torch.arange(side, device=masks.device, dtype=torch.float32) + 0.5 for side in size)
    result = torch.zeros(len(masks), height, width, dtype=torch.bool, device=masks.device)
    for i, (mask, box) in enumerate(zip(masks, boxes, strict=True)):  # one at a time bounds the memory
        left, top, right, bottom = box
        x = (xs - left) / (right - left) * 2 - 1
        y = (ys - top) / (bottom - top) * 2 - 1
        # A box of no width makes infinities.
        x, y = (values.nan_to_num(posinf=0, neginf=0) for values in (x, y))
        grid = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1)
        result[i] = F.grid_sample(mask[None, None].float(), grid[None], align_corners=False)[0, 0] >= threshold
    return result


class CascadeMaskRCNN(nn.Module):
    """A backbone with the pyramid and both heads.

    Args:
        backbone: network of ours or of timm that has ``features_only``, with four feature maps.
        backbone_args: further arguments of ``timm.create_model``.
        num_classes: number of classes.
        drop_path_rate: stochastic depth of the backbone.
        channels: of the pyramid (256 in the paper).
        hidden: of the box heads' linear layer (1024 in the paper).
        settings: numbers of boxes and thresholds.

    Raises:
        UserError: there is no such backbone, or it has not four feature maps.
    """

    def __init__(
        self,
        backbone: str = "convnext_tiny_1d",
        backbone_args: dict[str, Any] | None = None,
        num_classes: int = 80,
        drop_path_rate: float = 0.4,
        channels: int = 256,
        hidden: int = 1024,
        settings: Settings | None = None,
    ) -> None:
        super().__init__()
        self.settings = settings or Settings()
        self.num_classes = num_classes
        self.backbone = create_backbone(backbone, drop_path_rate, **(backbone_args or {}))
        widths = self.backbone.feature_info.channels()
        self.neck = FPN(widths, channels)
        self.rpn_head = RPNHead(channels)
        self.roi_head = RoIHead(num_classes, channels, hidden)

    def losses(self, images: Tensor, sizes: list[Size], truths: list[Truth]) -> dict[str, Tensor]:
        """All losses, weighted; their sum is what is trained.

        Args:
            images: ``(N, 3, H, W)``, normalised, padded to a common size.
            sizes: height and width of each image before the padding.
            truths: the objects of each image.
        """
        maps = self.neck(self.backbone(images))
        return head_losses(self.rpn_head, self.roi_head, maps, sizes, truths, self.settings)

    def forward(self, images: Tensor, sizes: list[Size], scales: Tensor) -> list[Detections]:
        """Detections of each image, in the pixels of the original images (see :meth:`RoIHead.detect`)."""
        maps = self.neck(self.backbone(images))
        proposals = self.rpn_head.proposals(self.rpn_head(maps), sizes, self.settings.test_proposals)
        return self.roi_head.detect(maps, [boxes for boxes, _ in proposals], sizes, scales, self.settings)


def head_losses(
    rpn: RPNHead, roi: RoIHead, maps: Sequence[Tensor], sizes: list[Size], truths: list[Truth], settings: Settings
) -> dict[str, Tensor]:
    """Losses of both heads on the maps of a pyramid."""
    outputs = rpn(maps)
    rpn_cls, rpn_bbox = rpn.losses(outputs, sizes, truths, settings.rpn_samples)
    proposals = [boxes for boxes, _ in rpn.proposals(outputs, sizes, settings.train_proposals)]
    losses = roi.losses(maps, proposals, sizes, truths, settings.roi_samples)
    return {"loss_rpn_cls": rpn_cls, "loss_rpn_bbox": rpn_bbox} | losses
