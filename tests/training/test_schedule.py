"""Learning rates of single steps, computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from oriented1d.training.schedule import warmup_cosine


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.0),  # linspace(0, 4e-3, 5): 0, 1, 2, 3, 4
        (1, 1e-3),
        (3, 3e-3),
        (4, 4e-3),
        (5, 4e-3),  # the cosine starts at its top
        (10, 1e-6 + (4e-3 - 1e-6) * 0.5),  # half of its 10 steps
        (14, 1e-6 + (4e-3 - 1e-6) * 0.5 * (1 + math.cos(0.9 * math.pi))),  # the last step
        (15, 1e-6),
        (100, 1e-6),
    ],
)
def test_warmup_cosine(step, expected):
    assert warmup_cosine(step, total_steps=15, warmup_steps=5, lr=4e-3, final_lr=1e-6) == pytest.approx(expected, 1e-12)


def test_the_recipe_on_imagenet():
    """312 steps of 4096 images an epoch, 300 epochs, 20 of them warm-up."""
    steps = 1281167 // 4096
    rates = [warmup_cosine(step, 300 * steps, 20 * steps, 4e-3, 1e-6) for step in range(300 * steps)]
    assert steps == 312
    np.testing.assert_allclose(rates[: 20 * steps], np.linspace(0, 4e-3, 20 * steps), rtol=1e-12)
    assert rates[160 * steps] == pytest.approx((4e-3 + 1e-6) / 2, rel=1e-9)
    assert rates[-1] == pytest.approx(1e-6, rel=1e-3)
    assert np.argmax(rates) == 20 * steps - 1


def test_without_warmup():
    assert warmup_cosine(0, 10, 0, 1.0, 0.0) == 1.0
    assert warmup_cosine(5, 10, 0, 1.0, 0.0) == pytest.approx(0.5)
