"""Speed and memory of whole networks: ``oriented1d benchmark network``.

Every line is measured in a process of its own, so that no network sees the memory, the compiled code or the crash of
another.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from oriented1d.analysis import networks
from oriented1d.analysis.benchmark.results import quantiles
from oriented1d.operator.layout import memory_format
from oriented1d.training.errors import UserError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MODES = ("inference", "training")
GRAPHS = ("reduce-overhead", "max-autotune")
COMPILE = ("none", "default", *GRAPHS)
"""Modes of ``torch.compile``; those of :data:`GRAPHS` record CUDA graphs."""

C = TypeVar("C")
M = TypeVar("M")


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the benchmark.

    Attributes:
        model: name of a network of ours or of timm.
        mode: ``"inference"`` (the logits, in evaluation mode and without gradients) or ``"training"`` (logits, cross
            entropy with random labels, gradients of all parameters; no optimizer's step) or ``"latency"`` (inference,
            each result waited for).
        batch: images ``(batch, 3, size, size)``.
        size: pixels.
        dtype: of autocast; ``"float32"`` for none. Weights are float32.
        layout: of images and weights, ``"contiguous"`` or ``"channels_last"``.
        compile: mode of ``torch.compile``, one of :data:`COMPILE`; ``"none"`` to run the network as it is.
        device: ``"cpu"`` or ``"cuda"``, with or without a number.
        warmup: steps before those that are timed.
        runs: timed steps.
    """

    model: str
    mode: str
    batch: int
    size: int
    dtype: str
    layout: str
    compile: str
    device: str
    warmup: int
    runs: int


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What one line gave.

    Attributes:
        ms: milliseconds of each timed step.
        peak_memory_mib: on CUDA the most that PyTorch's allocator had given out at once during the timed steps, weights
            included. On the CPU the growth of the process's resident memory from before the network was made to its
            peak, warm-up and compilation included. None where the system does not tell, and with CUDA graphs, whose
            memory the allocator does not count when they run.
    """

    ms: list[float]
    peak_memory_mib: float | None


def measure(case: Case) -> Measurement:
    """Measure one line in this process."""
    return prepare(case)[1]


def prepare(case: Case) -> tuple[Callable[[], object], Measurement]:
    """A step of a line, ready to be called again in this process, and what measuring it gave."""
    device = torch.device(case.device)
    before = _resident_mib("VmRSS")
    layout = memory_format(case.layout == "channels_last")
    model = networks.create(case.model).to(device)
    model = model.to(memory_format=layout)  # type: ignore[call-overload]
    images = torch.randn(case.batch, 3, case.size, case.size, device=device).contiguous(memory_format=layout)
    step = (_training if case.mode == "training" else _inference)(model, images, case)
    times(step, device, case.warmup)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    ms = (latencies if case.mode == "latency" else times)(step, device, case.runs)
    if device.type == "cuda":
        counted = case.compile not in GRAPHS
        return step, Measurement(ms, torch.cuda.max_memory_allocated(device) / 2**20 if counted else None)
    peak = _resident_mib("VmHWM")
    return step, Measurement(ms, None if before is None or peak is None else peak - before)


def _inference(model: nn.Module, images: torch.Tensor, case: Case) -> Callable[[], object]:
    run = _compiled(model, case)

    def step() -> None:
        with torch.inference_mode(), autocast(images.device, case.dtype):
            run(images)

    return step


def _training(model: nn.Module, images: torch.Tensor, case: Case) -> Callable[[], object]:
    model.train()
    run = _compiled(model, case)
    labels = torch.randint(int(model.num_classes), (case.batch,), device=images.device)  # type: ignore[arg-type]

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with autocast(images.device, case.dtype):
            loss = F.cross_entropy(run(images), labels)
        loss.backward()

    return step


def _compiled(model: nn.Module, case: Case) -> Callable[..., torch.Tensor]:
    return model if case.compile == "none" else torch.compile(model, mode=case.compile)


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """Autocast to one of :data:`DTYPES`; none for ``"float32"``."""
    return torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32")


def times(step: Callable[[], object], device: torch.device, runs: int) -> list[float]:
    """Milliseconds of each of ``runs`` steps, one after another. As in training, the GPU is not waited for between."""
    if device.type != "cuda":
        return latencies(step, device, runs)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
    torch.cuda.synchronize(device)
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in itertools.pairwise(events)]


def latencies(step: Callable[[], object], device: torch.device, runs: int) -> list[float]:
    """Milliseconds of each of ``runs`` steps, from the call until the device is done with it."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda device: None
    wait(device)
    clock = [time.perf_counter()]
    for _ in range(runs):
        step()
        wait(device)
        clock.append(time.perf_counter())
    return [(end - start) * 1e3 for start, end in itertools.pairwise(clock)]


