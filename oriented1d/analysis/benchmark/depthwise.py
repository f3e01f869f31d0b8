"""Speed of depthwise layers with 2D kernels beside PyTorch's: ``oriented1d benchmark depthwise``.

Where there is no kernel of ours (see :mod:`oriented1d.operator.depthwise`) both are PyTorch's.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from oriented1d.analysis.benchmark.operator import DTYPES, TOLERANCE, cold_sets, measure, worst_error
from oriented1d.analysis.benchmark.results import quantiles
from oriented1d.operator import depthwise

Shape = tuple[int, int, int, int]
_grad_input = torch.ops.oriented1d.depthwise_conv2d_grad_input
# The layers of convnext_tiny at 224 x 224 with 128 images, and at 800 x 1344 with 8.
SHAPES: dict[str, list[Shape]] = {
    "cpu": [(8, 96, 56, 56)],
    "cuda": [(128, 96 << i, 56 >> i, 56 >> i) for i in range(4)] + [(8, 96 << i, 200 >> i, 336 >> i) for i in range(4)],
}


def _images(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).to(dtype).contiguous(memory_format=torch.channels_last)


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))


def _pytorch_grad_input(x: Tensor, g: Tensor, weight: Tensor) -> Tensor:
    pad = weight.shape[-1] // 2
    how = [1, 1], [pad, pad], [1, 1], False, [0, 0], len(weight), [True, False, False]
    return torch.ops.aten.convolution_backward(g, x, weight, None, *how)[0]


def check_parity(x: Tensor, g: Tensor, weight: Tensor, bias: Tensor) -> float:
    """Largest relative error of output and gradient of the input against float64, on two images.

    Raises:
        ParityError: it is larger than rounding explains.
    """
    x, g = x[:2], g[:2]
    actual = depthwise.depthwise_conv2d(x, weight, bias), _grad_input(g, weight)
    w64 = weight.double()
    expected = _convolution(x.double(), w64, bias.double()), _convolution(g.double(), w64.flip(2, 3), None)
    return worst_error(f"{tuple(x.shape)} {x.dtype}", actual, expected, TOLERANCE[x.dtype])


def measure_case(shape: Shape, k: int, dtype: torch.dtype, device: torch.device, runs: int) -> dict[str, list[float]]:
    """Times of both directions, of PyTorch's, and of a copy of the images, by name; wrong results are not timed."""
    number = cold_sets(2 * math.prod(shape) * dtype.itemsize, device)
    sets = [(_images(shape, dtype, device), _images(shape, dtype, device)) for _ in range(number)]
    copied = torch.empty_like(sets[0][0])
    weight = torch.randn(shape[1], 1, k, k, device=device).to(dtype)
    bias = torch.randn(shape[1], device=device).to(dtype)
    error = check_parity(*sets[0], weight, bias)
    print(f"{'x'.join(map(str, shape))} {dtype}: relative error {error:.1e}", flush=True)

    def cold(function: Callable[[Tensor, Tensor], object]) -> Callable[[int], object]:
        return lambda i: function(*sets[i % number])

    functions = {
        "copy": cold(lambda x, g: copied.copy_(x)),
        "forward": cold(lambda x, g: depthwise.depthwise_conv2d(x, weight, bias)),
        "grad-input": cold(lambda x, g: _grad_input(g, weight)),
        "pytorch forward": cold(lambda x, g: _convolution(x, weight, bias)),
        "pytorch grad-input": cold(lambda x, g: _pytorch_grad_input(x, g, weight)),
    }
    return measure(functions, device, runs)


def run(options: argparse.Namespace) -> list[dict[str, object]]:
    """Two rows for each shape and dtype: forward, and gradient of the input."""
    rows: list[dict[str, object]] = []
    for shape in options.shapes or SHAPES[options.device.type]:
        for dtype in map(DTYPES.__getitem__, options.dtypes):
            times = measure_case(shape, options.kernel_size, dtype, options.device, options.runs)
            rows += _rows(shape, dtype, options.kernel_size, times)
    return rows


def _rows(shape: Shape, dtype: torch.dtype, k: int, times: dict[str, list[float]]) -> list[dict[str, object]]:
    medians = {name: statistics.median(values) for name, values in times.items()}
    rows = []
    for name in ("forward", "grad-input"):
        row: dict[str, object] = {
            "shape": "x".join(map(str, shape)),
            "kernel_size": k,
            "dtype": str(dtype).removeprefix("torch."),
            "direction": name,
        }
        for q, ms in zip((20, 50, 80), quantiles(times[name]), strict=True):
            row[f"ms_p{q}"] = f"{ms:.4f}"
        row["copy_ms"] = f"{medians['copy']:.4f}"
        row["ratio_to_copy"] = f"{medians[name] / medians['copy']:.3f}"
        row["pytorch_ms"] = f"{medians[f'pytorch {name}']:.4f}"
        row["ratio_to_pytorch"] = f"{medians[name] / medians[f'pytorch {name}']:.3f}"
        rows.append(row)
    return rows
