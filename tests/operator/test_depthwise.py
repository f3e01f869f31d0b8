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
from tests.operator.reference import inside_nan, kernels, relative_error

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


@pytest.mark.skipif(COMPILER is None, reason="needs g++")
@pytest.mark.parametrize(("kernel_size", "dtype"), [(7, BF16), (3, HALF)])
def test_float32_parameters_give_the_bits_of_rounded_ones(
    emulation: Emulation, kernel_size: int, dtype: torch.dtype
) -> None:
    x = inside_nan(SHAPES[0], dtype, True)
    weight, bias = parameters(SHAPES[0][1], kernel_size, torch.float32)
    for reverse, b in ((False, bias), (True, None)):
        rounded = cuda.depthwise(x, weight.to(dtype), None if b is None else b.to(dtype), reverse)
        assert torch.equal(cuda.depthwise(x, weight, b, reverse), rounded)
    assert [spec.wide for spec in emulation.launched] == [False, True, False, True]


@pytest.mark.skipif(COMPILER is None, reason="needs g++")
def test_images_of_any_layout_and_address_in_the_emulator(emulation: Emulation) -> None:
    shape = (2, 16, 7, 9)
    weight, bias = parameters(16, 7, BF16)
    x = torch.randn(shape).bfloat16()
    numbers = torch.empty(x.numel() + 1, dtype=BF16)
    moved = numbers[1:].as_strided(shape, x.contiguous(memory_format=LAST).stride())
    moved.copy_(x)
    assert moved.data_ptr() % 16 != 0
    for images in (x, moved, x[:, :, :1, :1].expand(shape)):
        y = cuda.depthwise(images, weight, bias, False)
        assert y.is_contiguous(memory_format=LAST)
        assert relative_error(y, expected(images, weight, bias)) < TOLERANCE[BF16]


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


@pytest.mark.parametrize("dtype", [BF16, HALF])
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_is_casting_by_hand(dtype: torch.dtype, compiled: bool) -> None:
    x = torch.randn(2, 6, 9, 8).contiguous(memory_format=LAST)
    tensors = [x, *parameters(6, 5, torch.float32)]
    leaves, others = ([t.clone().requires_grad_() for t in tensors] for _ in range(2))
    run = depthwise.depthwise_conv2d
    with torch.autocast("cpu", dtype):
        y = (torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run)(*leaves)
    expected = run(*(t.to(dtype) for t in others))
    assert y.dtype == dtype
    ours, theirs = (
        [z, *torch.autograd.grad(z.float().sin().sum(), all_, retain_graph=True)]
        for z, all_ in ((y, leaves), (expected, others))
    )
    assert all(g.dtype == torch.float32 for g in ours[1:])
    for a, e in zip(ours, theirs, strict=True):
        assert torch.equal(a, e)
        assert a.stride() == e.stride()
        assert a.abs().sum() > 0
    # Only of the weight: PyTorch's convolution of the gradients has nothing to read in it.
    assert torch.equal(torch.autograd.grad(y.float().sin().sum(), leaves[1])[0], theirs[2])


def test_double_backward_of_float32_parameters_beside_16_bits() -> None:
    x = torch.randn(2, 6, 9, 8).bfloat16().contiguous(memory_format=LAST)
    results = []
    for cast in (torch.float32, BF16):
        torch.manual_seed(1)
        leaves = [x.clone().requires_grad_(), *(t.requires_grad_() for t in parameters(6, 5, torch.float32))]
        y = depthwise.depthwise_conv2d(leaves[0], *(t.to(cast) for t in leaves[1:]))
        first = torch.autograd.grad(y.float().sin().sum(), leaves, create_graph=True)
        results.append([*first, *torch.autograd.grad(sum(g.float().square().sum() for g in first), leaves)])
    for a, e in zip(*results, strict=True):
        assert a.dtype == e.dtype
        assert relative_error(a, e) < 1e-2
        assert a.abs().sum() > 0


