"""Runs that are stopped go on to the very same end; checkpoints are whole; bad losses stop a run or are left out."""

from __future__ import annotations

import csv
import errno
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.plugins import MixedPrecision

from oriented1d.classification import ImageClassifier, ImageData
from oriented1d.cli import main
from oriented1d.training.callbacks import RandomStates, StopAtBadLoss
from oriented1d.training.errors import UserError
from oriented1d.training.restart import WholeCheckpoints, find_interrupted
from tests.classification.conftest import write_images
from tests.segmentation.conftest import mosaic

__all__ = ["mosaic"]  # a fixture

NETWORK = {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 16], "stem_dim": 8, "layer_scale_init_value": 1.0}


class Stop(L.Callback):
    """Stops a run after an optimizer step, as a lost connection would."""

    at = -1

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.at and not trainer.fit_loop._should_accumulate():
            raise RuntimeError("stopped here")


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    write_images(root / "train", 16, seed=1)
    write_images(root / "val", 4, seed=2)
    return root


@pytest.fixture
def classification(images: Path, tmp_path: Path) -> list[str]:
    """6 steps in 2 epochs; mixup, cutmix, drop path, erasing and a moving average are on."""
    model = {"network": "convnext_atto_1d", "network_args": NETWORK, "num_classes": 3, "drop_path_rate": 0.3}
    model |= {"warmup_epochs": 1, "ema_decay": 0.7}
    data = {"root": str(images), "image_size": 32, "batch_size": 8, "total_batch_size": 16, "num_workers": 0}
    return configure(tmp_path, "oriented1d.classification", "ImageClassifier", model, "ImageData", data, max_epochs=2)


@pytest.fixture
def segmentation(mosaic: Path, tmp_path: Path) -> list[str]:
    """10 steps in epochs of 6, with a validation after 4 and 8; dropout and drop path are on."""
    model = {"network": "convnext_atto_1d", "network_args": NETWORK, "num_classes": 3, "drop_path_rate": 0.3}
    model |= {"warmup_steps": 2, "channels": 8, "auxiliary_channels": 8}
    data = {"root": str(mosaic), "num_classes": 3, "scale": [80, 72], "crop": 48, "num_workers": 0}
    data |= {"batch_size": 4, "total_batch_size": 4}
    steps = {"max_epochs": -1, "max_steps": 10, "val_check_interval": 4, "check_val_every_n_epoch": None}
    return configure(tmp_path, "oriented1d.segmentation", "SemanticSegmenter", model, "SegmentationData", data, **steps)


def configure(
    folder: Path, package: str, model: str, model_args: dict, data: str, data_args: dict, **trainer: Any
) -> list[str]:
    config = {
        "threads": 1,
        "trainer": {"accelerator": "cpu", "log_every_n_steps": 1, "num_sanity_val_steps": 0} | trainer,
        "model": {"class_path": f"{package}.{model}", "init_args": model_args},
        "data": {"class_path": f"{package}.{data}", "init_args": data_args},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return [f"--config={path}"]


def fit(options: list[str], root: Path, *more: str) -> int:
    return main(["fit", *options, f"--trainer.default_root_dir={root}", *more])


def rows(run: Path) -> list[dict[str, str]]:
    """What was logged, but for the speed."""
    with (run / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "train/images_per_second"} for row in csv.DictReader(file)]


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Nested values that are the same to the bit."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}.{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def assert_same_end(run: Path, other: Path) -> None:
    """Weights, moving average, optimizer, schedule and random numbers are those of the other run."""
    ends = [torch.load(path / "checkpoints" / "last.ckpt", weights_only=True) for path in (run, other)]
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert_same(ends[0][part], ends[1][part], part)
    assert_same(*(end["callbacks"]["RandomStates"] for end in ends), "random")


