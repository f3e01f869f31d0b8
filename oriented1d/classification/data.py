"""Images and labels: folders, tar shards, Hugging Face data sets, and the digits of the quick start."""

from __future__ import annotations

import contextlib
import math
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import lightning as L
import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment, create_dataset, create_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.readers.reader import Reader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, SequentialSampler, get_worker_info

from oriented1d.classification.shards import CLASS_NAMES, Shards, open_shards
from oriented1d.training.batches import (
    EpochSampler,
    Shard,
    StreamSampler,
    keep_total_batch,
    worker_loader,
)
from oriented1d.training.errors import UserError
from oriented1d.training.files import find_images

Transform = Callable[[Image.Image], Tensor]

_UNREADABLE = 0.01  # part of the training images
_REPLACEMENTS = 10  # with 1% unreadable, all ten are so once in 10^20


def _posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    return auto_augment.posterize(image, bits_to_keep, **options) if bits_to_keep else Image.new(image.mode, image.size)


# The recipe's RandAugment keeps 0 bits at its strongest, which is a black image; Pillow 13 has an error instead.
auto_augment.NAME_TO_OP["PosterizeIncreasing"] = _posterize


def in_one_only(names: Sequence[str], others: Sequence[str]) -> str:
    """The first few classes that only one of two data sets has."""
    differing = sorted(set(names) ^ set(others))
    return ", ".join(differing[:5]) + (", ..." if len(differing) > 5 else "")


class Images(Protocol):
    """RGB images with their labels, by number. One that cannot be read raises a :class:`UserError` that names it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]: ...


class FileImages:
    """Images in files that a reader finds: one of timm's, or shards."""

    def __init__(self, reader: Reader | Shards) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        try:
            file, label = self.reader[index][:2]  # type: ignore[index]
            with file:
                return read_rgb(file), label
        except Exception as error:  # decoders raise OSError, SyntaxError, ValueError and more
            raise UserError(f"{self._name(index)}: expected an image, cannot be read ({error})") from error

    def _name(self, index: int) -> str:
        try:
            return str(self.reader.filename(index, absolute=True))
        except Exception:  # Hugging Face data sets decode the image to find its name
            return f"sample {index}"


class ArrayImages:
    """Grey images held in memory. ``pixels`` is uint8 ``(N, H, W)``, ``labels`` is ``(N,)``."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray) -> None:
        self.pixels = pixels
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]).convert("RGB"), int(self.labels[index])


def read_rgb(file: Any) -> Image.Image:
    """The image in a file, whole, with three channels."""
    with Image.open(file) as image:
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")


@contextlib.contextmanager
def random_numbers_of(*key: int) -> Iterator[None]:
    """Inside, the random numbers of Python, NumPy and torch (on the CPU) are those of ``key``. Outside they go on as if
    none had been drawn inside. timm's transforms draw from all three."""
    keep = get_worker_info() is None  # nothing else draws in a worker, and keeping the states takes a tenth of a ms
    before = (random.getstate(), np.random.get_state(), torch.get_rng_state()) if keep else None  # noqa: NPY002
    seeds = np.random.SeedSequence(key).generate_state(3).tolist()
    random.seed(seeds[0])
    np.random.seed(seeds[1])  # noqa: NPY002
    torch.default_generator.manual_seed(seeds[2])
    try:
        yield
    finally:
        if before is not None:
            random.setstate(before[0])
            np.random.set_state(before[1])  # noqa: NPY002
            torch.set_rng_state(before[2])


def erased_box(probability: float, side: int) -> tuple[int, int, int, int]:
    """Top, left, height and width of the part of a square image that is erased; zeros for none.

    Random erasing as timm has it (``RandomErasing``): 2% to a third of the area, aspect ratio 0.3 to 1 / 0.3.
    """
    if random.random() <= probability:
        for _ in range(10):
            area = random.uniform(0.02, 1 / 3) * side * side
            aspect = math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if width < side and height < side:
                return random.randint(0, side - height), random.randint(0, side - width), height, width
    return 0, 0, 0, 0


def erase(images: Tensor, boxes: Tensor, noise: torch.Generator) -> Tensor:
    """Images ``(N, C, H, W)`` with normal noise in their boxes ``(N, 4)``, which hold top, left, height and width. All
    three arguments are on one device."""
    top, left, height, width = boxes.T[:, :, None, None, None]
    row = torch.arange(images.shape[2], device=images.device)[:, None]
    column = torch.arange(images.shape[3], device=images.device)
    inside = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)
    return torch.where(inside, torch.randn(images.shape, generator=noise, device=images.device), images)


