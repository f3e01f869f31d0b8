"""Runs that go on where they were stopped: which one a command takes up, and files that survive a kill at any time."""

from __future__ import annotations

import csv
import errno
import fcntl
import io
import os
import shutil
from pathlib import Path
from typing import IO, Any

import lightning as L
import torch
import yaml
from lightning.fabric.loggers.csv_logs import _ExperimentWriter
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import TorchCheckpointIO

from oriented1d.files import unfinished
from oriented1d.training.errors import UserError

STATUS = "status"
"""File in the folder of a run: ``not finished`` or ``finished``; locked by the process that writes the run."""


def find_interrupted(root: Path, config: dict[str, Any]) -> Path | None:
    """The last checkpoint of the newest run in ``root`` with the same configuration, if that run did not finish.

    Runs that another process is writing are passed over.

    Args:
        root: folder of the folders ``version_N``.
        config: what ``config.yaml`` of the run would hold.
    """
    folders = [path for path in root.glob("version_*") if path.name.removeprefix("version_").isdecimal()]
    for folder in sorted(folders, key=lambda path: int(path.name.removeprefix("version_")), reverse=True):
        if _read_config(folder / "config.yaml") != config or _in_use(folder):
            continue
        checkpoint = folder / "checkpoints" / "last.ckpt"
        finished = (folder / STATUS).is_file() and (folder / STATUS).read_text().strip() == "finished"
        return checkpoint if checkpoint.is_file() and not finished else None
    return None


def _read_config(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError):  # the run was killed before it was written
        return None


def _in_use(folder: Path) -> bool:
    try:
        with (folder / STATUS).open() as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:  # other errors: no such file, or a file system without locks
        return error.errno in (errno.EACCES, errno.EAGAIN)
    return False


class RunStatus(Callback):
    """Marks the folder of a run as in use, and at the end as finished.

    Args:
        folder: of the run.
        checkpoint: that the run goes on from.

    Raises:
        UserError: another process uses the folder, or the processes of this run do not see the same files.
    """

    def __init__(self, folder: Path, checkpoint: Path | None) -> None:
        self.folder = folder
        self.checkpoint = checkpoint
        self._file: IO[str] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Each process looked for itself, before they knew of each other.
        first = trainer.strategy.broadcast(self.checkpoint)
        if first != self.checkpoint:
            raise UserError(
                "trainer.default_root_dir: expected a folder that all processes share; the first one found "
                f"{first or 'no checkpoint'}, process {trainer.global_rank} {self.checkpoint or 'none'}"
            )
        if not trainer.is_global_zero:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = (self.folder / STATUS).open("a+")
        try:
            # Unlike flock's, this lock is not inherited by the processes that load data, and ends with this one.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(f"{self.folder}: another process just took up this run") from error
        self._write("not finished")
        for partial in (self.folder / "checkpoints").glob(".*.ckpt"):  # a kill left them unfinished
            partial.unlink()

    def _write(self, status: str) -> None:
        assert self._file is not None
        self._file.truncate(0)
        self._file.write(f"{status}\n")
        self._file.flush()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._file is not None:
            self._write("finished")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all: under another name, to the disk, and only then under its own.

    Raises:
        UserError: it cannot be written; what was there under its name stays.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        path = Path(path)
        # In memory first: torch hides what went wrong with a file.
        content = io.BytesIO()
        torch.save(checkpoint, content)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with unfinished(path) as partial, partial.open("wb") as file:
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # the new name
            finally:
                os.close(folder)
        except OSError as error:
            free = shutil.disk_usage(next(parent for parent in path.parents if parent.exists())).free
            raise UserError(
                f"cannot write {path}: {error.strerror}; it needs {content.tell() / 1e6:.1f} MB, "
                f"{free / 1e6:.1f} MB are free"
            ) from error


class _Writer(_ExperimentWriter):
    def _check_log_dir_exists(self) -> None:
        """Lightning's own deletes what an earlier process wrote."""


class Metrics(CSVLogger):
    """``metrics.csv``, which a run that goes on from step ``start`` continues.

    Rows of later steps, which the stopped run had after its last checkpoint, are dropped: these steps are made again.
    """

    def __init__(self, save_dir: str, version: int, start: int = 0) -> None:
        super().__init__(save_dir, name="", version=version)
        self._start = start
        self._save_next = False

    @property
    @rank_zero_experiment
    def experiment(self) -> _ExperimentWriter:
        if self._experiment is None:
            writer = _Writer(self.log_dir)
            path = Path(writer.metrics_file_path)
            if path.is_file():
                writer.metrics_keys = self._drop_later_rows(path)
            self._experiment = writer
        return self._experiment

    def _drop_later_rows(self, path: Path) -> list[str]:
        lines = path.read_text().splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines.pop()  # cut short by a kill
        reader = csv.DictReader(lines)
        keys, rows = list(reader.fieldnames or []), list(reader)
        with unfinished(path) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, keys)
            writer.writeheader()
            writer.writerows(row for row in rows if int(row["step"]) < self._start)
        return keys

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        # So that no row before a checkpoint is lost. That of the step itself is yet to come.
        self.save()
        self._save_next = True

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        super().log_metrics(*args, **kwargs)
        if self._save_next:
            self.save()
            self._save_next = False
