"""Data sets that are streamed, and the digits of the quick start."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from PIL import Image
from timm.data.dataset import IterableImageDataset
from torch.utils.data import get_worker_info

from oriented1d.classification import Digits, data
from oriented1d.training.command import Command


class Stream:
    """A reader of 48 grey images that are shared out over the workers, in the manner of timm's reader of shards."""

    epochs: list[int]

    def __init__(self, length: int) -> None:
        self.length = length
        self.epochs = []
        self.workers = 0

    def set_loader_cfg(self, num_workers: int) -> None:
        self.workers = num_workers

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        for i in range(first, self.length, step):
            yield Image.new("RGB", (40, 40), (i, i, i)), i % 3


def test_streamed_data_are_all_used_and_told_the_epoch(options, tmp_path, monkeypatch):
    """27 images over 2 workers: batches of 8, 8, 8 and 3 from 14 and 13; none may be left out of the validation."""
    streams = {"train": Stream(48), "val": Stream(27)}
    asked = []

    def create_dataset(name, root, split, **arguments):
        asked.append((name, root, arguments["is_training"], arguments["num_samples"]))
        return IterableImageDataset(root, reader=streams[split])

    monkeypatch.setattr(data, "create_dataset", create_dataset)
    arguments = ["--data.dataset=wds/name", f"--data.root={tmp_path}", "--data.dataset_args.num_samples=48"]
    command = Command(["fit", *options, *arguments, "--data.num_workers=2"])
    assert asked == [("wds/name", str(tmp_path), True, 48), ("wds/name", str(tmp_path), False, 48)]
    assert command.trainer.global_step == 2 * 3
    assert streams["train"].epochs == [0, 1]
    assert streams["train"].workers == streams["val"].workers == 2

    seen = [int(label) for _, labels in command.datamodule.val_dataloader() for label in labels]
    assert sorted(seen) == sorted(i % 3 for i in range(27))
    right = 27 * float(command.trainer.callback_metrics["val/top1"])
    assert right == pytest.approx(round(right), abs=1e-4)


def test_digits():
    module = Digits(image_size=32, crop_pct=1.0)
    train, val = module.create_split(training=True), module.create_split(training=False)
    assert (len(train), len(val)) == (1437, 360)
    assert module.class_names == [str(digit) for digit in range(10)]
    labels = torch.tensor([val[i][1] for i in range(360)])
    assert labels.bincount().tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    image, _ = val[0]
    assert image.shape == (3, 32, 32)
    grey = image * torch.tensor(module.std).view(3, 1, 1) + torch.tensor(module.mean).view(3, 1, 1)
    torch.testing.assert_close(grey[0], grey[2], atol=1e-6, rtol=0)  # the same in every channel
    assert (float(grey.min()), float(grey.max())) == pytest.approx((0, 1), abs=0.01)  # 16 levels fill the range
    held_out = {val.pixels[i].tobytes() for i in range(360)}  # type: ignore[attr-defined]
    assert len(held_out & {train.pixels[i].tobytes() for i in range(1437)}) == 0  # type: ignore[attr-defined]
