"""Several processes make the step that one makes with the same images."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from oriented1d.classification import ImageClassifier, ImageData
from oriented1d.classification.module import _average
from oriented1d.cli import main
from oriented1d.layers import OrientedConv1d
from oriented1d.segmentation import SegmentationData, SemanticSegmenter
from oriented1d.training.callbacks import LeanDDP
from oriented1d.training.sharding import shard
from tests.classification.conftest import write_images
from tests.segmentation.conftest import mosaic

__all__ = ["mosaic"]  # a fixture

NETWORK = {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 16], "stem_dim": 8, "layer_scale_init_value": 1.0}


class Recorder(L.Callback):
    """Writes the gradients of the first step, all weights after the last one, and those of each process; and how often
    the angles of oriented layers were written meanwhile."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.gradients: dict[str, Tensor] = {}

    @staticmethod
    def _versions(module: nn.Module) -> int:
        return sum(layer.theta._version for layer in module.modules() if isinstance(layer, OrientedConv1d))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.versions = self._versions(pl_module.model)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if not self.gradients:
            self.gradients = {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        values = torch.cat([value.double().flatten() for value in pl_module.state_dict().values()])
        of_each = trainer.strategy.all_gather(values).reshape(trainer.world_size, -1)
        written = torch.tensor(self._versions(pl_module.model) - self.versions, device=pl_module.device)
        written = trainer.strategy.all_gather(written).flatten()
        if trainer.is_global_zero:
            parts = {"gradients": self.gradients, "state": pl_module.state_dict(), "of_each": of_each}
            parts["angles_written"] = [int(number) for number in written]
            torch.save(parts, self.file)


def train(task: str, root: str, devices: int, accelerator: str, file: Path) -> None:
    """Three steps on ``devices`` processes. Each step has all training images, in some order, without augmentation."""
    L.seed_everything(0)
    model: L.LightningModule
    data: L.LightningDataModule
    if task == "classification":
        options: dict[str, Any] = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "hflip": 0.0, "color_jitter": 0.0}
        options |= {"erasing": 0.0, "auto_augment": None, "num_workers": 0}
        data = ImageData(root, image_size=32, batch_size=48 // devices, total_batch_size=48, **options)
        plain = {"mixup": 0.0, "cutmix": 0.0, "drop_path_rate": 0.0, "ema_decay": 0.7, "warmup_epochs": 0}
        model = ImageClassifier("convnext_atto_1d", NETWORK, 3, **plain)
    else:
        size = {"scale": (80, 72), "ratios": (1.0, 1.0), "crop": 48, "most_of_a_class": 1.0, "num_workers": 0}
        data = SegmentationData(root, 3, batch_size=24 // devices, total_batch_size=24, **size)
        model = SemanticSegmenter("convnext_atto_1d", NETWORK, 3, 0.0, 16, 16, warmup_steps=1)
        for module in model.modules():
            if isinstance(module, nn.Dropout2d):
                module.p = 0.0
    trainer = L.Trainer(
        accelerator=accelerator,
        devices=devices,
        strategy="ddp_fork" if devices > 1 else "auto",
        sync_batchnorm=accelerator == "gpu",
        max_steps=3,
        callbacks=[Recorder(file), LeanDDP()],
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)


def run(task: str, root: Path, devices: list[int], accelerator: str, folder: Path) -> list[dict[str, Any]]:
    """What :class:`Recorder` wrote with each number of devices. Runs in a process of its own, which forks: numba's and
    CUDA's threads must not have started."""
    names = [str(number) for number in devices]
    command = [sys.executable, "-m", __name__, task, str(root), accelerator, str(folder), *names]
    subprocess.run(command, check=True, timeout=300)
    return [torch.load(folder / f"{number}.pt", weights_only=True, map_location="cpu") for number in devices]


def assert_equal_gradients(several: dict[str, Any], one: dict[str, Any], rounding: float = 0.0) -> None:
    """Each within 1e-5 of its norm, or of ``rounding`` times the norm of all where that is more."""
    assert several["gradients"].keys() == one["gradients"].keys()
    assert len(one["gradients"]) > 30
    least = rounding * torch.cat([gradient.flatten() for gradient in one["gradients"].values()]).norm()
    for name, gradient in one["gradients"].items():
        difference = (several["gradients"][name] - gradient).norm() / gradient.norm().clamp(min=least)
        assert difference < 1e-5, (name, float(difference), float(gradient.norm()))


def test_gradients_and_average_on_2_and_4_processes(tmp_path: Path) -> None:
    write_images(tmp_path / "train", 16, seed=1)
    write_images(tmp_path / "val", 1, seed=2)
    four, two, one = run("classification", tmp_path, [4, 2, 1], "cpu", tmp_path)
    for several, number in ((two, 2), (four, 4)):
        assert_equal_gradients(several, one)
        assert several["of_each"].shape[0] == number
        assert several["angles_written"] == [0] * number  # DDP leaves them alone
        assert all(torch.equal(values, several["of_each"][0]) for values in several["of_each"])
        averages = [name for name in one["state"] if name.startswith("ema.")]
        assert len(averages) > 30
        for name in averages:
            torch.testing.assert_close(several["state"][name], one["state"][name], rtol=0, atol=2e-3)
    start = one["state"]["model.head.weight"]
    assert not torch.equal(start, one["state"]["ema.module.head.weight"])


def test_sharded_weights_are_those_of_one_process(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Two processes with FSDP write the checkpoint that one without writes: weights, average, groups and moments.

    The network is one without oriented layers: numba's view of a weight keeps FSDP from freeing it on the CPU.
    """
    write_images(tmp_path / "train", 16, seed=1)
    write_images(tmp_path / "val", 4, seed=2)
    settings = {
        "threads": 1,
        "trainer.accelerator": "cpu",
        "trainer.max_epochs": 3,
        "trainer.gradient_clip_val": 0.5,
        "trainer.num_sanity_val_steps": 0,
        "bad_loss.skip": 1,
        "model": "oriented1d.classification.ImageClassifier",
        "model.network": "convnext_atto_2d",
        "model.network_args": '{"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 16]}',
        "model.num_classes": 3,
        "model.drop_path_rate": 0,
        "model.mixup": 0,
        "model.cutmix": 0,
        "model.layer_decay": 0.8,
        "model.warmup_epochs": 1,
        "model.ema_decay": 0.7,
        "data": "oriented1d.classification.ImageData",
        "data.root": tmp_path,
        "data.image_size": 32,
        "data.total_batch_size": 48,
        "data.num_workers": 0,
        "data.scale": "[1, 1]",
        "data.ratio": "[1, 1]",
        "data.hflip": 0,
        "data.color_jitter": 0,
        "data.auto_augment": "null",
        "data.erasing": 0,
    }
    options = [f"--{key}={value}" for key, value in settings.items()]
    several = [*options, "--trainer.devices=2", "--trainer.strategy=fsdp", "--data.batch_size=24"]
    command = [sys.executable, "-m", "oriented1d.cli", "fit", *several, f"--trainer.default_root_dir={tmp_path}/two"]
    subprocess.run(command, check=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert main(["fit", *options, "--data.batch_size=48", f"--trainer.default_root_dir={tmp_path}/one"]) == 0
    two, one = (
        torch.load(tmp_path / name / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)
        for name in ("two", "one")
    )
    assert two["global_step"] == one["global_step"] == 3
    assert two["state_dict"].keys() == one["state_dict"].keys()
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], value, rtol=1e-4, atol=2e-5)
    groups, expected = [by_group(end["optimizer_states"][0]) for end in (two, one)]
    assert groups.keys() == expected.keys()
    for name, (decay, moments) in expected.items():
        assert groups[name][0] == decay
        for moment, other in zip(groups[name][1], moments, strict=True):
            torch.testing.assert_close(moment, other, rtol=1e-3, atol=1e-6)
    assert main(["fit", *several, "--model=oriented1d.segmentation.SemanticSegmenter"]) == 1
    assert "trainer.strategy: expected ddp, got fsdp" in capsys.readouterr().err


def test_moving_average_of_sharded_weights_and_whole_buffers(tmp_path: Path) -> None:
    """Angles of oriented layers, like the statistics here, are not sharded."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", world_size=1, rank=0)
    try:
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        ema = _average(model, 0.75, sharded=True)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        mesh = init_device_mesh("cpu", (1,))
        for network in (model, ema.module):
            shard(network, mesh)
        with torch.no_grad():
            for value in model.state_dict().values():
                value.add_(2)
        ema.update(model)
        for name, value in ema.module.state_dict().items():
            value = value.full_tensor() if isinstance(value, DTensor) else value
            moved = 2 if name.endswith("num_batches_tracked") else 0.5
            torch.testing.assert_close(value, before[name] + moved, msg=name)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_compiled_network_sends_its_gradients_at_once(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []

    def ddp(model: nn.Module, **options: Any) -> nn.Module:
        made.append(options)
        return model

    ddp._set_params_and_buffers_to_ignore_for_model = lambda *_: None  # type: ignore[attr-defined]
    monkeypatch.setattr("oriented1d.training.callbacks.DistributedDataParallel", ddp)
    strategy = DDPStrategy(static_graph=True)
    monkeypatch.setattr(strategy, "determine_ddp_device_ids", lambda: None)
    module = L.LightningModule()
    module.compiled = compiled  # type: ignore[assignment]
    LeanDDP().setup(SimpleNamespace(strategy=strategy), module, "fit")  # type: ignore[arg-type]
    strategy._setup_model(module)
    size = {"bucket_cap_mb": 1000} if compiled else {}
    assert made == [{"device_ids": None, "gradient_as_bucket_view": True, "static_graph": True, **size}]


def by_group(optimizer: dict[str, Any]) -> dict[str, tuple[float, list[Tensor]]]:
    """Weight decay and first moments of each group."""
    moments = {number: state["exp_avg"] for number, state in optimizer["state"].items()}
    groups = optimizer["param_groups"]
    return {g["name"]: (g["weight_decay"], [moments[number] for number in g["params"]]) for g in groups}


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_synchronised_batch_norm_on_2_gpus(mosaic: Path, tmp_path: Path) -> None:
    """UPerNet's gradients on two devices are those of one with the same crops, and so are the running statistics."""
    (two,) = run("segmentation", mosaic, [2], "gpu", tmp_path)
    (one,) = run("segmentation", mosaic, [1], "gpu", tmp_path)
    # Where batch norm takes a bias away again, the gradient is nothing but rounding errors.
    assert_equal_gradients(two, one, rounding=1e-4)
    statistics = [name for name in one["state"] if name.endswith("running_var")]
    assert len(statistics) > 10
    for name in statistics:
        torch.testing.assert_close(two["state"][name], one["state"][name], rtol=1e-3, atol=1e-5)
    assert torch.equal(*two["of_each"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    _task, _root, _accelerator, _folder, *_devices = sys.argv[1:]
    for _number in _devices:
        train(_task, _root, int(_number), _accelerator, Path(_folder) / f"{_number}.pt")
