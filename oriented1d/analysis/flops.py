"""What one image costs a network, counted without computing anything."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from oriented1d.detection import CascadeMaskRCNN


def multiply_adds(model: nn.Module, size: int | tuple[int, int]) -> int:
    """Multiply-adds of one colour image ``(1, 3, H, W)``: the papers' "FLOPs".

    Counted are convolutions, oriented layers (K a pixel and channel) and matrix products, also where a kernel reaches
    outside the image; biases, normalisations, activations and sums are not. This is the convention of fvcore, and what
    most published numbers of networks mean.

    Args:
        model: any network; it is left as it is. Nothing is computed or allocated for it, so this is instant.
        size: height and width in pixels; one number for both.
    """
    with FlopCounterMode(display=False) as counter:
        run_on_meta(model, size)
    return counter.get_total_flops() // 2  # PyTorch counts a multiply-add as two


def detector_multiply_adds(model: CascadeMaskRCNN, size: tuple[int, int]) -> int:
    """Multiply-adds of a detector for one colour image, as mmdetection counts them: 1000 proposals in each of the three
    stages, and masks of 100 of them.

    Args:
        model: on the meta device, in evaluation mode.
        size: height and width in pixels.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        maps = model.neck(model.backbone(torch.empty(1, 3, *size, device="meta")))
        model.rpn_head(maps)
        width = maps[0].shape[1]
        for boxes, masks in zip(model.roi_head.bbox_head, model.roi_head.mask_head, strict=True):
            boxes(torch.empty(1000, width, 7, 7, device="meta"))
            masks(torch.empty(100, width, 14, 14, device="meta"))
    return counter.get_total_flops() // 2


def run_on_meta(model: nn.Module, size: int | tuple[int, int]) -> Any:
    """Output of a network for one colour image, on the meta device: shapes without numbers. Hooks run.

    Args:
        model: any network; it stays on its device.
        size: height and width in pixels; one number for both.
    """
    height, width = (size, size) if isinstance(size, int) else size
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        image = torch.empty(1, 3, height, width, device="meta")
        return functional_call(model, {name: tensor.to("meta") for name, tensor in tensors.items()}, (image,))