@pytest.mark.parametrize(("task", "workers", "stops"), [("classification", 0, (2, 4, 5)), ("segmentation", 1, (3, 9))])
def test_a_stopped_run_goes_on_to_the_same_end(
    task: str,
    workers: int,
    stops: tuple[int, ...],
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """With shuffling, augmentation, mixup, dropout and drop path; inside an epoch, at its end, after a validation."""
    options = request.getfixturevalue(task)
    common = ["--checkpoint.steps=1", f"--data.num_workers={workers}", f"--trainer.callbacks+={__name__}.Stop"]
    assert fit(options, tmp_path / "whole", *common) == 0
    for stop in stops:
        monkeypatch.setattr(Stop, "at", stop)
        assert fit(options, tmp_path / "parts", *common) == 1
    monkeypatch.setattr(Stop, "at", -1)
    capsys.readouterr()
    assert fit(options, tmp_path / "parts", *common) == 0
    assert f"going on from step {stops[-1] - 1} of {tmp_path}/parts/version_0/checkpoints/last.ckpt" in (
        capsys.readouterr().out
    )
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["version_0"]
    whole, parts = tmp_path / "whole" / "version_0", tmp_path / "parts" / "version_0"
    assert_same_end(whole, parts)
    assert rows(whole) == rows(parts)  # no step is there twice
    best = [torch.load(run / "checkpoints" / "best.ckpt", weights_only=True) for run in (whole, parts)]
    assert_same(best[0]["state_dict"], best[1]["state_dict"])


def test_which_run_is_taken_up(tmp_path: Path) -> None:
    def make(number: int, config: dict, status: str = "not finished", checkpoint: bool = True) -> Path:
        folder = tmp_path / f"version_{number}"
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / "status").write_text(status)
        last = folder / "checkpoints" / "last.ckpt"
        if checkpoint:
            last.touch()
        return last

    ours, other = {"lr": 1.0, "seed": None}, {"lr": 2.0, "seed": None}
    assert find_interrupted(tmp_path, ours) is None
    second = make(2, ours)
    ninth = make(9, ours)
    tenth = make(10, ours)
    make(11, other)
    assert find_interrupted(tmp_path, ours) == tenth
    assert find_interrupted(tmp_path, {"lr": 3.0}) is None
    lock = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", lock, str(tmp_path / "version_10" / "status")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert find_interrupted(tmp_path, ours) == ninth  # another process writes the tenth
        process.kill()
    (tmp_path / "version_10" / "status").write_text("finished\n")
    assert find_interrupted(tmp_path, ours) is None  # older ones are over
    make(12, ours, checkpoint=False)
    assert find_interrupted(tmp_path, ours) is None
    assert second.is_file()


