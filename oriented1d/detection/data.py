"""Images with objects in the layout of COCO."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from oriented1d.detection.cascade import Truth
from oriented1d.detection.transforms import SHORT_SIDES, Sample, TrainTransform, pad, pad_masks
from oriented1d.training.batches import GroupedSampler, Lists, eval_loader, keep_total_batch, worker_loader
from oriented1d.training.errors import UserError
from oriented1d.training.files import find_images
from oriented1d.training.images import MEAN, STD, read_image, resize_image, scaled_size, to_tensor

_SHOWN = 5  # files that an error names
_SMALLEST = 32  # images with a shorter side are not trained on


def read_annotations(path: Path) -> COCO:
    """Annotations of one split.

    Raises:
        UserError: there is no such file, or it is not in COCO's format.
    """
    if not path.is_file():
        raise UserError(f"data.root: expected the annotations {path}, which does not exist")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            annotations = COCO(str(path))
        for key in ("images", "categories", "annotations"):
            if not isinstance(annotations.dataset[key], list):
                raise TypeError(f"{key} is no list")
        if not annotations.dataset["images"]:
            raise ValueError("no images")
    except Exception as error:  # json and pycocotools raise many kinds
        raise UserError(
            f"{path}: expected COCO's format with images, annotations and categories ({type(error).__name__}: {error})"
        ) from error
    return annotations


def check_images(folder: Path, annotations: COCO) -> None:
    """See that every image is there, can be opened and has its size.

    Raises:
        UserError: the first few that are wrong are named.
    """
    wrong = []
    for image in annotations.dataset["images"]:
        path = folder / image["file_name"]
        try:
            with Image.open(path) as opened:
                if opened.size != (image["width"], image["height"]):
                    wrong.append(f"{path} ({opened.size} pixels, expected {(image['width'], image['height'])})")
        except FileNotFoundError:
            wrong.append(f"{path} (missing)")
        except Exception as error:  # decoders raise OSError, SyntaxError, ValueError and more
            wrong.append(f"{path} (cannot be read: {error})")
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise UserError(f"data.root: {len(wrong)} bad images: {'; '.join(wrong[:_SHOWN])}{more}")


def objects(annotations: COCO, image: dict[str, Any], labels: dict[int, int]) -> tuple[np.ndarray, ...]:
    """Boxes ``(G, 4)``, labels ``(G,)`` and masks ``(G, H, W)`` of an image.

    Crowd regions, boxes outside the image or without a pixel, and objects of no area are left out, as in mmdetection.
    """
    height, width = image["height"], image["width"]
    boxes, classes, masks = [], [], []
    for annotation in annotations.imgToAnns[image["id"]]:
        x, y, w, h = annotation["bbox"]
        inside = min(x + w, width) > max(x, 0) and min(y + h, height) > max(y, 0)
        skipped = annotation.get("ignore") or annotation.get("iscrowd")
        if skipped or not inside or annotation["area"] <= 0 or w < 1 or h < 1:
            continue
        boxes.append([x, y, x + w, y + h])
        classes.append(labels[annotation["category_id"]])
        masks.append(_decode(annotation["segmentation"], height, width))
    return (
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(classes, np.int64),
        np.stack(masks) if masks else np.zeros((0, height, width), np.uint8),
    )


def _decode(segmentation: Any, height: int, width: int) -> np.ndarray:
    if isinstance(segmentation, list):  # polygons
        parts = [polygon for polygon in segmentation if len(polygon) >= 6]
        if not parts:
            return np.zeros((height, width), np.uint8)
        segmentation = coco_mask.merge(coco_mask.frPyObjects(parts, height, width))
    elif isinstance(segmentation["counts"], list):  # run lengths, not compressed
        segmentation = coco_mask.frPyObjects(segmentation, height, width)
    return coco_mask.decode(segmentation)


class TrainSet(Dataset[tuple[Tensor, Truth]]):
    """Augmented images. Sample ``epoch * len + i`` is image ``i`` with the augmentation of that epoch, always the same,
    whichever process makes it."""

    def __init__(self, folder: Path, annotations: COCO, transform: TrainTransform, seed: int, keep_empty: bool) -> None:
        self.folder = folder
        self.annotations = annotations
        self.transform = transform
        self.seed = seed
        self.labels = {number: i for i, number in enumerate(sorted(annotations.cats))}
        self.images = [
            image
            for image in annotations.dataset["images"]
            if min(image["width"], image["height"]) >= _SMALLEST
            and (keep_empty or any(not a.get("iscrowd") for a in annotations.imgToAnns[image["id"]]))
        ]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, sample: int) -> tuple[Tensor, Truth]:
        epoch, index = divmod(sample, len(self.images))
        image = self.images[index]
        random = np.random.default_rng((self.seed, epoch, index))
        pixels = read_image(self.folder / image["file_name"])
        return self.transform(Sample(pixels, *objects(self.annotations, image, self.labels)), random)


class TestSet(Dataset[dict[str, Any]]):
    """Whole images, scaled. ``files`` are ``(path, image id)``."""

    def __init__(
        self,
        files: Sequence[tuple[Path, int]],
        longest: int,
        shortest: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
    ) -> None:
        self.files = files
        self.longest = longest
        self.shortest = shortest
        self.mean = mean
        self.std = std

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """``file``, ``id``, ``image`` ``(3, H, W)``, ``size`` of the file's image, ``scale`` from that to ``image``
        (width, height)."""
        path, number = self.files[index]
        pixels = read_image(path)
        height, width = pixels.shape[:2]
        size = scaled_size(height, width, self.longest, self.shortest)
        return {
            "file": str(path),
            "id": number,
            "image": to_tensor(resize_image(pixels, *size), self.mean, self.std),
            "size": (height, width),
            "scale": (size[1] / width, size[0] / height),
        }


def train_batch(samples: list[tuple[Tensor, Truth]]) -> dict[str, Any]:
    """``images`` ``(N, 3, H, W)``, ``sizes`` before the padding, ``truths`` with masks of the padded size."""
    images = pad([image for image, _ in samples])
    height, width = images.shape[2:]
    return {
        "images": images,
        "sizes": [tuple(image.shape[1:]) for image, _ in samples],
        "boxes": [truth.boxes for _, truth in samples],
        "labels": [truth.labels for _, truth in samples],
        "masks": [pad_masks(truth.masks, height, width) for _, truth in samples],
    }


def test_batch(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """``images`` ``(N, 3, H, W)``, ``sizes`` before the padding, ``scales`` ``(N, 2)``, and lists of the rest."""
    return {
        "images": pad([sample["image"] for sample in samples]),
        "sizes": [tuple(sample["image"].shape[1:]) for sample in samples],
        "scales": torch.tensor([sample["scale"] for sample in samples]),
        "originals": [sample["size"] for sample in samples],
        "ids": [sample["id"] for sample in samples],
        "files": [sample["file"] for sample in samples],
    }


class DetectionData(L.LightningDataModule):
    """Folders ``train2017`` and ``val2017`` and ``annotations/instances_{train2017,val2017}.json``, as COCO has them.

    The defaults are those of the recipe for COCO.

    Args:
        root: folder of the data set.
        train_split, val_split: names of the folders.
        images: image files and folders for ``oriented1d predict``.
        short_sides: shorter sides of training images, pixels; one of them at random.
        before_crop: shorter sides before a crop.
        crop: smallest and largest side of a crop, pixels.
        longest: longer side at most, in training and evaluation, pixels.
        test_short_side: shorter side in evaluation, pixels.
        keep_empty: train on images without objects too.
        batch_size: images of a batch on each device.
        total_batch_size: images of an optimizer step on all devices.
        num_workers: processes that load, for each device.
        seed: of shuffling and augmentation.
        mean, std: of the channels, for values from 0 to 1.
    """

    def __init__(
        self,
        root: str | None = None,
        train_split: str = "train2017",
        val_split: str = "val2017",
        images: str | list[str] | None = None,
        short_sides: list[int] | None = None,
        before_crop: list[int] | None = None,
        crop: tuple[int, int] = (384, 600),
        longest: int = 1333,
        test_short_side: int = 800,
        keep_empty: bool = False,
        batch_size: int = 2,
        total_batch_size: int = 16,
        num_workers: int = 4,
        seed: int = 0,
        mean: tuple[float, float, float] = MEAN,
        std: tuple[float, float, float] = STD,
    ) -> None:
        super().__init__()
        self.root = root
        self.train_split = train_split
        self.val_split = val_split
        self.images = [images] if isinstance(images, str) else images
        self.transform = TrainTransform(
            short_sides or SHORT_SIDES, longest, before_crop or (400, 500, 600), crop, mean=mean, std=std
        )
        self.test_short_side = test_short_side
        self.keep_empty = keep_empty
        self.batch_size = batch_size
        self.total_batch_size = total_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.class_names: list[str] | None = None
        self.annotations: COCO | None = None

    def setup(self, stage: str) -> None:
        """Find the images of the stage.

        Raises:
            UserError: something is missing or wrong, the categories of the splits differ, or the batch sizes do not
                divide.
        """
        assert self.trainer is not None
        if stage == "predict":
            if not self.images:
                raise UserError("data.images: expected image files or folders to predict, got none")
            self.test_set = self._test_set([(path, i) for i, path in enumerate(find_images(self.images))])
            return
        if self.root is None:
            raise UserError("data.root: expected the folder of the data set, got none")
        root = Path(self.root)
        if stage == "fit":
            annotations = self._read(root, self.train_split)
            self.train_set = TrainSet(root / self.train_split, annotations, self.transform, self.seed, self.keep_empty)
            keep_total_batch(self.trainer, self.total_batch_size, self.batch_size, len(self.train_set))
        self.annotations = self._read(root, self.val_split)
        images = self.annotations.dataset["images"]
        self.test_set = self._test_set([(root / self.val_split / i["file_name"], i["id"]) for i in images])

    def _read(self, root: Path, split: str) -> COCO:
        annotations = read_annotations(root / "annotations" / f"instances_{split}.json")
        check_images(root / split, annotations)
        names = [annotations.cats[number]["name"] for number in sorted(annotations.cats)]
        if self.class_names is not None and names != self.class_names:
            raise UserError(f"data.root: expected the categories of {self.train_split} in {split} too")
        self.class_names = names
        return annotations

    def _test_set(self, files: Sequence[tuple[Path, int]]) -> TestSet:
        transform = self.transform
        return TestSet(files, transform.longest, self.test_short_side, transform.mean, transform.std)

    def train_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        wide = [int(image["width"] >= image["height"]) for image in self.train_set.images]
        sampler = GroupedSampler(self.train_set, self.trainer, self.batch_size, self.seed, wide)
        return worker_loader(Lists(self.train_set), sampler, self.num_workers, batch_size=None, collate_fn=train_batch)

    def val_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        return eval_loader(self.test_set, self.trainer, self.num_workers, test_batch)

    predict_dataloader = val_dataloader
