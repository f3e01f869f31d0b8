"""The tensor core kernels: their matrices and their compilation anywhere, their results where there is a GPU."""

import itertools

import numpy as np
import pytest
import torch

from oriented1d import geometry, oriented_conv1d, use_backend
from oriented1d.operator.cuda import mma, source
from oriented1d.operator.layout import memory_format
from tests.operator.reference import inside_nan, relative_error

TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 6e-4}
ANGLES = tuple(geometry.layer_angles(8).tolist())


@pytest.mark.parametrize("angle", [*ANGLES, 0.2, 1.3, 2.9])
@pytest.mark.parametrize("kernel_size", [1, 7, 31, 63])
def test_products_with_the_bands_are_the_convolution(angle: float, kernel_size: int) -> None:
    """Sixteen outputs of every line of a random image, through the frame, the blocks and the table of a kernel."""
    spec = mma.Spec("gather", "bf16", 8, kernel_size, 1, (angle,), 1, 1, True)
    ((program, band),) = mma.programs(spec)
    rng = np.random.default_rng(0)
    image, weight = rng.standard_normal((150, 150)), rng.standard_normal(kernel_size)
    folded = [weight[list(taps)].sum() for taps in program.fold]
    values = [*folded, 0.0, *([0.0] * len(folded))]  # no rounding errors: their part of the table adds nothing
    table = np.array(mma._table(spec, program, band)).reshape(-1, 32, 4, 2)

    def pixel(u: int, v: int) -> float:
        return image[u, v] if band.steep else image[v, u]

    def drift(u: int) -> int:
        return (u * band.advance + band.phase) >> 4

    origin = 64  # a multiple of 16, far from the borders
    for line in (40, 61):
        h = line - drift(origin)
        result = np.zeros(16)
        for product, pair in enumerate(mma.products(spec, program, band)):
            left, right = np.zeros((16, 16)), np.zeros(16)
            for lane, register, half in np.ndindex(32, 4, 2):
                row, column = lane // 4 + 8 * (register % 2), 2 * (lane % 4) + half + 8 * (register // 2)
                left[row, column] = values[table[product, lane, register, half]]
            for half, (block, _) in enumerate(pair):
                if block >= 0:
                    e, k = band.blocks[block]
                    us = origin + 8 * k + np.arange(8)
                    right[8 * half : 8 * half + 8] = [pixel(u, h + e + drift(u)) for u in us]
            result += left @ right
        taps = geometry.kernel_taps(angle, kernel_size)
        for i in range(16):
            u, v = origin + i, h + drift(origin + i)
            y, x = (u, v) if band.steep else (v, u)
            expected = sum(w * image[y + dy, x + dx] for w, (dy, dx) in zip(weight, taps, strict=True))
            assert result[i] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("angle", ANGLES)
def test_weights_that_16_bits_do_not_hold_have_their_errors_in_the_table(angle: float) -> None:
    spec = mma.Spec("gather", "bf16", 8, 31, 1, (angle,), 1, 1, True)
    ((program, band),) = mma.programs(spec)
    count = len(program.fold)
    entries = np.array(mma._table(spec, program, band))
    for d, taps in enumerate(program.fold):
        assert (entries == d).sum() == 16  # once for each output
        exact = len(taps) == 1 and 15 not in taps  # the centre takes the identity of a residual
        # Blocks of errors hold those of all their weights: of exact ones they are zero.
        assert exact or (entries == d + count + 1).sum() == 16


@pytest.mark.parametrize(
    ("images", "channels", "size", "by_image"),
    [(64, 512, 56, False), (64, 96, 56, True), (2, 64, 100, False), (1, 16, 7, True)],
)
@pytest.mark.parametrize("kind", ["gather", "weight"])
def test_blocks_share_all_the_work(kind: str, images: int, channels: int, size: int, by_image: bool) -> None:
    spec = mma.choose(kind, "bf16", 8, 31, 1, ANGLES, (size, size), (size, size), 232448)
    assert spec is not None
    each = channels // 8
    groups = [(n, n * each + c, min(16, each - c)) for n in range(8) for c in range(0, each, 16)]
    shares = mma.share(spec, groups, images, (size, size), (size, size), 2 * channels * size**2, 132)
    assert shares.strips * 16 * spec.tiles >= size
    for group in groups:
        splits = [row[3:] for row in shares.rows if row[:3] == group]
        assert sorted(split for split, _ in splits) == list(range(len(splits)))
        assert {number for _, number in splits} == {len(splits)}
    assert len({row[:3] for row in shares.rows}) == len(groups)
    assert shares.by_image == by_image


