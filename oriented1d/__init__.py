"""Depthwise 1D convolutions along any angle, and the ConvNeXt-1D networks built from them.

Importing the package registers the networks with timm: ``timm.create_model("convnext_tiny_1d")``.
"""

from oriented1d.layers import OrientedConv1d
from oriented1d.models import load_checkpoint
from oriented1d.operator import oriented_conv1d, use_backend

__version__ = "0.1.0"

__all__ = ["OrientedConv1d", "load_checkpoint", "oriented_conv1d", "use_backend"]
