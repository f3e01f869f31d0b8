"""The numbers of the CUDA kernels without a GPU: their text runs on the CPU (``emulator.py``), against float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from oriented1d import geometry, oriented_conv1d, use_backend
from oriented1d.operator import cuda
from oriented1d.operator.cuda import mma
from oriented1d.operator.layout import memory_format
from tests.operator.emulator import ASCENDING, COMPILER, DESCENDING, Emulation, emulated
from tests.operator.reference import relative_error

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
RANDOM = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture
def emulation(folder: Path) -> Iterator[Emulation]:
    with emulated(folder) as emulation:
        yield emulation


def images(shape: tuple[int, int, int, int], dtype: torch.dtype, last: bool) -> Tensor:
    """Random images inside a field of NaN; contiguous ones at an odd address."""
    n, c, h, w = shape
    field = torch.full(((n + 2) * c * h * w + 1,), math.nan, dtype=dtype)
    if last:
        view = field[:-1].view(n + 2, h, w, c)[1:-1].permute(0, 3, 1, 2)
    else:
        view = field[1:].view(n + 2, c, h, w)[1:-1]
    return view.copy_(torch.randn(shape))


def check(
    emulation: Emulation,
    shape: tuple[int, int, int, int],
    directions: int,
    kernel_size: int,
    stride: int,
    dtype: torch.dtype,
    last: bool,
) -> None:
    """Outputs and gradients of a layer, the same bits in any order of threads, and within rounding of float64."""
    n, c, h, w = shape
    angles = geometry.layer_angles(c, directions, 0.02 if directions % 2 else 0.0)
    taps = geometry.layer_taps(geometry.directions(angles), kernel_size)
    x, g = images(shape, dtype, last), images((n, c, -(-h // stride), -(-w // stride)), dtype, last)
    weight, bias = torch.randn(c, kernel_size).to(dtype), torch.randn(c).to(dtype)
    cuda.expect_gradients(x, taps, stride)  # compiles what the gradients need beside the forward pass

    def results(order: int) -> list[Tensor]:
        emulation.order = order
        y = cuda.forward(x, weight, bias, taps, stride, residual=True)
        of_input = cuda.grad_input(g, weight, taps, h, w, stride, True, last)
        return [y, of_input, *cuda.grad_weight(g, x, taps, stride, with_bias=True)]

    ours = results(ASCENDING)
    for order in (DESCENDING, RANDOM):
        for name, a, b in zip(("output", "input", "weight", "bias"), results(order), ours, strict=True):
            assert torch.equal(a, b), f"{name}: depends on the order of threads"
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    with use_backend("portable"):
        y = oriented_conv1d(*leaves[:2], angles, leaves[2], stride=stride, residual=True)
        expected = [y, *torch.autograd.grad(y, leaves, g.double())]
    assert ours[0].is_contiguous(memory_format=memory_format(last))
    errors = [relative_error(a, e) for a, e in zip(ours, expected, strict=True)]
    assert max(errors) < TOLERANCE[dtype], errors


@pytest.mark.parametrize(
    ("shape", "directions", "kernel_size", "stride", "dtype", "last"),
    [
        ((3, 13, 7, 6), 8, 31, 1, BF16, False),
        ((2, 37, 16, 17), 3, 7, 1, HALF, False),
        ((2, 7, 33, 70), 5, 31, 1, BF16, False),  # strips
        ((5, 9, 5, 1), 4, 1, 1, HALF, False),
        ((3, 10, 28, 27), 3, 31, 2, BF16, False),
        ((2, 8, 21, 40), 4, 7, 2, HALF, False),
        ((3, 64, 14, 13), 8, 31, 1, BF16, True),
        ((2, 12, 28, 31), 3, 7, 1, HALF, True),  # four channels at a time
        ((1, 40, 67, 20), 5, 31, 1, BF16, True),
        ((5, 32, 1, 5), 4, 1, 1, HALF, True),
        ((3, 24, 27, 28), 3, 31, 2, BF16, True),
        ((2, 32, 21, 40), 4, 7, 2, HALF, True),
    ],
)
def test_on_tensor_cores(
    emulation: Emulation,
    shape: tuple[int, int, int, int],
    directions: int,
    kernel_size: int,
    stride: int,
    dtype: torch.dtype,
    last: bool,
) -> None:
    check(emulation, shape, directions, kernel_size, stride, dtype, last)
    ours = {spec.kind for spec in emulation.launched if isinstance(spec, mma.Spec)}
    assert ours == ({"gather", "weight"} if stride == 1 else {"adjoint"})
