"""Reading and scaling images for dense tasks, as mmdetection and mmsegmentation do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from oriented1d.training.errors import UserError

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, for values from 0 to 1
STD = (0.229, 0.224, 0.225)


def read_image(path: Path) -> np.ndarray:
    """``(H, W, 3)`` uint8, RGB.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError and more
        raise UserError(f"{path}: expected an image, cannot be read ({error})") from error


def scaled_size(height: int, width: int, longest: float, shortest: float) -> tuple[int, int]:
    """Height and width (pixels) of an image scaled in its own proportions, as large as both bounds allow."""
    factor = min(longest / max(height, width), shortest / min(height, width))
    return int(height * factor + 0.5), int(width * factor + 0.5)


def resize_image(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear, without antialiasing, which mmsegmentation's networks were trained without: within one grey level of
    OpenCV."""
    if image.shape[:2] == (height, width):
        return image
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()
    resized = F.interpolate(pixels, size=(height, width), mode="bilinear", align_corners=False)
    return resized[0].round_().to(torch.uint8).permute(1, 2, 0).numpy()


def to_tensor(image: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """``(H, W, 3)`` uint8 to ``(3, H, W)`` float32, normalised; ``mean`` and ``std`` for values from 0 to 1."""
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
