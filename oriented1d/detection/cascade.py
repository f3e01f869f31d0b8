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

from oriented1d.detection.boxes import Matcher, Size, area, clip, decode, encode, giou, grid_anchors, sample
from oriented1d.layers import PatchConv2d
from oriented1d.models.features import create_backbone

STRIDES = (4, 8, 16, 32)
STAGE_WEIGHTS = (1.0, 0.5, 0.25)
STAGE_OVERLAPS = (0.5, 0.6, 0.7)
STAGE_STDS = ((0.1, 0.2), (0.05, 0.1), (0.033, 0.067))  # of the centre, of the sides
MASK_SIZE = 28
LARGEST_TABLE = 2**24  # overlaps of ground truths with anchors at once: some hundred MB


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
class Truths:
    """Objects of all images of a batch: behind each other, and padded to the same number for each image.

    Attributes:
        rois: ``(T, 5)`` float32: index of the image, and the box in pixels.
        labels: ``(T,)`` int64, from 0.
        masks: ``(T, H, W)`` uint8.
        first: ``(N,)`` int64, where the objects of each image begin.
        boxes: ``(N, G, 4)`` float32, those of each image and then zeros; G is at least 1.
        exist: ``(N, G)`` bool, which of ``boxes`` are objects.
        numbers: of the objects of each image.
    """

    rois: Tensor
    labels: Tensor
    masks: Tensor
    first: Tensor
    boxes: Tensor
    exist: Tensor
    numbers: list[int]

    @classmethod
    def of(cls, truths: Sequence[Truth]) -> Truths:
        """Put the objects of several images together, without waiting for the device."""
        boxes, labels, masks = (torch.cat([getattr(t, name) for t in truths]) for name in ("boxes", "labels", "masks"))
        numbers = [len(truth.boxes) for truth in truths]
        counts = _on(boxes.device, numbers)
        image = torch.repeat_interleave(counts, output_size=len(boxes))
        exist = torch.arange(max(1, *numbers), device=boxes.device) < counts[:, None]
        padded = boxes.new_zeros(*exist.shape, 4).masked_scatter_(exist[..., None], boxes)
        rois, first = torch.cat([image[:, None], boxes], 1), counts.cumsum(0) - counts
        return cls(rois, labels, masks, first, padded, exist, numbers)


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
        self.conv = (
            PatchConv2d(in_channels, out_channels, bias=not norm)
            if kernel_size == 1
            else nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=not norm)
        )
        self.bn = nn.BatchNorm2d(out_channels) if norm else nn.Identity()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return F.relu(x) if self.act else x


SIDES = {"cuda": 16}
_LONGEST_SIDE = 192


def at_few_sizes(layer: nn.Module, x: Tensor) -> Tensor:
    """What a 3x3 layer makes of maps ``(N, C, H, W)``, on a GPU, unless compiled, with sides that are multiples of 16.

    Zeros are where the layer has its padding anyway; what it makes of them is cut off. cuDNN chooses anew for each size
    (see :class:`oriented1d.layers.PatchConv2d`). In maps of more than 192 pixels the copies would cost more in the
    long run.
    """
    step = 1 if torch.compiler.is_compiling() else SIDES.get(x.device.type, 1)
    height, width = x.shape[2:]
    right, below = -width % step, -height % step
    if right == below == 0 or max(height, width) > _LONGEST_SIDE:
        return layer(x)
    # Cut off by `pad` too: its gradient keeps channels_last, where that of a slice does not.
    return F.pad(layer(F.pad(x, (0, right, 0, below))), (0, -right, 0, -below))


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
        maps = [at_few_sizes(conv, x) for conv, x in zip(self.fpn_convs, maps, strict=True)]
        return [*maps, maps[-1][:, :, ::2, ::2]]


def _on(device: torch.device, numbers: Sequence[Any]) -> Tensor:
    """A tensor of a few numbers on a device, which is not waited for."""
    return torch.tensor(numbers).to(device, non_blocking=True)


def sides_of(sizes: Sequence[Size], device: torch.device) -> Tensor:
    """``(N, 2)`` float32, width and height of each image."""
    return _on(device, [(float(width), float(height)) for height, width in sizes])


# Logits, steps and anchors of all maps behind each other, and how many each map has.
RPNOutputs = tuple[Tensor, Tensor, Tensor, list[int]]


