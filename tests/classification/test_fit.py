"""Training through the real command, and what it does to weights, rates and files."""

from __future__ import annotations

import csv
from pathlib import Path

import lightning as L
import pytest
import torch
from PIL import Image

from oriented1d.classification import ImageClassifier, ImageData
from oriented1d.cli import main
from oriented1d.training.callbacks import StopAtBadLoss
from oriented1d.training.schedule import warmup_cosine


def column(run: Path, name: str) -> dict[int, float]:
    """Values of a logged metric by step."""
    with (run / "metrics.csv").open() as stream:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(stream) if row[name]}


def checkpoint(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def test_fit_writes_everything_and_says_where(options, tmp_path, capsys):
    assert main(["fit", *options]) == 0
    run = tmp_path / "runs" / "version_0"
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "best_ema.ckpt", "last.ckpt"}
    assert (run / "config.yaml").is_file()
    assert list(run.glob("events.out.tfevents.*"))
    top1 = column(run, "val/top1")
    assert list(top1) == [2, 5]  # after 3 and 6 steps
    assert all(0 <= value <= 1 for value in top1.values())
    assert column(run, "val/top5") == {2: 1.0, 5: 1.0}  # of three classes
    assert column(run, "val/top1_ema").keys() == column(run, "val/top5_ema").keys() == top1.keys()
    assert checkpoint(run / "checkpoints" / "best.ckpt")["global_step"] == 3 * (1 + (top1[5] > top1[2]))

    printed = capsys.readouterr().out
    assert "a step is 8 x 1 x 2 images" in printed
    assert "epoch 2/2" in printed
    assert "images/s" in printed
    for name in ("best.ckpt", "best_ema.ckpt", "last.ckpt", "metrics.csv"):
        assert str(run / name) in printed or str(run / "checkpoints" / name) in printed


def test_checkpoint_layout(options, tmp_path, image_folder):
    assert main(["fit", *options, "--trainer.max_epochs", "1"]) == 0
    saved = checkpoint(tmp_path / "runs" / "version_0" / "checkpoints" / "last.ckpt")
    keys = set(saved["state_dict"])
    network = {key.removeprefix("model.") for key in keys if key.startswith("model.")}
    assert {key.removeprefix("ema.module.") for key in keys if key.startswith("ema.module.")} == network
    assert keys == {f"model.{key}" for key in network} | {f"ema.module.{key}" for key in network}
    assert "stages.2.0.pwconv1.weight" in network
    assert saved["class_names"] == ["blue", "green", "red"]
    assert saved["global_step"] == 3
    assert "hyper_parameters" not in saved


def test_a_second_run_leaves_the_first_alone(options, tmp_path):
    assert main(["fit", *options, "--trainer.max_epochs", "1"]) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    assert main(["fit", *options, "--trainer.max_epochs", "1", "--seed_everything", "5"]) == 0
    assert {path: path.read_bytes() for path in before} == before
    assert (tmp_path / "runs" / "version_1" / "checkpoints" / "last.ckpt").is_file()


def test_schedule_and_optimizer_of_a_run(options, tmp_path):
    assert main(["fit", *options, "--model.layer_decay", "0.8"]) == 0
    run = tmp_path / "runs" / "version_0"
    assert column(run, "train/lr") == pytest.approx({step: warmup_cosine(step, 6, 3, 4e-3, 1e-6) for step in range(6)})
    optimizer = checkpoint(run / "checkpoints" / "last.ckpt")["optimizer_states"][0]
    groups = {group["name"]: group for group in optimizer["param_groups"]}
    assert groups["layer_13_decay"]["initial_lr"] == 4e-3
    assert groups["layer_0_no_decay"]["initial_lr"] == pytest.approx(4e-3 * 0.8**13)
    assert (groups["layer_1_decay"]["weight_decay"], groups["layer_1_no_decay"]["weight_decay"]) == (0.05, 0.0)