def test_another_configuration_a_finished_run_and_never_start_anew(
    classification: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ["--trainer.max_epochs=1", "--checkpoint.steps=1", f"--trainer.callbacks+={__name__}.Stop"]
    monkeypatch.setattr(Stop, "at", 2)
    assert fit(classification, tmp_path, *common) == 1
    assert fit(classification, tmp_path, *common, "--resume=never") == 1
    assert fit(classification, tmp_path, *common, "--model.lr=1e-3") == 1
    assert sorted(path.name for path in tmp_path.glob("version_*")) == ["version_0", "version_1", "version_2"]
    monkeypatch.setattr(Stop, "at", -1)
    assert fit(classification, tmp_path, *common) == 0  # takes up version_0
    assert (tmp_path / "version_0" / "status").read_text() == "finished\n"
    assert len(list(tmp_path.glob("version_*"))) == 3
    assert fit(classification, tmp_path, *common) == 0
    assert (tmp_path / "version_3" / "status").read_text() == "finished\n"


def wait_for(text: str, log: Path, process: subprocess.Popen) -> None:
    for _ in range(1200):
        if text in log.read_text() or process.poll() is not None:
            break
        time.sleep(0.05)
    assert text in log.read_text(), log.read_text()


def test_killed_and_terminated_on_two_processes(segmentation: list[str], tmp_path: Path) -> None:
    """SIGTERM saves and ends with 143, SIGKILL loses what came after the last checkpoint; the same command goes on to
    the end of a run that nothing stopped."""
    options = [*segmentation, "--trainer.devices=2", "--data.batch_size=2", "--checkpoint.steps=3"]
    options += ["--trainer.max_steps=40", "--trainer.val_check_interval=20"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(name: str, *more: str) -> tuple[subprocess.Popen, Path]:
        log = tmp_path / f"{len(list(tmp_path.glob('*.log')))}.log"
        root = f"--trainer.default_root_dir={tmp_path}/{name}"
        command = [sys.executable, "-m", "oriented1d.cli", "fit", *options, root, *more]
        with log.open("w") as file:
            return subprocess.Popen(command, stdout=file, stderr=file, env=environment), log

    whole, _ = start("whole", "--trainer.strategy=ddp_fork")
    for number, code in ((signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        process, log = start("parts")
        wait_for("/40  train/loss", log, process)  # said after each epoch
        process.send_signal(number)
        assert process.wait(60) == code, log.read_text()
        if number == signal.SIGTERM:
            saved = torch.load(tmp_path / "parts" / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)
            said = f"SIGTERM at step {saved['global_step']}: saved {tmp_path}/parts/version_0/checkpoints/last.ckpt"
            assert said in log.read_text()
            assert len(saved["callbacks"]["RandomStates"]["processes"]) == 2
            first, second = saved["callbacks"]["RandomStates"]["processes"]
            assert not torch.equal(first["torch"], second["torch"])
    process, log = start("parts")
    assert process.wait(120) == 0, log.read_text()
    assert whole.wait(120) == 0
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["version_0"]
    assert_same_end(tmp_path / "whole" / "version_0", tmp_path / "parts" / "version_0")
    assert rows(tmp_path / "whole" / "version_0") == rows(tmp_path / "parts" / "version_0")


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoints" / "last.ckpt"
    plugin = WholeCheckpoints()
    plugin.save_checkpoint({"step": 1}, path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    big = {"step": 2, "weights": torch.zeros(1_000_000)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # a real error in the middle of a write
    try:
        with pytest.raises(
            UserError, match=r"cannot write .*/last.ckpt: File too large; it needs 4.0 MB, .* MB are free"
        ):
            plugin.save_checkpoint(big, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def no_space(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(UserError, match="No space left on device"):
        plugin.save_checkpoint(big, path)
    monkeypatch.undo()
    assert os.listdir(path.parent) == ["last.ckpt"]
    assert torch.load(path, weights_only=True) == {"step": 1}
    plugin.save_checkpoint(big, path)
    assert torch.load(path, weights_only=True)["step"] == 2


def test_a_full_disk_ends_the_run_with_one_line(
    classification: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    fsync, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 4:  # a file and its folder; two checkpoints
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert fit(classification, tmp_path, "--checkpoint.steps=1") == 1
    last = tmp_path / "version_0" / "checkpoints" / "last.ckpt"
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("oriented1d fit: error: cannot write ")
    assert lines[-1].endswith(f"; last good checkpoint: {last}")
    assert torch.load(last, weights_only=True)["global_step"] == 2
    monkeypatch.undo()
    stale = last.with_name(".last.4711.ckpt")
    stale.write_bytes(b"half a checkpoint")
    assert fit(classification, tmp_path, "--checkpoint.steps=1") == 0
    assert not stale.exists()
    assert torch.load(last, weights_only=True)["global_step"] == 6


def test_random_states_hold_all_generators() -> None:
    import random

    import numpy as np

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    states = RandomStates()
    states.on_train_start(trainer, L.LightningModule())
    saved = states.state_dict()
    first = draw()
    assert draw() != first
    other = RandomStates()
    other.load_state_dict(saved)
    other.on_train_start(trainer, L.LightningModule())
    assert draw() == first


class Sometimes(ImageClassifier):
    """Has a loss that is not a number in given batches."""

    bad: tuple[int, ...] = ()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx) * (float("nan") if batch_idx in self.bad else 1.0)


class Weights(L.Callback):
    """Weights and optimizer states after each optimizer step."""

    def __init__(self) -> None:
        self.after: list[tuple[Any, Any]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.global_step > len(self.after):
            weights = {key: value.clone() for key, value in pl_module.model.state_dict().items()}
            states = [{k: v.clone() for k, v in state.items()} for state in trainer.optimizers[0].state.values()]
            self.after.append((weights, states))


def train(images: Path, bad: tuple[int, ...], skip: int, **trainer: Any) -> tuple[StopAtBadLoss, Weights]:
    L.seed_everything(0)
    model = Sometimes("convnext_atto_2d", {"depths": [1] * 4, "dims": [8] * 4}, 3, warmup_epochs=0, ema_decay=None)
    model.bad = bad
    guard, weights = StopAtBadLoss(skip=skip), Weights()
    options = {"accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_checkpointing": False}
    options |= {"enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0}
    data = ImageData(str(images), image_size=32, batch_size=8, total_batch_size=16, num_workers=0)
    L.Trainer(**(options | trainer), callbacks=[guard, weights]).fit(model, datamodule=data)
    return guard, weights


def test_bad_steps_are_skipped_and_counted(images: Path, capsys: pytest.CaptureFixture) -> None:
    """Three steps of two batches; the first batch of the second one is bad."""
    guard, weights = train(images, bad=(2,), skip=1)
    assert guard.skipped == guard.state_dict()["skipped"] == 1
    assert_same(weights.after[0], weights.after[1])
    assert not torch.equal(weights.after[1][0]["head.weight"], weights.after[2][0]["head.weight"])
    assert all(value.isfinite().all() for value in weights.after[2][0].values())
    assert [int(state["step"]) for state in weights.after[2][1]] == [2] * len(weights.after[2][1])
    assert "not finite at step 1 (epoch 0), learning rate 0.00" in capsys.readouterr().err


def test_too_many_bad_steps_stop_the_run(images: Path) -> None:
    with pytest.raises(UserError, match=r"at step 1 .* after 1 skipped steps; last good checkpoint: none"):
        train(images, bad=(0, 3), skip=1)


def test_steps_that_float16_scaling_leaves_out_are_not_bad(images: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)
    guard, _ = train(images, bad=(2,), skip=5, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert scaler.get_scale() == 2.0**37  # gradients were infinite, or not numbers, in all three steps
    assert guard.skipped == 1


def test_a_run_on_the_cpu_says_when_gradients_are_bad_although_the_loss_is_not(images: Path) -> None:
    class BadGradient(L.Callback):
        def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.fit_loop.batch_idx == 1:
                next(pl_module.model.parameters()).grad.fill_(float("inf"))

    L.seed_everything(0)
    model = ImageClassifier("convnext_atto_2d", {"depths": [1] * 4, "dims": [8] * 4}, 3, ema_decay=None)
    guard = StopAtBadLoss(skip=3)
    options = {"accelerator": "cpu", "max_steps": 1, "logger": False, "enable_checkpointing": False}
    options |= {"enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0}
    data = ImageData(str(images), image_size=32, batch_size=8, total_batch_size=16, num_workers=0)
    L.Trainer(**options, callbacks=[guard, BadGradient()]).fit(model, datamodule=data)
    assert guard.skipped == 1
    assert all(value.isfinite().all() for value in model.model.parameters())
