"""Tar shards in webdataset's layout: ``NAME-000000.tar`` with ``KEY.jpg`` beside ``KEY.cls``.

An index says where in its shard each image lies. With it shards are a data set like any other: every image has a number
and can be read by itself, so that samplers share them out without loss or repetition, and a run goes on in the middle
of an epoch.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import tarfile
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from timm.data import get_img_extensions
from timm.data.readers.reader_image_folder import ReaderImageFolder

from oriented1d.files import unfinished
from oriented1d.training.errors import UserError
from oriented1d.training.files import check_writable

CLASS_NAMES = "classes.txt"  # beside the shards, one name a line; webdataset has no place for them

_BLOCK = 512  # bytes; members of a tar file start at multiples of it
_OPEN_FILES = 256  # at once in a process; the usual limit is 1024
_SCANNING_THREADS = 16  # a network file system answers many at once


class Scan(NamedTuple):
    """What a shard holds.

    Attributes:
        rows: int64 ``(N, 4)``: byte of the header, first byte and number of bytes of each image, and its label.
        whole: the shard has its end.
    """

    rows: np.ndarray
    whole: bool


def _sample(path: Path, tar: tarfile.TarFile, key: str, members: dict[str, tarfile.TarInfo]) -> tuple[int, ...]:
    images = [ending for ending in members if f".{ending.lower()}" in get_img_extensions(as_set=True)]
    if len(images) != 1 or "cls" not in members:
        raise UserError(f"{path}: expected one image and {key}.cls of each key, got of {key} only {', '.join(members)}")
    file = tar.extractfile(members["cls"])
    assert file is not None
    text = file.read()
    if not text.strip().isdigit():
        raise UserError(f"{path}: expected the number of a class in {key}.cls, got {text[:20]!r}")
    image = members[images[0]]
    return image.offset, image.offset_data, image.size, int(text)


def scan(path: Path) -> Scan:
    """Look through the headers of a shard. What was cut off, or follows a damaged header, is not found.

    Raises:
        UserError: the layout is another one.
    """
    rows: list[tuple[int, ...]] = []
    end = 0
    try:
        size = path.stat().st_size
        with tarfile.open(path, "r:") as tar, path.open("rb") as file:
            key, members = "", dict[str, tarfile.TarInfo]()
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, _, ending = name.partition(".")
                if f"{folder}/{stem}" != key:
                    if members:
                        rows.append(_sample(path, tar, key, members))
                    key, members = f"{folder}/{stem}", {}
                if member.offset_data + member.size > size:
                    break
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                if member.isfile():
                    members[ending] = member
            file.seek(end)
            whole = file.read(_BLOCK) == bytes(_BLOCK)  # tarfile takes a damaged header for the end
            if members and whole:  # otherwise they may not be all of this key
                rows.append(_sample(path, tar, key, members))
    except (tarfile.TarError, OSError, ValueError):
        whole = False
    return Scan(np.array(rows, dtype=np.int64).reshape(-1, 4), whole)


class Shards:
    """Images of shards by their number, in the manner of timm's readers.

    Args:
        files: the shards.
        counts: images in each.
        missing: images that each should have beside them, known from before it was damaged, or estimated.
        rows: of all images, see :class:`Scan`.
    """

    def __init__(self, files: Sequence[Path], counts: np.ndarray, missing: np.ndarray, rows: np.ndarray) -> None:
        self.files = list(files)
        self.counts = counts
        self.missing = missing
        self.rows = rows
        self._ends = np.cumsum(counts)
        self._descriptors: dict[int, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_descriptors": {}}  # files are open in one process only

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        """The file of an image and its label.

        Raises:
            OSError, EOFError: the shard cannot be read, or ends before the image does.
        """
        _, offset, size, label = self.rows[index].tolist()
        data = os.pread(self._descriptor(self._shard(index)), size, offset)
        if len(data) < size:
            raise EOFError(f"the shard ends after {len(data)} of its {size} bytes")
        return io.BytesIO(data), label

    def filename(self, index: int, absolute: bool = True) -> str:
        """Shard and name of an image."""
        file, header = self.files[self._shard(index)], int(self.rows[index, 0])
        try:
            with file.open("rb") as stream:
                stream.seek(header)
                member = tarfile.TarFile(fileobj=stream).next()
        except (tarfile.TarError, OSError):
            member = None
        return f"{file}: {member.name if member else f'the image at byte {header}'}"

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self._ends, index, side="right"))

    def _descriptor(self, shard: int) -> int:
        if shard not in self._descriptors:
            if len(self._descriptors) == _OPEN_FILES:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            descriptor = os.open(self.files[shard], os.O_RDONLY)
            # The system reads the shard from its beginning to its end into memory, where we then pick from.
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
            self._descriptors[shard] = descriptor
        return self._descriptors[shard]


def _read_index(path: Path) -> dict[str, tuple[list[int], np.ndarray]]:
    """By shard: its bytes, time of change, images and missing images; rows. Empty if there is no usable file."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            names, shards, rows = stored["names"].tolist(), stored["shards"], stored["rows"]
        ends = np.cumsum(shards[:, 2])
        return {
            name: (shard.tolist(), rows[end - shard[2] : end])
            for name, shard, end in zip(names, shards, ends, strict=True)
        }
    except (OSError, ValueError, KeyError, IndexError, zipfile.BadZipFile):
        return {}


