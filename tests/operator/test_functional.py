"""What users see of the operator, on the backend that they get."""

import pytest
import torch

from oriented1d import geometry, oriented_conv1d, use_backend
from tests.operator import reference
from tests.operator.reference import relative_error

ANGLES = geometry.layer_angles(8)


def inputs(size: tuple[int, ...] = (2, 8, 9, 12), kernel_size: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(size), torch.randn(size[1], kernel_size)


def test_weight_may_have_two_or_four_dimensions() -> None:
    x, w = inputs()
    assert torch.equal(oriented_conv1d(x, w, ANGLES), oriented_conv1d(x, w[:, None, None], ANGLES))
    grads = []
    for shaped in (w, w[:, None, None]):
        leaf = shaped.clone().requires_grad_()
        oriented_conv1d(x, leaf, ANGLES).square().sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.shape == leaf.shape
        grads.append(leaf.grad.flatten())
    assert torch.equal(*grads)
    assert grads[0].abs().min() > 0


def test_angles_may_be_a_tensor_a_list_or_directions() -> None:
    x, w = inputs()
    expected = reference.oriented_conv1d(x, w, ANGLES)
    for angles in (ANGLES, ANGLES.double(), ANGLES.tolist(), geometry.directions(ANGLES)):
        assert relative_error(oriented_conv1d(x, w, angles), expected) < 1e-6


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda: torch.randn(2, 8, 9, 12), id="contiguous"),
        pytest.param(lambda: torch.randn(2, 9, 12, 8).permute(0, 3, 1, 2), id="channels_last"),
        pytest.param(lambda: torch.randn(2, 16, 9, 12)[:, 4:12], id="channel slice"),
        pytest.param(lambda: torch.randn(2, 9, 12, 16).permute(0, 3, 1, 2)[:, 3:11], id="channels_last channel slice"),
        pytest.param(lambda: torch.randn(2, 8, 12, 9).transpose(2, 3), id="transposed"),
        pytest.param(lambda: torch.randn(4, 8, 18, 26)[1::2, :, ::2, 1:25:2], id="strided"),
        pytest.param(lambda: torch.randn(2, 8, 1, 12).expand(2, 8, 9, 12), id="expanded"),
        pytest.param(lambda: torch.randn(2 * 8 * 9 * 12 + 1)[1:].view(2, 8, 9, 12), id="unaligned"),
    ],
)
def test_views_in_all_three_directions(view, stride: int) -> None:
    x, w = view(), torch.randn(8, 7)
    y = oriented_conv1d(x, w, ANGLES, stride=stride)
    assert relative_error(y, reference.oriented_conv1d(x, w, ANGLES, stride=stride)) < 1e-6
    # The same values, laid out plainly, in double: gradients must not depend on the strides.
    leaf, plain = x.detach().requires_grad_(), x.detach().double().contiguous().requires_grad_()
    wl, wp = w.clone().requires_grad_(), w.double().requires_grad_()
    g = torch.randn(y.shape)
    ours = torch.autograd.grad(oriented_conv1d(leaf, wl, ANGLES, stride=stride), (leaf, wl), g)
    with use_backend("portable"):
        theirs = torch.autograd.grad(oriented_conv1d(plain, wp, ANGLES, stride=stride), (plain, wp), g.double())
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(ours, theirs, strict=True))


def test_memory_format_follows_the_input() -> None:
    x, w = inputs()
    for fmt in (torch.contiguous_format, torch.channels_last):
        leaf = x.to(memory_format=fmt).requires_grad_()
        y = oriented_conv1d(leaf, w, ANGLES, stride=2)
        assert y.is_contiguous(memory_format=fmt)
        assert torch.autograd.grad(y.sum(), leaf)[0].is_contiguous(memory_format=fmt)


def test_gradient_of_the_other_memory_format() -> None:
    x, w = inputs()
    x.requires_grad_()
    y = oriented_conv1d(x, w, ANGLES)
    g = torch.randn_like(y)
    plain, permuted = (
        torch.autograd.grad(y, x, t, retain_graph=True)[0] for t in (g, g.to(memory_format=torch.channels_last))
    )
    assert relative_error(permuted, plain) < 1e-6


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1)])
def test_only_the_gradients_that_are_asked_for(needs: tuple[int, int, int]) -> None:
    x, w = inputs()
    b = torch.randn(8)
    everything = [t.clone().requires_grad_() for t in (x, w, b)]
    some = [t.clone().requires_grad_(bool(need)) for t, need in zip((x, w, b), needs, strict=True)]
    g = torch.randn(x.shape)
    for leaves in (everything, some):
        oriented_conv1d(leaves[0], leaves[1], ANGLES, leaves[2]).backward(g)
    for one, all_, need in zip(some, everything, needs, strict=True):
        assert (one.grad is not None) == bool(need)
        if need:
            assert relative_error(one.grad, all_.grad) < 1e-6


def test_empty_batch() -> None:
    x, w, b = (
        torch.randn(0, 8, 9, 12, requires_grad=True),
        torch.randn(8, 7, requires_grad=True),
        torch.zeros(8).requires_grad_(),
    )
    y = oriented_conv1d(x, w, ANGLES, b, stride=2)
    assert y.shape == (0, 8, 5, 6)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert w.grad is not None
    assert b.grad is not None
    assert not w.grad.any()
    assert not b.grad.any()


