"""The stem's first half in one pass: derivatives anywhere, kernels where there is a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from oriented1d import geometry, oriented_conv1d
from oriented1d.models.convnext import OrientedStem
from oriented1d.operator.stem import _has_kernel, oriented_stem, supported
from tests.operator.reference import relative_error

EPS = 1e-6


def parameters(c: int, i: int, k: int, offset: bool = True, bias: bool = True, **options) -> list[Tensor | None]:
    """Of the pointwise layer, the oriented one, and LayerNorm."""
    sizes = [(c, i), (c,) if offset else None, (c, k), (c,) if bias else None, (c,), (c,)]
    return [None if size is None else torch.randn(size, **options).requires_grad_() for size in sizes]


def in_one_pass(image: Tensor, tensors: list[Tensor | None], layer: geometry.Directions, stride: int) -> Tensor:
    projection, offset, weight, bias, *norm = tensors
    return oriented_stem(image, projection, offset, weight, layer.text, bias, *norm, EPS, stride)


def one_after_another(image: Tensor, tensors: list[Tensor | None], layer: geometry.Directions, stride: int) -> Tensor:
    projection, offset, weight, bias, *norm = tensors
    x = F.conv2d(image, projection[:, :, None, None], offset)
    x = oriented_conv1d(x, weight, layer, bias, stride=stride).permute(0, 2, 3, 1)
    return F.gelu(F.layer_norm(x, (len(weight),), *norm, EPS)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_derivatives(offset: bool, bias: bool) -> None:
    layer = geometry.directions(geometry.layer_angles(16))
    tensors = parameters(16, 3, 7, offset, bias, dtype=torch.float64)
    image = torch.randn(2, 3, 9, 7, dtype=torch.float64, requires_grad=True)
    y, expected = in_one_pass(image, tensors, layer, 2), one_after_another(image, tensors, layer, 2)
    assert relative_error(y, expected) < 1e-13
    assert y.is_contiguous(memory_format=torch.channels_last)
    leaves = [t for t in (image, *tensors) if t is not None]
    g = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(out, leaves, g) for out in (y, expected))
    for a, e in zip(ours, theirs, strict=True):
        assert relative_error(a, e) < 1e-10
    with torch.no_grad():
        assert torch.equal(in_one_pass(image, tensors, layer, 2), y)


def test_opcheck() -> None:
    projection, offset, weight, bias, *norm = parameters(16, 3, 5)
    layer = geometry.directions(geometry.layer_angles(16))
    image = torch.randn(2, 3, 6, 5)
    stem = torch.ops.oriented1d.oriented_stem
    for keep in (True, False):
        leaves = [t.detach().requires_grad_(keep) for t in (projection, offset, weight, bias, *norm)]
        torch.library.opcheck(stem, (image, *leaves, EPS, layer.text, 2, torch.float32, keep))
    arguments = torch.randn(2, 16, 3, 3), torch.randn(2, 16, 3, 3), image, *(t.detach() for t in norm), EPS, layer.text
    torch.library.opcheck(torch.ops.oriented1d.oriented_stem_backward, (*arguments, 5, 2))


def test_the_choice_of_a_kernel_does_not_break_a_graph() -> None:
    angles = geometry.directions(geometry.layer_angles(16))
    device, dtype = torch.device("cuda", 0), torch.bfloat16

    def run(x: Tensor) -> Tensor:
        five = _has_kernel(device, dtype, dtype, 5, angles.text, 7, 2)  # channels of the image
        return x - 1 if five else x + 1

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 2.0))


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_kernels_compile_without_a_gpu(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    pytest.importorskip("cuda.core")
    from oriented1d.operator.cuda import compiler, stem

    monkeypatch.setenv("ORIENTED1D_CACHE", str(tmp_path))
    for architecture, image in (("sm_80", "float"), ("sm_90", "bf16")):
        spec = stem.Spec(kind, image, 3, 31, 2, 15, 8, 8)
        assert len(compiler.machine_code(spec, architecture).code) > 1000
        assert all(f" {name}(" in spec.text for name in spec.functions.values())


# On a GPU ------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("size", "c", "i", "kernel_size", "stride"),
    [
        ((2, 64, 64), 64, 3, 31, 2),
        ((3, 224, 224), 64, 3, 31, 2),
        ((3, 33, 47), 64, 3, 15, 2),
        ((2, 31, 50), 32, 1, 31, 1),
        ((1, 19, 7), 16, 2, 9, 3),
        ((5, 1, 1), 64, 3, 31, 2),
        ((2, 17, 20), 8, 3, 31, 2),
        ((0, 32, 32), 64, 3, 31, 2),
    ],
)
def test_as_one_after_another(size, c: int, i: int, kernel_size: int, stride: int, dtype: torch.dtype) -> None:
    layer = geometry.directions(geometry.layer_angles(c, c // 8))
    tensors = parameters(c, i, kernel_size, device="cuda")
    n, height, width = size
    view = torch.randn(n, i + 1, height, width + 3, device="cuda").to(dtype)[:, :i, :, 2:-1]
    for image in (view, view.contiguous(memory_format=torch.channels_last)):
        with torch.autocast("cuda", torch.bfloat16):
            assert supported(image, tensors[2], layer.text, stride)
            # What is freed here is what the output is written to.
            shape = n, c, -(-height // stride), -(-width // stride)
            poison = torch.full(shape, torch.nan, device="cuda", dtype=torch.bfloat16)
            del poison
            y = in_one_pass(image, tensors, layer, stride)
            with torch.no_grad():
                assert torch.equal(in_one_pass(image, tensors, layer, stride), y)
        assert y.dtype == torch.bfloat16
        doubles = [t.detach().double().cpu().requires_grad_() for t in tensors]
        expected = one_after_another(image.double().cpu(), doubles, layer, stride)
        if n == 0:
            assert y.shape == expected.shape
        else:
            assert relative_error(y, expected) < 8e-3
        g = torch.randn_like(y)
        ours, again = (torch.autograd.grad(y, tensors, g, retain_graph=True) for _ in range(2))
        theirs = torch.autograd.grad(expected, doubles, g.double().cpu())
        for a, e, same in zip(ours, theirs, again, strict=True):
            assert torch.equal(a, same)
            assert (a.double().cpu() - e).norm() <= 1.5e-2 * e.norm()


@pytest.mark.gpu
def test_gradient_of_the_image() -> None:
    layer = geometry.directions(geometry.layer_angles(64))
    tensors = parameters(64, 3, 31, device="cuda")
    image = torch.randn(2, 3, 40, 40, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        y = in_one_pass(image, tensors, layer, 2)
    doubles = [t.detach().double().cpu() for t in tensors]
    x64 = image.detach().double().cpu().requires_grad_()
    g = torch.randn_like(y)
    (ours,) = torch.autograd.grad(y, image, g)
    (theirs,) = torch.autograd.grad(one_after_another(x64, doubles, layer, 2), x64, g.double().cpu())
    assert relative_error(ours, theirs) < 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compiled_stem(mode: str | None) -> None:
    stem = OrientedStem(3, 64, 96, 31, 8, 0.5, (2, 2)).cuda().to(memory_format=torch.channels_last)
    compiled = torch.compile(stem, fullgraph=True, mode=mode)
    plain = OrientedStem(3, 64, 96, 31, 8, 0.5, (2, 2)).double()
    plain.load_state_dict({name: value.cpu() for name, value in stem.state_dict().items()})
    for size in (64, 64, 96):
        x = torch.randn(4, 3, size, size, device="cuda")
        torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast("cuda", torch.bfloat16):
            y = compiled(x)
        expected = plain(x.double().cpu())
        assert relative_error(y, expected) < 1.5e-2
        g = torch.randn_like(y)
        ours = torch.autograd.grad(y, list(stem.parameters()), g)
        theirs = torch.autograd.grad(expected, list(plain.parameters()), g.double().cpu())
        assert max(relative_error(a, e) for a, e in zip(ours, theirs, strict=True)) < 4e-2
