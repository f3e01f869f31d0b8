"""The ``oriented1d`` command. What a command needs is imported when it runs, so that ``--help`` is quick."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable

HELP = """\
usage: oriented1d COMMAND ...

commands:
  fit        train:                    oriented1d fit --config configs/classification/quickstart.yaml
  validate   evaluate:                 oriented1d validate --config FILE --ckpt_path FILE
  predict    write predictions:        oriented1d predict --config FILE --ckpt_path FILE --data.images FOLDER
  shards     write tar shards:         oriented1d shards FOLDER OUT
  convert    convert a checkpoint:     oriented1d convert CHECKPOINT OUT [--to backbone|safetensors] [--ema]
  info       describe a network:       oriented1d info MODEL | --all
  draw       draw taps and kernels:    oriented1d draw [MODEL] [--weights FILE]
  erf        receptive fields:         oriented1d erf compute MODEL --output FILE; oriented1d erf plot FILE ...
  export     to another format:        oriented1d export MODEL OUT --to onnx|torch-export
  benchmark  measure speed:            oriented1d benchmark operator|network|segmentation|detection|input|table5
  study      compare variants:         oriented1d study run CONFIG ...; oriented1d study report
  doctor     versions and self-check:  oriented1d doctor

options:
  -h, --help   this text; after a command, the options of the command
  --version    the version
  --traceback  show where an error came from (so does the environment variable ORIENTED1D_TRACEBACK=1)
"""


def _train(command: str) -> Callable[[list[str]], int]:
    def run_command(args: list[str]) -> int:
        try:
            from oriented1d.training.command import run
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"oriented1d {command} needs {error.name}, which is not installed: pip install 'oriented1d[train]'"
            ) from error
        run(command, args)
        return 0

    return run_command


def _shards(args: list[str]) -> int:
    from oriented1d.classification import shards

    return shards.main(args)


def _convert(args: list[str]) -> int:
    parser = argparse.ArgumentParser("oriented1d convert", description="Convert a checkpoint.")
    parser.add_argument("checkpoint", help="official file, state dict, safetensors, or a checkpoint of oriented1d fit")
    parser.add_argument("out", help="file to write")
    parser.add_argument("--to", choices=["backbone", "safetensors"], default="backbone", help="(default: %(default)s)")
    parser.add_argument("--ema", action="store_true", help="take the moving average of the weights")
    options = parser.parse_args(args)
    from oriented1d.models.checkpoints import convert
    from oriented1d.training.errors import UserError

    try:
        lines = convert(options.checkpoint, options.out, options.to, options.ema)
    except (OSError, ValueError) as error:
        raise UserError(error) from error
    print("\n".join(lines))
    return 0


def _analysis(module: str) -> Callable[[list[str]], int]:
    def run_command(args: list[str]) -> int:
        return importlib.import_module(f"oriented1d.analysis.{module}").main(args)

    return run_command


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "fit": _train("fit"),
    "validate": _train("validate"),
    "predict": _train("predict"),
    "shards": _shards,
    "convert": _convert,
    "info": _analysis("info"),
    "draw": _analysis("draw"),
    "erf": _analysis("erf"),
    "export": _analysis("export"),
    "benchmark": _analysis("benchmark"),
    "study": _analysis("study"),
    "doctor": _analysis("doctor"),
}


def one_line(error: Exception) -> str:
    """What went wrong, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    name = type(error).__name__
    if lines and lines[0].startswith("Caught ") and "DataLoader worker" in lines[0]:
        # torch puts the traceback of the worker into the message; the error itself is its last line.
        qualified, _, message = lines[-1].partition(": ")
        name, lines = qualified.rpartition(".")[2], [message]
    message = " ".join(lines)
    if name in ("UserError", "ModuleNotFoundError"):
        return message
    return f"{name}: {message} (--traceback shows where)"


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv`` (``sys.argv`` without the program by default).

    Returns:
        exit code: 0; 1 after an error; 2 when the command line itself is wrong.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    show_traceback = os.environ.get("ORIENTED1D_TRACEBACK") == "1" or "--traceback" in args
    args = [arg for arg in args if arg != "--traceback"]
    if not args or args[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0
    if args[0] == "--version":
        from oriented1d import __version__

        print(f"oriented1d {__version__}")
        return 0
    if args[0] not in COMMANDS:
        print(f"oriented1d: error: expected a command ({', '.join(COMMANDS)}), got {args[0]}", file=sys.stderr)
        return 2
    try:
        return COMMANDS[args[0]](args[1:])
    except SystemExit as stop:  # argparse, after --help or its own error message
        return stop.code if isinstance(stop.code, int) else 1
    except Exception as error:
        if show_traceback:
            raise
        print(f"oriented1d {args[0]}: error: {one_line(error)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