class TrainSample(NamedTuple):
    """A training sample, or a batch of them, as workers make it.

    Attributes:
        pixels: uint8 ``(3, S, S)``, augmented.
        label: its class.
        erased: int64 ``(4,)``, see :func:`erased_box`.
        unreadable: what was wrong with the image whose place this one takes; empty where nothing was.
    """

    pixels: Tensor
    label: int
    erased: Tensor
    unreadable: str


class TrainSet(Dataset[TrainSample]):
    """Augmented images. Sample ``epoch * len + i`` is image ``i`` with the augmentation of that epoch, always the same,
    whichever process makes it.

    An image that cannot be read is replaced by another one, drawn from the same random numbers.
    """

    def __init__(self, images: Images, transform: Transform, side: int, erasing: float, seed: int) -> None:
        self.images = images
        self.transform = transform
        self.side = side
        self.erasing = erasing
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, sample: int) -> TrainSample:
        epoch, index = divmod(sample, len(self.images))
        with random_numbers_of(self.seed, epoch, index):
            image, label, unreadable = self._read(index)
            pixels = self.transform(image)
            return TrainSample(pixels, label, torch.tensor(erased_box(self.erasing, self.side)), unreadable)

    def _read(self, index: int) -> tuple[Image.Image, int, str]:
        try:
            return *self.images[index], ""
        except UserError as error:
            unreadable = str(error)
        for _ in range(_REPLACEMENTS):
            with contextlib.suppress(UserError):
                return *self.images[random.randrange(len(self.images))], unreadable
        raise UserError(f"{unreadable}; nor can {_REPLACEMENTS} others that were drawn in its place")


class EvalSet(Dataset[tuple[Tensor, int]]):
    """Images to validate on: uint8 ``(3, S, S)`` and the label."""

    def __init__(self, images: Images, transform: Transform) -> None:
        self.images = images
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[index]
        return self.transform(image), label


