"""Validating and predicting with every kind of checkpoint."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

from oriented1d.classification.data import EvalSet, ImageData
from oriented1d.cli import main
from oriented1d.training.command import Command

NETWORK = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "layer_scale_init_value": 1.0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, image_folder) -> Path:
    """Checkpoint of a run in which the weights and their average are told apart by their accuracy."""
    root = tmp_path_factory.mktemp("trained")
    arguments = [
        "fit", "--trainer.max_epochs=8", "--trainer.accelerator=cpu", f"--trainer.default_root_dir={root}",
        "--trainer.num_sanity_val_steps=0", "--trainer.log_every_n_steps=1",
        "--model=oriented1d.classification.ImageClassifier", "--model.network=convnext_atto_2d",
        f"--model.network_args={NETWORK}", "--model.num_classes=3", "--model.warmup_epochs=1", "--model.mixup=0",
        "--model.cutmix=0", "--model.ema_decay=0.9999", "--model.drop_path_rate=0",
        "--data=oriented1d.classification.ImageData", f"--data.root={image_folder}", "--data.image_size=32",
        "--data.batch_size=8", "--data.total_batch_size=8", "--data.num_workers=0", "--data.auto_augment=null",
        "--data.color_jitter=0", "--data.erasing=0",
    ]  # fmt: skip
    assert main(arguments) == 0
    return root / "version_0" / "checkpoints" / "last.ckpt"


def weights(path: Path, prefix: str) -> dict[str, torch.Tensor]:
    state = torch.load(path, weights_only=True)["state_dict"]
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def probabilities(path: Path, prefix: str, images: torch.Tensor) -> torch.Tensor:
    model = timm.create_model("convnext_atto_2d", num_classes=3, **NETWORK)
    model.load_state_dict(weights(path, prefix))
    with torch.no_grad():
        return model.eval()(images).softmax(-1)


@pytest.fixture(scope="module")
def expected(trained, image_folder) -> dict[str, float]:
    """Accuracy of the weights and of their average, computed without Lightning."""
    data = ImageData(str(image_folder), image_size=32)
    dataset = EvalSet(data.create_split(training=False), data.eval_transform())
    images = data.normalise(torch.stack([dataset[i][0] for i in range(12)]))
    labels = torch.tensor([dataset[i][1] for i in range(12)])
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    accuracy = {
        name: float((probabilities(trained, prefix, images).argmax(-1) == labels).float().mean())
        for name, prefix in (("plain", "model."), ("ema", "ema.module."))
    }
    assert accuracy["plain"] > 0.9  # the three colours are learned, and the average has hardly moved
    assert accuracy["ema"] < 0.7
    return accuracy


def validate(*arguments: str) -> dict[str, float]:
    return {key: float(value) for key, value in Command(["validate", *arguments]).trainer.callback_metrics.items()}


def test_validate_our_checkpoint_has_both(options, trained, expected):
    metrics = validate(*options, "--ckpt_path", str(trained))
    assert metrics["val/top1"] == pytest.approx(expected["plain"])
    assert metrics["val/top1_ema"] == pytest.approx(expected["ema"])
    assert metrics["val/top5"] == metrics["val/top5_ema"] == 1.0


@pytest.mark.parametrize("kind", ["lightning", "official", "plain", "safetensors"])
@pytest.mark.parametrize("ema", [False, True])
def test_validate_every_kind_of_file(options, trained, expected, tmp_path, kind, ema):
    plain, average = weights(trained, "model."), weights(trained, "ema.module.")
    file = trained
    if kind == "official":
        file = tmp_path / "official.pth"
        torch.save({"model": plain, "model_ema": average, "epoch": 299}, file)
    elif kind == "plain":
        file = tmp_path / "plain.pth"
        torch.save(average if ema else plain, file)
    elif kind == "safetensors":
        file = tmp_path / "weights.safetensors"
        safetensors.torch.save_file(average if ema else plain, file)
    inside = ema and kind in ("lightning", "official")
    metrics = validate(*options, "--model.pretrained", str(file), "--model.use_ema", str(inside).lower())
    assert metrics["val/top1"] == pytest.approx(expected["ema" if ema else "plain"])
    assert "val/top1_ema" not in metrics


def test_validate_leaves_no_files(options, trained, tmp_path):
    before = set(tmp_path.rglob("*"))
    assert main(["validate", *options, "--ckpt_path", str(trained)]) == 0
    assert set(tmp_path.rglob("*")) == before


def test_validate_refuses_the_wrong_checkpoint(options, tmp_path, capsys):
    torch.save({"model": {}}, tmp_path / "official.pth")
    assert main(["validate", *options, "--ckpt_path", str(tmp_path / "official.pth")]) == 1
    assert "weights of other origin are read with --model.pretrained" in capsys.readouterr().err
    assert main(["validate", *options, "--ckpt_path", "nowhere.ckpt"]) == 1
    assert "got nowhere.ckpt, which does not exist" in capsys.readouterr().err


def test_validate_refuses_other_classes(options, trained, image_folder, tmp_path, capsys):
    shutil.copytree(image_folder / "val", tmp_path / "other" / "val")
    (tmp_path / "other" / "val" / "red").rename(tmp_path / "other" / "val" / "rot")
    assert main(["validate", *options, "--ckpt_path", str(trained), "--data.root", str(tmp_path / "other")]) == 1
    assert "in one of the two only: red, rot" in capsys.readouterr().err


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture
def pictures(image_folder, tmp_path) -> Path:
    """A folder with a subfolder, three good images, two bad ones and a text."""
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    for name, source in (("a.png", "red/0.png"), ("c.png", "blue/0.png"), ("sub/d.PNG", "green/0.png")):
        shutil.copy(image_folder / "val" / source, folder / name)
    (folder / "b.jpg").write_bytes(b"not an image")
    (folder / "e.png").write_bytes((folder / "a.png").read_bytes()[:300])
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.mark.parametrize("ema", [False, True])
def test_predict_writes_class_probability_and_file(options, trained, pictures, tmp_path, capsys, ema):
    arguments = ["--ckpt_path", str(trained), "--data.images", str(pictures), "--model.use_ema", str(ema).lower()]
    assert main(["predict", *options, *arguments]) == 0
    found = rows(tmp_path / "predictions.csv")
    assert [Path(row["file"]).relative_to(pictures).as_posix() for row in found] == [
        "a.png", "b.jpg", "c.png", "e.png", "sub/d.PNG",
    ]  # fmt: skip
    data = ImageData(image_size=32, images=str(pictures))
    transform = data.eval_transform()
    for row in found:
        name = Path(row["file"]).name
        if name in ("b.jpg", "e.png"):
            assert (row["class"], row["probability"]) == ("", "")
            assert row["error"]
            continue
        with Image.open(row["file"]) as image:
            pixels = data.normalise(transform(image.convert("RGB"))[None])
        p = probabilities(trained, "ema.module." if ema else "model.", pixels)[0]
        assert row["class"] == ["blue", "green", "red"][int(p.argmax())]
        assert float(row["probability"]) == pytest.approx(float(p.max()), abs=2e-5)
        assert row["error"] == ""
    printed = capsys.readouterr().out
    assert f"{pictures / 'b.jpg'}: cannot be read" in printed
    assert "3 images predicted, 2 could not be read" in printed
    assert not list(tmp_path.glob("*.partial"))


def test_predict_takes_files_and_other_weights(options, trained, pictures, tmp_path):
    """Class names come with our checkpoints through --model.pretrained too; other files have numbers."""
    images = [f"--data.images=[{pictures / 'a.png'},{pictures / 'c.png'}]"]
    assert main(["predict", *options, *images, "--model.pretrained", str(trained)]) == 0
    named = rows(tmp_path / "predictions.csv")
    assert [row["class"] for row in named] == ["red", "blue"]
    torch.save(weights(trained, "model."), tmp_path / "plain.pth")
    assert main(["predict", *options, *images, "--model.pretrained", str(tmp_path / "plain.pth")]) == 0
    numbered = rows(tmp_path / "predictions.csv")
    assert [row["class"] for row in numbered] == ["2", "0"]
    assert [row["probability"] for row in numbered] == [row["probability"] for row in named]


def test_predict_names_imagenet_classes(options, pictures, tmp_path):
    arguments = ["--model.num_classes", "1000", "--data.images", str(pictures / "a.png")]
    assert main(["predict", *options, *arguments]) == 0
    name = rows(tmp_path / "predictions.csv")[0]["class"]
    assert name in timm.data.ImageNetInfo().label_descriptions()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("nowhere", "data.images: expected image files or folders, got nowhere, which does not exist"),
        ("{pictures}/notes", "data.images: no image files in"),
        ("{pictures}/b.jpg", "data.images: none of the images could be read"),
        (None, "data.images: expected image files or folders to predict, got none"),
    ],
)
def test_predict_without_images(options, pictures, tmp_path, capsys, images, message):
    (pictures / "notes").mkdir()
    arguments = [f"--data.images={images.format(pictures=pictures)}"] if images else []
    assert main(["predict", *options, *arguments]) == 1
    assert message in capsys.readouterr().err


def test_predict_keeps_an_older_file_when_it_fails(options, trained, tmp_path, capsys):
    (tmp_path / "predictions.csv").write_text("older")
    assert main(["predict", *options, "--ckpt_path", str(trained), "--data.images", "nowhere"]) == 1
    assert (tmp_path / "predictions.csv").read_text() == "older"
    arguments = ["--ckpt_path", str(trained), "--data.images", str(trained.parent), "--model.predictions"]
    assert main(["predict", *options, *arguments, str(trained / "x.csv")]) == 1
