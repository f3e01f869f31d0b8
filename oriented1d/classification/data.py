"""Images and labels: folders, tar shards, Hugging Face data sets, and the digits of the quick start."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment, create_dataset, create_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.dataset import ImageDataset, IterableImageDataset
from timm.data.readers.reader import Reader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from oriented1d.training.batches import keep_total_batch
from oriented1d.training.errors import UserError
from oriented1d.training.files import find_images

Transform = Callable[[Image.Image], Tensor]


def _posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    return auto_augment.posterize(image, bits_to_keep, **options) if bits_to_keep else Image.new(image.mode, image.size)


# The recipe's RandAugment keeps 0 bits at its strongest, which is a black image; Pillow 13 has an error instead.
auto_augment.NAME_TO_OP["PosterizeIncreasing"] = _posterize


def in_one_only(names: Sequence[str], others: Sequence[str]) -> str:
    """The first few classes that only one of two data sets has."""
    differing = sorted(set(names) ^ set(others))
    return ", ".join(differing[:5]) + (", ..." if len(differing) > 5 else "")


class LabelledImages(Dataset[tuple[Tensor, int]]):
    """Samples of a timm reader. Stops at an image that cannot be read, and names it; timm's own data set would train on
    the next image instead."""

    def __init__(self, reader: Reader, transform: Transform) -> None:
        self.reader = reader
        self.transform = transform

    def __len__(self) -> int:
        return len(self.reader)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            file, label = self.reader[index][:2]  # type: ignore[index]
            with Image.open(file) as image:
                pixels = image.convert("RGB")
        except Exception as error:  # decoders raise OSError, SyntaxError, ValueError and more
            raise UserError(f"{self._name(index)}: expected an image, cannot be read ({error})") from error
        return self.transform(pixels), label

    def _name(self, index: int) -> str:
        try:
            return str(self.reader.filename(index, absolute=True))
        except Exception:  # Hugging Face data sets decode the image to find its name
            return f"sample {index}"


class AllBatches(IterableDataset[tuple[Tensor, int]]):
    """An iterable data set without its length.

    Each worker ends with an incomplete batch of its own, so that there are more batches than length / batch size, and
    Lightning would leave the last ones out.
    """

    def __init__(self, dataset: IterableDataset) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return iter(self.dataset)


class ImageFiles(Dataset[tuple[Tensor, int, str]]):
    """Images to predict: ``(3, S, S)`` pixels, the index of the file, and what is wrong with it (empty when nothing).

    A file that cannot be read gives zeros and its error.
    """

    def __init__(self, files: Sequence[Path], transform: Transform, image_size: int) -> None:
        self.files = files
        self.transform = transform
        self.image_size = image_size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int, str]:
        try:
            with Image.open(self.files[index]) as image:
                pixels = image.convert("RGB")
        except Exception as error:  # decoders raise OSError, SyntaxError, ValueError and more
            return torch.zeros(3, self.image_size, self.image_size), index, f"{type(error).__name__}: {error}"
        return self.transform(pixels), index, ""


class ImageData(L.LightningDataModule):
    """Images to train on, to validate on and to predict, through timm's data sets and transforms.

    The defaults are the paper's recipe for ImageNet, as in the original's training script; docs/classification.md has
    it as a table.

    Args:
        root: folder of the data set.
        dataset: empty for one folder of images per class (``root/train/CLASS/*.jpg``), otherwise a name of
            ``timm.data.create_dataset``: ``wds/NAME`` for tar shards, ``hfds/NAME`` for Hugging Face data sets.
        dataset_args: further arguments of ``timm.data.create_dataset``.
        train_split, val_split: names of the two splits; for folders, of the folders in ``root``.
        images: files and folders of images to predict.
        image_size: side of the images that the network gets, pixels.
        batch_size: images on one device at once.
        total_batch_size: images of one optimizer step. Reached by accumulation; must be a multiple of ``batch_size``
            times the number of devices.
        num_workers: processes that load images, per device.
        mean, std: normalisation of each colour, in the range 0 to 1.
        interpolation: how images are resized.
        crop_pct: part of the resized validation image that is kept; None is 224/256 below 384 pixels, and from there on
            the whole image is warped into the square.
        scale, ratio: area and aspect ratio of the random crop for training.
        hflip: probability of a mirrored image in training.
        color_jitter: strength of the colour changes when ``auto_augment`` is off.
        auto_augment: timm's name of the augmentation, or None.
        erasing: probability of random erasing with noise.
    """

    class_names: list[str] | None = None
    """Names of the classes by label, where the data set knows them. Set by ``setup``."""

    def __init__(
        self,
        root: str | None = None,
        dataset: str = "",
        dataset_args: dict[str, Any] | None = None,
        train_split: str = "train",
        val_split: str = "val",
        images: str | list[str] | None = None,
        image_size: int = 224,
        batch_size: int = 128,
        total_batch_size: int = 4096,
        num_workers: int = 8,
        mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, float, float] = IMAGENET_DEFAULT_STD,
        interpolation: str = "bicubic",
        crop_pct: float | None = None,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        hflip: float = 0.5,
        color_jitter: float = 0.4,
        auto_augment: str | None = "rand-m9-mstd0.5-inc1",
        erasing: float = 0.25,
    ) -> None:
        super().__init__()
        self.root = root
        self.dataset = dataset
        self.dataset_args = dataset_args or {}
        self.train_split = train_split
        self.val_split = val_split
        self.images = [images] if isinstance(images, str) else images
        self.image_size = image_size
        self.batch_size = batch_size
        self.total_batch_size = total_batch_size
        self.num_workers = num_workers
        self.mean = mean
        self.std = std
        self.interpolation = interpolation
        self.crop_pct = crop_pct
        self.scale = scale
        self.ratio = ratio
        self.hflip = hflip
        self.color_jitter = color_jitter
        self.auto_augment = auto_augment
        self.erasing = erasing

    def train_transform(self) -> Transform:
        """From an RGB image to ``(3, S, S)``, augmented and normalised."""
        return create_transform(
            self.image_size,
            is_training=True,
            scale=self.scale,
            ratio=self.ratio,
            hflip=self.hflip,
            color_jitter=self.color_jitter,
            auto_augment=self.auto_augment,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            re_prob=self.erasing,
            re_mode="pixel",
        )

    def eval_transform(self) -> Transform:
        """From an RGB image to ``(3, S, S)``, resized, cropped in the centre and normalised."""
        warp = self.crop_pct is None and self.image_size >= 384
        return create_transform(
            self.image_size,
            is_training=False,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=1.0 if warp else self.crop_pct or 224 / 256,
            crop_mode="squash" if warp else "center",
        )

    def setup(self, stage: str) -> None:
        """Find the images of the stage.

        Raises:
            UserError: nothing is there, the classes of the two splits differ, or the batch sizes do not divide.
        """
        assert self.trainer is not None
        if stage == "predict":
            if not self.images:
                raise UserError("data.images: expected image files or folders to predict, got none")
            self.predict_set = ImageFiles(find_images(self.images), self.eval_transform(), self.image_size)
            return
        if stage == "fit":
            self.train_set = self.create_split(training=True)
            # The length of an iterable set is that of one process.
            processes = self.trainer.world_size if isinstance(self.train_set, IterableDataset) else 1
            samples = len(self.train_set) * processes  # type: ignore[arg-type]
            keep_total_batch(self.trainer, self.total_batch_size, self.batch_size, samples)
        self.val_set = self.create_split(training=False)

    def create_split(self, training: bool) -> Dataset:
        """Data set of one split. Sets ``class_names`` where the data set knows them.

        Raises:
            UserError: nothing is there, or the classes are not those of the split made before.
        """
        split = self.train_split if training else self.val_split
        root = self.root
        if "/" not in self.dataset or self.dataset.startswith("wds/"):
            if root is None:
                raise UserError("data.root: expected the folder of the data set, got none")
            if "/" not in self.dataset:
                root = str(Path(root) / split)
            if not Path(root).is_dir():
                raise UserError(f"data.root: expected the folder of the {split} images, but there is no folder {root}")
        transform = self.train_transform() if training else self.eval_transform()
        try:
            dataset = create_dataset(
                self.dataset,
                root=root,
                split=split,
                search_split=False,
                is_training=training,
                batch_size=self.batch_size,
                **self.dataset_args,
            )
        except RuntimeError as error:  # timm found no images or no shards
            raise UserError(f"data.root: {error}") from error
        if isinstance(dataset, ImageDataset):
            dataset = LabelledImages(dataset.reader, transform)
        else:
            dataset.transform = transform
            dataset.set_loader_cfg(self.num_workers)
        labels = getattr(dataset.reader, "class_to_idx", None)
        if labels:
            self._take_class_names(sorted(labels, key=labels.__getitem__), split)
        return dataset

    def _take_class_names(self, names: list[str], split: str) -> None:
        if self.class_names is not None and names != self.class_names:
            raise UserError(
                f"data.root: expected the {len(self.class_names)} classes of {self.train_split} in {split} too, got "
                f"{len(names)}; in one of the two only: {in_one_only(names, self.class_names)}"
            )
        self.class_names = names

    def _loader(self, dataset: Dataset, training: bool = False) -> DataLoader:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=training and not isinstance(dataset, IterableDataset),
            drop_last=training,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def set_epoch(self, epoch: int) -> None:
        """Tell a data set of shards which epoch it is: the order of the shards follows from it."""
        if isinstance(self.train_set, IterableImageDataset):
            self.train_set.set_epoch(epoch)

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.train_set, training=True)

    def val_dataloader(self) -> DataLoader:
        return self._loader(AllBatches(self.val_set) if isinstance(self.val_set, IterableDataset) else self.val_set)

    def predict_dataloader(self) -> DataLoader:
        return self._loader(self.predict_set)


class ArrayImages(Dataset[tuple[Tensor, int]]):
    """Grey images held in memory. ``pixels`` is uint8 ``(N, H, W)``, ``labels`` is ``(N,)``."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, transform: Transform) -> None:
        self.pixels = pixels
        self.labels = labels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index]).convert("RGB")), int(self.labels[index])


class Digits(ImageData):
    """The 1,797 handwritten digits that come with scikit-learn: 8x8 grey values, one fifth of each class held out.

    Takes the arguments of :class:`ImageData`; those that say where the data are have no effect.
    """

    def create_split(self, training: bool) -> Dataset:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        self.class_names = [str(name) for name in digits.target_names]
        pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        train_x, val_x, train_y, val_y = train_test_split(
            pixels, digits.target, test_size=0.2, stratify=digits.target, random_state=0
        )
        if training:
            return ArrayImages(train_x, train_y, self.train_transform())
        return ArrayImages(val_x, val_y, self.eval_transform())
