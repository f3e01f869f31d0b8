"""Data sets held on the device: reading, the batches of an epoch, what augmentation does, and whole runs."""

from __future__ import annotations

import csv
import gzip
import struct
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from oriented1d.classification import ImageClassifier
from oriented1d.classification.arrays import ArrayData, DeviceBatches, FolderArrays, IdxArrays, read_idx
from oriented1d.cli import main
from oriented1d.training.errors import UserError


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Networks as small as these are slower on several, above all when the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_idx(path: Path, array: np.ndarray) -> None:
    content = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    """40 and 11 grey images of 16 x 12 pixels, of two classes: bright above, bright below. Half of the files packed."""
    folder, random = tmp_path / "idx", np.random.default_rng(0)
    folder.mkdir()
    for prefix, number in (("train", 40), ("t10k", 11)):
        labels = (np.arange(number) % 2).astype(np.uint8)
        pixels = random.integers(0, 80, (number, 16, 12), dtype=np.uint8)
        pixels[labels == 0, :8] += 150
        pixels[labels == 1, 8:] += 150
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", pixels)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", labels)
    return folder


def batches(
    pixels: torch.Tensor, *, training: bool = True, had: int = 0, epoch: int = 0, **options: Any
) -> DeviceBatches:
    """Batches of images with their index as the label, of a run that had some already."""
    channels = pixels.shape[1]
    usual = {"padding": 0, "hflip": 0.0, "erasing": 0.0, "batch_size": 4, "mean": (0.0,) * channels}
    data = ArrayData("", **{**usual, "std": (1 / 255,) * channels, **options})
    epoch_loop = SimpleNamespace(batch_progress=SimpleNamespace(current=SimpleNamespace(ready=had)))
    data.trainer = SimpleNamespace(current_epoch=epoch, fit_loop=SimpleNamespace(epoch_loop=epoch_loop))  # type: ignore[assignment]
    return DeviceBatches(data, pixels, torch.arange(len(pixels)), training)


def noise(number: int = 10, channels: int = 3, size: int = 8) -> torch.Tensor:
    return torch.randint(0, 256, (number, channels, size, size), dtype=torch.uint8)


def test_idx_files_are_read_packed_or_not(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    for name in ("a", "a.gz"):
        write_idx(tmp_path / name, array)
        assert np.array_equal(read_idx(tmp_path / name), array)


@pytest.mark.parametrize(
    "content", [b"", b"\0\0", b"\0\0\x08\x01", b"\0\0\x08\x01\0\0\0\x02a", b"\0\0\x0d\x01\0\0\0\x01aaaa", b"<html>" * 9]
)
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "images").write_bytes(content)
    with pytest.raises(UserError, match="images: expected an IDX file of unsigned bytes, whole, got something"):
        read_idx(tmp_path / "images")
    (tmp_path / "images.gz").write_bytes(gzip.compress(bytes(999))[:-3])
    with pytest.raises(UserError, match=r"images.gz: expected an IDX file, cannot be read \("):
        read_idx(tmp_path / "images.gz")


def test_idx_arrays(idx_folder):
    pixels, labels = IdxArrays(str(idx_folder), mean=(0.5,), std=(0.5,)).read(training=True)
    assert pixels.shape == (40, 1, 16, 12)
    assert pixels.dtype == np.uint8
    assert labels.tolist() == [0, 1] * 20
    assert np.array_equal(pixels[:, 0], read_idx(idx_folder / "train-images-idx3-ubyte.gz"))
    (idx_folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match=r"expected the file t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte.gz in"):
        IdxArrays(str(idx_folder), mean=(0.5,), std=(0.5,)).read(training=False)


def test_folder_arrays(image_folder):
    data = FolderArrays(str(image_folder), mean=(0.5,) * 3, std=(0.5,) * 3)
    pixels, labels = data.read(training=False)
    assert pixels.shape == (12, 3, 36, 40)
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert data.class_names == ["blue", "green", "red"]
    with Image.open(image_folder / "val" / "green" / "2.png") as image:
        assert np.array_equal(pixels[6].transpose(1, 2, 0), np.array(image))