def test_layer_decay_of_another_network_is_refused_in_one_line(options, capsys):
    arguments = ["--model.network", "resnet18", "--model.network_args", "{in_chans: 3}", "--model.layer_decay", "0.8"]
    assert main(["fit", *options, *arguments]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert "model.layer_decay: expected null for" in line
    assert "got 0.8" in line


def test_resume_goes_on_with_step_rate_optimizer_and_average(options, tmp_path):
    assert main(["fit", *options]) == 0
    last = tmp_path / "runs" / "version_0" / "checkpoints" / "last.ckpt"
    assert main(["fit", *options, "--trainer.max_epochs", "4", "--ckpt_path", str(last)]) == 0
    run = tmp_path / "runs" / "version_1"
    rates = column(run, "train/lr")
    assert list(rates) == list(range(6, 12))
    assert rates[8] == pytest.approx(warmup_cosine(8, 12, 3, 4e-3, 1e-6))
    before, after = checkpoint(last), checkpoint(run / "checkpoints" / "last.ckpt")
    assert (before["global_step"], after["global_step"]) == (6, 12)
    assert {int(state["step"]) for state in after["optimizer_states"][0]["state"].values()} == {12}
    # The average moved on from the saved one: 0.7 ** 6 of what it was is still in it.
    key = "head.weight"
    old, new = before["state_dict"], after["state_dict"]
    assert not torch.equal(old[f"ema.module.{key}"], new[f"ema.module.{key}"])
    assert (new[f"ema.module.{key}"] - old[f"ema.module.{key}"]).abs().max() < 12 * 4e-3


def small_data(image_folder: Path, **options) -> ImageData:
    values = {"image_size": 32, "batch_size": 8, "total_batch_size": 16, "num_workers": 0} | options
    return ImageData(str(image_folder), **values)


def small_classifier(**options) -> ImageClassifier:
    arguments = {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8], "layer_scale_init_value": 1.0}
    values = {"network": "convnext_atto_2d", "network_args": arguments, "num_classes": 3, "warmup_epochs": 0}
    return ImageClassifier(**(values | options))


def small_trainer(**options) -> L.Trainer:
    values = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
    }
    return L.Trainer(**(values | options))


