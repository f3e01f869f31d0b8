"""Which samples make a step: the same ones whatever the number of devices, and after a restart."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

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


def expect_parts_of_epochs() -> None:
    """Let Lightning not warn of loaders that go on in the middle of an epoch, where the run stopped."""
    warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch")


class EpochSampler(DistributedSampler):
    """Samples of one process, shuffled, numbered ``epoch * len(dataset) + index``.

    The number tells a data set the epoch: workers live on from epoch to epoch with their own copy of it. A run that
    goes on from the middle of an epoch goes on with the samples that it has not had.

    Args:
        dataset: what is sampled.
        trainer: knows the processes and the batches that the epoch already had.
        batch_size: of each process.
        seed: of the order.
    """

    def __init__(self, dataset: Sized, trainer: L.Trainer, batch_size: int, seed: int) -> None:
        super().__init__(dataset, trainer.world_size, trainer.global_rank, shuffle=True, seed=seed, drop_last=True)  # type: ignore[arg-type]
        expect_parts_of_epochs()
        self.trainer = trainer
        self.batch_size = batch_size

    def had(self) -> int:
        """Batches that the epoch already had."""
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def all(self) -> list[int]:
        """All samples of the epoch."""
        length = len(self.dataset)  # type: ignore[arg-type]
        return [self.epoch * length + index for index in super().__iter__()]

    def __iter__(self) -> Iterator[int]:
        return iter(self.all()[self.had() * self.batch_size :])


class StreamSampler(EpochSampler):
    """Samples of files that are best read from their beginning to their end, such as tar shards.

    The files of an epoch follow one another in random order. Each process has an equal part of that sequence, which may
    begin and end inside a file, and moves each sample of it by a random number of places: at most ``buffer``, so that
    it is read while its file is.

    Args:
        dataset, trainer, batch_size, seed: as of :class:`EpochSampler`.
        lengths: samples of each file, in the order of the data set.
        buffer: places.
    """

    def __init__(
        self, dataset: Sized, trainer: L.Trainer, batch_size: int, seed: int, lengths: Sequence[int], buffer: int
    ) -> None:
        super().__init__(dataset, trainer, batch_size, seed)
        self.files = np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1])
        self.buffer = buffer

    def all(self) -> list[int]:
        random = np.random.default_rng((self.seed, self.epoch))
        order = np.concatenate([self.files[file] for file in random.permutation(len(self.files))])
        mine = order[self.rank * self.num_samples : (self.rank + 1) * self.num_samples]
        places = np.arange(len(mine)) + random.uniform(0, self.buffer, len(mine))
        return (self.epoch * len(order) + mine[np.argsort(places)]).tolist()


class GroupedSampler(EpochSampler):
    """Lists of samples of one group, such as upright and wide images, in the order in which groups fill up.

    What is left at the end of an epoch makes mixed lists, so that every process has as many. It is a sampler that gives
    batches (for a loader with ``batch_size=None`` and :class:`Lists`): Lightning would replace the sampler inside a
    batch sampler.

    Args:
        dataset, trainer, batch_size, seed: as of :class:`EpochSampler`.
        groups: group of each sample of the data set.
    """

    def __init__(self, dataset: Sized, trainer: L.Trainer, batch_size: int, seed: int, groups: Sequence[int]) -> None:
        super().__init__(dataset, trainer, batch_size, seed)
        self.groups = groups

    def __iter__(self) -> Iterator[list[int]]:  # type: ignore[override]
        waiting: dict[int, list[int]] = {}
        batches = []
        for sample in self.all():
            group = waiting.setdefault(self.groups[sample % len(self.groups)], [])
            group.append(sample)
            if len(group) == self.batch_size:
                batches.append(list(group))
                group.clear()
        left = [sample for _, group in sorted(waiting.items()) for sample in group]
        size = self.batch_size
        batches += [left[i : i + size] for i in range(0, len(left) - size + 1, size)]
        return iter(batches[self.had() :])

    def __len__(self) -> int:
        return super().__len__() // self.batch_size


class LateLoader(DataLoader):
    """Asks its sampler for samples when the first batch is wanted, and not before: Lightning makes the iterator early,
    when a run that goes on does not know yet where."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from super().__iter__()


def worker_loader(dataset: Dataset, sampler: Iterable[Any], num_workers: int, **options: Any) -> DataLoader:
    """Loader whose workers live on from epoch to epoch. ``options`` are those of ``DataLoader``."""
    return LateLoader(
        dataset,
        sampler=sampler,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # the loader's seeds for workers come from here, not from what dropout uses
        **options,
    )


def eval_loader(
    dataset: Dataset, trainer: L.Trainer, num_workers: int, collate: Callable[[list[Any]], Any]
) -> DataLoader:
    """Loader of whole images, which differ in size, one at a time."""
    return DataLoader(
        dataset,
        batch_size=1,
        collate_fn=collate,
        sampler=Shard(dataset, trainer),  # type: ignore[arg-type]
        num_workers=num_workers,
        generator=torch.Generator(),
    )


class Lists(Dataset[list[Any]]):
    """A data set that is asked for lists of samples."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, samples: list[int]) -> list[Any]:
        return [self.dataset[sample] for sample in samples]


class Shard(DistributedSampler):
    """Every ``world_size``-th sample, in order, none twice: for evaluation."""

    def __init__(self, dataset: Sized, trainer: L.Trainer) -> None:
        super().__init__(dataset, trainer.world_size, trainer.global_rank, shuffle=False)  # type: ignore[arg-type]

    def _mine(self) -> range:
        return range(self.rank, len(self.dataset), self.num_replicas)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        return iter(self._mine())

    def __len__(self) -> int:
        return len(self._mine())
