"""Speed of the operator: ``oriented1d benchmark operator`` and ``oriented1d benchmark table5``.

All candidates of a line are timed side by side in one run: each repetition runs every one of them once, on data that is
not in a cache. Results are compared with the portable path in float64 first; what is wrong is not timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from oriented1d import geometry, oriented_conv1d
from oriented1d.analysis.benchmark.results import quantiles
from oriented1d.operator import library, portable
from oriented1d.operator.layout import memory_format

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
LAYOUTS = {"contiguous": False, "channels_last": True}
SHAPES = {
    "cpu": [(8, 96, 56, 56), (8, 384, 14, 14)],
    "cuda": [(64, 512, 56, 56), (64, 512, 28, 28), (64, 512, 14, 14)],
}
DIRECTIONS = ("forward", "grad-input", "grad-weight", "total")
# Relative errors of a result that is right: sums of float32, then one rounding to the dtype.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
_COLD_BYTES = 3e8  # more than the caches of a GPU hold
_SLEEP_CYCLES = 20_000_000  # the GPU waits this long, so that the host is ahead of it


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of a benchmark: a layer of one angle, or of eight directions (``angle`` None; radians)."""

    shape: tuple[int, int, int, int]
    kernel_size: int
    stride: int
    dtype: torch.dtype
    channels_last: bool
    angle: float | None
    device: torch.device

    @property
    def angles(self) -> Tensor:
        channels = self.shape[1]
        return geometry.layer_angles(channels) if self.angle is None else torch.full((channels,), self.angle)

    def tensors(self, batch: int | None = None) -> tuple[Tensor, Tensor]:
        """Random input and gradient of the output."""
        n, c, h, w = self.shape
        sizes = (batch or n, c, h, w), (batch or n, c, -(-h // self.stride), -(-w // self.stride))
        x, g = (
            torch.randn(size, device=self.device)
            .to(self.dtype)
            .contiguous(memory_format=memory_format(self.channels_last))
            for size in sizes
        )
        return x, g


class ParityError(RuntimeError):
    """A result differs from that of the portable path in float64."""


def check_parity(case: Case) -> float:
    """Largest relative error of the three directions against the portable path in float64, on a small batch.

    Raises:
        ParityError: it is larger than rounding explains.
    """
    x, g = case.tensors(batch=min(2, case.shape[0]))
    w = torch.randn(case.shape[1], case.kernel_size, device=case.device).to(case.dtype)
    leaves = [x.requires_grad_(), w.requires_grad_()]
    y = oriented_conv1d(x, w, case.angles, stride=case.stride)
    actual = [y, *torch.autograd.grad(y, leaves, g)]
    layer = geometry.layer_taps(geometry.directions(case.angles), case.kernel_size)
    x64, w64, g64 = (t.detach().double().contiguous() for t in (x, w, g))
    expected = [
        portable.forward(x64, w64, None, layer, case.stride, False),
        portable.grad_input(g64, w64, layer, *case.shape[2:], case.stride, False, False),
        portable.grad_weight(g64, x64, layer, case.stride, False)[0],
    ]
    return worst_error(str(case), actual, expected, TOLERANCE[case.dtype])


def worst_error(what: str, actual: Iterable[Tensor], expected: Iterable[Tensor], tolerance: float) -> float:
    """The largest relative error of several tensors against those in float64.

    Raises:
        ParityError: it is larger than ``tolerance``, or one is not a number.
    """
    errors = [((a.double() - e).norm() / e.norm()).item() for a, e in zip(actual, expected, strict=True)]
    worst = math.inf if any(math.isnan(error) for error in errors) else max(errors)
    if worst > tolerance:
        raise ParityError(f"{what}: relative errors {errors}, expected at most {tolerance}")
    return worst


def measure(functions: dict[str, Callable[[int], object]], device: torch.device, runs: int) -> dict[str, list[float]]:
    """Milliseconds of each run of each function, side by side. Functions take the number of the run."""
    for i in range(2):
        for function in functions.values():
            function(i)
    times: dict[str, list[float]] = {name: [] for name in functions}
    if device.type != "cuda":
        for i in range(runs):
            for name, function in functions.items():
                began = time.perf_counter()
                function(i)
                times[name].append((time.perf_counter() - began) * 1e3)
        return times
    for i in range(runs):
        torch.cuda.synchronize(device)
        torch.cuda._sleep(_SLEEP_CYCLES)
        events = {}
        for name, function in functions.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function(i)
            end.record()
            events[name] = start, end
        torch.cuda.synchronize(device)
        for name, (start, end) in events.items():
            times[name].append(start.elapsed_time(end))
    return times


def cold_sets(bytes_of_set: int, device: torch.device) -> int:
    """How many sets of tensors, taken in turn, are in no cache of a GPU when their turn comes; one on the CPU."""
    return 1 if device.type == "cpu" else 1 + math.ceil(_COLD_BYTES / bytes_of_set)


def measure_case(case: Case, runs: int) -> dict[str, list[float]]:
    """Times of our four directions and of what they are compared with, by name."""
    _, c, h, w = case.shape
    k, s = case.kernel_size, case.stride
    layer = geometry.directions(case.angles)
    taps = geometry.layer_taps(layer, k)
    bytes_of_set = 2 * math.prod(case.shape) * case.dtype.itemsize
    sets = [case.tensors() for _ in range(cold_sets(bytes_of_set, case.device))]
    copies = [torch.empty_like(x) for x, _ in sets]
    weight = torch.randn(c, 1, 1, k, device=case.device).to(case.dtype)
    leaf_weight = weight.clone().requires_grad_()
    leaves = [x.detach().requires_grad_() for x, _ in sets]
    backend = library.backend_for(sets[0][0], taps, s)
    flat = weight.flatten(1)
    pick = lambda i: i % len(sets)  # noqa: E731

    def ours_total(i: int) -> object:
        y = oriented_conv1d(leaves[pick(i)], leaf_weight, layer, stride=s)
        return torch.autograd.grad(y, (leaves[pick(i)], leaf_weight), sets[pick(i)][1])

    def conv(x: Tensor, kernel: Tensor) -> Tensor:
        height, width = kernel.shape[2:]
        return F.conv2d(x, kernel, stride=s, padding=(height // 2, width // 2), groups=c)

    def conv_total(i: int) -> object:
        y = conv(leaves[pick(i)], leaf_weight)
        return torch.autograd.grad(y, (leaves[pick(i)], leaf_weight), sets[pick(i)][1])

    functions: dict[str, Callable[[int], object]] = {
        "copy": lambda i: copies[pick(i)].copy_(sets[pick(i)][0]),
        "forward": lambda i: oriented_conv1d(sets[pick(i)][0], weight, layer, stride=s),
        "grad-input": lambda i: backend.grad_input(sets[pick(i)][1], flat, taps, h, w, s, False, case.channels_last),
        "grad-weight": lambda i: backend.grad_weight(sets[pick(i)][1], sets[pick(i)][0], taps, s, False),
        "total": ours_total,
        "portable forward": lambda i: portable.forward(sets[pick(i)][0], flat, None, taps, s, False),
    }
    # Channels_last bfloat16 with few channels and wide kernels has been seen to hang on CPUs with AVX512_BF16.
    if not (case.device.type == "cpu" and case.dtype == torch.bfloat16 and c <= 16):
        functions["pytorch forward"] = lambda i: conv(sets[pick(i)][0], weight)
        functions["pytorch total"] = conv_total
        if k == 7:
            square = torch.randn(c, 1, 7, 7, device=case.device).to(case.dtype)
            functions["conv7x7 forward"] = lambda i: conv(sets[pick(i)][0], square)
    return measure(functions, case.device, runs)


def rows_of(case: Case, times: dict[str, list[float]]) -> list[dict[str, object]]:
    """Lines of the table and the CSV file, one for each direction."""
    medians = {name: statistics.median(values) for name, values in times.items()}
    n, c, h, w = case.shape
    inputs = n * c * h * w
    outputs = n * c * -(-h // case.stride) * -(-w // case.stride)
    moved = dict.fromkeys(DIRECTIONS, inputs + outputs) | {"total": 3 * (inputs + outputs)}
    angle = "8 directions" if case.angle is None else f"{math.degrees(case.angle):g}"
    rows = []
    for name in DIRECTIONS:
        p20, p50, p80 = quantiles(times[name])
        rival = "total" if name == "total" else "forward"
        row: dict[str, object] = {
            "shape": "x".join(map(str, case.shape)),
            "kernel_size": case.kernel_size,
            "stride": case.stride,
            "layout": "channels_last" if case.channels_last else "contiguous",
            "dtype": str(case.dtype).removeprefix("torch."),
            "angle": angle,
            "direction": name,
            "ms_p20": f"{p20:.4f}",
            "ms_p50": f"{p50:.4f}",
            "ms_p80": f"{p80:.4f}",
            "gb_per_s": f"{moved[name] * case.dtype.itemsize / p50 / 1e6:.1f}",
            "copy_ms": f"{medians['copy']:.4f}",
            "ratio_to_copy": f"{p50 / medians['copy']:.3f}",
        }
        for column, other in (
            ("ratio_to_pytorch_1xk", f"pytorch {rival}"),
            ("ratio_to_pytorch_7x7", f"conv7x7 {rival}"),
            ("ratio_to_portable", f"portable {rival}"),
        ):
            comparable = other in medians and name in ("forward", "total")
            row[column] = f"{p50 / medians[other]:.3f}" if comparable else ""
        rows.append(row)
    return rows


def run(options: argparse.Namespace) -> list[dict[str, object]]:
    shapes = options.shapes or SHAPES[options.device.type]
    angles = [None] if options.angles == "layer" else [math.pi * i / 8 for i in range(8)]
    rows: list[dict[str, object]] = []
    for shape in shapes:
        for dtype in options.dtypes:
            for layout in options.layouts:
                for angle in angles:
                    case = Case(
                        shape,
                        options.kernel_size,
                        options.stride,
                        DTYPES[dtype],
                        LAYOUTS[layout],
                        angle,
                        options.device,
                    )
                    error = check_parity(case)
                    rows += rows_of(case, measure_case(case, options.runs))
                    row = rows[-1]
                    print(f"{row['shape']} {dtype} {layout} {row['angle']}: relative error {error:.1e}", flush=True)
    return rows


def run_table5(options: argparse.Namespace) -> list[dict[str, object]]:
    """Table 5 of the paper: one angle at a time, N=64 and C=512, with and without grad-input.

    The original's script passed degrees where radians were meant, and its input asked for no gradient.
    """
    rows: list[dict[str, object]] = []
    for size in options.sizes:
        for kernel_size in options.kernel_sizes:
            for degrees in (0, 22.5, 45, 67.5, 90, 112.5, 135, 157.5):
                shape = (options.batch, options.channels, size, size)
                case = Case(shape, kernel_size, 1, torch.float32, False, math.radians(degrees), options.device)
                check_parity(case)
                times = {name: statistics.median(t) for name, t in measure_case(case, options.runs).items()}
                rows.append(
                    {
                        "size": size,
                        "kernel_size": kernel_size,
                        "angle": f"{degrees:g}",
                        "copy_ms": f"{times['copy']:.4f}",
                        "forward_ms": f"{times['forward']:.4f}",
                        "forward_backward_without_grad_input_ms": f"{times['forward'] + times['grad-weight']:.4f}",
                        "forward_backward_ms": f"{times['total']:.4f}",
                        "pytorch_horizontal_forward_ms": f"{times['pytorch forward']:.4f}",
                        "pytorch_horizontal_forward_backward_ms": f"{times['pytorch total']:.4f}",
                    }
                )
    return rows
