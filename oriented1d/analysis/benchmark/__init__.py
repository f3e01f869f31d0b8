"""Speed, measured side by side: ``oriented1d benchmark operator``, ``table5``, ``depthwise``, ``network``, ``kernels``,
``segmentation``, ``detection`` and ``input``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from oriented1d.analysis.benchmark import dense, depthwise, input, kernels, network, operator
from oriented1d.analysis.benchmark.results import environment, print_table, write_csv
from oriented1d.training.errors import UserError
from oriented1d.training.files import check_writable


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return int(text)


def _shape(text: str) -> tuple[int, int, int, int]:
    parts = text.split("x")
    if len(parts) != 4:
        raise argparse.ArgumentTypeError(f"expected a shape NxCxHxW, as in 8x96x56x56, got {text}")
    n, c, h, w = map(_positive, parts)
    return n, c, h, w


def _image_size(text: str) -> tuple[int, int]:
    parts = text.split("x")
    if len(parts) != 2:
        raise argparse.ArgumentTypeError(f"expected a size HxW, as in 800x1344, got {text}")
    height, width = map(_positive, parts)
    return height, width


def _device(text: str) -> torch.device:
    kind, _, index = text.partition(":")
    # The GPU itself is not touched: networks are measured by other processes, which want its memory.
    gpu = kind == "cuda" and (index.isdecimal() or not index) and int(index or 0) < torch.cuda.device_count()
    if text != "cpu" and not gpu:
        raise argparse.ArgumentTypeError(f"expected cpu or a GPU of this machine (cuda, cuda:1), got {text}")
    return torch.device(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="oriented1d benchmark", description="Measure speed, side by side.")
    commands = parser.add_subparsers(dest="command", required=True)
    layer = commands.add_parser("operator", help="the operator against copies, PyTorch and the portable path")
    layer.add_argument("--shapes", type=_shape, nargs="+", metavar="NxCxHxW", help="images (default: by device)")
    layer.add_argument("--kernel-size", type=_positive, default=31)
    layer.add_argument("--stride", type=_positive, default=1)
    layer.add_argument("--dtypes", nargs="+", choices=operator.DTYPES, default=["float32"])
    layer.add_argument("--layouts", nargs="+", choices=operator.LAYOUTS, default=list(operator.LAYOUTS))
    layer.add_argument("--angles", choices=["layer", "each"], default="layer", help="8 directions, or one at a time")
    table5 = commands.add_parser("table5", help="Table 5 of the paper, one angle at a time")
    table5.add_argument("--sizes", type=_positive, nargs="+", default=[14, 28, 56])
    table5.add_argument("--kernel-sizes", type=_positive, nargs="+", default=[7, 15, 31])
    table5.add_argument("--batch", type=_positive, default=64)
    table5.add_argument("--channels", type=_positive, default=512)
    square = commands.add_parser("depthwise", help="depthwise layers with 2D kernels, channels_last, beside PyTorch's")
    square.add_argument("--shapes", type=_shape, nargs="+", metavar="NxCxHxW", help="images (default: by device)")
    square.add_argument("--kernel-size", type=_positive, default=7)
    square.add_argument("--dtypes", nargs="+", choices=operator.DTYPES, default=["bfloat16"])
    net = commands.add_parser("network", help="images per second and memory of whole networks")
    parts = commands.add_parser("kernels", help="where the time of a network goes on a GPU, beside the least it can be")
    for command in (net, parts):
        command.add_argument("models", nargs="+", metavar="MODEL", help="names of networks of ours or of timm")
        command.add_argument("--batch-size", type=_positive, default=128, help="(default: %(default)s)")
        command.add_argument("--size", type=_positive, default=224, help="pixels of a side (default: %(default)s)")
        command.add_argument(
            "--dtype", choices=network.DTYPES, default="bfloat16", help="of autocast; float32 for none"
        )
        command.add_argument("--layout", choices=operator.LAYOUTS, default="channels_last")
        command.add_argument(
            "--compile", choices=network.COMPILE, default="default", help="mode of torch.compile (default: default)"
        )
        modes = (*network.MODES, "latency") if command is net else network.MODES
        command.add_argument("--mode", nargs="+", choices=modes, default=list(network.MODES))
        command.add_argument("--warmup", type=_positive, default=10, help="steps before the timed ones (%(default)s)")
    tasks = []
    for task, batch, size in (("segmentation", 16, (512, 512)), ("detection", 8, (800, 1344))):
        command = commands.add_parser(task, help=f"training speed of {task} with each backbone")
        command.add_argument("models", nargs="+", metavar="MODEL", help="names of backbones of ours or of timm")
        command.add_argument("--batch-size", type=_positive, default=batch, help="(default: %(default)s)")
        command.add_argument("--size", type=_image_size, default=size, metavar="HxW", help=f"(default: {size})")
        command.add_argument("--dtype", choices=network.DTYPES, default="bfloat16", help="of autocast")
        command.add_argument("--layouts", nargs="+", choices=operator.LAYOUTS, default=list(operator.LAYOUTS))
        command.add_argument("--warmup", type=_positive, default=10, help="steps before the timed ones")
        command.add_argument("--changing-sizes", type=int, default=0, help="steps with changing sizes, timed twice")
        tasks.append(command)
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    for command, runs in (
        (layer, 15),
        (table5, 15),
        (square, 15),
        *((command, 30) for command in (net, parts, *tasks)),
    ):
        command.add_argument("--device", type=_device, default=default_device, help="default: cuda, if there is one")
        command.add_argument("--runs", type=_positive, default=runs, help="timed runs of each (default: %(default)s)")
    for command in (layer, table5, net):
        command.add_argument("--plot", metavar="FIGURE", help="figure to write, of any file type matplotlib writes")
    data = commands.add_parser("input", help="images per second of the input pipeline, and cores that a GPU needs")
    data.add_argument("--config", metavar="FILE", help="configuration of a training (default: ImageNet's recipe)")
    data.add_argument("--data.root", dest="root", metavar="FOLDER", help="images (default: made up, in both layouts)")
    data.add_argument("--images", type=_positive, default=1024, help="to load (default: %(default)s)")
    data.add_argument("--workers", type=_positive, nargs="+", default=[1, 2], help="(default: 1 2)")
    data.add_argument("--gpu-rate", type=_positive, default=4000, help="images/s of training (default: %(default)s)")
    data.set_defaults(device=torch.device("cpu"))
    for command in (layer, table5, square, net, parts, *tasks, data):
        command.add_argument("--output", metavar="CSV", help="CSV file to write")
    parser.set_defaults(plot=None)
    return parser


def _check_outputs(options: argparse.Namespace) -> None:
    # Before the measurements, which may take an hour.
    for key, path in (("--output", options.output), ("--plot", options.plot)):
        if path:
            check_writable(Path(path).parent, key)
    if options.plot:
        try:
            from oriented1d.analysis.benchmark.plots import FILE_TYPES
        except ModuleNotFoundError as error:
            raise UserError(f"--plot: needs {error.name}: pip install 'oriented1d[train]'") from error
        if Path(options.plot).suffix.removeprefix(".") not in FILE_TYPES:
            raise UserError(f"--plot: expected a file of type {', '.join(sorted(FILE_TYPES))}, got {options.plot}")


def main(argv: Sequence[str] | None = None) -> int:
    """``oriented1d benchmark``. 1 if a network could not be measured, else 0."""
    options = _parser().parse_args(argv)
    _check_outputs(options)
    runs = {
        "operator": operator.run,
        "table5": operator.run_table5,
        "depthwise": depthwise.run,
        "network": network.run,
        "kernels": kernels.run,
        "input": input.run,
    }
    rows = runs.get(options.command, dense.run)(options)
    device = str(environment(options.device)["device"])
    title = f"{options.command} on {device}, "
    if options.command == "network":
        title += f"{options.runs} runs after {options.warmup} to warm up; training without the optimizer's step"
    elif options.command == "kernels":
        title += "a step of the network"
    elif options.command in ("segmentation", "detection"):
        title += f"{options.runs} steps of training after {options.warmup} to warm up"
    elif options.command == "input":
        title += "nothing done with the images"
    else:
        title += "medians in ms"
    print_table(rows, title)
    if options.output:
        write_csv(rows, options.output, options.device)
        print(f"wrote {options.output}")
    if options.plot:
        from oriented1d.analysis import figures
        from oriented1d.analysis.benchmark import plots

        draw = {"operator": plots.operator_figure, "table5": plots.table5_figure, "network": plots.network_figure}
        figures.save(draw[options.command](rows, device), options.plot)
        print(f"wrote {options.plot}")
    return 1 if any(row.get("error") for row in rows) else 0
