"""Tar shards: written, indexed, shared out without loss or repetition, and damaged."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from oriented1d.classification import ImageData, shards
from oriented1d.classification.shards import Shards, open_shards, scan, write_shards
from oriented1d.cli import main
from oriented1d.training.batches import StreamSampler
from oriented1d.training.command import Command
from oriented1d.training.errors import UserError
from tests.classification.conftest import write_images

ROOT = Path(__file__).resolve().parents[2]


def opened(folder: Path, index: Path | None = None) -> Shards:
    return open_shards(sorted(folder.glob("*.tar")), index or folder.parent / "index.npz")


@pytest.fixture
def copy(image_shards: Path, tmp_path: Path) -> Path:
    """Shards to damage; seven for training, with 7 images each but the last, which has 6."""
    for split in ("train", "val"):
        shutil.copytree(image_shards / split, tmp_path / "shards" / split)
    return tmp_path / "shards"


def cut(shard: Path, images: int) -> None:
    """Cut a shard off in the middle of the image that follows the first ``images``."""
    _, offset, size, _ = scan(shard).rows[images]
    os.truncate(shard, offset + size // 2)


# Writing and reading --------------------------------------------------------------------------------------------------


def test_shards_hold_the_files_of_the_folders(image_folder, image_shards):
    files = sorted((image_shards / "train").glob("*.tar"))
    assert [file.name for file in files] == [f"train-{i:06d}.tar" for i in range(7)]
    assert (image_shards / "train" / "classes.txt").read_text() == "blue\ngreen\nred\n"
    with tarfile.open(files[1]) as tar:
        assert tar.getnames() == [f"{i:08d}.{ending}" for i in range(7, 14) for ending in ("png", "cls")]
    data = opened(image_shards / "train")
    assert data.counts.tolist() == [7, 7, 7, 7, 7, 7, 6]
    assert data.missing.tolist() == [0] * 7
    found = sorted((label, file.getvalue()) for file, label in (data[i] for i in range(len(data))))
    names = ["blue", "green", "red"]
    paths = (image_folder / "train").rglob("*.png")
    assert found == sorted((names.index(path.parent.name), path.read_bytes()) for path in paths)
    assert data.filename(7) == f"{files[1]}: 00000007.png"
    labels = [label for _, label in (data[i] for i in range(7))]
    assert len(set(labels)) == 3  # shuffled before they are written


def test_writing_again_gives_the_same_bytes_and_never_adds_to_shards(image_folder, image_shards, tmp_path, capsys):
    assert main(["shards", str(image_folder / "train"), str(tmp_path / "train"), "--images-per-shard", "7"]) == 0
    assert "wrote 7 shards and classes.txt" in capsys.readouterr().out
    for file in (image_shards / "train").iterdir():
        assert (tmp_path / "train" / file.name).read_bytes() == file.read_bytes()
    assert main(["shards", str(image_folder / "train"), str(tmp_path / "train")]) == 1
    assert f"OUT: expected a folder without shards, got {tmp_path}/train" in capsys.readouterr().err
    assert main(["shards", str(tmp_path / "train"), str(tmp_path / "new")]) == 1
    assert "FOLDER: " in capsys.readouterr().err


def test_the_index_is_kept_and_follows_the_shards(copy, monkeypatch):
    index = copy / "index.npz"
    first = opened(copy / "train", index)
    scanned = []

    def watched(path: Path) -> shards.Scan:
        scanned.append(path.name)
        return scan(path)

    monkeypatch.setattr(shards, "scan", watched)
    assert np.array_equal(opened(copy / "train", index).rows, first.rows)
    assert scanned == []
    os.utime(copy / "train" / "train-000003.tar")
    (copy / "train" / "train-000005.tar").unlink()
    again = opened(copy / "train", index)
    assert scanned == ["train-000003.tar"]
    assert np.array_equal(again.rows, np.delete(first.rows, range(35, 42), axis=0))
    index.write_bytes(b"no index")
    assert np.array_equal(opened(copy / "train", index).rows, again.rows)
    assert len(scanned) == 1 + 6


def test_an_index_that_cannot_be_written_is_said(image_shards, capsys):
    assert len(opened(image_shards / "train", Path("/dev/null/index.npz"))) == 48
    assert "/dev/null/index.npz: cannot be written (Not a directory)" in capsys.readouterr().out


def test_files_are_opened_again_in_another_process_and_not_too_many_at_once(image_shards, monkeypatch):
    monkeypatch.setattr(shards, "_OPEN_FILES", 2)
    data = opened(image_shards / "train")
    expected = [data[i][0].getvalue() for i in (0, 10, 20, 40)]
    assert len(data._descriptors) == 2
    copied = pickle.loads(pickle.dumps(data))
    assert copied._descriptors == {}
    assert [copied[i][0].getvalue() for i in (0, 10, 20, 40)] == expected


def write_tar(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_other_members_folders_and_long_names(tmp_path):
    """Keys end at the first dot of the name; what is neither image nor class is passed over."""
    long = "deep/" + "k" * 150
    shard = write_tar(
        tmp_path / "a.tar", ("x/1.json", b"{}"), ("x/1.cls", b"4\n"), ("x/1.JPEG", b"one"), ("y/1.cls", b"5"),
        ("y/1.png", b"two"), (f"{long}.jpg", b"three"), (f"{long}.cls", b"6"), (f"{long}.seg.png", b"other"),
    )  # fmt: skip
    data = open_shards([shard], tmp_path / "index.npz")
    assert [(file.getvalue(), label) for file, label in (data[i] for i in range(3))] == [
        (b"one", 4), (b"two", 5), (b"three", 6),
    ]  # fmt: skip
    assert [data.filename(i) for i in range(3)] == [
        f"{shard}: {name}" for name in ("x/1.JPEG", "y/1.png", f"{long}.jpg")
    ]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("1.jpg", b"x")], "a.tar: expected one image and /1.cls of each key, got of /1 only jpg"),
        ([("1.jpg", b"x"), ("1.cls", b"cat")], "a.tar: expected the number of a class in /1.cls, got b'cat'"),
        ([("1.jpg", b"x"), ("1.png", b"x"), ("1.cls", b"0")], "expected one image and"),
        ([], "data.root: expected images in the 1 shards such as "),
    ],
)
def test_other_layouts_are_refused(tmp_path, members, message):
    write_tar(tmp_path / "a.tar", *members)
    with pytest.raises(UserError, match=message):
        open_shards([tmp_path / "a.tar"], tmp_path / "index.npz")


# Sharing out ----------------------------------------------------------------------------------------------------------


def sampler(rank: int, ranks: int, lengths: list[int], buffer: int = 10, had: int = 0, epoch: int = 0) -> StreamSampler:
    progress = SimpleNamespace(current=SimpleNamespace(ready=had))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    trainer = SimpleNamespace(world_size=ranks, global_rank=rank, fit_loop=loop)
    result = StreamSampler(range(sum(lengths)), trainer, 4, 3, lengths, buffer)  # type: ignore[arg-type]
    result.set_epoch(epoch)
    return result


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("epoch", [0, 2])
def test_processes_share_shards_without_loss_or_repetition(ranks, epoch):
    """Five shards of unequal lengths, 96 images: they divide by the processes, the shards do not."""
    lengths = [31, 7, 20, 20, 18]
    parts = [list(sampler(rank, ranks, lengths, epoch=epoch)) for rank in range(ranks)]
    assert {len(part) for part in parts} == {96 // ranks}
    assert sorted(chain(*parts)) == list(range(96 * epoch, 96 * (epoch + 1)))


def test_what_does_not_divide_is_left_out_once_at_most():
    parts = [list(sampler(rank, 4, [30, 30, 39])) for rank in range(4)]
    assert {len(part) for part in parts} == {24}
    assert len(set(chain(*parts))) == 96


def test_shards_are_read_one_after_another_and_their_images_shuffled():
    lengths = [100] * 20
    order = np.array(list(sampler(0, 1, lengths, buffer=300)))
    shard = order // 100
    first = [int(np.flatnonzero(shard == number)[0]) for number in range(20)]
    sequence = np.argsort(first)
    place = np.empty(2000)  # of each image, were there no buffer
    for position, number in enumerate(sequence):
        place[number * 100 : (number + 1) * 100] = np.arange(position * 100, (position + 1) * 100)
    moved = np.arange(2000) - place[order]
    assert sequence.tolist() != list(range(20))
    assert np.abs(moved).max() <= 300
    assert moved.std() > 60  # a uniform place among 300 has 87
    assert len(set(shard[1000:1100].tolist())) >= 3  # neighbours come from several shards
    other = list(sampler(0, 1, lengths, buffer=300, epoch=1))
    assert [sample - 2000 for sample in other] != order.tolist()
    assert list(sampler(0, 1, lengths, buffer=300)) == order.tolist()


def test_an_epoch_goes_on_where_it_stopped():
    whole = list(sampler(1, 2, [20, 20, 8]))
    assert list(sampler(1, 2, [20, 20, 8], had=4)) == whole[16:]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_workers_load_every_image_once(image_shards, workers):
    data = ImageData(str(image_shards), image_size=32).create_train_set()
    order = [sample for rank in range(3) for sample in sampler(rank, 3, [7, 7, 7, 7, 7, 7, 6])]
    batches = list(DataLoader(data, 5, sampler=order, num_workers=workers))
    alone = [data[sample] for sample in order]
    assert torch.equal(torch.cat([batch.pixels for batch in batches]), torch.stack([one.pixels for one in alone]))
    assert torch.cat([batch.label for batch in batches]).bincount().tolist() == [16, 16, 16]


# Training -------------------------------------------------------------------------------------------------------------


def test_training_on_shards(options, copy, tmp_path, capsys):
    command = Command(["fit", *options, f"--data.root={copy}", "--data.num_workers=2"])
    assert command.trainer.global_step == 2 * 3
    assert command.datamodule.class_names == ["blue", "green", "red"]
    assert isinstance(command.trainer.train_dataloader.sampler, StreamSampler)
    assert {path.name for path in copy.iterdir()} == {"train", "val", "train.index.npz", "val.index.npz"}
    right = 12 * float(command.trainer.callback_metrics["val/top1"])
    assert right == pytest.approx(round(right), abs=1e-4)


def test_shards_by_a_pattern(options, copy, capsys):
    """Both splits in one folder, and no names of classes: labels are held against the number of classes."""
    for split in ("train", "val"):
        for file in (copy / split).glob("*.tar"):
            file.rename(copy / file.name)
    arguments = [f"--data.root={copy}", "--data.train_split=train-*.tar", "--data.val_split=val-*.tar"]
    assert main(["fit", *options, *arguments, "--trainer.max_epochs=1"]) == 0
    assert (copy / "train-_.tar.index.npz").is_file()
    assert main(["fit", *options, *arguments, "--model.num_classes=2"]) == 1
    assert "data.root: expected labels from 0 to 1 in train-*.tar, got 2" in capsys.readouterr().err
    assert main(["fit", *options, f"--data.root={copy}", "--data.train_split=test-*.tar"]) == 1
    assert f"data.root: expected shards test-*.tar in {copy}, found none" in capsys.readouterr().err


# Damage ---------------------------------------------------------------------------------------------------------------


def test_a_shard_that_was_cut_off_before_it_was_indexed(copy, capsys):
    """Of 7 images 4 are whole. What is missing follows from the other shards, of 7 images each but for the last."""
    shard = copy / "train" / "train-000002.tar"
    cut(shard, 4)
    data = opened(copy / "train", copy / "index.npz")
    assert (data.counts.tolist(), data.missing.tolist()) == ([7, 7, 4, 7, 7, 7, 6], [0, 0, 3, 0, 0, 0, 0])
    assert f"{shard}: cut off or damaged after 4 images; about 3 are missing" in capsys.readouterr().out
    opened(copy / "train", copy / "index.npz")  # said at every start
    assert f"{shard}: cut off or damaged after 4 images; about 3 are missing" in capsys.readouterr().out


def test_a_shard_that_was_cut_off_after_it_was_indexed(copy):
    """How many images it had is known: the last one has 6, not 7."""
    opened(copy / "train", copy / "index.npz")
    cut(copy / "train" / "train-000006.tar", 4)
    for _ in range(2):
        data = opened(copy / "train", copy / "index.npz")
        assert (data.counts.tolist(), data.missing.tolist()) == ([7, 7, 7, 7, 7, 7, 4], [0, 0, 0, 0, 0, 0, 2])


def test_other_damage(copy):
    """A damaged header, an end cut off at a member's border, an empty file: what is before them is used."""
    files = sorted((copy / "train").glob("*.tar"))
    with files[0].open("r+b") as file:
        file.seek(int(scan(files[0]).rows[3, 0]) + 100)
        file.write(b"\xff" * 40)
    os.truncate(files[1], int(scan(files[1]).rows[5, 0]))
    os.truncate(files[2], 0)
    data = opened(copy / "train", copy / "index.npz")
    # The last key before a cut may lack a member, and is left out.
    assert (data.counts[:4].tolist(), data.missing[:4].tolist()) == ([2, 4, 0, 7], [5, 3, 7, 0])
    whole = opened(copy / "train", copy / "other.npz")
    assert all(whole[i][0].getvalue()[:4] == b"\x89PNG" for i in range(len(whole)))


