"""The same small network with other kernels, several times each: ``oriented1d study``. See docs/study.md.

Every run is ``oriented1d fit`` in a process of its own. What is finished stands in one CSV file, a row for each run,
and is not run again.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import math
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from oriented1d.files import unfinished
from oriented1d.training.errors import UserError
from oriented1d.training.files import check_writable

# What is compared: name, and options of fit. The first one is what the others are compared with.
NETWORKS: dict[str, tuple[str, ...]] = {
    "2d": ("--model.network=convnext_atto_2d",),
    "1d": ("--model.network=convnext_atto_1d",),
    "1dpp": ("--model.network=convnext_atto_1dpp",),
    "2dpp": ("--model.network=convnext_atto_2dpp",),
    "1d two directions": ("--model.network=convnext_atto_1d", "--model.network_args.num_directions=2"),
    "1d horizontal": (
        "--model.network=convnext_atto_1d",
        "--model.network_args.num_directions=1",
        "--model.network_args.layer_offset=0",
    ),
}
_COLUMNS = ("dataset", "network", "seed", "parameters", "epochs", "top1", "seconds", "options")
_BEGIN, _END = "<!-- oriented1d study report: begin -->", "<!-- end -->"


@dataclasses.dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        config: file of options.
        network: a name in :data:`NETWORKS`.
        seed: of the weights, the order and the augmentation.
        folder: what it writes goes there.
        root: folder of the data set; None for that of the configuration.
        options: further options of ``fit``.
    """

    config: Path
    network: str
    seed: int
    folder: Path
    root: str | None
    options: tuple[str, ...]

    @property
    def dataset(self) -> str:
        return self.config.stem.removeprefix("study_")

    @property
    def key(self) -> tuple[str, ...]:
        """What a row of the results is known by."""
        return self.dataset, self.network, str(self.seed)

    @property
    def command(self) -> list[str]:
        seeds = (f"--seed_everything={self.seed}", f"--data.seed={self.seed}")
        folders = [f"--trainer.default_root_dir={self.folder}"]
        if self.root is not None:
            folders.append(f"--data.root={self.root}")
        return ["fit", f"--config={self.config}", *NETWORKS[self.network], *seeds, *folders, *self.options]


def read_rows(results: Path) -> dict[tuple[str, ...], dict[str, str]]:
    """Rows of the CSV file by data set, network and seed; none if there is no file.

    Raises:
        UserError: it is another kind of file.
    """
    if not results.is_file():
        return {}
    with results.open(newline="") as file:
        reader = csv.DictReader(file)
        if not {"dataset", "network", "seed", "top1"} <= set(reader.fieldnames or ()):
            raise UserError(f"--results: expected a file of oriented1d study, got {results}")
        return {(row["dataset"], row["network"], row["seed"]): row for row in reader}


