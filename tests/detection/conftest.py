import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from oriented1d.detection.cascade import FPN, RoIHead, RPNHead

COLOURS = np.array([[220, 40, 40], [40, 60, 220]])


@pytest.fixture(scope="session")
def golden(goldens: Path) -> dict:
    return torch.load(goldens / "detection_a.pt", weights_only=True)


@pytest.fixture
def heads(golden: dict) -> torch.nn.ModuleDict:
    """Pyramid and heads with the weights of the goldens."""
    modules = {"neck": FPN([16, 32, 48, 64], 32), "rpn_head": RPNHead(32), "roi_head": RoIHead(7, 32, 64)}
    heads = torch.nn.ModuleDict(modules)
    heads.load_state_dict(golden["state_dict"])  # every key, no more
    return heads.eval()


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grey images with red rectangles and blue discs, some wide, some upright, in the layout of COCO."""
    root = tmp_path_factory.mktemp("shapes")
    rng = np.random.default_rng(0)
    (root / "annotations").mkdir()
    for split, count in (("train2017", 12), ("val2017", 4)):
        (root / split).mkdir()
        images, annotations = [], []
        for i in range(count):
            height, width = (96, 128) if i % 2 else (128, 96)
            pixels = 128 + rng.integers(-20, 20, (height, width, 3))
            for _ in range(0 if i == 2 else 1 + i % 2):
                kind, size = int(rng.integers(2)), int(rng.integers(28, 56))
                y, x = int(rng.integers(height - size)), int(rng.integers(width - size))
                ys, xs = np.mgrid[:height, :width]
                mask = (ys >= y) & (ys < y + size) & (xs >= x) & (xs < x + size)
                if kind:
                    mask &= (ys + 0.5 - y - size / 2) ** 2 + (xs + 0.5 - x - size / 2) ** 2 <= (size / 2) ** 2
                pixels[mask] = COLOURS[kind]
                polygon = [[x, y, x + size, y, x + size, y + size, x, y + size]]
                encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
                encoded["counts"] = encoded["counts"].decode()
                annotations.append(
                    {
                        "id": len(annotations) + 1, "image_id": 10 + i, "category_id": 3 + 4 * kind, "iscrowd": 0,
                        "bbox": [x, y, size, size], "area": int(mask.sum()),
                        "segmentation": encoded if kind else polygon,
                    }
                )  # fmt: skip
            name = f"{i:04d}.png"
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / split / name)
            images.append({"id": 10 + i, "file_name": name, "height": height, "width": width})
        categories = [{"id": 3, "name": "rectangle"}, {"id": 7, "name": "disc"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root
