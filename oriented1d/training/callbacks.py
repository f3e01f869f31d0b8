"""What every run does beside training: progress, checkpoints, a guard against bad losses, a figure, a summary."""

from __future__ import annotations

import math
import random
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from oriented1d.layers import OrientedConv1d, angle_buffers
from oriented1d.training.errors import UserError
from oriented1d.training.sharding import FullySharded


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


def last_checkpoint(trainer: L.Trainer) -> Path | None:
    """The newest checkpoint that this run wrote, or went on from."""
    saved = [c.best_model_path for c in trainer.checkpoint_callbacks if isinstance(c, LastCheckpoint)]
    return next((Path(file) for file in [*saved, trainer.ckpt_path] if file and Path(file).is_file()), None)


def _last_good(trainer: L.Trainer) -> str:
    return f"last good checkpoint: {last_checkpoint(trainer) or 'none, nothing was saved yet'}"


def stop(trainer: L.Trainer, message: str) -> NoReturn:
    """End the run on all processes, which call this at the same step; the first one says why.

    Raises:
        UserError: on the first process, with ``message``.
        SystemExit: on the others.
    """
    if trainer.is_global_zero:
        raise UserError(message)
    raise SystemExit(_exit_code(trainer, 1))


def _exit_code(trainer: L.Trainer, code: int) -> int:
    """``code``, or 0 in a process that Lightning started: it would kill the first one as soon as another failed."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return 0 if isinstance(environment, LightningEnvironment) and trainer.local_rank > 0 else code


def learning_rate(trainer: L.Trainer) -> float:
    """The highest of all groups."""
    return max(group["lr"] for group in trainer.optimizers[0].param_groups)


def read_later(trainer: L.Trainer, value: Tensor, op: dist.ReduceOp.RedOpType) -> Callable[[], float]:
    """Start to reduce a number over all processes and to copy it to the host.

    Returns:
        function that gives the reduced number, and waits for it if it has not arrived.
    """
    if trainer.world_size > 1:
        dist.all_reduce(value, op)
    if not value.is_cuda:
        return value.item
    copy, copied = value.to("cpu", non_blocking=True), torch.cuda.Event()
    copied.record()

    def read() -> float:
        copied.synchronize()
        return copy.item()

    return read


class _Checkpoint(ModelCheckpoint):
    """Keeps one file, which the next one replaces. Where it cannot be written, all processes stop."""

    def __init__(self, **options: Any) -> None:
        super().__init__(enable_version_counter=False, **options)

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        failure: UserError | None = None
        try:
            super()._save_checkpoint(trainer, filepath)
        except UserError as error:  # of the process that writes; the others wait
            failure = error
            trainer.strategy.barrier()
        failed = trainer.strategy.broadcast(str(failure) if failure is not None else None)
        if failed is not None:
            stop(trainer, f"{failed}; {_last_good(trainer)}")


class LastCheckpoint(_Checkpoint):
    """Keeps ``last.ckpt``: written after each validation or epoch, in between, and when the process is told to end.

    SIGTERM, which clusters send before they take a machine away, lets the step end, writes the checkpoint and ends the
    run with exit code 143. During a validation, and in the last step before one, it waits for the validation.

    Args:
        minutes: time between checkpoints; None is after validations or epochs only.
        steps: optimizer steps between checkpoints, beside ``minutes``.
    """

    def __init__(self, minutes: float | None = 15, steps: int | None = None) -> None:
        super().__init__(filename="last")
        self.minutes = minutes
        self.steps = steps
        self._told = self._leave = False
        self._wish: Callable[[], float] = lambda: 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._saved_at = time.monotonic()
        # Lightning's handler talks to the other processes at once, in the middle of whatever they do, and its loop asks
        # them before each step, for which the host waits for the device.
        signal.signal(signal.SIGTERM, self._on_sigterm)
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def _on_sigterm(self, *args: Any) -> None:
        self._told = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loop = trainer.fit_loop.epoch_loop
        if loop._should_accumulate():
            return
        due = self.minutes is not None and time.monotonic() - self._saved_at >= 60 * self.minutes
        # 2 leaves, 1 saves. Of other processes it is known one step later.
        wish = 2.0 if self._told else float(due and trainer.is_global_zero)
        if trainer.world_size > 1:
            before = self._wish()
            self._wish = read_later(trainer, torch.full((), wish, device=pl_module.device), dist.ReduceOp.MAX)
            wish = before
        self._leave |= wish == 2
        if loop._num_ready_batches_reached() or loop._should_check_val_fx(trainer.fit_loop._data_fetcher):  # type: ignore[arg-type]
            return  # saved after the validation or the epoch: Lightning would not make them up
        due = bool(self._leave or wish or (self.steps is not None and trainer.global_step % self.steps == 0))
        if due and not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self._end_if_told(trainer)  # not before, so that the metrics of the step before are logged

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        self._saved_at = time.monotonic()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        self._end_if_told(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        self._end_if_told(trainer)

    def _end_if_told(self, trainer: L.Trainer) -> None:
        if not self._leave or self._last_global_step_saved != trainer.global_step:
            return
        if trainer.is_global_zero:
            print(
                f"SIGTERM at step {trainer.global_step}: saved {_short(self.best_model_path)}; "
                "the same command goes on from there",
                file=sys.stderr,
                flush=True,
            )
        raise SystemExit(_exit_code(trainer, 128 + signal.SIGTERM))


class BestCheckpoint(_Checkpoint):
    """Keeps ``{filename}.ckpt`` of the epoch with the highest ``monitor``."""

    def __init__(self, monitor: str, filename: str) -> None:
        super().__init__(monitor=monitor, filename=filename, mode="max")


class RandomStates(Callback):
    """Gives each process random numbers of its own for training, and keeps their states in checkpoints: a run that is
    taken up again draws what an uninterrupted one would (mixup, dropout, drop path)."""

    def __init__(self) -> None:
        self._loaded: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        generator: Any = np.random.get_state(legacy=False)  # noqa: NPY002
        state = {
            "python": random.getstate(),
            "numpy": {**generator, "state": {**generator["state"], "key": generator["state"]["key"].tolist()}},
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        }
        states = [state]
        if dist.is_initialized():
            states = [{} for _ in range(dist.get_world_size())]
            dist.all_gather_object(states, state)
        return {"processes": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict.get("processes", [])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if len(self._loaded) == trainer.world_size:
            self._restore(self._loaded[trainer.global_rank])
        elif self._loaded or trainer.global_rank > 0:
            if self._loaded and trainer.is_global_zero:
                print(
                    f"the checkpoint has the random states of {len(self._loaded)} processes, there are "
                    f"{trainer.world_size}: they start anew"
                )
            # The networks were made with the same seed everywhere.
            seed = torch.initial_seed() + trainer.global_step * trainer.world_size + trainer.global_rank
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002 - timm's mixup draws from numpy's global generator
            torch.manual_seed(seed)
        self._loaded = []

    @staticmethod
    def _restore(state: dict[str, Any]) -> None:
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])  # noqa: NPY002
        torch.set_rng_state(state["torch"].cpu())
        if state["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"].cpu())


class Progress(TQDMProgressBar):
    """Lightning's bar with images/s and the time left of the whole run, one line for each epoch, and the learning rate.

    The bar shows in terminals only; the lines go into log files as well. The data module tells the images of a batch
    with ``batch_size``.

    Args:
        bar: show the bar; the lines come in any case.
    """

    def __init__(self, bar: bool = True) -> None:
        # Each refresh shows the loss, for which the host waits for the device.
        super().__init__(refresh_rate=10 if bar and sys.stdout.isatty() else 0)

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

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        super().on_train_batch_start(trainer, pl_module, *args)
        # A number would be copied to the device, and the host would wait until that has done all before.
        pl_module.log("train/lr", torch.tensor(learning_rate(trainer)))

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
            metrics |= {name: f"{loss:.4g}" for name, loss in self._loss(trainer).items()}
            metrics |= {"images/s": f"{self._images_per_second:.0f}", "left": self._time_left(trainer)}
        return metrics

    @staticmethod
    def _loss(trainer: L.Trainer) -> dict[str, float]:
        # Not logged for the bar: Lightning would read it from the device after each step, and the host wait for it.
        loss = trainer.callback_metrics.get("train/loss")
        return {} if loss is None else {"train/loss": float(loss)}

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if not self._batches:
            return  # the epoch was over when the run was stopped
        pl_module.log("train/images_per_second", self._images_per_second, rank_zero_only=True)
        if not trainer.is_global_zero:
            return
        values = self._loss(trainer) | trainer.progress_bar_metrics
        metrics = "  ".join(f"{name} {float(value):.4g}" for name, value in values.items())
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

    The loss of a step is looked at after the next step was launched, so that the host does not wait for the device. On
    several processes all of them stop at the same step.

    Args:
        skip: optimizer steps with a bad loss, or with gradients that are not finite, to leave out before the run stops.
            Weights, moments of the optimizer and gradients stay as if there had been no such step; the schedule goes
            on. To know before the step, the host waits for the device. Steps that float16's loss scaling leaves out do
            not count.
    """

    def __init__(self, skip: int = 0) -> None:
        self.skip = skip
        self.skipped = 0
        self._losses: list[Tensor] = []
        self._pending: tuple[int, int, float, Callable[[], float]] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]

    def _check(self, trainer: L.Trainer) -> None:
        if self._pending is None:
            return
        step, epoch, lr, read = self._pending
        self._pending = None
        loss = read()
        if not math.isfinite(loss):
            self._stop(trainer, f"the loss is {loss} at step {step} (epoch {epoch}), learning rate {lr:.3g}")

    def _stop(self, trainer: L.Trainer, what: str) -> NoReturn:
        stop(trainer, f"{what}; {_last_good(trainer)}")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # At the end of the batch these are already those of the next step.
        self._step = (trainer.global_step, trainer.current_epoch, learning_rate(trainer))

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        if self.skip:
            self._losses.append(loss.detach())

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if not self.skip:
            return
        numbers, self._losses = self._losses, []
        if getattr(trainer.precision_plugin, "scaler", None) is None:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            norm = nn.utils.get_total_norm(gradients)
            numbers.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        bad = (~torch.stack([number.float() for number in numbers]).isfinite()).any().float()
        if not read_later(trainer, bad, dist.ReduceOp.MAX)():
            return
        optimizer.zero_grad(set_to_none=True)  # optimizers leave alone what has no gradient
        self.skipped += 1
        step, epoch, lr = self._step
        what = f"the loss or its gradients are not finite at step {step} (epoch {epoch}), learning rate {lr:.3g}"
        if self.skipped > self.skip:
            self._stop(trainer, f"{what}, after {self.skip} skipped steps")
        if trainer.is_global_zero:
            print(f"\n{what}: skipped, {self.skipped} of at most {self.skip}", file=sys.stderr, flush=True)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._check(trainer)
        if self.skip:
            pl_module.log("train/skipped_steps", float(self.skipped))
            return
        loss: Tensor = (outputs["loss"] if isinstance(outputs, Mapping) else outputs).detach().float()
        # A sum is not finite where one of its parts is not.
        self._pending = (*self._step, read_later(trainer, loss.clone(), dist.ReduceOp.SUM))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._check(trainer)
        # The last steps of an epoch may have spoilt the weights after their own loss was computed.
        for name, value in trainer.callback_metrics.items():
            if name.startswith("val/") and "loss" in name and not math.isfinite(float(value)):
                where = f"step {trainer.global_step} (epoch {trainer.current_epoch})"
                self._stop(trainer, f"{name} is {float(value)} at {where}, learning rate {learning_rate(trainer):.3g}")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._check(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._check(trainer)


class ChannelsLast(Callback):
    """Weights of convolutions in channels_last on a GPU, where 16-bit convolutions are fastest; images follow them."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # FSDP shards contiguous weights only.
        if trainer.strategy.root_device.type == "cuda" and not isinstance(trainer.strategy, FullySharded):
            pl_module.to(memory_format=torch.channels_last)


class LeanDDP(Callback):
    """Keeps DDP from four things that cost time.

    It would send the angles of oriented layers, which never change, to all processes before each step, and a layer
    whose angles were written reads them back. It would copy each gradient back from where they are averaged together.
    It would average the gradients of a compiled network in several messages, to begin before the backward pass ends:
    but they are all there at once. And Lightning lets it sum up gradients in a side stream, for captured steps, so that
    each of them waits for the stream of the backward pass.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(pl_module, angle_buffers(pl_module))
        strategy = trainer.strategy
        if isinstance(strategy, DDPStrategy):

            def wrapped(model: nn.Module) -> DistributedDataParallel:
                options: dict[str, Any] = {"gradient_as_bucket_view": True}
                if getattr(pl_module, "compiled", False):
                    options["bucket_cap_mb"] = 1000
                options |= strategy._ddp_kwargs
                return DistributedDataParallel(model, device_ids=strategy.determine_ddp_device_ids(), **options)

            strategy._setup_model = wrapped  # type: ignore[method-assign]


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
            checkpoint = last_checkpoint(trainer)
            print(
                f"\nInterrupted at step {trainer.global_step}; last checkpoint: "
                + (f"{_short(checkpoint)}, the same command goes on from there" if checkpoint else "none")
            )

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
