"""Images with label maps in the layout of ADE20K."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from oriented1d.segmentation.transforms import IGNORED, TrainTransform
from oriented1d.training.batches import EpochSampler, eval_loader, keep_total_batch, worker_loader
from oriented1d.training.errors import UserError
from oriented1d.training.files import find_images
from oriented1d.training.images import MEAN, STD, read_image, resize_image, scaled_size, to_tensor

_SHOWN = 5  # files that an error names


def find_pairs(root: Path, split: str) -> list[tuple[Path, Path]]:
    """Images and label maps of a split, in the order of their names.

    Raises:
        UserError: a folder is missing, or images without labels, labels without images, files that are no images, or
            pairs of different sizes: the first few are named.
    """
    images, annotations = root / "images" / split, root / "annotations" / split
    for folder in (images, annotations):
        if not folder.is_dir():
            raise UserError(f"data.root: expected the folders images/{split} and annotations/{split}, no {folder}")
    labels = {path.stem: path for path in sorted(annotations.glob("*.png"))}
    pairs, wrong = [], []
    for image in find_images([str(images)]):
        label = labels.pop(image.stem, None)
        if label is None:
            wrong.append(f"{image} (no label map {annotations / image.stem}.png)")
            continue
        pairs.append((image, label))
    wrong += [f"{label} (no image {images / stem}.*)" for stem, label in labels.items()]
    for image, label in pairs:
        try:
            with Image.open(image) as first, Image.open(label) as second:
                if first.size != second.size:
                    wrong.append(f"{label} ({second.size} pixels, its image has {first.size})")
                elif second.mode not in ("L", "P"):
                    wrong.append(f"{label} (expected 8 bits a pixel, got mode {second.mode})")
        except Exception as error:  # decoders raise OSError, SyntaxError, ValueError and more
            wrong.append(f"{image} or {label} (cannot be read: {error})")
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise UserError(f"data.root: {len(wrong)} bad pairs in {split}: {'; '.join(wrong[:_SHOWN])}{more}")
    if not pairs:
        raise UserError(f"data.root: expected images in {images}, found none")
    return pairs


def class_names(root: Path) -> list[str] | None:
    """The names in ``objectInfo*.txt``, tab separated with the number first and the name last; None without a file."""
    for path in sorted(root.glob("objectInfo*.txt")):
        with path.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.reader(file, delimiter="\t") if row and row[0].strip().isdecimal()]
        return [row[-1].split(",")[0].strip() for row in rows]
    return None


def read_labels(path: Path, num_classes: int, zero_is_unlabelled: bool) -> np.ndarray:
    """``(H, W)`` uint8: classes from 0, and 255 for what is not labelled.

    Raises:
        UserError: it cannot be read, or holds labels of other classes.
    """
    try:
        with Image.open(path) as image:
            labels = np.array(image)
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError and more
        raise UserError(f"{path}: expected a label map, cannot be read ({error})") from error
    if zero_is_unlabelled:
        labels = np.where(labels == IGNORED, IGNORED, labels - np.uint8(1)).astype(np.uint8)  # 0 becomes 255
    largest = int(labels[labels != IGNORED].max(initial=0))
    if largest >= num_classes:
        first = int(zero_is_unlabelled)
        raise UserError(
            f"{path}: expected labels from {first} to {num_classes - 1 + first}, got {largest + first}; "
            "model.num_classes is the number of classes"
        )
    return labels


class TrainSet(Dataset[tuple[Tensor, Tensor]]):
    """Augmented crops. Sample ``epoch * len + i`` is image ``i`` with the augmentation of that epoch, always the same,
    whichever process makes it."""

    def __init__(
        self,
        pairs: Sequence[tuple[Path, Path]],
        num_classes: int,
        zero_is_unlabelled: bool,
        transform: TrainTransform,
        seed: int,
    ) -> None:
        self.pairs = pairs
        self.num_classes = num_classes
        self.zero_is_unlabelled = zero_is_unlabelled
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, sample: int) -> tuple[Tensor, Tensor]:
        epoch, index = divmod(sample, len(self.pairs))
        image, labels = self.pairs[index]
        random = np.random.default_rng((self.seed, epoch, index))
        return self.transform(read_image(image), read_labels(labels, self.num_classes, self.zero_is_unlabelled), random)


class TestSet(Dataset[dict[str, Any]]):
    """Whole images at several scales, with their labels where there are any."""

    def __init__(
        self,
        pairs: Sequence[tuple[Path, Path | None]],
        num_classes: int,
        zero_is_unlabelled: bool,
        scale: tuple[int, int],
        ratios: Sequence[float],
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
    ) -> None:
        self.pairs = pairs
        self.num_classes = num_classes
        self.zero_is_unlabelled = zero_is_unlabelled
        self.scale = scale
        self.ratios = ratios
        self.mean = mean
        self.std = std

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """``file``, ``images`` (a list of ``(3, H, W)``, one a ratio), ``size`` of the file's image, ``labels``."""
        file, annotation = self.pairs[index]
        image = read_image(file)
        height, width = image.shape[:2]
        sizes = [scaled_size(height, width, *(int(side * ratio) for side in self.scale)) for ratio in self.ratios]
        sample: dict[str, Any] = {
            "file": str(file),
            "size": (height, width),
            "images": [to_tensor(resize_image(image, *size), self.mean, self.std) for size in sizes],
        }
        if annotation is not None:
            labels = read_labels(annotation, self.num_classes, self.zero_is_unlabelled)
            sample["labels"] = torch.from_numpy(labels).long()
        return sample