@pytest.mark.parametrize("size", [16, 28, 64, 100])
@pytest.mark.parametrize("kind", ["gather", "weight"])
def test_blocks_share_all_the_work_of_planes(kind: str, size: int) -> None:
    """Contiguous images have no sectors that channels share: any channels of an angle, lines split between blocks."""
    spec = mma.choose(kind, "bf16", 1, 31, 1, ANGLES, (size, size), (size, size), 232448, last=False)
    assert spec is not None
    groups = [(n, 5 * n, 5) for n in range(8)]
    shares = mma.share(spec, groups, 64, (size, size), (size, size), 2 * 40 * size**2, 132)
    assert not shares.by_image
    assert shares.strips * 16 * spec.tiles >= size
    for group in groups:
        splits = [row[3:] for row in shares.rows if row[:3] == group]
        assert sorted(splits) == [(split, len(splits)) for split in range(len(splits))]


@pytest.mark.parametrize(
    ("kind", "kernel_size", "taken"),
    [
        ("gather", 31, {7: False, 14: False, 15: True, 32: True, 33: False, 56: False, 57: True, 200: True}),
        ("weight", 31, {7: False, 14: False, 15: True, 56: True, 200: True}),
        ("weight", 7, {7: True, 14: True, 56: True}),
        ("adjoint", 31, {7: True, 56: True}),
    ],
)
def test_contiguous_images_that_tensor_cores_take(kind: str, kernel_size: int, taken: dict[int, bool]) -> None:
    for size, expected in taken.items():
        shape, stride = (size, 3), 2 if kind == "adjoint" else 1
        spec = mma.choose(kind, "bf16", 1, kernel_size, stride, ANGLES, shape, shape, 232448, last=False)
        assert (spec is not None) == expected, size