def test_folders_that_do_not_fit(tmp_path):
    for split, name in (("train", "a"), ("train", "b"), ("val", "a"), ("val", "c")):
        (tmp_path / split / name).mkdir(parents=True)
        Image.new("RGB", (8, 6)).save(tmp_path / split / name / "0.png")
    data = FolderArrays(str(tmp_path), mean=(0.5,) * 3, std=(0.5,) * 3)
    data.read(training=True)
    with pytest.raises(UserError, match="expected the same classes in train and val; in one of the two only: b, c"):
        data.read(training=False)
    Image.new("RGB", (6, 6)).save(tmp_path / "train" / "b" / "1.png")
    with pytest.raises(UserError, match=r"b/1.png: expected 8 x 6 pixels, as the images before it, got 6 x 6"):
        data.read(training=True)
    with pytest.raises(UserError, match=r"data.root: expected a folder of images for each class in"):
        FolderArrays(str(tmp_path / "no"), mean=(0.5,) * 3, std=(0.5,) * 3).read(training=True)


def test_an_epoch_has_every_image_once_in_an_order_of_its_own():
    pixels, orders = noise(10), []
    for epoch, seed in ((0, 0), (1, 0), (0, 1), (0, 0)):
        found = list(batches(pixels, epoch=epoch, seed=seed))
        assert [len(labels) for _, labels in found] == [4, 4]  # the incomplete one is left out
        for images, labels in found:
            assert torch.equal(images.round().to(torch.uint8), pixels[labels])
        orders.append(torch.cat([labels for _, labels in found]).tolist())
        assert len(set(orders[-1])) == 8
    assert orders[0] == orders[3]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_validation_has_every_image_in_order_and_unchanged():
    pixels = noise(10)
    loader = batches(pixels, training=False, padding=3, hflip=1.0, erasing=1.0)
    assert len(loader) == 3
    images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    assert labels.tolist() == list(range(10))
    assert torch.equal(images.round().to(torch.uint8), pixels)


def test_a_run_that_goes_on_has_the_batches_that_are_left():
    pixels, augmented = noise(20), {"padding": 2, "hflip": 0.5, "erasing": 0.5}
    whole = list(batches(pixels, epoch=3, **augmented))
    rest = list(batches(pixels, epoch=3, had=2, **augmented))
    assert len(rest) == 3
    for (images, labels), (expected, order) in zip(rest, whole[2:], strict=True):
        assert torch.equal(images, expected)
        assert torch.equal(labels, order)


def test_normalisation_of_each_channel():
    pixels = torch.full((4, 2, 8, 8), 51, dtype=torch.uint8)
    images, _ = next(iter(batches(pixels, mean=(0.2, 0.1), std=(0.5, 0.25))))
    torch.testing.assert_close(images, torch.tensor([0.0, 0.4]).view(1, 2, 1, 1).expand(4, 2, 8, 8))


def test_images_are_moved_and_mirrored_at_the_border():
    pixels = noise(400, channels=2, size=8)
    padded = torch.nn.functional.pad(pixels.float(), (2, 2, 2, 2), mode="reflect")
    shifts, flips = [], []
    for images, labels in batches(pixels, padding=2, hflip=0.5, batch_size=100):
        for image, index in zip(images, labels, strict=True):
            candidates = {
                (dy, dx, flip): crop.flip(2) if flip else crop
                for dy in range(5)
                for dx in range(5)
                for flip in (False, True)
                for crop in [padded[index, :, dy : dy + 8, dx : dx + 8]]
            }
            found = [key for key, crop in candidates.items() if torch.allclose(crop, image, atol=0.01)]
            assert len(found) == 1
            shifts += [found[0][:2]]
            flips += [found[0][2]]
    assert len(set(shifts)) == 25  # each with a probability of 1 / 25, of 400 images
    assert 150 < sum(flips) < 250


def test_rectangles_of_a_quarter_to_a_half_of_each_side_are_erased():
    pixels = torch.full((300, 3, 16, 16), 255, dtype=torch.uint8)
    areas = []
    for images, _ in batches(pixels, erasing=0.5, batch_size=100):
        for image in images:
            hidden = (image == 0).all(0)
            assert torch.equal(hidden, (image == 0).any(0))
            rows, columns = hidden.any(1), hidden.any(0)
            assert torch.equal(hidden, rows[:, None] & columns)
            areas.append(hidden.sum().item())
            for side in (rows, columns):
                where = side.nonzero().flatten()
                if len(where):
                    assert 4 <= len(where) <= 8
                    assert len(where) == where[-1] - where[0] + 1
    assert 110 < np.count_nonzero(areas) < 190
    assert len(set(areas)) > 10


