"""Learning rate of each optimizer step."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warmup_cosine(step: int, total_steps: int, warmup_steps: int, lr: float, final_lr: float) -> float:
    """Learning rate of optimizer step ``step``, counted from 0.

    The warm-up is ``numpy.linspace(0, lr, warmup_steps)``: its first step has rate 0 and its last one ``lr``. Half a
    cosine follows, from ``lr`` towards ``final_lr``, which it would reach one step after the last.

    Source: ``cosine_scheduler`` of ConvNeXt's training code, which the original uses.
    """
    if step < warmup_steps:
        return lr * step / (warmup_steps - 1) if warmup_steps > 1 else 0.0
    if step >= total_steps:
        return final_lr
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return final_lr + 0.5 * (lr - final_lr) * (1.0 + math.cos(math.pi * progress))


def warmup_cosine_scheduler(
    optimizer: Optimizer, total_steps: int, warmup_steps: int, lr: float, final_lr: float
) -> LambdaLR:
    """Scheduler that scales the rates of all groups alike, as :func:`warmup_cosine` scales ``lr``. Step it after each
    optimizer step."""
    return LambdaLR(optimizer, lambda step: warmup_cosine(step, total_steps, warmup_steps, lr, final_lr) / lr)