def _resident_mib(key: str) -> float | None:
    # getrusage() would count what the parent held before it started this process.
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:")), None)


def isolated(function: Callable[[C], M], case: C) -> M | str:
    """Call ``function(case)`` in a new process.

    Returns:
        its result, or, if it failed or the process died, one line that says how.
    """
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, case))
    process.start()
    sender.close()
    try:
        answer = receiver.recv()
    except EOFError:
        process.join()
        code = process.exitcode or 0
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        answer = f"the process ended without a result, {how}"
    except BaseException:
        process.terminate()
        raise
    finally:
        process.join()
    return answer


def _answer(sender: Connection, function: Callable[[C], M], case: C) -> None:
    answer: M | str
    try:
        answer = function(case)
    except Exception as error:
        message = " ".join(str(error).split())
        answer = message if isinstance(error, UserError) else f"{type(error).__name__}: {message}"
    with contextlib.suppress(BrokenPipeError):  # the parent was stopped
        sender.send(answer)


def speed(batch: int, result: Measurement | str) -> dict[str, object]:
    """Columns of images per second, time and memory of steps of ``batch`` images; empty where nothing was measured."""
    if isinstance(result, str):
        return dict.fromkeys(("img_per_s_p20", "img_per_s_p50", "img_per_s_p80", "ms_p50", "peak_memory_mib"), "")
    rates = quantiles([batch / ms * 1e3 for ms in result.ms])
    return {
        **{f"img_per_s_p{q}": f"{rate:.2f}" for q, rate in zip((20, 50, 80), rates, strict=True)},
        "ms_p50": f"{quantiles(result.ms)[1]:.3f}",
        "peak_memory_mib": "" if result.peak_memory_mib is None else f"{result.peak_memory_mib:.0f}",
    }


def columns(case: Case) -> dict[str, object]:
    """Columns that say what was measured."""
    return {
        "model": case.model,
        "mode": case.mode,
        "batch": case.batch,
        "size": case.size,
        "dtype": case.dtype,
        "layout": case.layout,
        "compile": case.compile,
    }


def row_of(case: Case, result: Measurement | str) -> dict[str, object]:
    """A line of the table and the CSV file; ``result`` is a measurement, or what went wrong."""
    return {
        **columns(case),
        "warmup": case.warmup,
        "runs": case.runs,
        **speed(case.batch, result),
        "error": result if isinstance(result, str) else "",
    }


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """One for each network and mode, in the order given."""
    for model, mode in itertools.product(options.models, options.mode):
        yield Case(
            model,
            mode,
            options.batch_size,
            options.size,
            options.dtype,
            options.layout,
            options.compile,
            str(options.device),
            options.warmup,
            options.runs,
        )


def run(options: argparse.Namespace) -> list[dict[str, object]]:
    """One row for each network and mode, in the order given."""
    rows = []
    for case in cases(options):
        row = row_of(case, isolated(measure, case))
        print(f"{case.model} {case.mode}: {row['error'] or str(row['img_per_s_p50']) + ' images/s'}", flush=True)
        rows.append(row)
    return rows