class ImageFiles(Dataset[tuple[Tensor, int, str]]):
    """Images to predict: uint8 ``(3, S, S)``, the index of the file, and what is wrong with it (empty when nothing).

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
            image = read_rgb(self.files[index])
        except Exception as error:  # decoders raise OSError, SyntaxError, ValueError and more
            nothing = torch.zeros(3, self.image_size, self.image_size, dtype=torch.uint8)
            return nothing, index, f"{type(error).__name__}: {error}"
        return self.transform(image), index, ""


class ImageData(L.LightningDataModule):
    """Images to train on, to validate on and to predict.

    Workers decode and augment with timm's transforms and hand over 8 bits a colour; erasing and normalisation are done
    on the device. The defaults are the paper's recipe for ImageNet, as in the original's training script;
    docs/classification.md has it as a table.

    The order and the augmentation of training follow from the seed of the run (``seed_everything``), the epoch and the
    number of the image alone.

    Args:
        root: folder of the data set.
        dataset: empty for folders and shards in ``root``, or ``hfds/NAME`` for a Hugging Face data set.
        dataset_args: further arguments of ``timm.data.create_dataset``, for folders of classes and ``hfds/``.
        train_split, val_split: names of the two splits. In ``root`` a folder, with one folder of images per class
            (``root/train/CLASS/*.jpg``) or with tar shards (``root/train/*.tar``); or, where it ends in ``.tar``, a
            pattern of shards in ``root`` (``imagenet1k-train-*.tar``).
        images: files and folders of images to predict.
        image_size: side of the images that the network gets, pixels.
        batch_size: images on one device at once.
        total_batch_size: images of one optimizer step. Reached by accumulation; must be a multiple of ``batch_size``
            times the number of devices.
        num_workers: processes that load images, per device.
        shuffle_buffer: how many places an image of shards may move from that of its shard; images.
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
        shuffle_buffer: int = 16384,
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
        self.shuffle_buffer = shuffle_buffer
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
        self._colours: Tensor | None = None
        self._named: list[str] = []
        self._counted_epoch = -1
        self._unreadable = 0

    def train_transform(self) -> Transform:
        """From an RGB image to uint8 ``(3, S, S)``, augmented but for erasing."""
        return create_transform(
            self.image_size,
            is_training=True,
            scale=self.scale,
            ratio=self.ratio,
            hflip=self.hflip,
            color_jitter=self.color_jitter,
            auto_augment=self.auto_augment,
            interpolation=self.interpolation,
            mean=self.mean,  # fills what a rotation leaves empty
            normalize=False,
        )

    def eval_transform(self) -> Transform:
        """From an RGB image to uint8 ``(3, S, S)``, resized and cropped in the centre."""
        warp = self.crop_pct is None and self.image_size >= 384
        return create_transform(
            self.image_size,
            is_training=False,
            interpolation=self.interpolation,
            crop_pct=1.0 if warp else self.crop_pct or 224 / 256,
            crop_mode="squash" if warp else "center",
            normalize=False,
        )

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 ``(N, 3, S, S)`` to float32 with mean 0 and standard deviation 1, on the device of ``pixels``."""
        if self._colours is None or self._colours.device != pixels.device:
            # Once: a copy to a GPU makes the host wait for it.
            self._colours = torch.tensor([self.mean, self.std], device=pixels.device)[:, :, None, None]
        mean, std = self._colours
        return pixels.float().div_(255).sub_(mean).div_(std)

    def setup(self, stage: str) -> None:
        """Find the images of the stage.

        Raises:
            UserError: nothing is there, the classes of the two splits differ, too many images are missing, or the batch
                sizes do not divide.
        """
        assert self.trainer is not None
        if stage == "predict":
            if not self.images:
                raise UserError("data.images: expected image files or folders to predict, got none")
            self.predict_set = ImageFiles(find_images(self.images), self.eval_transform(), self.image_size)
            return
        if stage == "fit":
            self.train_set = self.create_train_set()
            keep_total_batch(self.trainer, self.total_batch_size, self.batch_size, len(self.train_set))
            self._check_unreadable(0)
        images = self.create_split(training=False)
        if missing := _missing(images):
            raise UserError(f"data.root: expected whole shards to validate on, {missing} images of them are missing")
        self.val_set = EvalSet(images, self.eval_transform())

    def create_train_set(self) -> TrainSet:
        """The training images with their augmentation, which follows from the seed of the run."""
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))  # where Lightning keeps that of seed_everything
        return TrainSet(self.create_split(True), self.train_transform(), self.image_size, self.erasing, seed)

    def create_split(self, training: bool) -> Images:
        """Images of one split. Sets ``class_names`` where the data set knows them.

        Raises:
            UserError: nothing is there, or the classes are not those of the split made before.
        """
        split = self.train_split if training else self.val_split
        if self.dataset and not self.dataset.startswith("hfds/"):
            raise UserError(
                "data.dataset: expected nothing, for folders of classes and tar shards in data.root, or hfds/NAME, got "
                f"{self.dataset}"
            )
        root = self.root
        if not self.dataset:
            if root is None:
                raise UserError("data.root: expected the folder of the data set, got none")
            folder = Path(root) if split.endswith(".tar") else Path(root) / split
            if not folder.is_dir():
                raise UserError(
                    f"data.root: expected the folder of the {split} images, but there is no folder {folder}"
                )
            pattern = split if split.endswith(".tar") else "*.tar"
            files = sorted(file for file in folder.glob(pattern) if not file.name.startswith("."))
            if files:
                return self._open_shards(files, split)
            if split.endswith(".tar"):
                raise UserError(f"data.root: expected shards {split} in {folder}, found none")
            root = str(folder)
        try:
            reader = create_dataset(
                self.dataset, root=root, split=split, search_split=False, is_training=training, **self.dataset_args
            ).reader
        except RuntimeError as error:  # timm found no images
            raise UserError(f"data.root: {error}") from error
        labels = getattr(reader, "class_to_idx", None)
        if labels:
            self._take_class_names(sorted(labels, key=labels.__getitem__), split)
        return FileImages(reader)

    def _open_shards(self, files: list[Path], split: str) -> FileImages:
        index = Path(self.root or "") / (re.sub(r"[^\w.-]", "_", split) + ".index.npz")
        shards: Shards | UserError | None = None
        if self.trainer is None or self.trainer.is_global_zero:
            try:
                shards = open_shards(files, index)
            except UserError as error:
                shards = error  # the others wait for an answer
        if self.trainer is not None:
            shards = self.trainer.strategy.broadcast(shards)
        if isinstance(shards, UserError):
            raise shards
        assert shards is not None
        names = files[0].parent / CLASS_NAMES
        if names.is_file():
            self._take_class_names(names.read_text(encoding="utf-8").splitlines(), split)
        number = len(self.class_names) if self.class_names else getattr(self._module(), "num_classes", None)
        if number is not None and shards.rows[:, 3].max() >= number:
            raise UserError(
                f"data.root: expected labels from 0 to {number - 1} in {split}, got {shards.rows[:, 3].max()}"
            )
        return FileImages(shards)

    def _module(self) -> L.LightningModule | None:
        return self.trainer.lightning_module if self.trainer is not None else None

    def _take_class_names(self, names: list[str], split: str) -> None:
        if self.class_names is not None and names != self.class_names:
            raise UserError(
                f"data.root: expected the {len(self.class_names)} classes of {self.train_split} in {split} too, got "
                f"{len(names)}; in one of the two only: {in_one_only(names, self.class_names)}"
            )
        self.class_names = names

    def loader(self, dataset: Dataset, sampler: Iterable, drop_last: bool = False) -> DataLoader:
        """Batches of the samples of ``dataset`` that ``sampler`` names, made by workers."""
        options = {"batch_size": self.batch_size, "drop_last": drop_last}
        return worker_loader(dataset, sampler, self.num_workers, **options)

    def train_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        data, shards = self.train_set, _shards(self.train_set.images)
        sampler = EpochSampler(data, self.trainer, self.batch_size, data.seed)
        if shards is not None:
            counts = shards.counts.tolist()
            sampler = StreamSampler(data, self.trainer, self.batch_size, data.seed, counts, self.shuffle_buffer)
        return self.loader(data, sampler, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        return self.loader(self.val_set, Shard(self.val_set, self.trainer))

    def predict_dataloader(self) -> DataLoader:
        return self.loader(self.predict_set, SequentialSampler(self.predict_set))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> list[Any]:
        """What workers made, on the device, to what the network gets.

        Raises:
            UserError: more than 1% of the training images cannot be read.
        """
        assert self.trainer is not None
        if isinstance(batch, TrainSample):
            number = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready  # in this epoch, from 0
            self._count(batch.unreadable, number)
            images = self.normalise(batch.pixels)
            if self.erasing:
                key = (self.train_set.seed, self.trainer.current_epoch, number, self.trainer.global_rank)
                noise = torch.Generator(images.device)
                noise.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
                images = erase(images, batch.erased, noise)
            rest = [batch.label]
        else:
            images, rest = self.normalise(batch[0]), batch[1:]
        return [self.trainer.precision_plugin.convert_input(images), *rest]

    def _count(self, unreadable: Sequence[str], batch: int) -> None:
        """Name images that cannot be read, once each, and stop when there are too many in this epoch."""
        assert self.trainer is not None
        if self._counted_epoch != self.trainer.current_epoch:
            self._counted_epoch, self._unreadable = self.trainer.current_epoch, 0
        for message in filter(None, unreadable):
            self._unreadable += 1
            if message not in self._named:
                self._named.append(message)
                print(f"{message}; another image takes its place", flush=True)
        # All processes have as many batches, and meet here a hundred times an epoch.
        last = self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if last or batch % math.ceil(self.trainer.num_training_batches / 100) == 0:
            mine = torch.tensor(float(self._unreadable), device=self.trainer.strategy.root_device)
            self._check_unreadable(int(self.trainer.strategy.reduce(mine, reduce_op="sum")))

    def _check_unreadable(self, number: int) -> None:
        missing = _missing(self.train_set.images)
        samples = len(self.train_set) + missing
        if number + missing > _UNREADABLE * samples:
            last = f", the last of them {self._named[-1]}" if self._named else ", in shards that are damaged"
            raise UserError(
                f"data.root: expected at most {_UNREADABLE:.0%} of the {samples} training images to be unreadable, got "
                f"{number + missing} in this epoch{last}"
            )


def _shards(images: Images) -> Shards | None:
    return images.reader if isinstance(images, FileImages) and isinstance(images.reader, Shards) else None


def _missing(images: Images) -> int:
    shards = _shards(images)
    return int(shards.missing.sum()) if shards is not None else 0


class Digits(ImageData):
    """The 1,797 handwritten digits that come with scikit-learn: 8x8 grey values, one fifth of each class held out.

    Takes the arguments of :class:`ImageData`; those that say where the data are have no effect.
    """

    def create_split(self, training: bool) -> Images:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        self.class_names = [str(name) for name in digits.target_names]
        pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        train_x, val_x, train_y, val_y = train_test_split(
            pixels, digits.target, test_size=0.2, stratify=digits.target, random_state=0
        )
        return ArrayImages(train_x, train_y) if training else ArrayImages(val_x, val_y)