def test_too_much_is_missing(options, copy, capsys):
    cut(copy / "train" / "train-000002.tar", 4)
    assert main(["fit", *options, f"--data.root={copy}", "--data.total_batch_size=8"]) == 1
    error = capsys.readouterr().err
    assert "at most 1% of the 48 training images to be unreadable, got 3 in this epoch, in shards that" in error


def test_validation_takes_whole_shards_only(options, copy, capsys):
    cut(copy / "val" / "val-000000.tar", 6)
    assert main(["validate", *options, f"--data.root={copy}"]) == 1
    assert "expected whole shards to validate on, 1 images of them are missing" in capsys.readouterr().err


def test_a_shard_that_is_cut_off_during_the_run(copy):
    data = ImageData(str(copy), image_size=32).create_train_set()
    shard = copy / "train" / "train-000000.tar"
    cut(shard, 5)
    assert [bool(data[i].unreadable) for i in range(8)] == [False] * 5 + [True] * 2 + [False]
    assert data[6].unreadable.startswith(f"{shard}: the image at byte ")
    assert "the shard ends after 0 of its" in data[6].unreadable
    assert data[6].pixels.float().std() > 0


def test_two_processes_share_shards_and_count_together(options, tmp_path, capfd):
    """Of 300 images each process meets two that cannot be read in its first batch: neither alone has more than 1%."""
    write_images(tmp_path / "images", 100, seed=1)
    write_shards(tmp_path / "images", tmp_path / "shards" / "train", images_per_shard=70)
    write_shards(tmp_path / "images", tmp_path / "shards" / "val", images_per_shard=200)
    data = opened(tmp_path / "shards" / "train")
    first = []
    for rank in range(2):
        order = sampler(rank, 2, data.counts.tolist(), buffer=16384)
        order.seed = 0  # that of the run
        first.append(list(order)[:2])
    for sample in chain(*first):
        _, offset, size, _ = data.rows[sample].tolist()
        with data.files[data._shard(sample)].open("r+b") as file:
            file.seek(offset)
            file.write(bytes(size))
    command = [
        sys.executable, "-m", "oriented1d.cli", "fit", *options, "--trainer.devices=2", "--threads=1",
        f"--data.root={tmp_path}/shards",
    ]  # fmt: skip
    result = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 1, result.stderr
    assert result.stdout.count("another image takes its place") == 4
    for sample in chain(*first):
        assert f"{data.filename(sample)}: expected an image, cannot be read (" in result.stdout
    assert "at most 1% of the 300 training images to be unreadable, got 4 in this epoch" in result.stderr