def test_parameters_of_other_dtypes() -> None:
    x = torch.randn(2, 6, 9, 8).bfloat16().contiguous(memory_format=LAST)
    weight, bias = parameters(6, 5, torch.float32)
    torch.library.opcheck(
        torch.ops.oriented1d.depthwise_conv2d,
        (x, weight.requires_grad_(), bias.requires_grad_()),
        atol=1e-2,
        rtol=1e-2,
    )
    torch.library.opcheck(torch.ops.oriented1d.depthwise_conv2d_grad_input, (x, weight.detach()))
    with pytest.raises(TypeError, match=r"weight: .*bfloat16, got torch\.float64"):
        depthwise.depthwise_conv2d(x, weight.double(), None)
    with pytest.raises(TypeError, match=r"bias: .*bfloat16, got torch\.float16"):
        depthwise.depthwise_conv2d(x, weight, bias.half())
    with pytest.raises(TypeError, match=r"weight: .*float32, got torch\.bfloat16"):
        depthwise.depthwise_conv2d(x.float(), weight.bfloat16(), None)


def test_both_roads_are_the_same() -> None:
    x, g = (torch.randn(2, 8, 6, 5).contiguous(memory_format=LAST) for _ in range(2))
    leaves = [x.requires_grad_(), *(t.requires_grad_() for t in parameters(8, 3, torch.float32))]
    for enabled in (False, True):
        with torch.autocast("cpu", BF16, enabled=enabled):
            ys = [depthwise.depthwise_conv2d(*leaves), torch.ops.oriented1d.depthwise_conv2d(*leaves)]
        assert type(ys[0].grad_fn).__name__ == "_RecordedBackward"
        assert type(ys[1].grad_fn).__name__ != "_RecordedBackward"
        assert ys[0].dtype == (BF16 if enabled else torch.float32)
        results = [[y, *torch.autograd.grad(y, leaves, g.to(y.dtype))] for y in ys]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert torch.autograd.gradcheck(
        torch.ops.oriented1d.depthwise_conv2d.default, [t.detach().double().requires_grad_() for t in leaves]
    )


def test_an_outer_autocast_does_not_change_the_gradient() -> None:
    g, weight = torch.randn(2, 8, 6, 5), parameters(8, 3, torch.float32)[0]
    with torch.autocast("cpu", BF16):
        of_input = torch.ops.oriented1d.depthwise_conv2d_grad_input(g, weight)
    assert of_input.dtype == torch.float32


@pytest.mark.parametrize(
    ("weight", "bias", "message"),
    [
        ((8, 1, 3, 3), (8,), r"weight: expected shape \(16, 1, K, K\) with K odd, got \(8, 1, 3, 3\)"),
        ((24, 1, 3, 3), (24,), r"weight: expected shape \(16, 1, K, K\)"),
        ((16, 1, 3, 5), (16,), r"weight: expected shape \(16, 1, K, K\)"),
        ((16, 1, 4, 4), (16,), r"weight: expected shape \(16, 1, K, K\) with K odd"),
        ((16, 1, 3, 3), (8,), r"bias: expected shape \(16,\), got \(8,\)"),
    ],
)
def test_wrong_shapes(weight: tuple[int, ...], bias: tuple[int, ...], message: str) -> None:
    x = torch.randn(2, 16, 6, 5).contiguous(memory_format=LAST)
    with pytest.raises(ValueError, match=message):
        depthwise.depthwise_conv2d(x, torch.randn(weight), torch.randn(bias))


def test_parameters_of_another_device() -> None:
    x, (weight, bias) = torch.randn(2, 16, 6, 5), parameters(16, 3, torch.float32)
    with pytest.raises(ValueError, match="weight: expected the device of the images, cpu, got meta"):
        depthwise._kernel(x, weight.to("meta"), bias)
    with pytest.raises(ValueError, match="bias: expected the device of the images, cpu, got meta"):
        depthwise._kernel(x, weight, bias.to("meta"))


