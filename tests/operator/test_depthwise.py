"""Depthwise layers with 2D kernels: the operator, and its kernel in the emulator and on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from oriented1d.layers import DepthwiseConv2d
from oriented1d.operator import cuda, depthwise
from oriented1d.operator.cuda import mma
from tests.operator.emulator import ASCENDING, COMPILER, DESCENDING, Emulation, emulated
from tests.operator.reference import inside_nan, relative_error

BF16, HALF = torch.bfloat16, torch.float16
TOLERANCE = {BF16: 4e-3, HALF: 6e-4}
LAST = torch.channels_last
SHAPES = [(3, 48, 14, 13), (2, 24, 67, 20), (5, 16, 7, 9), (1, 40, 30, 1)]


def expected(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.double()
    return F.conv2d(x.double(), weight.double(), bias, padding=weight.shape[-1] // 2, groups=len(weight))


def parameters(channels: int, kernel_size: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    shapes = (channels, 1, kernel_size, kernel_size), (channels,)
    return tuple(torch.randn(shape, device=device).to(dtype) for shape in shapes)  # type: ignore[return-value]


@pytest.fixture
def emulation(tmp_path: Path) -> Iterator[Emulation]:
    with emulated(tmp_path) as emulation:
        yield emulation


@pytest.mark.skipif(COMPILER is None, reason="needs g++")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kernel_size", "dtype"), [(7, BF16), (5, HALF), (3, BF16)])
def test_kernel_in_the_emulator(
    emulation: Emulation, shape: tuple[int, int, int, int], kernel_size: int, dtype: torch.dtype
) -> None:
    x = inside_nan(shape, dtype, True)
    weight, bias = parameters(shape[1], kernel_size, dtype)
    results = []
    for order in (ASCENDING, DESCENDING, 2):
        emulation.order = order
        results.append([cuda.depthwise(x, weight, bias, False), cuda.depthwise(x, weight, None, True)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))
    forward, of_input = results[0]
    assert forward.is_contiguous(memory_format=LAST)
    assert relative_error(forward, expected(x, weight, bias)) < TOLERANCE[dtype]
    assert relative_error(of_input, expected(x, weight.flip(2, 3), None)) < TOLERANCE[dtype]
    assert all(isinstance(spec, mma.Spec) and spec.square for spec in emulation.launched)


@pytest.mark.parametrize("kernel_size", [3, 5, 7])
@pytest.mark.parametrize("side", [7, 14, 28, 56, 200])
def test_there_is_a_kernel_for_every_size(kernel_size: int, side: int) -> None:
    shape = (side, side)
    spec = mma.choose("gather", "bf16", 8, kernel_size, 1, (0.0,), shape, shape, 101376, square=True)
    assert spec is not None
    ((program, band),) = mma.programs(spec)
    assert len(program.taps) == kernel_size**2
    assert band.gap(side) == kernel_size // 2
    assert {e for e, _ in band.blocks} == set(range(-(kernel_size // 2), kernel_size // 2 + 1))


def test_operator_is_the_convolution_with_all_its_derivatives() -> None:
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64).contiguous(memory_format=LAST).requires_grad_()
    weight, bias = (t.double().requires_grad_() for t in parameters(3, 5, torch.float32))
    y = depthwise.depthwise_conv2d(x, weight, bias)
    torch.testing.assert_close(y, expected(x, weight, bias))
    assert y.is_contiguous(memory_format=LAST)
    torch.library.opcheck(torch.ops.oriented1d.depthwise_conv2d, (x, weight, bias))
    torch.library.opcheck(torch.ops.oriented1d.depthwise_conv2d, (x.detach(), weight.detach(), None))
    torch.library.opcheck(torch.ops.oriented1d.depthwise_conv2d_grad_input, (x.detach(), weight.detach()))
    assert torch.autograd.gradcheck(depthwise.depthwise_conv2d, (x, weight, bias))
    assert torch.autograd.gradgradcheck(depthwise.depthwise_conv2d, (x, weight, bias))


def test_layer_is_the_convolution_where_there_is_no_kernel() -> None:
    layer = DepthwiseConv2d(6, 7)
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert layer.weight.shape == (6, 1, 7, 7)
    x = torch.randn(2, 6, 9, 8)
    torch.testing.assert_close(layer(x), expected(x, layer.weight, layer.bias).float())
    assert not depthwise.supported(x.contiguous(memory_format=LAST), layer.weight)


@pytest.mark.parametrize(
    ("dtype", "channels", "kernel_size", "reason"),
    [
        (torch.float32, 64, 7, "torch.float32"),
        (BF16, 64, 9, "a kernel size of 9"),
        (BF16, 60, 7, "channels in no multiple of 8"),
    ],
)
def test_what_has_no_kernel(dtype: torch.dtype, channels: int, kernel_size: int, reason: str) -> None:
    assert cuda.depthwise_unsupported(torch.device("cuda", 0), dtype, channels, kernel_size) == reason


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (4, 96, 56, 56), (2, 32, 33, 130), (16, 64, 28, 28)])
@pytest.mark.parametrize("kernel_size", [3, 7])
@pytest.mark.parametrize("dtype", [BF16, HALF])
@pytest.mark.parametrize("compiled", [False, True])
def test_layer_on_a_gpu(shape: tuple[int, int, int, int], kernel_size: int, dtype: torch.dtype, compiled: bool) -> None:
    layer = DepthwiseConv2d(shape[1], kernel_size).cuda().to(memory_format=LAST)
    x = inside_nan(shape, torch.float32, True).cuda().contiguous(memory_format=LAST).requires_grad_()
    g = torch.randn(shape, device="cuda", dtype=dtype)
    ran = depthwise.supported(x, layer.weight)
    run = torch.compile(layer, fullgraph=True) if compiled else layer
    with torch.autocast("cuda", dtype):
        assert depthwise.supported(x, layer.weight)
        y = run(x)
    assert not ran  # float32 without autocast
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=LAST)
    leaves = [x, layer.weight, layer.bias]
    ours = [y, *torch.autograd.grad(y, leaves, g)]
    wide = [t.detach().to(dtype).double().requires_grad_() for t in leaves]
    y64 = expected(*wide)
    for name, a, e in zip("yxwb", ours, [y64, *torch.autograd.grad(y64, wide, g.double())], strict=True):
        assert relative_error(a, e) < TOLERANCE[dtype], name
