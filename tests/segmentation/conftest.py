from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

COLOURS = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]])


@pytest.fixture(scope="session")
def golden(goldens: Path) -> dict:
    return torch.load(goldens / "segmentation_a.pt", weights_only=True)


@pytest.fixture(scope="session")
def mosaic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of three colours with noise, 72x80 pixels, in the layout of ADE20K; label 0 is a border without class."""
    root = tmp_path_factory.mktemp("mosaic")
    rng = np.random.default_rng(0)
    for split, count in (("training", 24), ("validation", 5)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            labels = rng.integers(1, 4, (3, 4)).repeat(24, 0).repeat(20, 1).astype(np.uint8)
            pixels = COLOURS[labels - 1] + rng.integers(-30, 30, (*labels.shape, 3))
            labels[:, :2] = 0
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / "images" / split / f"{i:03d}.png")
            Image.fromarray(labels).save(root / "annotations" / split / f"{i:03d}.png")
    (root / "objectInfo3.txt").write_text("Idx\tRatio\tName\n1\t.3\tred, crimson\n2\t.3\tgreen\n3\t.4\tblue\n")
    return root