def write_rows(rows: dict[tuple[str, ...], dict[str, Any]], results: Path) -> None:
    """Write all rows, whole or not at all."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    with unfinished(results) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows.values())


def final_top1(metrics: Path) -> tuple[int, float]:
    """Epochs of a run, and the top-1 accuracy (0 to 1) after the last of them, from its ``metrics.csv``.

    Raises:
        UserError: the last epoch was not validated.
    """
    with metrics.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["epoch"]]
    last = max(int(row["epoch"]) for row in rows)
    values = [float(row["val/top1"]) for row in rows if int(row["epoch"]) == last and row.get("val/top1")]
    if not values:
        raise UserError(
            f"{metrics}: expected val/top1 after the last epoch ({last}): trainer.max_epochs must be a multiple of "
            "trainer.check_val_every_n_epoch"
        )
    return last + 1, values[-1]


def _row(run: Run, seconds: float) -> dict[str, Any]:
    """What the results say of a finished run."""
    import timm
    import yaml

    from oriented1d.analysis.benchmark.results import environment
    from oriented1d.analysis.info import parameters

    metrics = max(run.folder.rglob("metrics.csv"), key=lambda path: path.stat().st_mtime)
    config = yaml.safe_load((metrics.parent / "config.yaml").read_text())
    arguments = config["model"]["init_args"]
    with torch.device("meta"):
        model = timm.create_model(
            arguments["network"], num_classes=arguments["num_classes"], **(arguments["network_args"] or {})
        )
    on_gpu = torch.cuda.is_available() and config["trainer"]["accelerator"] != "cpu"
    epochs, top1 = final_top1(metrics)
    values = (*run.key, parameters(model), epochs, f"{top1:.4f}", f"{seconds:.0f}", shlex.join(run.options))
    return environment(torch.device("cuda" if on_gpu else "cpu")) | dict(zip(_COLUMNS, values, strict=True))


def run_all(runs: Sequence[Run], results: Path, jobs: int, minutes: float) -> int:
    """Run what the results do not have yet, ``jobs`` at a time, and write each result as it comes.

    After ``minutes`` what still runs is told to end, and nothing new is started; the same command goes on later.

    Returns:
        how many runs have no result in the end.
    """
    rows: dict[tuple[str, ...], dict[str, Any]] = dict(read_rows(results))
    waiting = [run for run in runs if run.key not in rows]
    print(f"{len(runs)} runs, {len(runs) - len(waiting)} done before; {jobs} at a time, {minutes:g} minutes at most")
    start = time.monotonic()
    running: dict[Run, tuple[subprocess.Popen[bytes], float]] = {}
    failed = 0
    try:
        while (waiting or running) and time.monotonic() - start < 60 * minutes:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                run.folder.mkdir(parents=True, exist_ok=True)
                with (run.folder / "log.txt").open("ab") as log:
                    command = [sys.executable, "-m", "oriented1d.cli", *run.command]
                    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
                running[run] = process, time.monotonic()
            time.sleep(0.2)
            for run, (process, since) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[run]
                seconds = time.monotonic() - since
                name = f"{run.dataset}, {run.network}, seed {run.seed}"
                if process.returncode:
                    failed += 1
                    lines = (run.folder / "log.txt").read_text(errors="replace").split("\n")
                    print(f"{name}: failed: {next(filter(None, reversed(lines)), '')} ({run.folder / 'log.txt'})")
                    continue
                rows[run.key] = _row(run, seconds)
                write_rows(rows, results)
                print(f"{name}: top-1 {rows[run.key]['top1']} ({seconds:.0f} s)", flush=True)
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
    print(f"{len(runs) - failed - len(running) - len(waiting)} of {len(runs)} runs done, {failed} failed; {results}")
    return failed + len(running) + len(waiting)


# Report --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Summary:
    """All runs of one network on one data set.

    Attributes:
        parameters: trainable ones.
        top1: accuracy of each run, percent.
    """

    dataset: str
    network: str
    parameters: int
    top1: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.mean(self.top1)

    @property
    def deviation(self) -> float:
        """Standard deviation over runs (with n - 1); NaN for one run."""
        return statistics.stdev(self.top1) if len(self.top1) > 1 else math.nan

    def standard_error(self, other: Summary) -> float:
        """Of the difference of the two means, from the spread of runs alone."""
        return math.sqrt(sum(one.deviation**2 / len(one.top1) for one in (self, other)))


def summaries(rows: Sequence[dict[str, Any]]) -> list[Summary]:
    """One for each data set, by name, and network, in the order of :data:`NETWORKS`."""
    result = []
    for dataset in sorted({row["dataset"] for row in rows}):
        for network in NETWORKS:
            found = [row for row in rows if (row["dataset"], row["network"]) == (dataset, network)]
            if found:
                top1 = tuple(100 * float(row["top1"]) for row in found)
                result.append(Summary(dataset, network, int(found[0]["parameters"]), top1))
    return result


def _with_spread(value: str, spread: float) -> str:
    return value if math.isnan(spread) else f"{value} ± {spread:.2f}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The results as Markdown: a table for each data set, and where they were measured."""
    first = next(iter(NETWORKS))
    lines = []
    found = summaries(rows)
    for dataset in dict.fromkeys(summary.dataset for summary in found):
        of_it = [row for row in rows if row["dataset"] == dataset]
        what = {
            name: ", ".join(dict.fromkeys(row[name] for row in of_it)) for name in ("date", "device", "torch", "epochs")
        }
        lines += [f"**{dataset}**: {what['epochs']} epochs; {what['device']}, torch {what['torch']}, {what['date']}."]
        options = list(dict.fromkeys(row["options"] for row in of_it if row["options"]))
        lines += [f"Further options: {'; '.join(f'`{option}`' for option in options)}."] if options else []
        lines += [
            "",
            f"| network | parameters | runs | top-1, mean ± standard deviation | minus {first} |",
            "|---|---|---|---|---|",
        ]
        group = [summary for summary in found if summary.dataset == dataset]
        reference = next((summary for summary in group if summary.network == first), None)
        for summary in group:
            difference = ""
            if reference is not None and summary is not reference:
                difference = _with_spread(f"{summary.mean - reference.mean:+.2f}", summary.standard_error(reference))
            lines.append(
                f"| {summary.network} | {summary.parameters:,} | {len(summary.top1)} | "
                f"{_with_spread(f'{summary.mean:.2f}', summary.deviation)} | {difference} |"
            )
        lines.append("")
    return "\n".join(lines)


