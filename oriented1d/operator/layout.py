"""Memory formats: which one an output takes, and inputs brought into it."""

from __future__ import annotations

import torch
from torch import Tensor


def channels_last(tensor: Tensor) -> bool:
    """Whether an output made from the 4-D ``tensor`` is laid out as ``torch.channels_last``.

    The rule is that of PyTorch's own convolutions: the order of the strides decides, so that slices of a channels_last
    tensor count too; where both formats describe the tensor (one channel, or 1x1 images) it is contiguous.
    """
    if tensor.is_contiguous():
        return False
    return tensor.is_contiguous(memory_format=torch.channels_last) or _channels_innermost(tensor)


def only_channels_last(tensor: Tensor) -> bool:
    """Whether ``torch.channels_last`` alone describes the 4-D ``tensor``, without gaps.

    Where the contiguous format does too, PyTorch's convolutions give contiguous outputs.
    """
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def _channels_innermost(tensor: Tensor) -> bool:
    # A view whose strides fall in the order N, H, W, C, without zeros (expanded tensors count as contiguous).
    n, c, h, w = tensor.stride()
    return 0 < c < w < h and (h < n or tensor.shape[0] <= 1) and tensor.shape[1] > 1


def memory_format(is_channels_last: bool) -> torch.memory_format:
    return torch.channels_last if is_channels_last else torch.contiguous_format


def new_images(like: Tensor, size: tuple[int, int, int, int], is_channels_last: bool) -> Tensor:
    """Images ``(N, C, H, W)``, not initialised, with the dtype and on the device of others."""
    layout = memory_format(is_channels_last)
    if like.shape == size:  # twice as fast, and most calls of the operator keep the size
        return torch.empty_like(like, memory_format=layout)
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=layout)
