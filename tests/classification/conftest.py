"""A small data set of images and the options of a run that takes about a second."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from oriented1d.classification.shards import write_shards

CLASSES = {"blue": (40, 60, 220), "green": (50, 200, 60), "red": (230, 40, 30)}


def write_images(folder: Path, number: int, seed: int) -> None:
    """``number`` noisy 40x36 images of each class, told apart by their colour."""
    rng = np.random.default_rng(seed)
    for name, colour in CLASSES.items():
        (folder / name).mkdir(parents=True)
        for i in range(number):
            pixels = np.clip(np.array(colour) + rng.normal(0, 25, (36, 40, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Networks this small come to a halt when two threads wait for a core that another program has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``train`` with 16 and ``val`` with 4 images of each of three classes."""
    root = tmp_path_factory.mktemp("images")
    write_images(root / "train", 16, seed=1)
    write_images(root / "val", 4, seed=2)
    return root


@pytest.fixture(scope="session")
def image_shards(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images in shards: seven of up to 7 images for training, two for validation."""
    root = tmp_path_factory.mktemp("shards")
    write_shards(image_folder / "train", root / "train", images_per_shard=7)
    write_shards(image_folder / "val", root / "val", images_per_shard=7)
    return root


@pytest.fixture
def options(image_folder: Path, tmp_path: Path) -> list[str]:
    """Options of ``fit``, ``validate`` and ``predict``: a small network, 3 steps of 2 x 8 images an epoch."""
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
trainer:
  max_epochs: 2
  accelerator: cpu
  log_every_n_steps: 1
  num_sanity_val_steps: 0
  default_root_dir: {tmp_path}/runs
model:
  class_path: oriented1d.classification.ImageClassifier
  init_args:
    network: convnext_atto_2d
    network_args: {{depths: [1, 1, 1, 1], dims: [8, 8, 16, 16], layer_scale_init_value: 1.0}}
    num_classes: 3
    warmup_epochs: 1
    ema_decay: 0.7
    predictions: {tmp_path}/predictions.csv
data:
  class_path: oriented1d.classification.ImageData
  init_args:
    root: {image_folder}
    image_size: 32
    batch_size: 8
    total_batch_size: 16
    num_workers: 0
"""
    )
    return ["--config", str(config)]
