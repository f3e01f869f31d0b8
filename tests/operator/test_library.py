"""The operators as PyTorch sees them: opcheck, derivatives, compile, export, autocast, FLOPs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from oriented1d import OrientedConv1d, geometry, oriented_conv1d
from oriented1d.operator import library
from tests.operator import reference
from tests.operator.reference import relative_error

LAYER = geometry.directions(geometry.layer_angles(8))
RUNS = (None, list(LAYER.angles), list(LAYER.counts))
THETA = (LAYER.per_channel(), [], [])


def double(*size: int) -> torch.Tensor:
    return torch.randn(*size, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("layer", [RUNS, THETA], ids=["directions", "theta"])
@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(layer: tuple, fmt: torch.memory_format, dtype: torch.dtype) -> None:
    x = torch.randn(2, 8, 9, 11).to(dtype).to(memory_format=fmt).requires_grad_()
    w = torch.randn(8, 1, 1, 7).to(dtype).requires_grad_()
    b = torch.randn(8).to(dtype).requires_grad_()
    y = library._conv(x, w, b, *layer, 2, True)
    g = torch.randn_like(y).requires_grad_()
    is_last = fmt == torch.channels_last
    tolerance = {"atol": 1e-2, "rtol": 1e-2} if dtype == torch.bfloat16 else {}
    torch.library.opcheck(library._conv, (x, w, b, *layer, 2, True), **tolerance)
    torch.library.opcheck(library._grad_input, (g, w, *layer, 9, 11, 2, True, is_last), **tolerance)
    torch.library.opcheck(library._grad_weight, (g, x, *layer, 7, 2, True), **tolerance)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("residual", [False, True])
def test_first_and_second_derivatives(stride: int, residual: bool) -> None:
    def run(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return oriented_conv1d(x, w, LAYER, b, stride=stride, residual=residual)

    tensors = double(1, 8, 5, 6), double(8, 5), double(8)
    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks(dynamic: bool) -> None:
    layer = OrientedConv1d(8, 7, stride=2)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for size in ((2, 8, 9, 11), (3, 8, 12, 10)):
        for fmt in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(size).to(memory_format=fmt).requires_grad_()
            eager, traced = layer(x), compiled(x)
            assert torch.equal(traced, eager)
            assert traced.stride() == eager.stride()
            ours, theirs = (torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]) for y in (traced, eager))
            assert all(torch.equal(a, b) and a.abs().sum() > 0 for a, b in zip(ours, theirs, strict=True))


def test_compiled_function_reads_the_tensor_of_angles_at_run_time() -> None:
    compiled = torch.compile(lambda x, w, a: oriented_conv1d(x, w, a), fullgraph=True, backend="aot_eager")
    x, w, angles = torch.randn(1, 8, 9, 9), torch.randn(8, 7), geometry.layer_angles(8)
    for turned in (angles, angles + 0.3, angles.flip(0)):
        assert relative_error(compiled(x, w, turned), reference.oriented_conv1d(x, w, turned)) < 1e-6
    with pytest.raises(ValueError, match="angles: expected finite"):
        compiled(x, w, angles * float("nan"))


def test_compiled_layer_follows_a_loaded_state_dict() -> None:
    layer = OrientedConv1d(8, 7)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 8, 9, 9)
    before = compiled(x).detach()
    layer.load_state_dict({**layer.state_dict(), "theta": layer.theta + 0.4})
    assert relative_error(compiled(x), reference.oriented_conv1d(x, layer.weight, layer.theta, layer.bias)) < 1e-6
    assert relative_error(compiled(x), before) > 0.1


def test_inductor() -> None:
    layer = OrientedConv1d(8, 7)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), layer, torch.nn.GELU())
    compiled = torch.compile(network, fullgraph=True)
    for fmt in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 3, 9, 11).to(memory_format=fmt)
        eager, fast = network(x), compiled(x)
        assert relative_error(fast, eager) < 1e-5
        ours, theirs = (torch.autograd.grad(y.square().sum(), list(network.parameters())) for y in (fast, eager))
        assert all(relative_error(a, b) < 1e-5 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_dynamic_batch_and_size(strict: bool) -> None:
    layer = OrientedConv1d(8, 7, stride=2).eval()
    n, h, w = (torch.export.Dim(name, min=3, max=64) for name in ("n", "h", "w"))
    program = torch.export.export(
        layer, (torch.randn(4, 8, 9, 11),), dynamic_shapes=({0: n, 2: h, 3: w},), strict=strict
    )
    x = torch.randn(3, 8, 14, 6)
    assert torch.equal(program.module()(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    layer = OrientedConv1d(8, 31)
    x = torch.randn(2, 8, 12, 14, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y = layer(x)
    assert y.dtype == dtype
    low = [t.detach().to(dtype) for t in (x, layer.weight, layer.bias)]
    expected = reference.oriented_conv1d(low[0], low[1], layer.theta, low[2])
    assert relative_error(y, expected) < (4e-3 if dtype == torch.bfloat16 else 5e-4)
    y.square().sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert x.grad.dtype == layer.weight.grad.dtype == torch.float32
    assert x.grad.abs().sum() > 0


def test_autocast_inside_compile() -> None:
    layer = OrientedConv1d(8, 7)
    x = torch.randn(2, 8, 12, 14)
    with torch.autocast("cpu", torch.bfloat16):
        eager = layer(x)
        traced = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert traced.dtype == eager.dtype == torch.bfloat16
    assert torch.equal(traced, eager)


def test_autocast_leaves_float64_alone() -> None:
    x, w = double(1, 8, 6, 6), double(8, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y = oriented_conv1d(x, w, LAYER)
    assert y.dtype == torch.float64


def test_flops_count_two_for_a_multiply_add() -> None:
    layer = OrientedConv1d(8, 31, stride=2)
    x = torch.randn(2, 8, 11, 20, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
    forward = 2 * (2 * 8 * 6 * 10) * 31
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * forward