class RPNHead(nn.Module):
    """Whether there is an object at each anchor, and where."""

    matcher = Matcher(positive=0.7, negative=0.3, lowest=0.3)

    def __init__(self, channels: int = 256, anchors: int = 3) -> None:
        super().__init__()
        self.rpn_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.rpn_cls = PatchConv2d(channels, anchors)
        self.rpn_reg = PatchConv2d(channels, 4 * anchors)
        for module in (self.rpn_conv, self.rpn_cls, self.rpn_reg):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, maps: Sequence[Tensor]) -> RPNOutputs:
        """Logits ``(N, A)`` and steps ``(N, A, 4)`` of the anchors ``(A, 4)`` of all maps, and their number in each."""
        logits, steps, anchors = [], [], []
        for x, stride in zip(maps, (*STRIDES, 2 * STRIDES[-1]), strict=True):
            hidden = F.relu(at_few_sizes(self.rpn_conv, x))
            logits.append(self.rpn_cls(hidden).permute(0, 2, 3, 1).flatten(1))
            steps.append(self.rpn_reg(hidden).permute(0, 2, 3, 1).reshape(len(x), -1, 4))
            anchors.append(grid_anchors(x.shape[2:], stride, x.device))
        parts = [len(of_map) for of_map in anchors]
        return torch.cat(logits, 1).float(), torch.cat(steps, 1).float(), torch.cat(anchors), parts

    def losses(self, outputs: RPNOutputs, sides: Tensor, truths: Truths, number: int) -> tuple[Tensor, Tensor]:
        """Losses of logits and steps, divided by the anchors that all images contribute: an image without positives
        counts as if it had one, and so for negatives."""
        logits, steps, anchors, _ = outputs
        # Anchors that cross the border of the image (not of the batch) are left out.
        inside = (anchors[:, :2] >= 0).all(1) & (anchors[:, 2:] < sides[:, None]).all(2)
        images = max(1, LARGEST_TABLE // (truths.boxes.shape[1] * len(anchors)))
        matched = []
        for i in range(0, len(sides), images):
            part = slice(i, i + images)
            most = max(1, *truths.numbers[part])  # the padding is the whole batch's
            matched.append(self.matcher(anchors, truths.boxes[part, :most], truths.exist[part, :most], inside[part]))
        matches = torch.cat(matched)
        image = torch.arange(len(sides), device=sides.device)[:, None]
        chosen, positives, negatives = sample(matches, image, len(sides), number, 0.5)
        divisor = sum(max(count, 1) for count in positives + negatives)
        found = sum(positives)
        at = chosen[:found]
        target = truths.rois[truths.first[at // len(anchors)] + matches.flatten()[at], 1:]
        logit, step = logits.flatten().index_select(0, chosen), steps.flatten(0, 1).index_select(0, at)
        objectness = F.softplus(torch.cat([-logit[:found], logit[found:]])).sum()
        regression = F.smooth_l1_loss(step, encode(anchors[at % len(anchors)], target), beta=1 / 9, reduction="sum")
        return objectness / divisor, regression / divisor

    @torch.no_grad()
    def proposals(self, outputs: RPNOutputs, sides: Tensor, numbers: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Boxes ``(R, 5)``, as of :func:`pool`, and scores ``(R,)``: image by image, the surest first."""
        before, after = numbers
        logits, steps, anchors, parts = outputs
        best = [of_map.topk(min(before, of_map.shape[1])) for of_map in logits.split(parts, 1)]
        scores = torch.cat([top.values for top in best], 1).sigmoid()
        starts = itertools.accumulate(parts, initial=0)
        index = torch.cat([top.indices + start for top, start in zip(best, starts, strict=False)], 1)
        boxes = decode(anchors[index], steps.gather(1, index[..., None].expand(-1, -1, 4)))
        boxes = clip(boxes, sides[:, None])
        # Boxes without area go: nothing suppresses them, they suppress nothing, and they come last.
        scores = scores.where((boxes[..., 2:] > boxes[..., :2]).all(-1), -1.0)
        # Boxes suppress those of their own level: the levels are moved apart.
        taken = [top.indices.shape[1] for top in best]
        level = torch.repeat_interleave(_on(boxes.device, taken), output_size=sum(taken))
        apart = boxes + (level * (boxes.amax((1, 2)) + 1)[:, None])[..., None]
        images = enumerate(zip(apart, scores, strict=True))
        keep = torch.cat([nms(*of_image, 0.7)[:after] + i * len(level) for i, of_image in images])
        scores = scores.flatten()
        keep = keep[scores[keep] >= 0]
        return torch.cat([(keep // len(level))[:, None], boxes.flatten(0, 1)[keep]], 1), scores[keep]


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
    return [x.to(torch.float32, memory_format=torch.contiguous_format) for x in maps[: len(STRIDES)]]


def pool(maps: Sequence[Tensor], rois: Tensor, size: int) -> Tensor:
    """Features ``(R, C, size, size)`` of boxes, each from the map that suits its area.

    The device is waited for once.

    Args:
        maps: as of :func:`plain`.
        rois: ``(R, 5)`` float32: index of the image, and the box in pixels.
        size: of the result.
    """
    # Its whole part is the map's index; what is below or above the indices goes to the nearest map.
    level, order = (area(rois[:, 1:]).sqrt() / 56 + 1e-6).log2().sort()
    ends = torch.searchsorted(level, torch.arange(1.0, len(STRIDES), device=level.device)).tolist()
    pooled = [
        roi_align(x, part, size, 1 / stride, sampling_ratio=0, aligned=True)
        for x, stride, part in zip(maps, STRIDES, rois[order].tensor_split(ends), strict=True)
    ]
    result = torch.cat(pooled)
    return torch.empty_like(result).index_copy_(0, order, result)


ROWS = {"cuda": 32}


def filled_up(rois: Tensor) -> Tensor:
    """``(R, 5)`` boxes, and on a GPU behind them empty ones up to a multiple of 32.

    Their number is another one at each step, and cuDNN chooses anew for each number (see
    :class:`oriented1d.layers.PatchConv2d`).
    """
    return F.pad(rois, (0, 0, 0, -len(rois) % ROWS.get(rois.device.type, 1)))


class RoIHead(nn.Module):
    """The three stages: each refines the boxes of the one before, with its own classes, steps and masks."""

    def __init__(self, num_classes: int, channels: int = 256, hidden: int = 1024) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.bbox_head = nn.ModuleList(BoxHead(num_classes, channels, hidden) for _ in STAGE_WEIGHTS)
        self.mask_head = nn.ModuleList(MaskHead(num_classes, channels) for _ in STAGE_WEIGHTS)

    def losses(
        self, maps: Sequence[Tensor], rois: Tensor, sides: Tensor, truths: Truths, number: int
    ) -> dict[str, Tensor]:
        """Weighted losses of all stages: ``s0.loss_cls``, ``s0.loss_bbox``, ``s0.loss_mask`` and so on.

        Args:
            maps: of the pyramid.
            rois: ``(R, 5)`` proposals, as of :func:`pool`.
            sides: ``(N, 2)`` float32, width and height of each image.
            truths: the objects.
            number: of boxes that an image contributes to a stage.
        """
        losses: dict[str, Tensor] = {}
        maps, joined, allowed = plain(maps), len(truths.rois), None
        for stage, weight in enumerate(STAGE_WEIGHTS):
            matcher = Matcher(STAGE_OVERLAPS[stage], STAGE_OVERLAPS[stage])
            image = rois[:, 0].long()
            match = matcher(rois[:, None, 1:], truths.boxes[image], truths.exist[image], allowed)[:, 0]
            match = match.where(match < 0, match + truths.first[image])
            # Ground truth joins the proposals, as a match of itself.
            rois = torch.cat([truths.rois, rois])
            match = torch.cat([torch.arange(joined, device=match.device), match])
            chosen, positives, _ = sample(match, rois[:, 0].long(), len(sides), number, 0.25)
            rois, found, total = rois[chosen], sum(positives), max(len(chosen), 1)
            match = match[chosen[:found]]
            label = F.pad(truths.labels[match], (0, len(chosen) - found), value=self.num_classes)
            logits, steps = self.bbox_head[stage](pool(maps, rois, 7))
            losses[f"s{stage}.loss_cls"] = weight / total * F.cross_entropy(logits, label, reduction="sum")
            likely = torch.cat([label[:found], logits[found:, :-1].argmax(1)])
            boxes = decode(rois[:, 1:], _of_label(steps, likely), STAGE_STDS[stage])
            loss = (1 - giou(boxes[:found], truths.rois[match, 1:])).sum()
            losses[f"s{stage}.loss_bbox"] = weight * 10 / total * loss
            masks = self.mask_head[stage](pool(maps, filled_up(rois[:found]), 14))[:found]
            losses[f"s{stage}.loss_mask"] = weight * _mask_loss(masks, rois[:found], truths, match)
            # Ground truth that joined leaves again.
            rois, allowed = _refined(rois, boxes.detach(), sides), (chosen >= joined)[:, None]
        return losses

    @torch.no_grad()
    def detect(
        self, maps: Sequence[Tensor], rois: Tensor, sides: Tensor, scales: Tensor, settings: Settings
    ) -> list[Detections]:
        """Detections of each image.

        Args:
            maps: of the pyramid.
            rois: ``(R, 5)`` proposals, as of :func:`pool`, image by image.
            sides: ``(N, 2)`` float32, width and height of each image in the batch; boxes are clipped to it.
            scales: ``(N, 2)`` width and height factors from the original images: boxes are divided by them before they
                suppress each other.
            settings: numbers and thresholds.
        """
        maps, logits = plain(maps), []
        for stage, stds in enumerate(STAGE_STDS):
            stage_logits, steps = (x[: len(rois)] for x in self.bbox_head[stage](pool(maps, filled_up(rois), 7)))
            logits.append(stage_logits)
            if stage + 1 < len(STAGE_STDS):
                likely = _of_label(steps, stage_logits[:, :-1].argmax(1))
                rois = _refined(rois, decode(rois[:, 1:], likely, stds), sides)
        # The stages' logits are averaged, not their probabilities.
        scores = torch.stack(logits).mean(0).softmax(-1)[:, :-1]
        row, label = (scores > settings.score).nonzero(as_tuple=True)
        image, scores = rois[row, 0].long(), scores[row, label]
        scales = scales.repeat(1, 2)
        boxes = clip(decode(rois[row, 1:], steps[row, label], STAGE_STDS[-1]), sides[image]) / scales[image]
        numbers = image.bincount(minlength=len(sides)).tolist()
        starts = itertools.accumulate(numbers, initial=0)
        parts = zip(*(x.split(numbers) for x in (boxes, scores, label)), starts, strict=False)
        kept = [batched_nms(*part, settings.overlap)[: settings.detections] + start for *part, start in parts]
        boxes, scores, label, image = (x[torch.cat(kept)] for x in (boxes, scores, label, image))
        features = pool(maps, filled_up(torch.cat([image[:, None], boxes * scales[image]], 1)), 14)
        logits = [head(features)[: len(label)] for head in self.mask_head]
        masks = torch.stack([_of_label(of_stage, label).sigmoid() for of_stage in logits]).mean(0)
        found = (x.split([len(of_image) for of_image in kept]) for x in (boxes, scores, label, masks))
        return [Detections(*of_image) for of_image in zip(*found, strict=True)]


def _of_label(x: Tensor, labels: Tensor) -> Tensor:
    """``(R, ...)``, what ``x`` ``(R, K, ...)`` has for the label of each row."""
    index = labels.view(-1, *[1] * (x.dim() - 1))
    return x.gather(1, index.expand(-1, 1, *x.shape[2:]))[:, 0]


def _mask_loss(logits: Tensor, rois: Tensor, truths: Truths, match: Tensor) -> Tensor:
    if not len(logits):
        return logits.sum()
    targets = mask_targets(truths.masks, match, rois[:, 1:])
    return F.binary_cross_entropy_with_logits(_of_label(logits, truths.labels[match]), targets)


def _refined(rois: Tensor, boxes: Tensor, sides: Tensor) -> Tensor:
    """``(R, 5)``, the boxes ``(R, 4)`` that ``rois`` became, clipped to their images."""
    return torch.cat([rois[:, :1], clip(boxes, sides[rois[:, 0].long()])], 1)


def mask_targets(masks: Tensor, matches: Tensor, boxes: Tensor) -> Tensor:
    """``(P, 28, 28)`` float32, 0 or 1: masks ``(G, H, W)`` of the ground truths ``(P,)`` inside boxes ``(P, 4)``."""
    rois = torch.cat([matches[:, None], boxes], dim=1)
    pooled = roi_align(masks[:, None].float(), rois, MASK_SIZE, 1.0, sampling_ratio=0, aligned=True)
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
        sides = sides_of(sizes, images.device)
        rois, _ = self.rpn_head.proposals(self.rpn_head(maps), sides, self.settings.test_proposals)
        return self.roi_head.detect(maps, rois, sides, scales, self.settings)


def head_losses(
    rpn: RPNHead, roi: RoIHead, maps: Sequence[Tensor], sizes: list[Size], truths: list[Truth], settings: Settings
) -> dict[str, Tensor]:
    """Losses of both heads on the maps of a pyramid."""
    outputs, sides, objects = rpn(maps), sides_of(sizes, maps[0].device), Truths.of(truths)
    rpn_cls, rpn_bbox = rpn.losses(outputs, sides, objects, settings.rpn_samples)
    rois, _ = rpn.proposals(outputs, sides, settings.train_proposals)
    losses = roi.losses(maps, rois, sides, objects, settings.roi_samples)
    return {"loss_rpn_cls": rpn_cls, "loss_rpn_bbox": rpn_bbox} | losses