class Recorder(L.Callback):
    """Keeps the weights after each optimizer step and the gradients that the step was made with."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.gradient_norms: list[float] = []

    def _record(self, module: ImageClassifier) -> None:
        self.weights.append({key: value.clone() for key, value in module.model.state_dict().items()})

    def on_train_start(self, trainer, pl_module):
        self._record(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == len(self.weights):
            self._record(pl_module)
            gradients = [p.grad.double().flatten() for p in pl_module.model.parameters() if p.grad is not None]
            self.gradient_norms.append(float(torch.cat(gradients).norm()))


def test_average_is_that_of_the_steps(image_folder):
    """Updated once an optimizer step of two batches: e = 0.7 e + 0.3 w, computed here from the weights of each step."""
    recorder, module = Recorder(), small_classifier(ema_decay=0.7)
    small_trainer(max_epochs=2, callbacks=[recorder]).fit(module, datamodule=small_data(image_folder))
    assert len(recorder.weights) == 1 + 6
    assert module.ema is not None
    averaged = module.ema.module.state_dict()
    for key in recorder.weights[0]:
        expected = recorder.weights[0][key].double()
        for weights in recorder.weights[1:]:
            expected = 0.7 * expected + 0.3 * weights[key].double()
        torch.testing.assert_close(averaged[key].double(), expected, rtol=1e-5, atol=1e-7)
    assert not torch.equal(averaged["head.weight"], recorder.weights[-1]["head.weight"])
    assert not any(parameter.requires_grad for parameter in module.ema.parameters())


def test_accumulation_equals_one_large_batch(image_folder):
    """Without augmentation, 2 batches of 24 make the step that one of 48 makes."""
    plain = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "hflip": 0.0, "color_jitter": 0.0, "erasing": 0.0}
    plain["auto_augment"] = None
    updates = []
    for batch_size in (24, 48):
        L.seed_everything(0)
        module = small_classifier(
            mixup=0.0, cutmix=0.0, drop_path_rate=0.0, optimizer="momentum", lr=0.1, weight_decay=0.0, ema_decay=None
        )
        before = {key: value.clone() for key, value in module.model.state_dict().items()}
        data = small_data(image_folder, batch_size=batch_size, total_batch_size=48, **plain)
        small_trainer(max_epochs=1).fit(module, datamodule=data)
        updates.append({key: value - before[key] for key, value in module.model.state_dict().items()})
    assert max(float(value.abs().max()) for value in updates[0].values()) > 1e-3
    for key, value in updates[0].items():
        torch.testing.assert_close(value, updates[1][key], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("precision", "accelerator"),
    [
        ("32-true", "cpu"),
        ("64-true", "cpu"),
        ("bf16-mixed", "cpu"),
        ("bf16-true", "cpu"),
        pytest.param("16-mixed", "gpu", marks=pytest.mark.gpu),
        pytest.param("bf16-mixed", "gpu", marks=pytest.mark.gpu),
    ],
)
def test_clipping_in_every_precision(image_folder, precision, accelerator):
    norms = {}
    for clip in (None, 0.01):
        L.seed_everything(0)
        recorder, module = Recorder(), small_classifier(ema_decay=None)
        trainer = small_trainer(
            max_steps=1, callbacks=[recorder], precision=precision, accelerator=accelerator, gradient_clip_val=clip
        )
        trainer.fit(module, datamodule=small_data(image_folder))
        norms[clip] = recorder.gradient_norms[0]
    assert norms[None] > 0.05
    assert norms[0.01] == pytest.approx(0.01, rel=0.02)


def test_bad_loss_stops_the_run_and_keeps_the_last_good_checkpoint(options, tmp_path, capsys):
    """The rate becomes nan with the first step of the second epoch, the loss with the step after it."""
    assert main(["fit", *options, "--model.final_lr", ".nan"]) == 1
    good = tmp_path / "runs" / "version_0" / "checkpoints" / "last.ckpt"
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0
    assert "the loss is nan at step 4 (epoch 1), learning rate nan" in error
    assert error.endswith(f"last good checkpoint: {good}")
    saved = checkpoint(good)
    assert saved["global_step"] == 3
    assert all(value.isfinite().all() for value in saved["state_dict"].values())


def test_weights_spoilt_by_the_last_step_of_an_epoch_are_not_saved(options, tmp_path, capsys):
    """No training loss sees them, the validation does."""
    one_step = ["--data.total_batch_size=48", "--data.batch_size=24", "--model.warmup_epochs=0"]
    assert main(["fit", *options, *one_step, "--model.lr=1e30"]) == 1
    assert "val/loss is nan at step 1 (epoch 0)" in capsys.readouterr().err
    assert not list((tmp_path / "runs").rglob("*.ckpt"))


def test_bad_loss_at_the_very_first_step():
    guard = StopAtBadLoss()
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy._optimizers = [torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.25)]
    guard.on_train_batch_start(trainer, L.LightningModule(), None, 0)
    guard.on_train_batch_end(trainer, L.LightningModule(), {"loss": torch.tensor(float("inf"))}, None, 0)
    with pytest.raises(Exception, match=r"the loss is inf at step 0 .* rate 0.25; .* none, nothing was saved yet"):
        guard.on_train_epoch_end(trainer, L.LightningModule())


def test_images_of_other_modes_are_read(image_folder, tmp_path):
    """Grey, palette and transparent images become three channels."""
    for name, mode in (("a", "L"), ("b", "P"), ("c", "RGBA")):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (50, 40), (200, 100, 50)).convert(mode).save(tmp_path / "val" / name / "x.png")
    data = ImageData(str(tmp_path), image_size=32)
    dataset = data.create_split(training=False)
    assert [(dataset[i][0].mode, dataset[i][0].size) for i in range(3)] == [("RGB", (50, 40))] * 3
    assert [dataset[i][1] for i in range(3)] == [0, 1, 2]
    assert data.class_names == ["a", "b", "c"]
