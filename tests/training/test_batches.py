"""The total batch size, whatever the number of devices."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from oriented1d.training.batches import LateLoader, accumulation_steps, keep_total_batch
from oriented1d.training.errors import UserError


@pytest.mark.parametrize(
    ("batch_size", "processes", "steps"), [(128, 1, 32), (128, 8, 4), (64, 8, 8), (256, 16, 1), (512, 4, 2)]
)
def test_accumulation_keeps_4096(batch_size, processes, steps):
    assert accumulation_steps(4096, batch_size, processes) == steps


@pytest.mark.parametrize(("batch_size", "processes"), [(128, 3), (100, 8), (8192, 1)])
def test_a_total_that_does_not_divide_is_refused(batch_size, processes):
    with pytest.raises(UserError, match=rf"{batch_size} x {processes} = {batch_size * processes}, got 4096"):
        accumulation_steps(4096, batch_size, processes)


def trainer(**values) -> SimpleNamespace:
    return SimpleNamespace(**{"world_size": 8, "accumulate_grad_batches": 1, "limit_train_batches": 1.0} | values)


def test_an_epoch_has_whole_steps_only():
    eight_devices = trainer()
    keep_total_batch(eight_devices, 4096, 128, 1281167)
    assert eight_devices.accumulate_grad_batches == 4
    assert eight_devices.limit_train_batches == 312 * 4


def test_a_number_of_batches_given_by_the_user_is_kept():
    limited = trainer(limit_train_batches=1)
    keep_total_batch(limited, 4096, 128, 1281167)
    assert limited.limit_train_batches == 1


def test_accumulation_is_not_given_twice():
    with pytest.raises(UserError, match=r"trainer.accumulate_grad_batches: .* would be 4, got 2"):
        keep_total_batch(trainer(accumulate_grad_batches=2), 4096, 128, 1281167)


def test_a_data_set_smaller_than_a_step_is_refused():
    with pytest.raises(UserError, match="at most the 4095 training samples, got 4096"):
        keep_total_batch(trainer(), 4096, 128, 4095)


def test_a_late_loader_asks_for_samples_when_the_first_batch_is_wanted():
    asked = []

    class Watched:
        def __iter__(self):
            asked.append(True)
            return iter(range(6))

        def __len__(self) -> int:
            return 6

    loader = LateLoader(range(10), 2, sampler=Watched(), num_workers=1, persistent_workers=True)  # type: ignore[arg-type]
    for epoch in (1, 2):
        iterator = iter(loader)
        assert len(asked) == epoch - 1
        assert next(iterator).tolist() == [0, 1]
        assert len(asked) == epoch
        assert [batch.tolist() for batch in iterator] == [[2, 3], [4, 5]]