def test_outputs_are_written_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory full of NaN: whatever a backend forgets to write shows."""

    def poisoned(make):
        def call(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return call

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    for fmt in (torch.contiguous_format, torch.channels_last):
        for stride in (1, 2, 5):
            x, w = inputs((2, 8, 11, 7))
            leaves = [x.to(memory_format=fmt).requires_grad_(), w.requires_grad_()]
            y = oriented_conv1d(*leaves, ANGLES, stride=stride)
            assert relative_error(y, reference.oriented_conv1d(x, w, ANGLES, stride=stride)) < 1e-6
            assert all(g.isfinite().all() and g.abs().sum() > 0 for g in torch.autograd.grad(y.sum(), leaves))


def test_not_a_number_reaches_only_the_pixels_that_read_it() -> None:
    for angle, pixels in zip(geometry.layer_angles(8).tolist(), (31, 29, 21, 29, 31, 29, 21, 29), strict=True):
        x = torch.randn(1, 1, 41, 41)
        x[0, 0, 20, 20] = float("nan")
        y = oriented_conv1d(x, torch.randn(1, 31), [angle])
        assert y.isnan().sum().item() == pixels


def test_memory_of_forward_and_backward() -> None:
    """At most 4 times the input's bytes beside it, by PyTorch's own count of what it allocates."""
    x = torch.randn(8, 96, 56, 56, requires_grad=True)
    w = torch.randn(96, 31, requires_grad=True)
    g = torch.randn(x.shape)
    angles = geometry.layer_angles(96)
    with use_backend("portable"), torch.profiler.profile(profile_memory=True) as profile:
        oriented_conv1d(x, w, angles).backward(g)
    now = peak = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    size = x.numel() * 4
    assert size < peak <= 4 * size


BAD = {
    "input is a list": (lambda x, w: ([1.0], w, ANGLES), {}, TypeError, "input: expected a tensor, got list"),
    "integer input": (lambda x, w: (x.int(), w, ANGLES), {}, TypeError, "input: .*int32"),
    "complex input": (lambda x, w: (x.cfloat(), w, ANGLES), {}, TypeError, "input: .*complex64"),
    "three dimensions": (
        lambda x, w: (x[0], w, ANGLES),
        {},
        ValueError,
        r"input: expected shape \(N, C, H, W\).*\(8, 9, 12\)",
    ),
    "no pixels": (lambda x, w: (x[..., :0], w, ANGLES), {}, ValueError, r"input: .*one pixel.*\(2, 8, 9, 0\)"),
    "even kernel": (lambda x, w: (x, w[:, :6], ANGLES), {}, ValueError, "weight: expected an odd kernel size K, got 6"),
    "weight of rank 3": (lambda x, w: (x, w[None], ANGLES), {}, ValueError, r"weight: .*\(1, 8, 7\)"),
    "2D weight": (lambda x, w: (x, torch.randn(8, 1, 3, 3), ANGLES), {}, ValueError, r"weight: .*\(8, 1, 3, 3\)"),
    "channels": (lambda x, w: (x, w[:4], ANGLES), {}, ValueError, "weight: expected 8 channels.*got 4"),
    "angles": (
        lambda x, w: (x, w, ANGLES[:5]),
        {},
        ValueError,
        "angles: expected one for each of the 8 channels, got 5",
    ),
    "rank of angles": (lambda x, w: (x, w, ANGLES[None]), {}, ValueError, r"angles: .*\(1, 8\)"),
    "NaN angles": (lambda x, w: (x, w, ANGLES * float("nan")), {}, ValueError, "angles: expected finite radians"),
    "integer angles": (lambda x, w: (x, w, ANGLES.int()), {}, TypeError, "angles: .*int32"),
    "dtypes": (lambda x, w: (x, w.double(), ANGLES), {}, TypeError, "weight: expected .*float32, got torch.float64"),
    "wide weight": (lambda x, w: (x.bfloat16(), w, ANGLES), {}, TypeError, "weight: .*bfloat16, got torch.float32"),
    "bias dtype": (lambda x, w: (x, w, ANGLES, torch.zeros(8).half()), {}, TypeError, "bias: .*float16"),
    "bias": (lambda x, w: (x, w, ANGLES, torch.zeros(7)), {}, ValueError, r"bias: expected shape \(8,\), got \(7,\)"),
    "devices": (lambda x, w: (x, w.to("meta"), ANGLES), {}, ValueError, "weight: expected the device .*cpu, got meta"),
    "stride": (lambda x, w: (x, w, ANGLES), {"stride": 0}, ValueError, "stride: expected at least 1, got 0"),
    "stride type": (lambda x, w: (x, w, ANGLES), {"stride": 1.5}, TypeError, "stride: expected an int, got float"),
    "residual": (lambda x, w: (x, w, ANGLES), {"residual": 1}, TypeError, "residual: expected a bool, got int"),
    "stride pair": (lambda x, w: (x, w, ANGLES), {"stride": (1, 2)}, TypeError, "stride: expected an int, got tuple"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_arguments_are_named(case: str) -> None:
    make, keywords, error, words = BAD[case]
    with pytest.raises(error, match=words):
        oriented_conv1d(*make(*inputs()), **keywords)


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="got 'cudnn'"), use_backend("cudnn"):
        pass


def test_meta_tensors() -> None:
    x = torch.empty(2, 8, 9, 12, device="meta").to(memory_format=torch.channels_last).requires_grad_()
    y = oriented_conv1d(x, torch.empty(8, 7, device="meta"), ANGLES, stride=2)
    assert y.shape == (2, 8, 5, 6)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape
