import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from oriented1d.segmentation.data import TestSet as ImagesToTest
from oriented1d.segmentation.data import TrainSet, class_names, find_pairs, read_labels
from oriented1d.segmentation.predictions import overlay
from oriented1d.segmentation.transforms import TrainTransform, distort
from oriented1d.training.batches import EpochSampler, Shard
from oriented1d.training.errors import UserError
from oriented1d.training.predictions import palette
from tests.segmentation.conftest import COLOURS


def plain(**options) -> TrainTransform:
    """A transform without randomness of colour."""
    return TrainTransform(**({"scale": (320, 288), "crop": 64, "distort": False} | options))


def test_pairs_and_names(mosaic: Path) -> None:
    pairs = find_pairs(mosaic, "training")
    assert [image.stem for image, _ in pairs] == [f"{i:03d}" for i in range(24)]
    assert all(image.stem == label.stem for image, label in pairs)
    assert class_names(mosaic) == ["red", "green", "blue"]
    assert class_names(mosaic / "images") is None


def test_bad_pairs_are_named(mosaic: Path, tmp_path: Path) -> None:
    root = tmp_path / "bad"
    shutil.copytree(mosaic, root)
    images, annotations = root / "images" / "training", root / "annotations" / "training"
    (annotations / "003.png").unlink()
    (images / "004.png").unlink()
    (images / "005.png").write_bytes(b"no image")
    Image.new("L", (5, 5)).save(annotations / "006.png")
    with pytest.raises(UserError, match=r"data\.root: 4 bad pairs in training: ") as error:
        find_pairs(root, "training")
    for name in (
        "003.png (no label map",
        "004.png (no image",
        "005.png",
        "006.png ((5, 5) pixels, its image has (80, 72))",
    ):
        assert name in str(error.value)
    with pytest.raises(UserError, match="expected the folders images/test and annotations/test"):
        find_pairs(root, "test")


def test_labels_are_shifted(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 1, 2], [3, 255, 1]], np.uint8)).save(tmp_path / "a.png")
    assert read_labels(tmp_path / "a.png", 3, True).tolist() == [[255, 0, 1], [2, 255, 0]]
    assert read_labels(tmp_path / "a.png", 4, False).tolist() == [[0, 1, 2], [3, 255, 1]]
    with pytest.raises(UserError, match=r"a\.png: expected labels from 1 to 2, got 3"):
        read_labels(tmp_path / "a.png", 2, True)


def test_labels_stay_on_their_pixels(mosaic: Path) -> None:
    """Scaled, cropped and mirrored alike: away from borders every pixel has the colour of its label."""
    data = TrainSet(find_pairs(mosaic, "training"), 3, True, plain(mirror=1.0, ratios=(0.4, 0.6)), seed=3)
    right = total = 0
    for i in range(len(data)):
        pixels, labels = data[i]
        assert pixels.shape == (3, 64, 64)
        colours = (pixels * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)).permute(1, 2, 0)
        colours = (colours + torch.tensor([0.485, 0.456, 0.406])) * 255
        nearest = (colours[..., None, :] - torch.from_numpy(COLOURS)).norm(dim=-1).argmin(-1)
        known = labels != 255
        right, total = right + (nearest == labels)[known].sum().item(), total + known.sum().item()
    assert total > 24 * 2000
    assert right / total > 0.97


def test_small_images_are_filled_up_with_ignored_labels(mosaic: Path) -> None:
    data = TrainSet(find_pairs(mosaic, "training"), 3, True, plain(scale=(40, 36), ratios=(1.0, 1.0)), seed=0)
    pixels, labels = data[0]
    assert (labels[36:] == 255).all()
    assert (labels[:, 40:] == 255).all()
    assert (pixels[:, 36:] == 0).all()
    assert (labels[:36, 2:40] != 255).any()


