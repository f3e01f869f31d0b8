"""What every run does beside training: progress, checkpoints, a guard against bad losses, a figure, a summary."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from torch import Tensor, nn

from oriented1d.layers import OrientedConv1d
from oriented1d.training.errors import UserError


def duration(seconds: float) -> str:
    """``h:mm:ss``, or ``m:ss`` under an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def run_folder(trainer: L.Trainer) -> Path | None:
    """Folder that this run writes into; None without a logger, and on all processes but the first."""
    if not trainer.is_global_zero or not trainer.loggers:
        return None
    # Trainer.log_dir would wait for the other processes.
    return Path(trainer.loggers[0].log_dir or trainer.default_root_dir)


def last_checkpoint(trainer: L.Trainer) -> str:
    """The newest checkpoint that this run wrote, or went on from."""
    saved = [str(c.best_model_path) for c in trainer.checkpoint_callbacks if isinstance(c, LastCheckpoint)]
    return str(next(filter(None, [*saved, trainer.ckpt_path]), "none, nothing was saved yet"))


class LastCheckpoint(ModelCheckpoint):
    """Keeps ``last.ckpt``, written after each epoch."""

    def __init__(self) -> None:
        super().__init__(filename="last")


class BestCheckpoint(ModelCheckpoint):
    """Keeps ``{filename}.ckpt`` of the epoch with the highest ``monitor``."""

    def __init__(self, monitor: str, filename: str) -> None:
        super().__init__(monitor=monitor, filename=filename, mode="max")


class RandomStates(Callback):
    """Keeps the states of the random numbers in checkpoints, so that a run that is taken up again draws what an
    uninterrupted one would (dropout, drop path)."""

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return {"torch": torch.get_rng_state(), "cuda": cuda}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict

    def on_train_batch_start(self, *args: Any) -> None:
        if self._loaded is None:
            return
        torch.set_rng_state(self._loaded["torch"].cpu())
        if len(self._loaded["cuda"]) == torch.cuda.device_count() > 0:
            torch.cuda.set_rng_state_all([state.cpu() for state in self._loaded["cuda"]])
        self._loaded = None


class Progress(TQDMProgressBar):
    """Lightning's bar with images/s and the time left of the whole run, and one line for each epoch.

    The bar shows in terminals only; the lines go into log files as well. The data module tells the images of a batch
    with ``batch_size``.
    """

    def __init__(self) -> None:
        # Each refresh shows the loss, for which the host waits for the device.
        super().__init__(refresh_rate=10 if sys.stdout.isatty() else 0)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._images_per_batch: int = trainer.datamodule.batch_size * trainer.world_size  # type: ignore[attr-defined]

    def on_train_start(self, trainer: L.Trainer, *args: Any) -> None:
        super().on_train_start(trainer, *args)
        self._first_step = trainer.global_step
        self._train_start = time.monotonic()
        self._start_epoch()  # one that goes on in the middle does not start

    def on_train_epoch_start(self, trainer: L.Trainer, *args: Any) -> None:
        super().on_train_epoch_start(trainer, *args)
        self._start_epoch()

    def _start_epoch(self) -> None:
        self._epoch_start = time.monotonic()
        self._batches = 0
        self._images_per_second = math.nan

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self._batches += 1
        self._images_per_second = self._batches * self._images_per_batch / (time.monotonic() - self._epoch_start)
        super().on_train_batch_end(trainer, *args)

    def _time_left(self, trainer: L.Trainer) -> str:
        done = trainer.global_step - self._first_step
        left = trainer.estimated_stepping_batches - trainer.global_step
        if done == 0 or math.isinf(left):
            return "?"
        return duration((time.monotonic() - self._train_start) / done * left)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        metrics: dict[str, Any] = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        if trainer.training and trainer.state.fn == "fit":
            metrics |= {"images/s": f"{self._images_per_second:.0f}", "left": self._time_left(trainer)}
        return metrics

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        pl_module.log("train/images_per_second", self._images_per_second, rank_zero_only=True)
        if not trainer.is_global_zero:
            return
        metrics = "  ".join(f"{name} {float(value):.4g}" for name, value in trainer.progress_bar_metrics.items())
        of = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        if trainer.max_epochs == -1:  # the run is measured in steps
            of = f"step {trainer.global_step}/{trainer.max_steps}"
        line = f"{of}  {metrics}  {self._images_per_second:.0f} images/s  {self._time_left(trainer)} left"
        if self.is_enabled:
            self.print(line)
        else:
            print(line, flush=True)


