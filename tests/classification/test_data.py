"""Samples that follow from the seed, the epoch and their number; what the device does to them; images that cannot be
read."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from torch.utils.data import DataLoader

from oriented1d.classification import Digits, ImageClassifier, ImageData
from oriented1d.classification.data import ArrayImages, EvalSet, TrainSample, erase, erased_box, random_numbers_of
from oriented1d.cli import main
from oriented1d.training.errors import UserError
from tests.classification.conftest import write_images


def test_digits():
    module = Digits(image_size=32, crop_pct=1.0)
    train, images = module.create_split(training=True), module.create_split(training=False)
    assert isinstance(train, ArrayImages)
    assert isinstance(images, ArrayImages)
    val = EvalSet(images, module.eval_transform())
    assert (len(train), len(val)) == (1437, 360)
    assert module.class_names == [str(digit) for digit in range(10)]
    labels = torch.tensor([val[i][1] for i in range(360)])
    assert labels.bincount().tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    image, _ = val[0]
    assert (image.shape, image.dtype) == ((3, 32, 32), torch.uint8)
    assert torch.equal(image[0], image[2])  # the same in every channel
    assert (int(image.min()), int(image.max())) == pytest.approx((0, 255), abs=3)  # 16 levels fill the range
    held_out = {images.pixels[i].tobytes() for i in range(360)}
    assert len(held_out & {train.pixels[i].tobytes() for i in range(1437)}) == 0


# Random numbers -------------------------------------------------------------------------------------------------------


def draw() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002


def test_random_numbers_follow_from_the_key_and_leave_those_outside_alone():
    L.seed_everything(3)
    outside = [draw(), draw()]
    L.seed_everything(3)
    inside = []
    assert draw() == outside[0]
    for key in ((0, 1, 2), (0, 1, 2), (0, 2, 1), (1, 1, 2)):
        with random_numbers_of(*key):
            inside.append(draw())
    assert draw() == outside[1]
    assert inside[0] == inside[1]
    assert len({number for numbers in inside for number in numbers}) == 3 * 3


def train_set(folder: Path, **options):
    return ImageData(str(folder), image_size=32, **options).create_train_set()


def test_samples_are_the_same_whichever_process_makes_them(image_folder, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    data = train_set(image_folder)
    samples = list(range(47, 47 + 12))  # the last one of epoch 0 and the first ones of epoch 1
    alone = next(iter(DataLoader(data, 12, sampler=samples)))
    # Two workers, of which each makes every second batch.
    shared = list(DataLoader(data, 3, sampler=samples, num_workers=2))
    for name in ("pixels", "label", "erased"):
        assert torch.equal(torch.cat([getattr(batch, name) for batch in shared]), getattr(alone, name))
    again = data[47 + 48]
    assert again.label == alone.label[0] == 2
    assert not torch.equal(again.pixels, alone.pixels[0])  # another epoch
    monkeypatch.setenv("PL_GLOBAL_SEED", "6")
    assert not torch.equal(train_set(image_folder)[47].pixels, alone.pixels[0])


class Recorder(L.Callback):
    """Keeps the batches that the network gets; writes a checkpoint after batch ``at`` and stops."""

    def __init__(self, at: int | None = None, path: Path | None = None) -> None:
        self.batches: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.at = at
        self.path = path

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if len(self.batches) == self.at:
            trainer.save_checkpoint(self.path)
            raise InterruptedError
        self.batches.append(tuple(batch))


def fit(folder: Path, recorder: Recorder, checkpoint: Path | None = None, **options) -> None:
    L.seed_everything(0)
    network = {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]}
    module = ImageClassifier("convnext_atto_2d", network, num_classes=3, warmup_epochs=0, mixup=0, cutmix=0)
    values = {"image_size": 32, "batch_size": 8, "total_batch_size": 8, "num_workers": 0, "erasing": 1.0}
    trainer = L.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0, callbacks=[recorder],
    )  # fmt: skip
    trainer.fit(module, datamodule=ImageData(str(folder), **(values | options)), ckpt_path=checkpoint)


@pytest.mark.parametrize("shards", [False, True])
def test_a_resumed_run_gets_the_samples_of_an_uninterrupted_one(image_folder, image_shards, tmp_path, shards):
    """From the middle of the second epoch of six batches, with another number of workers."""
    folder = image_shards if shards else image_folder
    whole, first, second = Recorder(), Recorder(8, tmp_path / "x.ckpt"), Recorder()
    fit(folder, whole, num_workers=1)
    with pytest.raises(InterruptedError):
        fit(folder, first, num_workers=0)
    fit(folder, second, tmp_path / "x.ckpt", num_workers=2)
    parts = first.batches + second.batches
    assert len(whole.batches) == len(parts) == 12
    for one, two in zip(whole.batches, parts, strict=True):
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])
    assert len({float(images.sum()) for images, _ in parts}) == 12
    for epoch in (parts[:6], parts[6:]):
        assert torch.cat([labels for _, labels in epoch]).bincount().tolist() == [16, 16, 16]


# On the device --------------------------------------------------------------------------------------------------------


def test_normalisation_is_that_of_timm_to_the_bit(image_folder):
    data = ImageData(str(image_folder), image_size=32)
    images = data.create_split(training=False)
    timms = create_transform(32, is_training=False, interpolation="bicubic", crop_pct=224 / 256)
    expected = torch.stack([timms(images[i][0]) for i in range(12)])
    pixels = torch.stack([EvalSet(images, data.eval_transform())[i][0] for i in range(12)])
    assert pixels.dtype == torch.uint8
    normalised = data.normalise(pixels)
    assert torch.equal(normalised, expected)
    assert normalised.is_contiguous()


def test_erased_boxes_are_those_of_timm():
    timms = RandomErasing(0.25, mode="const", device="cpu")
    erased = 0
    for seed in range(400):
        random.seed(seed)
        expected = timms(torch.ones(1, 32, 32))[0] == 0
        random.seed(seed)
        top, left, height, width = erased_box(0.25, 32)
        found = torch.zeros(32, 32, dtype=torch.bool)
        found[top : top + height, left : left + width] = True
        assert torch.equal(found, expected)
        erased += height > 0
    assert 70 < erased < 130


def test_boxes_are_filled_with_noise_and_the_rest_is_left_alone():
    images = torch.full((3, 3, 40, 50), 7.0)
    boxes = torch.tensor([[5, 10, 30, 35], [0, 0, 0, 0], [39, 49, 1, 1]])
    result = erase(images, boxes, torch.Generator().manual_seed(0))
    changed = result != 7
    assert changed.sum(dim=(1, 2, 3)).tolist() == [3 * 30 * 35, 0, 3]
    assert changed[0, :, 5:35, 10:45].all()
    noise = result[0][changed[0]]
    assert (float(noise.mean()), float(noise.std())) == pytest.approx((0, 1), abs=0.06)
    assert noise.unique().numel() > 3000  # another value in each pixel and channel
    assert not torch.equal(erase(images, boxes, torch.Generator().manual_seed(1)), result)


# Images that cannot be read -------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def many_images(tmp_path_factory) -> Path:
    """``train`` with 100 and ``val`` with 4 images of each of three classes."""
    root = tmp_path_factory.mktemp("many")
    write_images(root / "train", 100, seed=1)
    write_images(root / "val", 4, seed=2)
    return root


@pytest.fixture
def broken(many_images, tmp_path) -> Path:
    """A copy to break images of."""
    shutil.copytree(many_images, tmp_path / "broken")
    return tmp_path / "broken"


def spoil(image: Path) -> Path:
    image.write_bytes(image.read_bytes()[:200])
    return image


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_replaced_and_named_once(options, broken, capsys, workers):
    bad = [spoil(broken / "train" / name) for name in ("red/0.png", "green/50.png", "blue/99.png")]
    arguments = [
        "--data.root",
        str(broken),
        "--data.num_workers",
        str(workers),
        "--data.batch_size=50",
        "--data.total_batch_size=50",
    ]
    assert main(["fit", *options, *arguments, "--trainer.limit_val_batches=0", "--trainer.max_epochs=2"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "cannot be read" in line]
    assert len(lines) == 3  # 1% of 300, in two epochs
    for image in bad:
        (line,) = (line for line in lines if line.startswith(f"{image}: expected an image, cannot be read ("))
        assert line.endswith("another image takes its place")


def test_more_than_one_percent_stop_the_run(options, broken, capsys):
    for i in range(4):
        spoil(broken / "train" / "red" / f"{i}.png")
    arguments = [f"--data.root={broken}", "--data.batch_size=50", "--data.total_batch_size=50"]
    assert main(["fit", *options, *arguments]) == 1
    printed = capsys.readouterr()
    named = [line for line in printed.out.splitlines() if "cannot be read" in line]
    assert len(named) == 4
    error = printed.err.strip().splitlines()[-1]
    assert "at most 1% of the 300 training images to be unreadable, got 4 in this epoch, the last of them " in error
    assert named[-1].partition(":")[0] in error


def test_the_sample_in_place_of_an_unreadable_one_is_always_the_same(broken):
    data = train_set(broken)
    before = data[7], data[8]
    bad = spoil(Path(data.images.reader.filename(7, absolute=True)))  # type: ignore[attr-defined]
    one, two = data[7], data[7]
    assert one.unreadable == two.unreadable
    assert one.unreadable.startswith(f"{bad}: expected an image, cannot be read (")
    assert torch.equal(one.pixels, two.pixels)
    assert not torch.equal(one.pixels, before[0].pixels)
    assert not torch.equal(one.pixels, data[300 + 7].pixels)  # another one in another epoch
    assert data[8].unreadable == ""
    assert torch.equal(data[8].pixels, before[1].pixels)


def test_nothing_can_be_read(options, tmp_path, image_folder, capsys):
    shutil.copytree(image_folder, tmp_path / "broken")
    for image in (tmp_path / "broken" / "train").rglob("*.png"):
        spoil(image)
    assert main(["fit", *options, "--data.root", str(tmp_path / "broken"), "--data.num_workers=1"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"oriented1d fit: error: {tmp_path}/broken/train/")
    assert error.endswith("; nor can 10 others that were drawn in its place")


def test_validation_stops_at_an_unreadable_image(options, tmp_path, image_folder, capsys):
    shutil.copytree(image_folder, tmp_path / "broken")
    bad = spoil(tmp_path / "broken" / "val" / "green" / "2.png")
    arguments = ["--data.root", str(tmp_path / "broken"), "--data.num_workers=1"]
    assert main(["validate", *options, *arguments]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"oriented1d validate: error: {bad}: expected an image, cannot be read (")


def test_streams_of_timm_are_refused():
    with pytest.raises(UserError, match=r"data.dataset: expected nothing, .*, or hfds/NAME, got wds/imagenet"):
        ImageData("anywhere", dataset="wds/imagenet").create_split(training=True)


def test_batches_are_named_tuples_of_whole_tensors(image_folder):
    batch = next(iter(DataLoader(train_set(image_folder), 4)))
    assert isinstance(batch, TrainSample)
    assert (batch.pixels.shape, batch.pixels.dtype) == ((4, 3, 32, 32), torch.uint8)
    assert batch.pixels.is_contiguous()
    assert (batch.erased.shape, tuple(batch.unreadable)) == ((4, 4), ("",) * 4)