@pytest.mark.parametrize("kind", ["gather", "weight"])
@pytest.mark.parametrize("size", [16, 28, 64, 100])
@pytest.mark.parametrize("kernel_size", [7, 31])
@pytest.mark.parametrize("memory", [101376, 166912, 232448])
def test_warps_of_a_channel_share_its_groups_of_lines(kind: str, size: int, kernel_size: int, memory: int) -> None:
    spec = mma.choose(kind, "bf16", 1, kernel_size, 1, ANGLES, (size, size), (size, size), memory, last=False)
    if spec is None:
        assert memory < 166912
        return
    assert spec.groups % spec.team == 0
    assert spec.channels * spec.team == mma.WARPS
    assert spec.shared_bytes <= memory


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("kind", "stride"), [("gather", 1), ("adjoint", 2), ("weight", 1)])
def test_kernels_compile_without_a_gpu(
    architecture: str, kind: str, stride: int, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cuda.core")
    from oriented1d.operator.cuda import compiler

    monkeypatch.setenv("ORIENTED1D_CACHE", str(tmp_path))
    memory = {"sm_80": 166912, "sm_90": 232448}[architecture]
    for (vector, dtype, size), wide in itertools.product(
        ((8, "bf16", 56), (4, "half", 14), (1, "half", 64), (1, "bf16", 16)), {False, kind != "weight"}
    ):
        shape, last = (size, size), vector > 1
        spec = mma.choose(kind, dtype, vector, 15, stride, ANGLES[:3], shape, shape, memory, last, wide=wide)
        assert spec is not None
        assert spec.wide == wide
        assert spec.last == last
        assert spec.shared_bytes <= memory
        assert all(f" {name}(" in spec.text for name in spec.functions.values())
        assert bytes(compiler.machine_code(spec, architecture).code)[:4] == b"\x7fELF"


def test_other_kernels_are_left_to_the_other_module() -> None:
    def choose(kind="gather", vector=8, kernel_size=31, stride=1, size=56, memory=232448, last=True) -> mma.Spec | None:
        return mma.choose(kind, "bf16", vector, kernel_size, stride, ANGLES, (size, size), (size, size), memory, last)

    assert choose() is not None
    assert choose(kind="adjoint", stride=2) is not None
    assert choose(stride=2) is None
    assert choose(kind="weight", stride=2) is None
    assert choose(vector=1) is None
    assert choose(vector=1, size=32, last=False) is not None
    assert choose(vector=1, size=65, last=False) is not None
    assert choose(stride=2, last=False) is None
    assert choose(kind="weight", kernel_size=63) is None
    assert choose(memory=48 * 1024, kernel_size=63, size=100) is None
    small = choose(size=14, memory=120_000)
    assert small is not None
    assert small.shared_bytes <= 120_000


def test_large_images_whose_blocks_would_share_sectors_are_left_to_the_other_module(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("cuda.core")
    from oriented1d.operator import cuda

    monkeypatch.setattr(cuda.compiler, "limits", lambda device: (132, 232448))
    monkeypatch.setattr(cuda.compiler, "capability", lambda device: (9, 0))

    def chosen(channels: int, size: int, kind: str = "gather") -> bool:
        taps = geometry.layer_taps(geometry.directions(geometry.layer_angles(channels)), 31)
        stride = 2 if kind == "adjoint" else 1
        small, large = (torch.Size((2, channels, side, side)) for side in (size, stride * size))
        problem = cuda._Problem(kind, small, large, torch.bfloat16, True, 16, torch.device("cuda", 0), taps, stride)
        return isinstance(cuda._choose(problem, cuda._parts(problem)[0])[0], mma.Spec)

    assert [chosen(channels, 56) for channels in (64, 96, 192, 384)] == [True] * 4
    assert [chosen(channels, 65) for channels in (64, 96, 192, 384)] == [False, False, False, True]
    assert [chosen(channels, 65, "adjoint") for channels in (64, 96, 192, 384)] == [True, False, True, True]


@pytest.mark.parametrize("kernel_size", [7, 31])
def test_images_lie_as_close_as_taps_allow(kernel_size: int) -> None:
    for angle in (*ANGLES, 0.1, 1.2, 2.0, 3.0):
        taps = tuple(map(tuple, geometry.kernel_taps(angle, kernel_size).tolist()))
        band = mma.make_band(angle, taps)
        offsets = [(dy, dx) if band.steep else (dx, dy) for dy, dx in taps]
        for size in range(1, 40):
            inside = [abs(dv) for du, dv in offsets if abs(du) < size]
            assert band.gap(size) == max(inside)


def test_the_second_size_begins_what_all_others_need(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.core")
    from oriented1d.operator import cuda

    begun: dict[mma.Spec | source.Spec, None] = {}
    monkeypatch.setattr(cuda.compiler, "limits", lambda device: (132, 232448))
    monkeypatch.setattr(cuda.compiler, "capability", lambda device: (9, 0))
    for name in ("begin", "begin_later"):
        monkeypatch.setattr(cuda.compiler, name, lambda spec, device: begun.setdefault(spec))
    monkeypatch.setattr(cuda, "_layers", {})

    def new(height: int, width: int, last: bool, dtype: torch.dtype) -> int:
        """Kernels begun for the layers of convnext_tiny_1d."""
        before = len(begun)
        device, h, w = torch.device("cuda", 0), -(-height // 2), -(-width // 2)
        for channels, stride in ((64, 2), (96, 1), (192, 1), (384, 1), (768, 1)):
            taps = geometry.layer_taps(geometry.directions(geometry.layer_angles(channels)), 31)
            small, large = torch.Size((8, channels, -(-h // stride), -(-w // stride))), torch.Size((8, channels, h, w))
            of_input = ("adjoint" if stride > 1 else "gather"), small, large
            for kind, *shapes in (("gather", large, small), of_input, ("weight", large, small)):
                cuda._begin(cuda._Problem(kind, *shapes, dtype, last, 16, device, taps, stride))
            h, w = max(1, small[2] // (1 if stride > 1 else 2)), max(1, small[3] // (1 if stride > 1 else 2))
        return len(begun) - before

    for last, dtype in itertools.product((True, False), (torch.bfloat16, torch.float32)):
        begun.clear()
        cuda._layers.clear()
        first, again, second = (new(size, size, last, dtype) for size in (224, 224, 256))
        assert first > 0
        assert again == 0
        assert second > 0
        sizes = [(288, 288), (384, 384), (31, 47), (800, 1344), (1344, 800), (480, 640), (64, 64), (97, 1000)]
        assert [new(*size, last, dtype) for size in sizes] == [0] * len(sizes)


def test_the_second_size_of_a_layer_begins_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each would begin when the one before it has been compiled."""
    pytest.importorskip("cuda.core")
    from oriented1d.operator import cuda

    now: list[mma.Spec | source.Spec] = []
    later: list[mma.Spec | source.Spec] = []
    monkeypatch.setattr(cuda.compiler, "limits", lambda device: (132, 232448))
    monkeypatch.setattr(cuda.compiler, "capability", lambda device: (9, 0))
    monkeypatch.setattr(cuda.compiler, "begin", lambda spec, device: now.append(spec))
    monkeypatch.setattr(cuda.compiler, "begin_later", lambda spec, device: later.append(spec))
    monkeypatch.setattr(cuda, "_layers", {})

    def begin(directions: int, sides: tuple[int, int], device: int = 0, kind: str = "gather") -> None:
        taps = geometry.layer_taps(geometry.directions(geometry.layer_angles(64, directions)), 7)
        stride = 2 if kind == "adjoint" else 1
        inputs, outputs = (torch.Size((2, 64, *(step * side for side in sides))) for step in (1, stride))
        layer = torch.float32, True, 16, torch.device("cuda", device), taps, stride
        cuda._begin(cuda._Problem(kind, inputs, outputs, *layer))

    def angles(specs: list[mma.Spec | source.Spec]) -> list[int]:
        return [len(spec.angles) for spec in specs]

    begin(2, (14, 14))
    begin(4, (28, 20))
    begin(3, (14, 14), kind="adjoint")
    begin(8, (14, 14), device=1)
    begin(2, (14, 14))
    assert angles(now) == [2, 4, 3, 8, 2]
    assert later == []
    now.clear()
    begin(4, (400, 20))
    assert angles(now) == [4]
    # First what all of its device need if their images become as much higher, and not wider; two kernels have the rows
    # of a large gradient.
    guesses = later[:4]
    assert angles(guesses) == [2, 4, 3, 3]
    assert guesses[1] == now[0]
    now.clear()
    begin(2, (200, 14))
    begin(3, (200, 14), kind="adjoint")
    assert now == [guesses[0], *guesses[2:]]
    del later[:4]
    sizes = len(cuda._SIDES)
    assert sorted(angles(later)) == [2] * sizes + [3] * (sizes + 1) + [4] * sizes
    # Then those nearest to 200, of two layers, and to 400: of 112 pixels and of 64, of the two layers both.
    assert sorted(angles(later[:5])) == [2, 2, 3, 3, 3]
    assert angles(later[-1:]) == [4]
    for directions in (2, 4):
        lengths = [spec.length for spec in later if len(spec.angles) == directions]
        assert lengths == sorted(lengths, reverse=True)  # small images, whose lines are short, last
        assert lengths[-1] < lengths[0]
    later.clear()
    begin(4, (300, 300))
    assert later == []
    begin(1, (14, 14))  # not seen before: it has its own second size
    begin(1, (28, 28))
    assert angles(later) == [1] * (1 + sizes)
    later.clear()
    monkeypatch.setattr(cuda, "_MOST_OF_A_NETWORK", 4)
    begin(16, (14, 14))
    begin(16, (28, 28))  # alone: there are more layers than a network has
    assert angles(later) == [8, 8] * (1 + sizes)  # two kernels of eight angles each
    monkeypatch.setattr(cuda, "_MOST_LAYERS", 5)
    begin(32, (14, 14))
    assert len(cuda._layers) == 1  # layers that do not come again are forgotten


def test_images_that_grow_much_begin_no_impossible_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many images of such a size are too many lines for a layer of two dimensions, which has no other kernels."""
    pytest.importorskip("cuda.core")
    from oriented1d.operator import cuda

    begun: list[int] = []
    monkeypatch.setattr(cuda.compiler, "limits", lambda device: (132, 232448))
    monkeypatch.setattr(cuda.compiler, "capability", lambda device: (9, 0))
    monkeypatch.setattr(cuda.compiler, "begin", lambda spec, device: None)
    monkeypatch.setattr(cuda.compiler, "begin_later", lambda spec, device: begun.append(spec.square))
    monkeypatch.setattr(cuda, "_layers", {})
    layer = torch.bfloat16, True, 16, torch.device("cuda", 0)
    many, few = torch.Size((65536, 8, 32, 32)), [torch.Size((1, 64, side, side)) for side in (1, 300)]
    cuda._begin(cuda._Problem("gather", many, many, *layer, cuda._square_taps(8, 7), 1, True))
    taps = geometry.layer_taps(geometry.directions(geometry.layer_angles(64)), 31)
    for shape in few:
        cuda._begin(cuda._Problem("gather", shape, shape, *layer, taps, 1))
    assert sorted(begun) == [False] * (1 + len(cuda._SIDES)) + [True] * (1 + len(cuda._SIDES))


# On a GPU ------------------------------------------------------------------------------------------------------------

SIZES = [(1, 1), (7, 7), (14, 14), (16, 17), (28, 27), (32, 32), (33, 5), (56, 56), (64, 64), (65, 40), (61, 150)]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "kernel_size", "stride"),
    [(torch.bfloat16, k, s) for k, s in ((31, 1), (31, 2), (7, 1), (63, 1), (15, 3), (1, 1))]
    + [(torch.float16, 31, 1), (torch.float16, 7, 2)],
)
@pytest.mark.parametrize("last", [True, False])
def test_every_size(
    dtype: torch.dtype, kernel_size: int, stride: int, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64, with outputs and workspaces full of NaN before, and the image inside a field of NaN.

    Contiguous images have few and different numbers of channels an angle, and odd addresses.
    """

    def poisoned(make):
        def call(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return call

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    batches = [(3, 64), (1, 128), (5, 96), (2, 200)] if last else [(3, 64), (1, 13), (5, 75), (2, 150)]
    for (height, width), (images, channels) in zip(SIZES, itertools.cycle(batches), strict=False):
        x = inside_nan((images, channels, height, width), dtype, last, "cuda")
        w, b = (torch.randn(s, device="cuda").to(dtype) for s in ((channels, kernel_size), (channels,)))
        results = []
        for backend, wide in (("cuda", dtype), ("portable", torch.float64)):
            leaves = [t.detach().to(wide).requires_grad_() for t in (x, w, b)]
            if backend == "cuda":
                leaves[0] = x.detach().requires_grad_()
            with use_backend(backend):
                y = oriented_conv1d(
                    *leaves[:2], geometry.layer_angles(channels), leaves[2], stride=stride, residual=True
                )
                if backend == "cuda":
                    g = torch.randn(y.shape, device="cuda").to(dtype).to(memory_format=memory_format(last))
                results.append([y, *torch.autograd.grad(y, leaves, g.to(wide))])
        errors = [relative_error(a, e) for a, e in zip(*results, strict=True)]
        assert max(errors) < TOLERANCE[dtype], (height, width, errors)


@pytest.mark.gpu
@pytest.mark.parametrize("last", [True, False])
def test_the_identity_of_a_residual_is_exact(last: bool) -> None:
    """With weights of zero the output is the input, though ``weight + 1`` and its error are 16-bit numbers."""
    x = torch.randn(2, 128, 30, 30, device="cuda").bfloat16().to(memory_format=memory_format(last))
    w = torch.zeros(128, 31, device="cuda", dtype=torch.bfloat16)
    assert torch.equal(oriented_conv1d(x, w, geometry.layer_angles(128), residual=True), x)
    w[:, 15] = 2**-10  # lost in bfloat16's 1 + 2**-10
    y = oriented_conv1d(x, w, geometry.layer_angles(128), residual=True)
    assert torch.equal(y, (x.double() * (1 + 2**-10)).to(torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("last", [True, False])
def test_weight_gradient_is_the_same_bits_every_time(last: bool) -> None:
    x = torch.randn(32, 96, 28, 28, device="cuda").bfloat16().to(memory_format=memory_format(last))
    w = torch.randn(96, 31, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    g = torch.randn_like(x)
    grads = [torch.autograd.grad(oriented_conv1d(x, w, geometry.layer_angles(96)), w, g)[0] for _ in range(3)]
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])
    assert grads[0].abs().sum() > 0
