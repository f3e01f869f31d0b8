import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from oriented1d.cli import main

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "detection"


def arguments(root: Path, runs: Path, **options) -> list[str]:
    defaults = {
        "threads": 1,
        "data.root": root,
        "data.short_sides": "[96]",
        "data.before_crop": "[96]",
        "data.crop": "[80, 96]",
        "data.longest": 160,
        "data.test_short_side": 96,
        "data.batch_size": 2,
        "data.total_batch_size": 2,
        "data.num_workers": 0,
        "model.num_classes": 2,
        "model.network_args": '{"depths": [1, 1, 1, 1], "dims": [8, 12, 16, 24], "stem_dim": 8}',
        "model.channels": 16,
        "model.hidden": 32,
        "model.settings": '{"rpn_samples": 64, "roi_samples": 64, "train_proposals": [100, 50], '
        '"test_proposals": [100, 50], "score": 0.01, "detections": 20}',
        "trainer.accelerator": "cpu",
        "trainer.default_root_dir": runs,
    }
    settings = defaults | {key.replace("__", "."): value for key, value in options.items()}
    return [f"--{key}={value}" for key, value in settings.items()]


TRAINING = {
    "trainer__max_epochs": 4,
    "trainer__check_val_every_n_epoch": 4,
    "trainer__log_every_n_steps": 1,
    "model__warmup_steps": 4,
    "model__lr": 3e-3,
    "model__milestones": "[3]",
}


def fit(root: Path, runs: Path, **options) -> int:
    settings = arguments(root, runs, **(TRAINING | options))
    return main(["fit", f"--config={CONFIGS / 'stamps_1d.yaml'}", *settings])


@pytest.fixture(scope="module")
def run(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    assert fit(shapes, runs) == 0
    return runs / "version_0"


def metrics(folder: Path, name: str) -> list[float]:
    with (folder / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def test_losses_fall(run: Path) -> None:
    losses = metrics(run, "train/loss")
    assert len(losses) == 20
    assert np.mean(losses[-4:]) < 0.75 * np.mean(losses[:2])
    for name in ("loss_rpn_cls", "s0.loss_cls", "s2.loss_mask"):
        assert len(metrics(run, f"train/{name}")) == 20
    rates = metrics(run, "train/lr")
    assert rates[0] == pytest.approx(3e-6)
    assert rates[14] == pytest.approx(3e-3)
    assert rates[15] == pytest.approx(3e-4)
    found = json.loads((run / "detections.json").read_text())
    assert {result["category_id"] for result in found} <= {3, 7}
    assert {result["image_id"] for result in found} <= {10, 11, 12, 13}


def test_validate_and_predict(run: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    common = [f"--config={CONFIGS / 'stamps_1d.yaml'}", f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}"]
    results = tmp_path / "found.json"
    assert main(["validate", *common, *arguments(shapes, tmp_path, model__results=results)]) == 0
    out = capsys.readouterr().out
    assert "bbox" in out
    assert "segm" in out
    assert json.loads(results.read_text()) == json.loads((run / "detections.json").read_text())

    folder = tmp_path / "pictures"
    settings = arguments(shapes, tmp_path, data__images=shapes / "val2017", model__predictions=folder, model__shown=0.0)
    assert main(["predict", *common, *settings]) == 0
    for name in ("0000", "0001"):
        picture = np.array(Image.open(folder / f"{name}.png"))
        original = np.array(Image.open(shapes / "val2017" / f"{name}.png"))
        assert picture.shape == original.shape
        assert (picture != original).any()
    found = json.loads((folder / "detections.json").read_text())
    assert {result["class"] for result in found} <= {"rectangle", "disc"}
    assert len(found) > 4
    assert len(list(folder.glob("*.png"))) == 4


def test_errors(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for options, message in (
        ({"model__num_classes": 5}, "model.num_classes: expected 2, the categories of the data, got 5"),
        ({"data__root": tmp_path / "none"}, "data.root: expected the annotations"),
        ({"data__total_batch_size": 3}, "data.total_batch_size: expected a multiple"),
        ({"model__pretrained": tmp_path / "x.pth"}, "model.pretrained: "),
        ({"model__network": "resnet18"}, "model.network: cannot make a backbone of resnet18"),
    ):
        assert fit(shapes, tmp_path, **options) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("cascade_*.yaml")), ids=lambda path: path.stem)
def test_recipes(path: Path) -> None:
    import yaml

    config = yaml.safe_load(path.read_text())
    network = path.stem.removeprefix("cascade_mask_rcnn_")
    expected = {"network": network}
    if "base" in network:
        expected |= {"drop_path_rate": 0.7, "layer_decay": 0.8, "num_layers": 12}
    assert config["model"]["init_args"] == expected
    assert config["trainer"]["max_epochs"] == 36
    assert config["trainer"]["sync_batchnorm"] is True