def test_crops_have_more_than_one_class() -> None:
    labels = np.zeros((64, 640), np.uint8)
    labels[:, 600:] = 1
    image = np.zeros((64, 640, 3), np.uint8)
    transform = TrainTransform(scale=(640, 64), ratios=(1.0, 1.0), crop=64, distort=False)
    with_two = 0
    for seed in range(100):
        _, target = transform(image, labels, np.random.default_rng(seed))
        counts = torch.bincount(target.flatten(), minlength=2)
        with_two += bool((counts > 0).all() and counts.max() < 0.75 * counts.sum())
    # One draw in twelve or so succeeds, and there are eleven of them.
    assert 35 < with_two < 85


def test_samples_do_not_depend_on_who_makes_them(mosaic: Path) -> None:
    pairs = find_pairs(mosaic, "training")
    first, second = (TrainSet(pairs, 3, True, TrainTransform(scale=(80, 72), crop=48), seed=s) for s in (1, 1))
    for a, b in zip(first[30], second[30], strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first[30][0], first[6][0])  # the same image in the epoch before
    assert not torch.equal(first[30][0], TrainSet(pairs, 3, True, first.transform, seed=2)[30][0])


def test_distortion() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (20, 30, 3)).astype(np.uint8)
    results = [distort(image, np.random.default_rng(seed)) for seed in range(40)]
    assert all(result.shape == image.shape and result.dtype == np.uint8 for result in results)
    unchanged = sum(np.array_equal(result, image) for result in results)
    assert 0 < unchanged < 12
    grey = np.full((4, 4, 3), 100, np.uint8)  # no hue and no saturation: only brightness and contrast act
    values = {int(distort(grey, np.random.default_rng(seed))[0, 0, 0]) for seed in range(200)}
    assert min(values) < 60
    assert max(values) > 140
    assert min(values) >= 34
    assert max(values) <= 198


def trainer(world: int = 1, rank: int = 0, had: int = 0) -> SimpleNamespace:
    progress = SimpleNamespace(current=SimpleNamespace(ready=had))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    return SimpleNamespace(world_size=world, global_rank=rank, fit_loop=loop)


def test_samplers() -> None:
    data = list(range(11))
    samplers = [EpochSampler(data, trainer(2, rank), 2, seed=0) for rank in range(2)]
    orders = []
    for epoch in range(2):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        parts = [list(sampler) for sampler in samplers]
        assert len(parts[0]) == len(parts[1]) == 5
        assert len(set(parts[0]) | set(parts[1])) == 10
        assert all(sample // 11 == epoch for part in parts for sample in part)
        orders.append([sample % 11 for sample in parts[0]])
    assert orders[0] != orders[1]
    late = EpochSampler(data, trainer(2, 0, had=1), 2, seed=0)
    late.set_epoch(1)
    assert [sample % 11 for sample in late] == orders[1][2:]
    shards = [Shard(data, trainer(3, rank)) for rank in range(3)]
    assert sorted(sample for shard in shards for sample in shard) == data
    assert [len(shard) for shard in shards] == [4, 4, 3]


def test_images_to_test(mosaic: Path) -> None:
    data = ImagesToTest(
        find_pairs(mosaic, "validation"), 3, True, (160, 144), [0.5, 1.0], (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)
    )
    sample = data[1]
    assert [tuple(image.shape) for image in sample["images"]] == [(3, 72, 80), (3, 144, 160)]
    assert sample["size"] == (72, 80)
    assert sample["labels"].shape == (72, 80)
    original = np.array(Image.open(sample["file"]).convert("RGB"))
    expected = (torch.from_numpy(original).permute(2, 0, 1) / 255 - 0.5) / 0.2
    torch.testing.assert_close(sample["images"][0], expected)


def test_overlay() -> None:
    colours = palette(150)
    assert len({tuple(colour) for colour in colours.tolist()}) == 150
    image = np.full((2, 2, 3), 100, np.uint8)
    labels = np.array([[0, 1], [255, 0]])
    mixed = overlay(image, labels, 2)
    assert mixed[1, 0].tolist() == [100, 100, 100]
    assert mixed[0, 1].tolist() == np.rint(50 + colours[1] / 2).tolist()