def test_what_is_left_to_pytorch() -> None:
    x, weight = torch.randn(2, 16, 6, 5), torch.randn(16, 1, 3, 3)
    last = x.contiguous(memory_format=LAST)
    assert depthwise._fits(last, weight)
    assert not depthwise._fits(x, weight)
    assert not depthwise._fits(last[:, :, :1, :1].contiguous(), weight)  # both formats
    assert not depthwise._fits(last, weight[:8])
    assert not depthwise._fits(last, weight.to("meta"))
    assert not depthwise._fits(last[0], weight)
    assert not depthwise._fits(last.bfloat16(), weight)
    with torch.autocast("cpu", BF16):
        assert depthwise._fits(last.bfloat16(), weight)
    seen = []
    torch.vmap(lambda images: (seen.append(depthwise._fits(images, weight)), images)[1])(last[None])
    with torch.autograd.forward_ad.dual_level():
        seen.append(depthwise._fits(last, weight))
    assert seen == [False, False]


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_in_one_graph(dynamic: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    @torch.compiler.assume_constant_result
    def has_kernel(device: torch.device, dtype: torch.dtype, channels: int, kernel_size: int) -> bool:
        asked.append((dtype, channels, kernel_size))
        return True

    monkeypatch.setattr(depthwise, "_has_kernel", has_kernel)
    monkeypatch.setattr(
        depthwise,
        "supported",
        lambda x, w: (
            depthwise._fits(x, w)
            and depthwise._has_kernel(x.device, depthwise.library.computed_dtype(x), w.shape[0], w.shape[-1])
        ),
    )
    layer = DepthwiseConv2d(8, 5).to(memory_format=LAST)
    torch._dynamo.reset()
    run = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for side in (6, 9, 11):
        x = torch.randn(2, 8, side, 7).contiguous(memory_format=LAST).requires_grad_()
        with torch.autocast("cpu", BF16):
            y, plain = run(x), layer(x)
        assert y.dtype == BF16
        leaves = [x, layer.weight, layer.bias]
        assert relative_error(y, expected(*(t.detach().bfloat16() for t in leaves))) < TOLERANCE[BF16]
        for a, b in zip(*([out, *torch.autograd.grad(out.float().sum(), leaves)] for out in (y, plain)), strict=True):
            torch.testing.assert_close(a, b)
    assert set(asked) == {(BF16, 8, 5)}


@pytest.mark.parametrize(
    "changed", [{"padding_mode": "circular"}, {"dilation": (2, 2)}, {"stride": (2, 2)}, {"padding": (0, 0)}]
)
def test_settings_that_somebody_changed(changed: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    layer, plain = DepthwiseConv2d(8, 3), torch.nn.Conv2d(8, 8, 3, padding=1, groups=8)
    plain.load_state_dict(layer.state_dict())
    monkeypatch.setattr(depthwise, "supported", lambda *_: True)
    x = torch.randn(2, 8, 6, 5).contiguous(memory_format=LAST)
    before = plain(x)
    torch.testing.assert_close(layer(x), before)
    for module in (layer, plain):
        for name, value in changed.items():
            setattr(module, name, value)
    after = plain(x)
    assert after.shape != before.shape or not torch.allclose(after, before)
    torch.testing.assert_close(layer(x), after)


def test_even_kernels() -> None:
    with pytest.raises(ValueError, match="kernel_size: expected an odd number, got 4"):
        DepthwiseConv2d(8, 4)


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
def test_layer_on_a_gpu(
    shape: tuple[int, int, int, int],
    kernel_size: int,
    dtype: torch.dtype,
    compiled: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # PyTorch 2.11 keeps compiled graphs on disk under keys that do not hold the dtype of autocast.
    monkeypatch.setattr("torch._functorch.config.enable_autograd_cache", False)
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
        # The gradient of the weight is cuDNN's: seen at 1.2e-3 in float16.
        assert relative_error(a, e) < (max(2e-3, TOLERANCE[dtype]) if name == "w" else TOLERANCE[dtype]), name


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4, 96, 56, 56), (2, 64, 14, 13)])
@pytest.mark.parametrize("dtype", [BF16, HALF])
def test_autocast_on_a_gpu_is_casting_by_hand(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    layer = DepthwiseConv2d(shape[1], 7).cuda()
    x = torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=LAST).requires_grad_()
    g = torch.randn_like(x)
    leaves = [x, layer.weight, layer.bias]
    with torch.autocast("cuda", dtype):
        y = layer(x)
    z = depthwise.depthwise_conv2d(*(t.to(dtype) for t in leaves))
    ours, theirs = ([t, *torch.autograd.grad(t, leaves, g)] for t in (y, z))
    assert [t.dtype for t in ours] == [dtype, dtype, torch.float32, torch.float32]
    # The gradients of the parameters are cuDNN's, whose order of sums may change from run to run.
    for a, e in zip(ours[:2], theirs[:2], strict=True):
        assert torch.equal(a, e)
    for a, e in zip(ours[2:], theirs[2:], strict=True):
        assert relative_error(a, e) < TOLERANCE[dtype]
    with torch.no_grad(), torch.autocast("cuda", dtype):
        assert kernels(lambda: layer(x)) == ["depthwise_conv2d"]