class StopAtBadLoss(Callback):
    """Stops the run when a loss is nan or infinite, before a checkpoint is written with such weights.

    The loss of a step is looked at after the next step was launched, so that the host does not wait for the device.
    """

    def __init__(self) -> None:
        self._pending: tuple[int, int, float, Tensor, torch.cuda.Event | None] | None = None

    def _check(self, trainer: L.Trainer) -> None:
        if self._pending is None:
            return
        step, epoch, lr, loss, copied = self._pending
        self._pending = None
        if copied is not None:
            copied.synchronize()
        if not math.isfinite(float(loss)):
            self._stop(trainer, f"the loss is {float(loss)} at step {step} (epoch {epoch}), learning rate {lr:.3g}")

    def _stop(self, trainer: L.Trainer, what: str) -> NoReturn:
        raise UserError(f"{what}; last good checkpoint: {last_checkpoint(trainer)}")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # At the end of the batch these are already those of the next step.
        self._step = (trainer.global_step, trainer.current_epoch, self._rate(trainer))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._check(trainer)
        loss: Tensor = (outputs["loss"] if isinstance(outputs, Mapping) else outputs).detach()
        copied = None
        if loss.is_cuda:
            loss = loss.to("cpu", non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self._pending = (*self._step, loss, copied)

    @staticmethod
    def _rate(trainer: L.Trainer) -> float:
        return max(group["lr"] for group in trainer.optimizers[0].param_groups)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._check(trainer)
        # The last steps of an epoch may have spoilt the weights after their own loss was computed.
        for name, value in trainer.callback_metrics.items():
            if "loss" in name and not math.isfinite(float(value)):
                where = f"step {trainer.global_step} (epoch {trainer.current_epoch})"
                self._stop(trainer, f"{name} is {float(value)} at {where}, learning rate {self._rate(trainer):.3g}")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._check(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._check(trainer)


class KernelFigure(Callback):
    """Draws the learned kernels along their directions, at the end of the run, into ``kernels.png`` of its folder.

    The network is the module's ``model``; nothing is drawn of one without oriented layers.
    """

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder, model = run_folder(trainer), pl_module.model
        assert isinstance(model, nn.Module)
        if folder is not None and any(isinstance(module, OrientedConv1d) for module in model.modules()):
            from oriented1d.analysis.draw import draw_kernels

            draw_kernels(model, folder / "kernels.png")


class Summary(Callback):
    """Says at the start of a run what is trained on what; at the end how long it took, how good it was, and where
    everything lies."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start = time.monotonic()
        self._first_step = trainer.global_step
        folder = run_folder(trainer)
        if folder is None:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        parameters = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        print(
            f"{parameters:,} parameters on {trainer.world_size} x {trainer.strategy.root_device.type} "
            f"({trainer.precision}); a step is {data.batch_size} x {trainer.world_size} x "
            f"{trainer.accumulate_grad_batches} images; writing to {_short(folder)}",
            flush=True,
        )

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt) and trainer.is_global_zero and trainer.state.fn == "fit":
            print(f"\nInterrupted at step {trainer.global_step}; last checkpoint: {last_checkpoint(trainer)}")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = run_folder(trainer)
        if folder is None:
            return
        seconds = time.monotonic() - self._start
        print(
            f"\nTrained {trainer.current_epoch} epochs, {trainer.global_step} steps "
            f"({trainer.global_step - self._first_step} in this run, {duration(seconds)})"
        )
        for checkpoint in trainer.checkpoint_callbacks:
            if isinstance(checkpoint, ModelCheckpoint) and checkpoint.best_model_path:
                score = checkpoint.best_model_score
                what = f"best {checkpoint.monitor} {float(score):.4f}" if score is not None else "last epoch"
                print(f"  {what:<28} {_short(checkpoint.best_model_path)}")
        for what, name in [("metrics", "metrics.csv"), ("configuration", "config.yaml"), ("kernels", "kernels.png")]:
            if (folder / name).exists():
                print(f"  {what:<28} {_short(folder / name)}")
        print(f"  {'curves':<28} tensorboard --logdir {_short(folder)}")


def _short(path: str | Path) -> Path:
    """``path`` relative to the working folder where it lies inside."""
    path = Path(path)
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
