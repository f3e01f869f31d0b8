"""Training on random images, and compiled training."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from oriented1d.cli import main
from oriented1d.training.callbacks import ChannelsLast, Summary

NETWORK = '{"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 16], "stem_dim": 8}'


def run(folder: Path, *further: str) -> dict[str, Any]:
    options = {
        "config": "configs/classification/speed.yaml",
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.max_epochs": 2,
        "trainer.log_every_n_steps": 1,
        "trainer.default_root_dir": folder,
        "threads": 1,
        "model.network": "convnext_atto_1d",
        "model.network_args": NETWORK,
        "model.num_classes": 5,
        "data.num_classes": 5,
        "data.image_size": 32,
        "data.batch_size": 4,
        "data.steps": 3,
    }
    assert main(["fit", *(f"--{name}={value}" for name, value in options.items()), *further]) == 0
    return torch.load(folder / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)


def test_compiled_training_gives_the_same_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    original = nn.Module.compile

    def by_eager(
        module: nn.Module, mode: str | None
    ) -> None:  # the graph is captured; Inductor would take half a minute
        assert mode is None
        compiled.append(module)
        original(module, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", by_eager)
    plain = run(tmp_path / "plain", "--model.compile=false")
    assert not compiled
    fast = run(tmp_path / "compiled", "--model.compile=true")
    assert [type(module).__name__ for module in compiled] == ["ConvNeXt"]
    assert fast["global_step"] == plain["global_step"] == 6
    assert list(fast["state_dict"]) == list(plain["state_dict"])
    for name, value in plain["state_dict"].items():
        torch.testing.assert_close(fast["state_dict"][name], value, rtol=1e-4, atol=1e-6)
    with (tmp_path / "compiled" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert all(float(row["train/images_per_second"]) > 0 for row in rows if row["train/images_per_second"])
    assert any(row["train/images_per_second"] for row in rows)


def test_without_a_bar_the_numbers_are_logged_all_the_same(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run(tmp_path, "--model.compile=false", "--trainer.enable_progress_bar=false")
    with (tmp_path / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert any(row["train/lr"] for row in rows)
    assert "epoch 2/2  train/loss" in capsys.readouterr().out


class Reads(TorchDispatchMode):
    """Counts the numbers that the host reads out of tensors."""

    number = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_a_step_reads_the_loss_of_the_step_before_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anything else would make the host wait for a GPU."""
    reads = Reads()
    read: list[int] = []

    def start(self: Summary, trainer: L.Trainer, *args: Any) -> None:
        read.append(reads.number)

    monkeypatch.setattr(Summary, "on_train_batch_start", start)
    with reads:
        run(tmp_path, "--model.compile=false", "--model.optimizer=sgd", "--trainer.log_every_n_steps=1000")
    assert len(read) == 6
    assert read[2] - read[1] == read[5] - read[4] == 1


def test_random_images_are_for_fit(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run(tmp_path, "--model.compile=false")
    checkpoint = tmp_path / "version_0" / "checkpoints" / "last.ckpt"
    options = ["--trainer.accelerator=cpu", "--model.network=convnext_atto_1d", f"--model.network_args={NETWORK}"]
    options += ["--model.num_classes=5", f"--ckpt_path={checkpoint}", "--trainer.precision=32-true"]
    assert main(["validate", "--config=configs/classification/speed.yaml", *options]) == 1
    assert "data: random images are for oriented1d fit alone" in capsys.readouterr().err


def test_cuda_graphs_are_not_for_accumulated_gradients(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(AssertionError):
        run(tmp_path, "--model.compile=reduce-overhead", "--trainer.accumulate_grad_batches=2")
    error = "trainer.accumulate_grad_batches: expected 1 with the CUDA graphs of --model.compile reduce-overhead, got 2"
    assert error in capsys.readouterr().err


@pytest.mark.gpu
def test_training_with_cuda_graphs_gives_the_same_checkpoint(tmp_path: Path) -> None:
    # AdamW takes a whole step where a gradient is nothing but rounding errors; this optimizer does not.
    # And recorded steps draw other random numbers.
    options = ["--trainer.accelerator=gpu", "--trainer.devices=1", "--model.drop_path_rate=0"]
    options += ["--model.optimizer=sgd", "--model.lr=0.05"]
    plain = run(tmp_path / "plain", *options, "--model.compile=false")
    fast = run(tmp_path / "graphs", *options, "--model.compile=reduce-overhead")
    for name, value in plain["state_dict"].items():
        torch.testing.assert_close(fast["state_dict"][name], value, rtol=1e-3, atol=1e-5, msg=name)
    weight = "stages.3.0.pwconv2.weight"  # the moving average is still where the weights began
    assert (plain["state_dict"][f"model.{weight}"] - plain["state_dict"][f"ema.module.{weight}"]).abs().max() > 1e-3


@pytest.mark.gpu
def test_weights_are_channels_last_on_a_gpu() -> None:
    class Net(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            y = self.conv(batch)
            self.followed = y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous()
            return y.square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    trainer = L.Trainer(
        accelerator="gpu", devices=1, max_steps=1, callbacks=[ChannelsLast()], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    model = Net()
    trainer.fit(model, DataLoader(torch.randn(2, 8, 16, 16), batch_size=2))
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert model.followed
