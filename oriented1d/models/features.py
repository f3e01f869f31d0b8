"""Backbones of dense tasks."""

from __future__ import annotations

from typing import Any

import timm

from oriented1d.models.convnext import DENSE_KERNEL_SIZES
from oriented1d.training.errors import UserError


def create_backbone(name: str, drop_path_rate: float, **options: Any) -> Any:
    """A network for dense tasks: its four feature maps, each with a norm where the network is ours.

    Ours take the kernel sizes of dense tasks and a layer scale of 1, unless ``options`` say otherwise.

    Raises:
        UserError: it cannot be made, or has not four feature maps.
    """
    kernels = name.rpartition("_")[2]
    if name.startswith("convnext_") and kernels in DENSE_KERNEL_SIZES:
        defaults = {"kernel_sizes": DENSE_KERNEL_SIZES[kernels], "layer_scale_init_value": 1.0, "output_norms": True}
        options = defaults | options
    try:
        backbone: Any = timm.create_model(name, features_only=True, drop_path_rate=drop_path_rate, **options)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"model.network: cannot make a backbone of {name} with {options}: {error}") from error
    maps = len(backbone.feature_info.channels())
    if maps != 4:
        raise UserError(f"model.network: expected a backbone with four feature maps, {name} has {maps}")
    return backbone
