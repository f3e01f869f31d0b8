"""``oriented1d fit|validate|predict``: one command for all tasks, made of the classes that the configuration names."""

from __future__ import annotations

import difflib
import inspect
import logging
import os
import pydoc
import re
import warnings
from argparse import ArgumentError
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import yaml
from jsonargparse.typing import PositiveInt
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities.model_helpers import is_overridden

from oriented1d.training.callbacks import (
    BestCheckpoint,
    ChannelsLast,
    LastCheckpoint,
    LeanDDP,
    Progress,
    RandomStates,
    StopAtBadLoss,
    Summary,
)
from oriented1d.training.errors import UserError
from oriented1d.training.files import check_writable
from oriented1d.training.restart import Metrics, RunStatus, WholeCheckpoints, find_interrupted
from oriented1d.training.sharding import FullySharded

_EXPECTED_WARNINGS = (
    "LightningCLI's args parameter is intended",  # with several devices, the other processes need sys.argv too
    "Experiment logs directory .* exists and is not empty",  # the folder is shared with TensorBoard's log
    r"Found \d+ module\(s\) in eval mode at the start of training",  # the moving average
    "Be aware that when using `ckpt_path`, callbacks used",  # validate and predict write no checkpoints
    r"Checkpoint directory .* exists and is not empty",  # a run that goes on
    "The dirpath has changed from",  # a resumed run writes into a folder of its own
    "It is recommended to use `self.log\\('train/images_per_second'",  # the first process knows
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning with torch 2.11
)


class Command(LightningCLI):
    """Lightning's command line with our loggers, callbacks and checks.

    A run of ``fit`` writes into ``{trainer.default_root_dir}/version_N`` with the next free ``N``: nothing that an
    earlier run saved is touched. Only where that run was stopped, and had the same configuration, is it taken up again
    (docs/training.md).
    """

    def __init__(self, args: list[str]) -> None:
        strict = {"exit_on_error": False, "allow_abbrev": False}
        super().__init__(
            trainer_defaults={
                "default_root_dir": "runs",
                "enable_model_summary": False,
                "callbacks": [ChannelsLast(), LeanDDP(), Summary(), RandomStates()],
            },
            seed_everything_default=0,
            # An ArgumentError instead of three lines of usage and the end of the process; no guessing of options.
            parser_kwargs=strict | {name: dict(strict) for name in self.subcommands()},
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=args,
            auto_configure_optimizers=False,
            # Options come from the configuration and the command line alone, never from inside a checkpoint.
            load_from_checkpoint_support=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {name: skip for name, skip in LightningCLI.subcommands().items() if name != "test"}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--threads",
            type=PositiveInt | None,
            default=None,
            help="CPU threads of each process; null leaves the choice to torch. A small network trains about as fast "
            "with one, and does not come to a halt when other programs need the cores.",
        )
        parser.add_argument(
            "--resume",
            type=Literal["auto", "never"],
            default="auto",
            help="auto takes up the newest run in trainer.default_root_dir that has this very configuration and was "
            "stopped, from its last checkpoint; never starts a new run.",
        )
        parser.add_class_arguments(LastCheckpoint, "checkpoint")
        parser.add_class_arguments(StopAtBadLoss, "bad_loss")

    def before_instantiate_classes(self) -> None:
        threads = self._get(self.config, "threads")
        if threads is not None:
            torch.set_num_threads(threads)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.set_defaults(weights_only=True)
        if subcommand == "predict":
            parser.set_defaults(return_predictions=False)
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        checkpoint = self.config[self.config.subcommand].ckpt_path
        if checkpoint is not None:
            _check_checkpoint(checkpoint)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        trainer = self._get(self.config_init, "trainer")
        callbacks = self.trainer_defaults["callbacks"]
        callbacks.append(Progress(bar=trainer.enable_progress_bar is not False))
        kwargs["enable_progress_bar"] = True  # Lightning refuses the callback, which logs and prints too, without it
        if self.subcommand == "fit":
            root = os.path.abspath(trainer.default_root_dir)
            check_writable(root, "trainer.default_root_dir")
            if trainer.logger is None and not trainer.fast_dev_run:
                kwargs["logger"] = self._choose_run(Path(root))
            best = [BestCheckpoint(monitor, filename) for filename, monitor in self.model.monitors.items()]
            # The last one comes last: it holds the state of the others.
            callbacks += [self._get(self.config_init, "bad_loss"), *best, self._get(self.config_init, "checkpoint")]
            kwargs["plugins"] = _plugins(trainer.plugins)
            if trainer.strategy == "fsdp":
                if not is_overridden("configure_model", self.model):
                    raise UserError("trainer.strategy: expected ddp, got fsdp, which is for image classification")
                kwargs["strategy"] = FullySharded()
        else:
            self.save_config_callback = None
            kwargs["logger"] = False
        if self.subcommand == "predict" and trainer.devices == "auto":
            kwargs["devices"] = 1  # the predictions are one file
        return super().instantiate_trainer(**kwargs)

    def _choose_run(self, root: Path) -> list[Logger]:
        """Loggers of a new run, or of one that was stopped and goes on."""
        checkpoint = None
        if self._get(self.config, "resume") == "auto":
            checkpoint = find_interrupted(root, yaml.safe_load(self._dump()))
        if checkpoint is None:
            tensorboard, step = TensorBoardLogger(root, name=""), 0
        else:
            _check_checkpoint(str(checkpoint))
            step = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"]
            tensorboard = TensorBoardLogger(
                root, name="", version=int(checkpoint.parents[1].name.removeprefix("version_")), purge_step=step
            )
            self.config_init[self.subcommand].ckpt_path = str(checkpoint)
            self.save_config_callback = None  # it is there, and the same
            if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
                print(f"going on from step {step} of {checkpoint} (--resume never starts a new run)", flush=True)
        self.trainer_defaults["callbacks"].append(RunStatus(Path(tensorboard.log_dir), checkpoint))
        return [tensorboard, Metrics(str(root), int(tensorboard.version), step)]

    def _dump(self) -> str:
        """What ``config.yaml`` of the run holds."""
        return self._parser(self.subcommand).dump(self.config[self.subcommand], skip_none=False)


