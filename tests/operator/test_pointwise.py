"""A pointwise and an oriented layer in one pass: derivatives anywhere, kernels where there is a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from oriented1d import geometry, oriented_conv1d
from oriented1d.models.convnext import OrientedStem
from oriented1d.operator.pointwise import fused, pointwise_oriented_conv1d
from tests.operator.reference import relative_error


def tensors(c: int, i: int, k: int, offset: bool = True, bias: bool = True, **options: object) -> list:
    sizes = [(c, i), (c,) if offset else None, (c, k), (c,) if bias else None]
    return [None if size is None else torch.randn(size, **options).requires_grad_() for size in sizes]  # type: ignore[call-overload]


def one_after_another(image, projection, offset, weight, bias, layer, stride):
    x = F.conv2d(image, projection[:, :, None, None], offset)
    return oriented_conv1d(x, weight, layer, bias, stride=stride)


@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_derivatives(offset: bool, bias: bool) -> None:
    layer = geometry.directions(geometry.layer_angles(16))
    p, o, w, b = tensors(16, 3, 7, offset, bias, dtype=torch.float64)
    image = torch.randn(2, 3, 9, 7, dtype=torch.float64, requires_grad=True)
    y = pointwise_oriented_conv1d(image, p, o, w, layer, b, stride=2)
    expected = one_after_another(image, p, o, w, b, layer, 2)
    assert relative_error(y, expected) < 1e-14
    assert y.is_contiguous(memory_format=torch.channels_last)
    leaves = [t for t in (image, p, o, w, b) if t is not None]
    g = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(out, leaves, g) for out in (y, expected))
    for a, e in zip(ours, theirs, strict=True):
        assert relative_error(a, e) < 1e-13


def test_opcheck() -> None:
    p, o, w, b = tensors(16, 3, 5)
    layer = geometry.directions(geometry.layer_angles(16))
    arguments = (torch.randn(2, 3, 6, 5), p, o, w, b, list(layer.angles), list(layer.counts), 2, torch.float32)
    torch.library.opcheck(torch.ops.oriented1d.pointwise_oriented_conv1d, arguments)
    arguments = (torch.randn(2, 16, 3, 3), torch.randn(2, 3, 6, 5), list(layer.angles), list(layer.counts), 5, 2)
    torch.library.opcheck(torch.ops.oriented1d.pointwise_oriented_conv1d_correlation, arguments)


@pytest.mark.parametrize("kind", ["forward", "weight"])
def test_kernels_compile_without_a_gpu(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    pytest.importorskip("cuda.core")
    from oriented1d.operator.cuda import compiler, pointwise

    monkeypatch.setenv("ORIENTED1D_CACHE", str(tmp_path))
    for architecture in ("sm_80", "sm_90"):
        spec = pointwise.Spec(kind, "float", 3, 31, 2, 15, 8, 8)
        assert len(compiler.machine_code(spec, architecture).code) > 1000


# On a GPU ------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("size", "c", "i", "kernel_size", "stride"),
    [
        ((2, 64, 64), 64, 3, 31, 2),
        ((3, 224, 224), 64, 3, 31, 2),
        ((3, 33, 47), 64, 3, 15, 2),
        ((2, 31, 50), 128, 1, 31, 1),
        ((1, 19, 7), 24, 2, 9, 3),
        ((5, 1, 1), 64, 3, 31, 2),
        ((0, 32, 32), 64, 3, 31, 2),
    ],
)
def test_as_one_after_another(size, c: int, i: int, kernel_size: int, stride: int, dtype: torch.dtype) -> None:
    angles = geometry.layer_angles(c, 8 if c % 64 == 0 else 3)
    layer = geometry.directions(angles)
    p, o, w, b = tensors(c, i, kernel_size, device="cuda")
    n, height, width = size
    big = torch.randn(n, i + 1, height, width + 3, device="cuda").to(dtype)
    contiguous = big[:, :i, :, 2:-1]
    for image in (contiguous, contiguous.contiguous(memory_format=torch.channels_last)):
        with torch.autocast("cuda", torch.bfloat16):
            assert fused(image, w, layer, stride)
            # Poison: what is not written stays NaN.
            shape = n, c, -(-height // stride), -(-width // stride)
            poison = torch.full(shape, torch.nan, device="cuda", dtype=torch.bfloat16)
            del poison
            y = pointwise_oriented_conv1d(image, p, o, w, layer, b, stride=stride)
        assert y.dtype == torch.bfloat16
        doubles = [t.detach().double().cpu().requires_grad_() for t in (p, o, w, b)]
        x64 = image.double().cpu()
        expected = one_after_another(x64, *doubles, layer, stride)
        if n == 0:
            assert y.shape == expected.shape
        else:
            assert relative_error(y.cpu(), expected) < 6e-3
        g = torch.randn_like(y)
        ours = torch.autograd.grad(y, [p, o, w, b], g)
        theirs = torch.autograd.grad(expected, doubles, g.double().cpu())
        for a, e in zip(ours, theirs, strict=True):
            assert (a.double().cpu() - e).norm() <= 4e-3 * e.norm()
        again = torch.autograd.grad(pointwise(image, p, o, w, layer, b, stride), [p, o, w, b], g)
        assert all(torch.equal(a, e) for a, e in zip(ours, again, strict=True))


def pointwise(image, p, o, w, layer, b, stride):
    with torch.autocast("cuda", torch.bfloat16):
        return pointwise_oriented_conv1d(image, p, o, w, layer, b, stride=stride)


@pytest.mark.gpu
def test_gradient_of_the_image() -> None:
    layer = geometry.directions(geometry.layer_angles(64))
    p, o, w, b = tensors(64, 3, 31, device="cuda")
    image = torch.randn(2, 3, 40, 40, device="cuda", requires_grad=True)
    y = pointwise(image, p, o, w, layer, b, 2)
    doubles = [t.detach().double().cpu() for t in (p, o, w, b)]
    x64 = image.detach().double().cpu().requires_grad_()
    g = torch.randn_like(y)
    (ours,) = torch.autograd.grad(y, image, g)
    (theirs,) = torch.autograd.grad(one_after_another(x64, *doubles, layer, 2), x64, g.double().cpu())
    assert relative_error(ours, theirs) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compiled_stem(mode: str | None) -> None:
    stem = OrientedStem(3, 64, 96, 31, 8).cuda().to(memory_format=torch.channels_last)
    compiled = torch.compile(stem, fullgraph=True, mode=mode)
    plain = OrientedStem(3, 64, 96, 31, 8).double()
    plain.load_state_dict({name: value.cpu() for name, value in stem.state_dict().items()})
    for size in (64, 64, 96):
        x = torch.randn(4, 3, size, size, device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            y = compiled(x)
        expected = plain(x.double().cpu())
        assert relative_error(y, expected) < 1e-2
        g = torch.randn_like(y)
        ours = torch.autograd.grad(y, list(stem.parameters()), g)
        theirs = torch.autograd.grad(expected, list(plain.parameters()), g.double().cpu())
        assert max(relative_error(a, e) for a, e in zip(ours, theirs, strict=True)) < 3e-2
