"""Measuring the input pipeline alone."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest

from oriented1d.analysis.benchmark import input
from oriented1d.classification import ImageData
from oriented1d.cli import main


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_pictures_are_as_large_as_those_of_imagenet():
    random = np.random.default_rng(0)
    sizes = []
    for _ in range(5):
        file = io.BytesIO()
        picture = input.picture(random)
        assert (picture.size, picture.mode) == ((500, 375), "RGB")
        picture.save(file, "JPEG", quality=91)
        sizes.append(file.tell())
    assert 80_000 < np.mean(sizes) < 140_000


def test_cores_follow_from_the_time_of_an_image():
    """100 images in 4 s of CPU time are 25 a second on a core: 4000 of them need 160 cores, 4001 one more."""
    data = ImageData(num_workers=2)
    row = input.row_of("shards", data, (100, 2.5, 4.0), 4000)
    assert (row["img_per_s"], row["cpu_ms_per_image"], row["img_per_s_per_core"]) == ("40.0", "40.00", "25.0")
    assert (row["cores_per_gpu"], row["source"], row["workers"]) == (160, "shards", 2)
    assert input.row_of("shards", data, (100, 2.5, 4.0), 4001)["cores_per_gpu"] == 161


def test_both_layouts_are_measured(tmp_path):
    output = tmp_path / "rows.csv"
    config = tmp_path / "config.yaml"
    arguments = ["class_path: oriented1d.classification.ImageData", "init_args: {image_size: 32, batch_size: 4}"]
    config.write_text("data:\n" + "".join(f"  {line}\n" for line in arguments))
    command = ["benchmark", "input", "--config", str(config), "--images", "10", "--workers", "1", "2"]
    assert main([*command, "--gpu-rate", "50", "--output", str(output)]) == 0
    found = rows(output)
    assert [(row["source"], row["workers"]) for row in found] == [
        ("folders", "1"), ("folders", "2"), ("shards", "1"), ("shards", "2"),
    ]  # fmt: skip
    for row in found:
        assert (row["images"], row["batch"], row["size"], row["gpu_img_per_s"]) == ("8", "4", "32", "50")
        assert float(row["cpu_ms_per_image"]) > 0


def test_images_of_the_user_are_measured(image_root, tmp_path, capsys):
    output = tmp_path / "rows.csv"
    command = ["benchmark", "input", "--data.root", str(image_root), "--images", "128", "--workers", "1"]
    assert main([*command, "--output", str(output)]) == 0
    assert main([*command[:-3], "127", "--workers", "1"]) == 1
    assert "--images: expected at least a batch of 128, got 127" in capsys.readouterr().err
    (row,) = rows(output)
    assert (row["source"], row["images"], row["size"]) == ("data", "128", "224")


@pytest.fixture
def image_root(tmp_path: Path) -> Path:
    from PIL import Image

    for i in range(128):
        path = tmp_path / "root" / "train" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (i, i, i)).save(path)
    return tmp_path / "root"


@pytest.mark.parametrize(
    "text", ["", "data: {}", "data: {class_path: nowhere.Data}", "data: {class_path: builtins.dict}"]
)
def test_other_configurations_are_refused(tmp_path, capsys, text):
    (tmp_path / "config.yaml").write_text(text)
    assert main(["benchmark", "input", "--config", str(tmp_path / "config.yaml")]) == 1
    assert "--config: expected " in capsys.readouterr().err
