"""The portable path against the definition, pixel by pixel."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from oriented1d import geometry, oriented_conv1d, use_backend
from tests.operator import reference
from tests.operator.reference import relative_error

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@pytest.fixture(autouse=True)
def _portable():
    with use_backend("portable"):
        yield


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel_size", [1, 3, 7, 15])
@pytest.mark.parametrize("size", [(1, 1), (5, 3), (9, 14), (2, 21)])
@pytest.mark.parametrize("residual", [False, True])
def test_forward_is_the_definition(stride: int, kernel_size: int, size: tuple[int, int], residual: bool) -> None:
    x = torch.randn(2, 9, *size, dtype=torch.float64)
    w, b = torch.randn(9, kernel_size, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    angles = geometry.layer_angles(9, 8, 0.25)
    y = oriented_conv1d(x, w, angles, b, stride=stride, residual=residual)
    assert relative_error(y, reference.oriented_conv1d(x, w, angles, b, stride, residual)) < 1e-12


def test_angle_zero_is_a_horizontal_depthwise_convolution() -> None:
    x, w, b = torch.randn(2, 6, 12, 17), torch.randn(6, 1, 1, 31), torch.randn(6)
    y = oriented_conv1d(x, w, torch.zeros(6), b)
    assert relative_error(y, F.conv2d(x, w, b, padding=(0, 15), groups=6)) < 1e-6


def test_ninety_degrees_is_a_vertical_convolution_upwards() -> None:
    x, w = torch.randn(2, 6, 40, 17), torch.randn(6, 1, 1, 31)
    y = oriented_conv1d(x, w, torch.full((6,), np.pi / 2))
    assert relative_error(y, F.conv2d(x, w.transpose(2, 3).flip(2), padding=(15, 0), groups=6)) < 1e-6


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_of_every_dtype_against_autograd_of_a_dense_convolution(dtype: torch.dtype, stride: int) -> None:
    """The adjoints by an independent route: autograd through a dense 2D convolution in float64."""
    c, k = 8, 7
    x, w, b = torch.randn(2, c, 11, 13).to(dtype), torch.randn(c, k).to(dtype), torch.randn(c).to(dtype)
    angles = geometry.layer_angles(c)
    leaves = [t.detach().double().requires_grad_() for t in (x, w, b)]
    scatter = torch.zeros(c, k, k, k, dtype=torch.float64)
    for channel in range(c):
        for tap, (dy, dx) in enumerate(reference.taps(float(angles[channel]), k)):
            scatter[channel, tap, dy + k // 2, dx + k // 2] = 1
    dense = torch.einsum("ck,ckij->cij", leaves[1], scatter)[:, None]
    expected = F.conv2d(leaves[0], dense, leaves[2], stride=stride, padding=k // 2, groups=c)
    g = torch.randn(expected.shape).to(dtype)
    ours = [t.requires_grad_() for t in (x, w, b)]
    y = oriented_conv1d(*ours[:2], angles, ours[2], stride=stride)
    assert y.dtype == dtype
    assert relative_error(y, expected) < TOLERANCE[dtype]
    for actual, wanted in zip(
        torch.autograd.grad(y, ours, g), torch.autograd.grad(expected, leaves, g.double()), strict=True
    ):
        assert actual.dtype == dtype
        assert relative_error(actual, wanted) < TOLERANCE[dtype]


def test_low_precision_accumulates_in_float32() -> None:
    # 1 + 30 * 2**-9: in bfloat16 each step would round back to 1.
    w = torch.full((1, 31), 2.0**-9)
    w[0, 0] = 1.0
    y = oriented_conv1d(torch.ones(1, 1, 1, 31, dtype=torch.bfloat16), w.bfloat16(), [0.0])
    assert y[0, 0, 0, 15].item() == torch.tensor(1 + 30 * 2.0**-9).bfloat16().item() != 1.0


def test_goldens_of_the_original(goldens) -> None:
    arrays = {name: torch.from_numpy(a) for name, a in np.load(goldens / "operator.npz").items()}
    cases = sorted({name.split("_")[0] for name in arrays})
    assert len(cases) >= 6
    for case in cases:
        x, w, b = (arrays[f"{case}_{name}"].requires_grad_() for name in "xwb")
        y = oriented_conv1d(x, w, arrays[f"{case}_theta"].flatten(), b, stride=int(arrays[f"{case}_stride"]))
        assert relative_error(y, arrays[f"{case}_y"]) < 1e-6
        if f"{case}_gy" in arrays:
            gradients = torch.autograd.grad(y, (x, w, b), arrays[f"{case}_gy"])
            for gradient, name in zip(gradients, ("dx", "dw", "db"), strict=True):
                assert relative_error(gradient, arrays[f"{case}_{name}"]) < 1e-6
