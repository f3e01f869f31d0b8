"""The networks (``convnext``) and their files (``checkpoints``)."""

from oriented1d.models.checkpoints import (
    Network,
    convert,
    infer_network,
    load_checkpoint,
    load_dense_checkpoint,
    read_checkpoint,
)
from oriented1d.models.convnext import DENSE_KERNEL_SIZES, KERNEL_SIZES, SIZES, ConvNeXt, ConvNeXtFeatures

__all__ = [
    "DENSE_KERNEL_SIZES",
    "KERNEL_SIZES",
    "SIZES",
    "ConvNeXt",
    "ConvNeXtFeatures",
    "Network",
    "convert",
    "infer_network",
    "load_checkpoint",
    "load_dense_checkpoint",
    "read_checkpoint",
]
