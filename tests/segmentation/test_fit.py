import csv
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from oriented1d.cli import main

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "segmentation"
NETWORK = '{"depths": [1, 1, 1, 1], "dims": [8, 12, 16, 24], "stem_dim": 8}'


def arguments(root: Path, runs: Path, **options) -> list[str]:
    defaults = {
        "threads": 1,
        "data.root": root,
        "data.num_classes": 3,
        "data.scale": "[80, 72]",
        "data.crop": 48,
        "data.batch_size": 4,
        "data.total_batch_size": 4,
        "data.num_workers": 0,
        "model.num_classes": 3,
        "model.network_args": NETWORK,
        "model.channels": 16,
        "model.auxiliary_channels": 8,
        "trainer.accelerator": "cpu",
        "trainer.default_root_dir": runs,
    }
    settings = defaults | {key.replace("__", "."): value for key, value in options.items()}
    return [f"--{key}={value}" for key, value in settings.items()]


TRAINING = {
    "trainer__max_steps": 8,
    "trainer__val_check_interval": 2,
    "trainer__log_every_n_steps": 1,
    "model__warmup_steps": 2,
    "model__lr": 5e-3,
}


def fit(root: Path, runs: Path, *extra: str, **options) -> int:
    settings = arguments(root, runs, **(TRAINING | options))
    return main(["fit", f"--config={CONFIGS / 'mosaic_1d.yaml'}", *settings, *extra])