def _only(samples: list[dict[str, Any]]) -> dict[str, Any]:
    (sample,) = samples
    return sample


class SegmentationData(L.LightningDataModule):
    """Folders ``images/{training,validation}`` and ``annotations/{training,validation}``, as ADE20K has them.

    The defaults are those of the recipe for ADE20K.

    Args:
        root: folder of the data set.
        num_classes: number of classes.
        train_split, val_split: names of the folders.
        zero_is_unlabelled: label 0 means no label, and class ``i`` has label ``i + 1``; else label ``i``. In both,
            255 is ignored.
        images: image files and folders for ``oriented1d predict``. Those in ``root/images`` that have labels are shown
            beside them.
        scale: longer and shorter side in pixels that images are made to fit, before the random ratio of training.
        ratios: range of that ratio.
        crop: side of the training crops, pixels.
        most_of_a_class: part of a crop that one class may have.
        test_ratios: factors on ``scale`` for evaluation; more than one with their mirror images is multi-scale testing.
        batch_size: crops of a batch on each device.
        total_batch_size: crops of an optimizer step on all devices.
        num_workers: processes that load, for each device.
        seed: of shuffling and augmentation.
        mean, std: of the channels, for values from 0 to 1.
    """

    def __init__(
        self,
        root: str | None = None,
        num_classes: int = 150,
        train_split: str = "training",
        val_split: str = "validation",
        zero_is_unlabelled: bool = True,
        images: str | list[str] | None = None,
        scale: tuple[int, int] = (2048, 512),
        ratios: tuple[float, float] = (0.5, 2.0),
        crop: int = 512,
        most_of_a_class: float = 0.75,
        test_ratios: list[float] | None = None,
        batch_size: int = 16,
        total_batch_size: int = 16,
        num_workers: int = 4,
        seed: int = 0,
        mean: tuple[float, float, float] = MEAN,
        std: tuple[float, float, float] = STD,
    ) -> None:
        super().__init__()
        self.root = root
        self.num_classes = num_classes
        self.train_split = train_split
        self.val_split = val_split
        self.zero_is_unlabelled = zero_is_unlabelled
        self.images = [images] if isinstance(images, str) else images
        self.scale = scale
        self.transform = TrainTransform(scale, ratios, crop, most_of_a_class, mean=mean, std=std)
        self.test_ratios = test_ratios or [1.0]
        self.batch_size = batch_size
        self.total_batch_size = total_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.class_names: list[str] | None = None

    def setup(self, stage: str) -> None:
        """Find the images of the stage.

        Raises:
            UserError: something is missing or wrong, see :func:`find_pairs`, or the batch sizes do not divide.
        """
        assert self.trainer is not None
        if self.root is not None:
            self.class_names = class_names(Path(self.root))
            if self.class_names is not None and len(self.class_names) != self.num_classes:
                raise UserError(
                    f"data.num_classes: expected {len(self.class_names)}, the classes of objectInfo in {self.root}, "
                    f"got {self.num_classes}"
                )
        if stage == "predict":
            if not self.images:
                raise UserError("data.images: expected image files or folders to predict, got none")
            self.test_set = self._test_set([(path, self._labels_of(path)) for path in find_images(self.images)])
            return
        if self.root is None:
            raise UserError("data.root: expected the folder of the data set, got none")
        if stage == "fit":
            pairs = find_pairs(Path(self.root), self.train_split)
            self.train_set = TrainSet(pairs, self.num_classes, self.zero_is_unlabelled, self.transform, self.seed)
            keep_total_batch(self.trainer, self.total_batch_size, self.batch_size, len(pairs))
        self.test_set = self._test_set(find_pairs(Path(self.root), self.val_split))

    def _labels_of(self, image: Path) -> Path | None:
        """The label map of an image of the data set; None for other images."""
        if self.root is None or not image.is_relative_to(Path(self.root) / "images"):
            return None
        inside = image.relative_to(Path(self.root) / "images").with_suffix(".png")
        labels = Path(self.root) / "annotations" / inside
        return labels if labels.is_file() else None

    def _test_set(self, pairs: Sequence[tuple[Path, Path | None]]) -> TestSet:
        mean, std = self.transform.mean, self.transform.std
        return TestSet(pairs, self.num_classes, self.zero_is_unlabelled, self.scale, self.test_ratios, mean, std)

    def train_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        sampler = EpochSampler(self.train_set, self.trainer, self.batch_size, self.seed)
        return worker_loader(self.train_set, sampler, self.num_workers, batch_size=self.batch_size, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        return eval_loader(self.test_set, self.trainer, self.num_workers, _only)

    predict_dataloader = val_dataloader