def _state(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def open_shards(files: Sequence[Path], index: Path) -> Shards:
    """Shards with the index that is kept in the file ``index``: shards that are new or have changed are looked through.

    Damaged shards are named on the screen, and so is an index that cannot be written.

    Raises:
        UserError: the layout is another one, or there is no image.
    """
    known = _read_index(index)
    states = {file.name: _state(file) for file in files}
    changed = [file for file in files if known.get(file.name, [[]])[0][:2] != list(states[file.name])]
    with ThreadPoolExecutor(_SCANNING_THREADS) as pool:
        scans = {file.name: found for file, found in zip(changed, pool.map(scan, changed), strict=True)}
    typical = [shard[2] for shard, _ in known.values() if not shard[3]]
    typical += [len(found.rows) for found in scans.values() if found.whole]
    shards, rows = [], []
    for file in files:
        if file.name in scans:
            found = scans[file.name]
            missing = 0
            if not found.whole:
                before = sum(known[file.name][0][2:]) if file.name in known else int(np.median(typical or [0]))
                missing = max(before - len(found.rows), 1)
            shards.append([*states[file.name], len(found.rows), missing])
            rows.append(found.rows)
        else:
            shards.append(known[file.name][0])
            rows.append(known[file.name][1])
    table, all_rows = np.array(shards, dtype=np.int64), np.concatenate(rows)
    for file, (_, _, count, missing) in zip(files, shards, strict=True):
        if missing:
            print(f"{file}: cut off or damaged after {count} images; about {missing} are missing", flush=True)
    if not len(all_rows):
        raise UserError(f"data.root: expected images in the {len(files)} shards such as {files[0]}, found none")
    if changed or len(known) != len(files):
        try:
            with unfinished(index) as partial:
                np.savez(partial, names=np.array([file.name for file in files]), shards=table, rows=all_rows)
        except OSError as error:
            print(f"{index}: cannot be written ({error.strerror}); the next run looks through them again", flush=True)
    return Shards(files, table[:, 2], table[:, 3], all_rows)


def write_shards(folder: str | Path, output: str | Path, images_per_shard: int = 1000, seed: int = 0) -> int:
    """Write the images of ``folder/CLASS/*`` into ``output/NAME-000000.tar`` and so on, the files as they are.

    Images are shuffled first, so that each shard has images of all classes. The same input gives the same bytes. The
    names of the classes go into ``classes.txt``.

    Args:
        output: a folder without shards; its name is that of the shards.

    Returns:
        number of shards.

    Raises:
        UserError: there are no images, or ``output`` has shards already or cannot be written to.
    """
    output = Path(output)
    check_writable(output, "OUT")
    if any(output.glob("*.tar")):
        raise UserError(f"OUT: expected a folder without shards, got {output}")
    try:
        reader = ReaderImageFolder(str(folder))
    except RuntimeError as error:  # timm found no images
        raise UserError(f"FOLDER: {error}") from error
    samples = list(reader.samples)
    random.Random(seed).shuffle(samples)
    names = sorted(reader.class_to_idx, key=reader.class_to_idx.__getitem__)
    with unfinished(output / CLASS_NAMES) as partial:
        partial.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    starts = range(0, len(samples), images_per_shard)
    for number, start in enumerate(starts):
        with (
            unfinished(output / f"{output.resolve().name}-{number:06d}.tar") as partial,
            tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar,
        ):
            for i, (path, label) in enumerate(samples[start : start + images_per_shard], start):
                file = Path(path)
                for ending, data in ((file.suffix.lower(), file.read_bytes()), (".cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{i:08d}{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return len(starts)


def main(argv: Sequence[str] | None = None) -> int:
    """``oriented1d shards``."""
    parser = argparse.ArgumentParser("oriented1d shards", description="Write images in folders into tar shards.")
    parser.add_argument("folder", metavar="FOLDER", help="folder of one folder of images per class")
    parser.add_argument("out", metavar="OUT", help="folder to write to; its name is that of the shards")
    parser.add_argument("--images-per-shard", type=int, default=1000, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the images (default: %(default)s)")
    options = parser.parse_args(argv)
    if options.images_per_shard < 1:
        raise UserError(f"--images-per-shard: expected a positive number, got {options.images_per_shard}")
    number = write_shards(options.folder, options.out, options.images_per_shard, options.seed)
    print(f"wrote {number} shards and {CLASS_NAMES} to {options.out}")
    return 0