@pytest.fixture(scope="module")
def run(mosaic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 steps, the folder of the run."""
    runs = tmp_path_factory.mktemp("runs")
    assert fit(mosaic, runs, trainer__max_steps=40, trainer__val_check_interval=4) == 0
    return runs / "version_0"


def metrics(folder: Path, name: str) -> list[float]:
    with (folder / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def test_it_learns(run: Path) -> None:
    losses = metrics(run, "train/loss")
    assert len(losses) == 40
    assert np.mean(losses[-5:]) < 0.85 * np.mean(losses[:3])
    scores = metrics(run, "val/miou")
    assert scores[-1] > 0.6
    assert scores[-1] > scores[0]
    assert metrics(run, "train/lr")[0] < 1e-8  # the first step of the warm-up


def test_validate_says_what_fit_said(run: Path, mosaic: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    checkpoint = run / "checkpoints" / "last.ckpt"
    common = ["validate", f"--config={CONFIGS / 'mosaic_1d.yaml'}", f"--ckpt_path={checkpoint}"]
    results = {}
    for name, options in {
        "whole": {},
        "slide": {"model__mode": "slide", "model__window": 48, "model__window_stride": 24},
        "scales": {"data__test_ratios": "[0.75, 1.0, 1.25]"},
    }.items():
        assert main([*common, *arguments(mosaic, tmp_path, **options)]) == 0
        out = capsys.readouterr().out
        assert "crimson" not in out
        assert all(name in out for name in ("red", "green", "blue"))
        results[name] = float(out.split("mIoU ")[1].split(",")[0])
    assert results["whole"] == pytest.approx(100 * metrics(run, "val/miou")[-1], abs=0.01)
    assert len(set(results.values())) == 3
    assert min(results.values()) > 40


def test_predict_writes_labels_and_overlays(run: Path, mosaic: Path, tmp_path: Path) -> None:
    folder = mosaic / "images" / "validation"
    settings = arguments(mosaic, tmp_path, data__images=folder, model__predictions=tmp_path / "out")
    checkpoint = run / "checkpoints" / "last.ckpt"
    assert main(["predict", f"--config={CONFIGS / 'mosaic_1d.yaml'}", f"--ckpt_path={checkpoint}", *settings]) == 0
    right = []
    for path in sorted(folder.iterdir()):
        labels = np.array(Image.open(tmp_path / "out" / f"{path.stem}_labels.png"))
        truth = np.array(Image.open(mosaic / "annotations" / "validation" / path.name))
        assert labels.shape == truth.shape
        right.append((labels == truth.astype(int) - 1)[truth > 0].mean())
        height, width = labels.shape
        predicted = np.array(Image.open(tmp_path / "out" / f"{path.stem}_overlay.png"))
        assert predicted.shape == (height, width, 3)
        comparison = np.array(Image.open(tmp_path / "out" / f"{path.stem}_comparison.png"))
        assert comparison.shape == (height, 3 * width, 3)
        assert np.array_equal(comparison[:, 2 * width :], predicted)
        # Where the prediction is right, its picture and that of the labels are the same.
        same = (comparison[:, width : 2 * width] == predicted).all(-1)
        assert same[labels == truth.astype(int) - 1].all()
        assert not same.all()
    assert np.mean(right) > 0.6
    assert len(list((tmp_path / "out").iterdir())) == 3 * len(right)
    # Images from elsewhere have no labels.
    alone = tmp_path / "elsewhere" / path.name
    alone.parent.mkdir()
    alone.write_bytes(path.read_bytes())
    settings = arguments(mosaic, tmp_path, data__images=alone, model__predictions=tmp_path / "two")
    assert main(["predict", f"--config={CONFIGS / 'mosaic_1d.yaml'}", f"--ckpt_path={checkpoint}", *settings]) == 0
    assert len(list((tmp_path / "two").iterdir())) == 2


class Stop(L.Callback):
    """Stops a run after five steps, as a lost connection would."""

    def on_train_batch_end(self, trainer: L.Trainer, *args) -> None:
        if trainer.global_step == 5:
            raise RuntimeError("stopped here")


def test_a_resumed_run_continues_exactly(mosaic: Path, tmp_path: Path) -> None:
    """From the middle of an epoch of six steps, with dropout, drop path and shuffling on: the same bits."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert fit(mosaic, whole, model__drop_path_rate=0.3) == 0
    stop = f"--trainer.callbacks+={Stop.__module__}.Stop"
    assert fit(mosaic, parts, stop, model__drop_path_rate=0.3) == 1
    checkpoint = parts / "version_0" / "checkpoints" / "last.ckpt"
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 4
    assert fit(mosaic, parts, f"--ckpt_path={checkpoint}", model__drop_path_rate=0.3) == 0
    files = (whole / "version_0", parts / "version_1")
    ends = [torch.load(file / "checkpoints" / "last.ckpt", weights_only=True) for file in files]
    assert ends[0]["global_step"] == ends[1]["global_step"] == 8
    for key, value in ends[0]["state_dict"].items():
        assert torch.equal(value, ends[1]["state_dict"][key]), key
    states = [end["optimizer_states"][0]["state"] for end in ends]
    assert all(torch.equal(a["exp_avg"], states[1][i]["exp_avg"]) for i, a in states[0].items())
    assert metrics(files[0], "train/loss")[4:] == metrics(files[1], "train/loss")


def test_errors(mosaic: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for options, message in (
        ({"model__num_classes": 4}, "model.num_classes: expected 3, as data.num_classes, got 4"),
        ({"data__num_classes": 4, "model__num_classes": 4}, "data.num_classes: expected 3, the classes of objectInfo"),
        ({"data__root": tmp_path / "none"}, "data.root: expected the folders images/training and annotations/training"),
        ({"data__total_batch_size": 6}, "data.total_batch_size: expected a multiple"),
        ({"model__pretrained": tmp_path / "x.pth"}, "model.pretrained: "),
        ({"model__network": "resnet18"}, "model.network: cannot make a backbone of resnet18"),
    ):
        assert fit(mosaic, tmp_path, **options) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("upernet_*.yaml")), ids=lambda path: path.stem)
def test_recipes(path: Path) -> None:
    import yaml

    config = yaml.safe_load(path.read_text())
    network = path.stem.removeprefix("upernet_")
    assert config["model"]["init_args"] == {"network": network, "num_layers": 6 if "tiny" in network else 12}
    assert config["trainer"]["max_steps"] == 160_000
    assert config["trainer"]["sync_batchnorm"] is True
