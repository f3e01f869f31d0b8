"""Images per second that the input pipeline alone delivers: ``oriented1d benchmark input``."""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import pydoc
import resource
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import yaml
from PIL import Image

from oriented1d.training.errors import UserError

if TYPE_CHECKING:
    from oriented1d.classification import ImageData

SIZE = (500, 375)  # pixels, width and height: the usual ones of ImageNet
_CLASSES = 10


def cpu_model() -> str:
    """Name of the processor, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def picture(random: np.random.Generator) -> Image.Image:
    """An image about as hard to decode as a photograph: gradients, and noise that is weaker the finer it is."""
    width, height = SIZE
    x, y = np.linspace(-1, 1, width)[:, None], np.linspace(-1, 1, height)[:, None, None]
    pixels = 128 + 40 * (x * random.normal(size=3) + y * random.normal(size=3))
    for step, strength in ((64, 40), (16, 20), (4, 20), (2, 16), (1, 14)):
        noise = random.normal(128, strength, (height // step + 1, width // step + 1, 3)).clip(0, 255).astype(np.uint8)
        pixels += np.asarray(Image.fromarray(noise).resize(SIZE, Image.Resampling.BICUBIC), dtype=np.float64) - 128
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_pictures(folder: Path, number: int) -> None:
    """Write ``number`` JPEG files into ``folder/CLASS/``, of about the size that files of ImageNet have (110 KB)."""
    random = np.random.default_rng(0)
    for i in range(number):
        path = folder / f"class{i % _CLASSES}" / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(random).save(path, quality=91)


def read_config(config: str | None) -> ImageData:
    """Data as a configuration of ``oriented1d fit`` describes them; without one, the recipe for ImageNet.

    Raises:
        UserError: the file cannot be read, or is about other data.
    """
    from oriented1d.classification import ImageData

    if config is None:
        return ImageData()
    try:
        part = yaml.safe_load(Path(config).read_text())["data"]
        data = pydoc.locate(part["class_path"])(**part.get("init_args", {}))  # type: ignore[operator]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"--config: expected a file with data.class_path and data.init_args, got {config}") from error
    if not isinstance(data, ImageData):
        raise UserError(f"--config: expected the data of a classification, got {part['class_path']}")
    return data


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def measure(data: ImageData, images: int) -> tuple[int, float, float]:
    """Load about ``images`` training images as a run would, in whole batches, and do nothing with them.

    Returns:
        images, seconds, and seconds of CPU time of this process and its workers together.

    Raises:
        UserError: the images do not make a batch.
    """
    import lightning as L

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    data.trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    data.train_set = data.create_train_set()
    samples = list(itertools.islice(data.train_dataloader().sampler, images))
    if len(samples) < data.batch_size:
        raise UserError(f"--images: expected at least a batch of {data.batch_size}, got {len(samples)}")
    start, cpu = time.perf_counter(), _cpu_seconds()
    # Workers end with the loader, which adds what they used to that of this process's children.
    loaded = sum(len(batch.pixels) for batch in data.loader(data.train_set, samples, drop_last=True))
    return loaded, time.perf_counter() - start, _cpu_seconds() - cpu


def row_of(source: str, data: ImageData, measured: tuple[int, float, float], gpu_rate: float) -> dict[str, object]:
    """A line of the table and the CSV file."""
    images, seconds, cpu = measured
    per_core = images / cpu
    return {
        "cpu": cpu_model(),
        "pillow": metadata.version("pillow"),
        "torchvision": metadata.version("torchvision"),
        "source": source,
        "size": data.image_size,
        "auto_augment": data.auto_augment,
        "batch": data.batch_size,
        "workers": data.num_workers,
        "images": images,
        "img_per_s": f"{images / seconds:.1f}",
        "cpu_ms_per_image": f"{cpu / images * 1e3:.2f}",
        "img_per_s_per_core": f"{per_core:.1f}",
        "gpu_img_per_s": f"{gpu_rate:g}",
        "cores_per_gpu": math.ceil(gpu_rate / per_core),
    }


def run(options: argparse.Namespace) -> list[dict[str, object]]:
    """One row for each source and number of workers."""
    with tempfile.TemporaryDirectory() as folder:
        roots = {"data": options.root}
        data = read_config(options.config)
        if options.root is None and data.root is None:
            from oriented1d.classification.shards import write_shards

            roots = {"folders": f"{folder}/folders", "shards": f"{folder}/shards"}
            write_pictures(Path(folder, "folders", "train"), options.images)
            write_shards(f"{folder}/folders/train", f"{folder}/shards/train", images_per_shard=256)
        rows = []
        for source, root in roots.items():
            data.root = root or data.root
            for workers in options.workers:
                data.num_workers = workers
                row = row_of(source, data, measure(data, options.images), options.gpu_rate)
                print(f"{source}, {workers} workers: {row['img_per_s']} images/s", flush=True)
                rows.append(row)
    return rows