def figure(rows: Sequence[dict[str, Any]]) -> Any:
    """Every run a point, every mean a line with the standard deviation, a panel for each data set."""
    from matplotlib.figure import Figure

    from oriented1d.analysis.figures import COLOURS, MARKERS

    found = summaries(rows)
    datasets = list(dict.fromkeys(summary.dataset for summary in found))
    result = Figure(figsize=(1 + 4.5 * len(datasets), 4), layout="constrained")
    panels = result.subplots(1, len(datasets), squeeze=False)[0]
    for dataset, axes in zip(datasets, panels, strict=True):
        group = [summary for summary in found if summary.dataset == dataset]
        for position, summary in enumerate(group):
            index = list(NETWORKS).index(summary.network)
            colour = COLOURS[index]
            spread = 0.0 if math.isnan(summary.deviation) else summary.deviation
            axes.errorbar(position, summary.mean, spread, fmt="_", markersize=24, color=colour, capsize=5)
            offsets = [position + 0.08 * (i - (len(summary.top1) - 1) / 2) for i in range(len(summary.top1))]
            axes.plot(offsets, summary.top1, MARKERS[index], color=colour, markersize=5, markeredgecolor="white")
        axes.set_xticks(range(len(group)), [summary.network.replace(" ", "\n") for summary in group])
        axes.set_title(dataset)
        axes.set_ylabel("top-1 after the last epoch (%)")
        axes.grid(axis="y", alpha=0.3)
    return result


def write_into(document: Path, text: str) -> None:
    """Replace what stands between the two marks of a report in a document.

    Raises:
        UserError: the marks are not there.
    """
    before = document.read_text()
    if before.count(_BEGIN) != 1 or before.find(_END) < before.find(_BEGIN):
        raise UserError(f"--document: expected the marks {_BEGIN} and {_END} in {document}")
    head, _, rest = before.partition(_BEGIN)
    with unfinished(document) as partial:
        partial.write_text(f"{head}{_BEGIN}\n\n{text}\n{_END}{rest.partition(_END)[2]}")


# Command line --------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="oriented1d study", description="Train the same small network with other kernels, and compare."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser(
        "run", help="train", epilog="What follows -- are options of oriented1d fit, for all runs."
    )
    run.add_argument("configs", nargs="+", type=Path, metavar="CONFIG", help="a file of options for each data set")
    run.add_argument("--root", action="append", default=[], metavar="DATASET=FOLDER", help="where a data set is")
    run.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS), metavar="NETWORK")
    run.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    run.add_argument("--folder", type=Path, default=Path("runs/study"), help="for logs and checkpoints (%(default)s)")
    run.add_argument("--jobs", type=int, default=12, help="runs at a time (default: %(default)s)")
    run.add_argument("--minutes", type=float, default=math.inf, help="end after so long; the same command goes on")
    report = commands.add_parser("report", help="the results as a table and a figure")
    report.add_argument("--plot", metavar="FIGURE", help="figure to write")
    report.add_argument("--document", type=Path, help="Markdown file to write the table into, between its marks")
    for command in (run, report):
        command.add_argument("--results", type=Path, default=Path("benchmarks/results/study.csv"), metavar="CSV")
    return parser


def _runs(options: argparse.Namespace, further: Sequence[str]) -> list[Run]:
    if options.jobs < 1:
        raise UserError(f"--jobs: expected at least 1, got {options.jobs}")
    roots = dict(root.partition("=")[::2] for root in options.root)
    configs = {config.stem.removeprefix("study_"): config for config in options.configs}
    for config in options.configs:
        if not config.is_file():
            raise UserError(f"CONFIG: expected a file, got {config}, which does not exist")
    for dataset, folder in roots.items():
        if dataset not in configs or not folder:
            raise UserError(
                f"--root: expected one of {', '.join(configs)}, then = and a folder, got {dataset}={folder}"
            )
    return [
        # Seeds last: what runs together needs different kernels, and each of them is compiled once.
        Run(
            config,
            network,
            seed,
            options.folder / dataset / re.sub(r"\W", "_", network) / f"seed{seed}",
            roots.get(dataset),
            tuple(further),
        )
        for seed in options.seeds
        for dataset, config in configs.items()
        for network in options.networks
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """``oriented1d study``. 1 if runs are missing in the end, else 0."""
    args = list(sys.argv[1:] if argv is None else argv)
    end = args.index("--") if "--" in args else len(args)
    options = _parser().parse_args(args[:end])
    check_writable(options.results.parent, "--results")
    if options.command == "run":
        missing = run_all(_runs(options, args[end + 1 :]), options.results, options.jobs, options.minutes)
        return 1 if missing else 0
    rows = list(read_rows(options.results).values())
    if not rows:
        raise UserError(
            f"--results: expected a file of oriented1d study run, got {options.results}, with nothing in it"
        )
    text = table(rows)
    print(text)
    if options.document:
        write_into(options.document, text)
        print(f"wrote {options.document}")
    if options.plot:
        from oriented1d.analysis import figures

        figures.save(figure(rows), options.plot)
        print(f"wrote {options.plot}")
    return 0
