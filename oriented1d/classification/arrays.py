"""Small data sets held in the memory of the device, where batches are gathered, cropped and mirrored.

No worker processes, no decoding after the start: many small runs can share one GPU and its host.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import ImageFolder

from oriented1d.classification.data import in_one_only
from oriented1d.training.batches import expect_parts_of_epochs
from oriented1d.training.errors import UserError
from oriented1d.training.images import read_image


def read_idx(path: Path) -> np.ndarray:
    """Array of unsigned bytes in an IDX file (the format of MNIST), which may be compressed by gzip.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: expected an IDX file, cannot be read ({error})") from error
    # Two zeros, the type (8: unsigned bytes), the number of dimensions; then each as a big-endian number.
    try:
        if content[:3] != b"\0\0\x08":
            raise ValueError("another type")
        shape = struct.unpack_from(f">{content[3]}I", content, 4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    except (IndexError, ValueError, struct.error) as error:
        raise UserError(
            f"{path}: expected an IDX file of unsigned bytes, whole, got something else ({error})"
        ) from error


class DeviceBatches:
    """Batches ``(B, C, H, W)`` float32 and ``(B,)`` int64 of images that lie on a device.

    A training batch follows from the seed, the epoch and its number alone, so a run that goes on from the middle of an
    epoch goes on with the batches that it has not had.

    Args:
        data: the options, and the trainer, which knows the epoch and the batches that it already had.
        pixels: ``(N, C, H, W)`` uint8.
        labels: ``(N,)`` int64.
        training: shuffle, augment, and leave out the incomplete batch at the end.
    """

    def __init__(self, data: ArrayData, pixels: Tensor, labels: Tensor, training: bool) -> None:
        self.data = data
        self.pixels = pixels
        self.labels = labels
        self.training = training
        self.mean, self.std = (
            torch.tensor(value, device=pixels.device).view(-1, 1, 1) for value in (data.mean, data.std)
        )

    def __len__(self) -> int:
        size = self.data.batch_size
        return len(self.labels) // size if self.training else -(-len(self.labels) // size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        size = self.data.batch_size
        if not self.training:
            for pixels, labels in zip(self.pixels.split(size), self.labels.split(size), strict=True):
                yield self._normalised(pixels), labels
            return
        trainer = self.data.trainer
        assert trainer is not None
        # Drawn on the host, so that every device sees the same batches, and moved at once: a copy waits for the device.
        random = np.random.default_rng((self.data.seed, trainer.current_epoch))
        order = torch.from_numpy(random.permutation(len(self.labels))).to(self.labels.device)
        draws = torch.from_numpy(random.random((len(self), 8, size), dtype=np.float32)).to(self.labels.device)
        for number in range(trainer.fit_loop.epoch_loop.batch_progress.current.ready, len(self)):
            chosen = order[number * size : (number + 1) * size]
            yield self._augmented(chosen, draws[number]), self.labels[chosen]

    def _augmented(self, chosen: Tensor, draws: Tensor) -> Tensor:
        down, right, mirrored, erased, top, left, tall, wide = draws[..., None]
        _, channels, height, width = self.pixels.shape
        rows = _shifted(height, down, self.data.padding)
        columns = _shifted(width, right, self.data.padding)
        columns = torch.where(mirrored < self.data.hflip, columns.flip(1), columns)
        images = self._normalised(
            self.pixels[
                chosen[:, None, None, None],
                torch.arange(channels, device=chosen.device)[:, None, None],
                rows[:, None, :, None],
                columns[:, None, None, :],
            ]
        )
        hidden = _between(height, top, tall)[:, :, None] & _between(width, left, wide)[:, None, :]
        hidden &= (erased < self.data.erasing)[..., None]
        return images.masked_fill(hidden[:, None], 0.0)

    def _normalised(self, pixels: Tensor) -> Tensor:
        return (pixels / 255 - self.mean) / self.std


def _shifted(size: int, where: Tensor, padding: int) -> Tensor:
    """``(B, size)`` positions, moved by up to ``padding`` either way and mirrored at the border."""
    shift = (where * (2 * padding + 1)).long() - padding
    positions = (torch.arange(size, device=where.device) + shift).abs()
    return size - 1 - (size - 1 - positions).abs()


def _between(size: int, start: Tensor, extent: Tensor) -> Tensor:
    """``(B, size)``: which positions lie in a stretch of a quarter to a half of them."""
    length = (0.25 + 0.25 * extent) * size
    positions = torch.arange(size, device=start.device) + 0.5
    begin = start * (size - length)
    return (positions >= begin) & (positions < begin + length)


class ArrayData(L.LightningDataModule):
    """Images of one size that fit on the device, for training on one device. Made by :class:`FolderArrays` and
    :class:`IdxArrays`.

    Args:
        root: folder of the data set.
        mean, std: normalisation of each channel, in the range 0 to 1.
        batch_size: images of a step.
        padding: pixels that a training image is moved by at most, each way; what comes in is mirrored at the border.
        hflip: probability of a mirrored image in training.
        erasing: probability that a rectangle, of a quarter to a half of both sides, becomes the mean colour.
        seed: of the order and the augmentation.
    """

    class_names: list[str] | None = None
    """Names of the classes by label, where the data set knows them. Set by ``setup``."""

    def __init__(
        self,
        root: str,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        batch_size: int = 256,
        padding: int = 4,
        hflip: float = 0.5,
        erasing: float = 0.25,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.root = root
        self.batch_size = batch_size
        self.mean = mean
        self.std = std
        self.padding = padding
        self.hflip = hflip
        self.erasing = erasing
        self.seed = seed

    def read(self, training: bool) -> tuple[np.ndarray, np.ndarray]:
        """Images ``(N, C, H, W)`` uint8 and labels ``(N,)`` of one split.

        Raises:
            UserError: they are not there, or not what they should be.
        """
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Read both splits, or the validation split alone, and move them to the device.

        Raises:
            UserError: something is wrong with the data, or there are several devices.
        """
        assert self.trainer is not None
        if stage == "predict":
            raise UserError("data: images of one's own are predicted with oriented1d.classification.ImageData")
        if self.trainer.world_size > 1:
            raise UserError(
                f"trainer.devices: {type(self).__name__} holds its images on one device, got {self.trainer.world_size}"
            )
        if stage == "fit":
            self.train_batches = self._batches(training=True)
            if not len(self.train_batches):
                samples = len(self.train_batches.labels)
                raise UserError(
                    f"data.batch_size: expected at most the {samples} training images, got {self.batch_size}"
                )
        self.val_batches = self._batches(training=False)

    def _batches(self, training: bool) -> DeviceBatches:
        assert self.trainer is not None
        pixels, labels = self.read(training)
        channels, smallest = pixels.shape[1], min(pixels.shape[2:])
        for name, value in (("mean", self.mean), ("std", self.std)):
            if len(value) != channels:
                raise UserError(f"data.{name}: expected one number for each of the {channels} channels, got {value}")
        if not 0 <= self.padding < smallest:
            raise UserError(
                f"data.padding: expected 0 to {smallest - 1}, less than the images' side, got {self.padding}"
            )
        device = self.trainer.strategy.root_device
        on_device = torch.from_numpy(pixels).to(device), torch.from_numpy(labels.astype(np.int64)).to(device)
        return DeviceBatches(self, *on_device, training)

    def train_dataloader(self) -> DeviceBatches:
        expect_parts_of_epochs()
        return self.train_batches

    def val_dataloader(self) -> DeviceBatches:
        return self.val_batches


class FolderArrays(ArrayData):
    """Images in ``root/train/CLASS`` and ``root/val/CLASS``, all of one size. Takes the arguments of
    :class:`ArrayData`."""

    def read(self, training: bool) -> tuple[np.ndarray, np.ndarray]:
        folder = Path(self.root) / ("train" if training else "val")
        try:
            found = ImageFolder(folder)
        except FileNotFoundError as error:
            raise UserError(f"data.root: expected a folder of images for each class in {folder} ({error})") from error
        if self.class_names is not None and found.classes != self.class_names:
            differing = in_one_only(found.classes, self.class_names)
            raise UserError(
                f"data.root: expected the same classes in train and val; in one of the two only: {differing}"
            )
        self.class_names = found.classes
        images = [read_image(Path(path)) for path, _ in found.samples]
        for image, (path, _) in zip(images, found.samples, strict=True):
            if image.shape != images[0].shape:
                sizes = [f"{width} x {height}" for height, width, _ in (images[0].shape, image.shape)]
                raise UserError(f"{path}: expected {sizes[0]} pixels, as the images before it, got {sizes[1]}")
        return np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2)), np.array(found.targets)


class IdxArrays(ArrayData):
    """Grey images in the four files of MNIST or Fashion-MNIST, ``train-images-idx3-ubyte`` and its like, as they are or
    with ``.gz`` at the end. Takes the arguments of :class:`ArrayData`."""

    def read(self, training: bool) -> tuple[np.ndarray, np.ndarray]:
        prefix = "train" if training else "t10k"
        pixels, labels = (self._array(f"{prefix}-{kind}") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))
        if pixels.ndim != 3 or labels.shape != pixels.shape[:1]:
            raise UserError(
                f"data.root: expected {prefix} images (N, H, W) and labels (N,), got {pixels.shape} and {labels.shape}"
            )
        return pixels[:, None].copy(), labels

    def _array(self, name: str) -> np.ndarray:
        found = [path for path in (Path(self.root) / name, Path(self.root) / f"{name}.gz") if path.is_file()]
        if not found:
            raise UserError(f"data.root: expected the file {name} or {name}.gz in {self.root}, found neither")
        return read_idx(found[0])
