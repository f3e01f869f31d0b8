"""Networks by name, for the commands that look at them."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import timm
from torch import nn

import oriented1d.models  # noqa: F401  (registers our networks with timm)
from oriented1d.models.checkpoints import load_checkpoint
from oriented1d.training.errors import UserError, blamed_on


def create(name: str, weights: str | Path | None = None, ema: bool = False, **options: Any) -> nn.Module:
    """A network of ours or of timm, in evaluation mode.

    Args:
        name: registered name, such as ``convnext_tiny_1d`` or ``resnet50``.
        weights: checkpoint of any kind that :func:`oriented1d.models.checkpoints.load_checkpoint` reads; ``"timm"`` for
            the weights that timm downloads; None for random ones.
        ema: take the moving average of the weights, where the file has one.
        options: of ``timm.create_model``.

    Raises:
        UserError: no such network, or the weights do not fit it.
    """
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f" (close: {', '.join(close)})" if close else ""
        raise UserError(f"model: expected a network that timm knows, got {name!r}{hint}")
    model = timm.create_model(name, pretrained=weights == "timm", **options)
    if weights is not None and weights != "timm":
        with blamed_on("weights"):
            load_checkpoint(model, weights, ema=ema)
    return model.eval()