@pytest.fixture
def idx_options(idx_folder: Path, tmp_path: Path) -> list[str]:
    return [
        "--trainer.accelerator=cpu", "--trainer.max_epochs=6", f"--trainer.default_root_dir={tmp_path / 'runs'}",
        "--trainer.log_every_n_steps=1", "--trainer.num_sanity_val_steps=0", "--trainer.devices=1",
        "--model=oriented1d.classification.ImageClassifier", "--model.network=convnext_atto_2d",
        "--model.network_args={depths: [1, 1, 1, 1], dims: [8, 8, 8, 8], stem_stride: 1, in_chans: 1}",
        "--model.network_args.layer_scale_init_value=1.0", "--model.num_classes=2", "--model.warmup_epochs=1",
        "--model.lr=5e-3", "--model.mixup=0", "--model.cutmix=0", "--model.ema_decay=null", "--model.drop_path_rate=0",
        "--data=oriented1d.classification.arrays.IdxArrays", f"--data.root={idx_folder}", "--data.batch_size=8",
        "--data.mean=[0.4]", "--data.std=[0.3]", "--data.padding=1", "--data.erasing=0",
    ]  # fmt: skip


def test_a_run_learns_and_sees_another_order_in_every_epoch(idx_options, tmp_path, monkeypatch):
    seen: list[list[int]] = []
    whole = DeviceBatches.__iter__

    def watched(self):
        for images, labels in whole(self):
            if self.training:
                seen.append(labels.tolist())
            yield images, labels

    monkeypatch.setattr(DeviceBatches, "__iter__", watched)
    assert main(["fit", *idx_options]) == 0
    with (tmp_path / "runs" / "version_0" / "metrics.csv").open() as stream:
        top1 = [float(row["val/top1"]) for row in csv.DictReader(stream) if row["val/top1"]]
    assert len(top1) == 6
    assert top1[-1] == 1.0
    assert len(seen) == 30
    epochs = [tuple(chain(*seen[5 * i : 5 * i + 5])) for i in range(6)]
    assert all(sum(epoch) == 20 for epoch in epochs)
    assert len(set(epochs)) == 6


@pytest.mark.parametrize("step", [7, 10])
def test_a_run_that_goes_on_from_a_checkpoint(idx_folder, tmp_path, step):
    """In the middle of the second epoch of five batches, and at its end."""
    seen: list[list[tuple[float, list[int]]]] = []

    class Watched(ImageClassifier):
        def training_step(self, batch, batch_idx):
            seen[-1].append((float(batch[0].sum()), batch[1].tolist()))
            return super().training_step(batch, batch_idx)

    for checkpoint in (None, str(tmp_path / f"epoch=1-step={step}.ckpt")):
        seen.append([])
        arguments = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8), "in_chans": 1, "stem_stride": 1}
        model = Watched("convnext_atto_2d", arguments, 2, mixup=0.0, cutmix=0.0, ema_decay=None, warmup_epochs=1)
        data = IdxArrays(str(idx_folder), mean=(0.4,), std=(0.3,), batch_size=8, padding=2, seed=5)
        saving = ModelCheckpoint(tmp_path, every_n_train_steps=step, save_top_k=-1)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = L.Trainer(accelerator="cpu", max_epochs=3, callbacks=saving, num_sanity_val_steps=0, **quiet)
        trainer.fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    assert len(seen[0]) == 15
    assert seen[1] == seen[0][step:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.padding=12"], "data.padding: expected 0 to 11, less than the images' side, got 12"),
        (
            ["--data.mean=[0.1,0.2,0.3]"],
            "data.mean: expected one number for each of the 1 channels, got (0.1, 0.2, 0.3)",
        ),
        (["--data.batch_size=41"], "data.batch_size: expected at most the 40 training images, got 41"),
        (["--data.root=nowhere"], "data.root: expected the file train-images-idx3-ubyte or train-images-idx3-ubyte.gz"),
        (["--trainer.devices=2"], "trainer.devices: IdxArrays holds its images on one device, got 2"),
    ],
)
def test_bad_input_is_named(idx_options, capsys, monkeypatch, options, message):
    if "--trainer.devices=2" in options:  # without the second process
        monkeypatch.setattr("lightning.Trainer.world_size", 2)
        options = []
    assert main(["fit", *idx_options, *options]) == 1
    assert message in capsys.readouterr().err


def test_predicting_is_left_to_the_other_data(idx_options, capsys):
    options = [option for option in idx_options if "max_epochs" not in option]
    assert main(["predict", *options]) == 1
    assert "predicted with oriented1d.classification.ImageData" in capsys.readouterr().err
