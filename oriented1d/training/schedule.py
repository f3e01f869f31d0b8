"""Learning rate of each optimizer step."""

from __future__ import annotations

import math
from collections.abc import Sequence

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


def warmup_poly(step: int, total_steps: int, warmup_steps: int) -> float:
    """Factor on the learning rate of optimizer step ``step``, counted from 0.

    A straight line from 1 towards 0, which it would reach one step after the last; during the warm-up a straight line
    from 1e-6 to 1 on top of it.

    Source: mmsegmentation's schedule in the original's configs (``poly`` of power 1, ``linear`` warm-up).
    """
    factor = 1 - step / total_steps
    return factor * (1 - (1 - step / warmup_steps) * (1 - 1e-6)) if step < warmup_steps else factor


def warmup_poly_scheduler(optimizer: Optimizer, total_steps: int, warmup_steps: int) -> LambdaLR:
    """Scheduler that scales the rates of all groups by :func:`warmup_poly`. Step it after each optimizer step."""
    return LambdaLR(optimizer, lambda step: max(0.0, warmup_poly(step, total_steps, warmup_steps)))


def warmup_steps_down(step: int, warmup_steps: int, milestones: Sequence[int]) -> float:
    """Factor on the learning rate of optimizer step ``step``, counted from 0: a tenth of it after each milestone, and
    during the warm-up a straight line from 0.001 to 1 on top of it.

    Source: mmdetection's schedule in the original's configs (``step`` with ``linear`` warm-up).
    """
    factor = 0.1 ** sum(step >= milestone for milestone in milestones)
    return factor * (1 - (1 - step / warmup_steps) * (1 - 1e-3)) if step < warmup_steps else factor


def warmup_steps_down_scheduler(optimizer: Optimizer, warmup_steps: int, milestones: Sequence[int]) -> LambdaLR:
    """Scheduler that scales the rates of all groups by :func:`warmup_steps_down`. Step it after each optimizer step."""
    return LambdaLR(optimizer, lambda step: warmup_steps_down(step, warmup_steps, milestones))