def _plugins(given: Any) -> list[Any]:
    plugins = list(given) if isinstance(given, list) else [given] if given is not None else []
    if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
        plugins.append(WholeCheckpoints())
    if SLURMEnvironment.detect() and not any(isinstance(plugin, ClusterEnvironment) for plugin in plugins):
        # Lightning would save in the middle of a step, into a folder that all runs share.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    return plugins


def _check_checkpoint(path: str) -> None:
    if not Path(path).is_file():
        raise UserError(f"ckpt_path: expected a checkpoint file, got {path}, which does not exist")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        ours = isinstance(checkpoint, dict) and {"state_dict", "pytorch-lightning_version"} <= checkpoint.keys()
    except Exception:  # torch.load fails in many ways; all of them mean the same here
        ours = False
    if not ours:
        raise UserError(
            f"ckpt_path: expected a checkpoint written by oriented1d fit, got {path}; "
            "weights of other origin are read with --model.pretrained"
        )


def plain(message: str) -> str:
    """A message of jsonargparse on one line, without the alternatives that nobody meant (that it may also be null)."""
    lines = message.splitlines()
    union = next((i for i, line in enumerate(lines) if "Does not validate against any of the Union" in line), None)
    errors = next((i for i, line in enumerate(lines) if line.strip() == "Errors:"), None)
    if union is None or errors is None:
        return " ".join(line.strip() for line in lines)
    first = lines[errors + 1]
    alternative = [first.strip().removeprefix("- ")]
    for line in lines[errors + 2 :]:
        if _indent(line) <= _indent(first):
            break
        alternative.append(line)
    text = " ".join([*(line.strip() for line in lines[:union]), plain("\n".join(alternative))])
    if "Expected a" in text and "value:" not in text:
        text += ". " + next(line.strip() for line in reversed(lines) if line.strip().startswith("Given value:"))
    return text


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _suggestion(message: str) -> str:
    if "arguments are required" in message:
        return "; give them with --config FILE"
    option = re.search(r"(?:ption '|arguments: --)([\w.]+)", message)
    owner = re.search(r"class_path '([\w.]+)'", message)
    if option is None or not (owner or option[1].startswith("trainer.")):
        return ""
    names = inspect.signature(pydoc.locate(owner[1]) if owner else L.Trainer).parameters  # type: ignore[arg-type]
    close = difflib.get_close_matches(option[1].rpartition(".")[2], names, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def run(command: str, args: list[str]) -> None:
    """Run ``fit``, ``validate`` or ``predict`` with the arguments that follow it on the command line.

    Raises:
        UserError: bad input.
        Exception: whatever else torch, timm or Lightning raise.
    """
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        Command([command, *args])
    except ArgumentError as error:
        message = plain(str(error))
        raise UserError(message + _suggestion(message)) from error
    except OSError as error:
        # On a full disk the loggers fail too, when they are closed after the error that matters.
        if isinstance(error.__context__, UserError):
            raise error.__context__ from None
        raise
    except ValueError as error:
        # What a class raised when it was made, wrapped by jsonargparse.
        if "Does not validate against any of the Union" in str(error) and error.__cause__ is not None:
            raise error.__cause__ from error
        raise
