"""The total batch size stays what the recipe says, whatever the number of devices."""

from __future__ import annotations

import lightning as L

from oriented1d.training.errors import UserError


def accumulation_steps(total_batch_size: int, batch_size: int, processes: int) -> int:
    """Batches to accumulate on each of ``processes`` devices for one optimizer step of ``total_batch_size`` samples.

    Raises:
        UserError: ``total_batch_size`` is no multiple of ``batch_size * processes``.
    """
    steps, rest = divmod(total_batch_size, batch_size * processes)
    if rest or not steps:
        raise UserError(
            "data.total_batch_size: expected a multiple of batch_size x devices x nodes = "
            f"{batch_size} x {processes} = {batch_size * processes}, got {total_batch_size}"
        )
    return steps


def keep_total_batch(trainer: L.Trainer, total_batch_size: int, batch_size: int, num_samples: int) -> None:
    """Make every optimizer step of ``trainer`` see exactly ``total_batch_size`` samples.

    Sets the accumulation, and leaves out the batches at the end of an epoch that would make an incomplete step (the
    original does the same). A number of batches given with ``--trainer.limit_train_batches`` is left alone.

    Raises:
        UserError: the batch sizes do not divide, or the data set is smaller than one total batch.
    """
    steps = accumulation_steps(total_batch_size, batch_size, trainer.world_size)
    if trainer.accumulate_grad_batches not in (1, steps):
        raise UserError(
            f"trainer.accumulate_grad_batches: it follows from data.total_batch_size and would be {steps}, got "
            f"{trainer.accumulate_grad_batches}; set data.total_batch_size instead"
        )
    if num_samples < total_batch_size:
        raise UserError(
            f"data.total_batch_size: expected at most the {num_samples} training samples, got {total_batch_size}"
        )
    trainer.accumulate_grad_batches = steps
    if trainer.limit_train_batches == 1.0 and isinstance(trainer.limit_train_batches, float):
        trainer.limit_train_batches = num_samples // total_batch_size * steps
