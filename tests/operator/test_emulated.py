"""The numbers of the CUDA kernels without a GPU: their text runs on the CPU (``emulator.py``), against float64."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from oriented1d import geometry, oriented_conv1d, use_backend
from oriented1d.operator import cuda
from oriented1d.operator.cuda import mma, stem
from oriented1d.operator.layout import memory_format
from oriented1d.operator.stem import _cpu_backward, _cpu_forward
from tests.operator.emulator import ASCENDING, COMPILER, DESCENDING, Emulation, emulated
from tests.operator.reference import inside_nan, relative_error

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
RANDOM = 2  # a seed
EPS = 1e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture
def emulation(folder: Path) -> Iterator[Emulation]:
    with emulated(folder) as emulation:
        yield emulation


class Case(NamedTuple):
    """A layer and its images."""

    shape: tuple[int, int, int, int]
    directions: int
    kernel_size: int
    stride: int
    dtype: torch.dtype
    last: bool


def check(emulation: Emulation, case: Case) -> None:
    """Outputs and gradients of a layer, the same bits in any order of threads, and within rounding of float64."""
    shape, directions, kernel_size, stride, dtype, last = case
    n, c, h, w = shape
    angles = geometry.layer_angles(c, directions, 0.02 if directions % 2 else 0.0)
    taps = geometry.layer_taps(geometry.directions(angles), kernel_size)
    x, g = inside_nan(shape, dtype, last), inside_nan((n, c, -(-h // stride), -(-w // stride)), dtype, last)
    weight, bias = torch.randn(c, kernel_size).to(dtype), torch.randn(c).to(dtype)
    cuda.expect_gradients(x, weight, taps, stride)  # compiles what the gradients need beside the forward pass

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
    "case",
    [
        Case((12, 13, 17, 6), 8, 31, 1, BF16, False),
        Case((9, 37, 16, 17), 3, 7, 1, HALF, False),
        Case((3, 7, 33, 70), 5, 31, 1, BF16, False),  # strips
        Case((30, 9, 20, 1), 4, 1, 1, HALF, False),
        Case((9, 10, 16, 15), 1, 15, 1, BF16, False),  # lines split between blocks
        Case((7, 10, 28, 27), 3, 31, 2, BF16, False),
        Case((6, 8, 21, 40), 4, 7, 2, HALF, False),
        Case((15, 5, 17, 3), 5, 31, 1, BF16, False),  # far taps find nothing in narrow images, which lie closer
        Case((7, 64, 14, 13), 8, 31, 1, BF16, True),
        Case((17, 64, 7, 5), 8, 31, 1, BF16, True),  # far taps find nothing in small images, which lie closer
        Case((20, 32, 6, 7), 4, 31, 2, HALF, True),
        Case((4, 12, 28, 31), 3, 7, 1, HALF, True),  # four channels at a time
        Case((2, 48, 67, 20), 3, 31, 1, BF16, True),
        Case((30, 32, 1, 5), 4, 1, 1, HALF, True),
        Case((7, 32, 30, 32), 2, 15, 1, HALF, True),  # lines split between blocks
        Case((9, 8, 28, 30), 1, 15, 1, BF16, True),  # images split between blocks
        Case((7, 24, 27, 28), 3, 31, 2, BF16, True),
        Case((6, 32, 21, 40), 4, 7, 2, HALF, True),
        Case((2, 16, 19, 133), 2, 15, 2, BF16, True),  # two kernels, one for every second row
    ],
)
def test_on_tensor_cores(emulation: Emulation, case: Case) -> None:
    check(emulation, case)
    kinds = {spec.kind for spec in emulation.launched if isinstance(spec, mma.Spec)}
    assert kinds == ({"gather", "weight"} if case.stride == 1 else {"adjoint"})


@pytest.mark.parametrize(
    ("case", "capability"),
    [
        (Case((7, 13, 7, 6), 8, 31, 1, FLOAT, False), (9, 0)),  # regions
        (Case((3, 7, 60, 58), 3, 15, 1, FLOAT, False), (8, 0)),  # several of an image
        (Case((5, 6, 28, 20), 4, 7, 2, FLOAT, False), (7, 5)),
        (Case((5, 13, 14, 13), 3, 15, 1, HALF, False), (7, 5)),
        (Case((5, 24, 14, 13), 3, 31, 1, FLOAT, True), (9, 0)),
        (Case((3, 10, 30, 45), 4, 7, 1, FLOAT, True), (9, 0)),  # strips
        (Case((3, 24, 19, 33), 3, 15, 2, FLOAT, True), (9, 0)),
        (Case((2, 24, 20, 33), 2, 15, 1, FLOAT, True), (9, 0)),  # 12 channels an angle: 8 and 4, by sectors
        (Case((2, 48, 67, 20), 2, 7, 1, BF16, True), (9, 0)),  # 24: 16 and 8, large images with shared sectors
        (Case((3, 12, 20, 31), 3, 7, 1, BF16, True), (7, 5)),  # two channels a thread
        (Case((3, 7, 20, 9), 3, 7, 3, HALF, True), (9, 0)),  # channels that no copy is aligned to
    ],
)
def test_without_tensor_cores(emulation: Emulation, case: Case, capability: tuple[int, int]) -> None:
    emulation.capability, emulation.processors = capability, 1  # a block has several images, one after the other
    if capability == (7, 5):
        emulation.memory = 65536
    check(emulation, case)
    assert not any(isinstance(spec, mma.Spec) for spec in emulation.launched)


@pytest.mark.parametrize(
    ("case", "capability"),
    [
        (Case((9, 10, 16, 15), 1, 15, 1, BF16, False), (9, 0)),  # tensor cores
        (Case((9, 37, 16, 17), 3, 7, 1, HALF, False), (9, 0)),
        (Case((9, 8, 28, 30), 1, 15, 1, BF16, True), (9, 0)),
        (Case((4, 12, 28, 31), 3, 7, 1, HALF, True), (9, 0)),
        (Case((6, 8, 21, 40), 4, 7, 2, HALF, False), (9, 0)),  # planes; their adjoint on tensor cores
        (Case((6, 32, 21, 40), 4, 7, 2, HALF, True), (9, 0)),  # strips; the same
        (Case((5, 13, 14, 13), 3, 15, 1, HALF, False), (7, 5)),
        (Case((3, 12, 20, 31), 3, 7, 1, BF16, True), (7, 5)),  # two channels a thread
        (Case((3, 7, 20, 9), 3, 7, 3, HALF, True), (9, 0)),  # an adjoint without tensor cores
    ],
)
def test_float32_parameters_give_the_bits_of_rounded_ones(
    emulation: Emulation, case: Case, capability: tuple[int, int]
) -> None:
    shape, directions, kernel_size, stride, dtype, last = case
    n, c, h, w = shape
    emulation.capability = capability
    taps = geometry.layer_taps(geometry.directions(geometry.layer_angles(c, directions)), kernel_size)
    x, g = inside_nan(shape, dtype, last), inside_nan((n, c, -(-h // stride), -(-w // stride)), dtype, last)
    weight, bias = torch.randn(c, kernel_size), torch.randn(c)
    of_input = "gather" if stride == 1 else "adjoint"
    results = []
    for parameters in ((weight, bias), (weight.to(dtype), bias.to(dtype))):
        wide = parameters[0].dtype == FLOAT
        emulation.begun.clear()
        emulation.launched.clear()
        cuda.expect_gradients(x, parameters[0], taps, stride)
        assert {(spec.kind, spec.wide) for spec in emulation.begun} == {(of_input, wide), ("weight", False)}
        results.append(
            [
                cuda.forward(x, *parameters, taps, stride, residual=True),
                cuda.forward(x, parameters[0], None, taps, stride, residual=False),
                cuda.grad_input(g, parameters[0], taps, h, w, stride, True, last),
            ]
        )
        assert {(spec.kind, spec.wide) for spec in emulation.launched} == {("gather", wide), (of_input, wide)}
    for float32, rounded in zip(*results, strict=True):
        assert torch.equal(float32, rounded)
        assert rounded.abs().sum() > 0


@pytest.mark.parametrize(
    ("size", "channels", "image_channels", "kernel_size", "stride", "dtype"),
    [
        ((2, 33, 47), 64, 3, 31, 2, FLOAT),
        ((2, 21, 30), 32, 1, 15, 1, BF16),
        ((5, 19, 7), 16, 2, 9, 3, FLOAT),
    ],
)
def test_stem(
    emulation: Emulation,
    size: tuple[int, int, int],
    channels: int,
    image_channels: int,
    kernel_size: int,
    stride: int,
    dtype: torch.dtype,
) -> None:
    n, height, width = size
    taps = geometry.layer_taps(geometry.directions(geometry.layer_angles(channels, channels // 8, 0.02)), kernel_size)
    image = inside_nan((n, image_channels, height, width + 3), dtype, False)[..., 2:-1]
    shapes = (channels, image_channels), (channels,), (channels, kernel_size), *[(channels,)] * 3
    projection, offset, weight, bias, *norm = (torch.randn(shape) for shape in shapes)
    how = EPS, taps, stride
    g = torch.randn(n, channels, -(-height // stride), -(-width // stride)).bfloat16()

    def results(order: int) -> list[Tensor]:
        emulation.order = order
        y, conv = stem.forward(image, (projection, offset, weight, bias, *norm), *how, BF16, keep=True)
        return [y, conv, *stem.backward(g, conv, image, *norm, *how)]

    y, conv, *gradients = ours = results(ASCENDING)
    for order in (DESCENDING, RANDOM):
        assert all(torch.equal(a, b) for a, b in zip(results(order), ours, strict=True)), "depends on the order"
    wide = [t.double() for t in (image, projection, offset, weight, bias, *norm)]
    layer = taps.directions.text
    y64, conv64 = _cpu_forward(*wide, EPS, layer, stride, torch.float64, True)
    assert relative_error(conv, conv64) < 8e-3
    assert relative_error(y, y64) < 8e-3
    gradients64 = _cpu_backward(g.double(), conv.double(), wide[0], *wide[5:], EPS, layer, kernel_size, stride)
    for a, e in zip(gradients, gradients64, strict=True):
        assert relative_error(a, e) < 8e-3
