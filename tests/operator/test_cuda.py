"""The CUDA kernels: compiled anywhere, run where there is a GPU."""

import collections
import ctypes
import itertools
import math
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch

from oriented1d import OrientedConv1d, geometry, oriented_conv1d, use_backend
from oriented1d.operator import portable
from tests.operator.reference import kernels, relative_error

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_90"])
@pytest.mark.parametrize(
    ("kind", "wide"),
    [("gather", False), ("gather", True), ("adjoint", False), ("adjoint", True), ("weight", False)],
)
@pytest.mark.parametrize("last", [False, True])
def test_kernels_compile_without_a_gpu(
    architecture: str, kind: str, wide: bool, last: bool, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cuda.core")
    from oriented1d.operator import cuda
    from oriented1d.operator.cuda import compiler

    monkeypatch.setenv("ORIENTED1D_CACHE", str(tmp_path))
    memory = {"sm_75": 65536, "sm_80": 166912, "sm_90": 232448}[architecture]
    dtype = torch.bfloat16 if last else torch.float16
    angles = tuple(geometry.layer_angles(8).tolist()[:3])
    stride = 2 if kind == "adjoint" else 1
    part = cuda._Part(angles, (0, 1) if kind == "adjoint" else ())
    spec, shared = cuda._spec(kind, last, dtype, 7, stride, part, True, 16, 56, 112, memory, wide)
    assert spec.wide == wide
    assert shared <= memory
    assert all(f" {name}(" in spec.text for name in spec.functions.values())
    first = compiler.machine_code(spec, architecture)
    assert bytes(first.code)[:4] == b"\x7fELF"
    again = compiler.machine_code(spec, architecture)  # now from the cache
    assert bytes(again.code) == bytes(first.code)
    assert any(path.is_file() for path in tmp_path.rglob("*"))


def test_an_unwritable_cache_only_costs_time(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.core")
    from oriented1d.operator import cuda
    from oriented1d.operator.cuda import compiler

    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("ORIENTED1D_CACHE", str(blocked / "cache"))
    spec, _ = cuda._spec("gather", True, torch.float32, 3, 1, cuda._Part((0.0,), ()), True, 8, 7, 7, 65536)
    with pytest.warns(UserWarning, match="compiled kernels are not kept"):
        code = compiler.machine_code(spec, "sm_80")
    assert bytes(code.code)[:4] == b"\x7fELF"


def test_what_may_be_needed_later_waits_for_what_is_needed_now(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.core")
    from oriented1d.operator.cuda import compiler

    order, first_runs, go = [], threading.Event(), threading.Event()

    def machine_code(name: str, architecture: str) -> str:
        assert architecture == "sm_90"
        order.append(name)
        first_runs.set()
        assert go.wait(60)
        return name.upper()

    monkeypatch.setattr(compiler, "machine_code", machine_code)
    monkeypatch.setattr(compiler, "capability", lambda device: (9, 0))
    monkeypatch.setattr(compiler, "_THREADS", 2)
    monkeypatch.setattr(compiler, "_codes", {})
    with ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(compiler, "_pool", pool)
        device = torch.device("cuda", 0)
        for name in ("a", "b", "c", "b", "d"):
            compiler.begin_later(name, device)
        assert first_runs.wait(60)
        future = compiler.begin("c", device)  # needed now
        assert compiler.begin("c", device) is future
        go.set()
        assert future.result(60) == "C"
        while "d" not in order:
            time.sleep(0.01)
        assert order == ["a", "c", "b", "d"]
        assert compiler.begin("a", device).result(60) == "A"
    assert not compiler._later
    assert compiler._in_background == 0


def test_what_failed_in_the_background_is_tried_again_when_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.core")
    from oriented1d.operator.cuda import compiler

    tried: list[str] = []

    def machine_code(name: str, architecture: str) -> str:
        tried.append(name)
        if len(tried) == 1:
            raise RuntimeError("no memory")
        return name

    monkeypatch.setattr(compiler, "machine_code", machine_code)
    monkeypatch.setattr(compiler, "capability", lambda device: (9, 0))
    monkeypatch.setattr(compiler, "_codes", {})
    with ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(compiler, "_pool", pool)
        compiler.begin_later("a", torch.device("cuda", 0))
        while compiler._in_background:
            time.sleep(0.01)
        assert compiler.begin("a", torch.device("cuda", 0)).result(60) == "a"
    assert tried == ["a", "a"]


def test_the_interpreter_does_not_wait_for_what_may_be_needed_later(tmp_path: Path) -> None:
    pytest.importorskip("cuda.core")
    script = f"""
import pathlib, time, torch
from oriented1d.operator.cuda import compiler
def machine_code(name, architecture):
    pathlib.Path({str(tmp_path)!r}, name).touch()
    time.sleep(0.2)
compiler.machine_code, compiler.capability = machine_code, lambda device: (9, 0)
for i in range(200):
    compiler.begin_later(str(i), torch.device("cuda", 0))
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    assert 1 <= len(list(tmp_path.iterdir())) < 100  # those that had begun


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("angle", [0.0, math.pi / 8, math.pi / 4, 1.3, math.pi / 2, 2.0, 3 * math.pi / 4, 3.0])
@pytest.mark.parametrize("length", [7, 14, 19, 28])
def test_a_tile_holds_every_tap_of_every_output(angle: float, stride: int, length: int) -> None:
    from oriented1d.operator.cuda.tiles import make_tile

    taps = geometry.layer_taps(geometry.directions([angle]), 31).runs[0].distinct
    tile = make_tile(angle, taps, stride, length)
    uses = {(i, d): (u, v) for u, v, pairs in tile.pixels for i, d in pairs}
    assert len(uses) == length * len(taps)
    assert len(tile.pixels) < 0.75 * len(uses)
    for (i, d), (u, v) in uses.items():
        dy, dx = taps[d].tolist()
        du, dv = (dy, dx) if tile.steep else (dx, dy)
        assert (u, v) == (i * stride + du, tile.drift(i) * stride + dv)
    assert tile.drift(5 + 3 * length) == tile.drift(5) + 3 * tile.advance


@pytest.mark.parametrize(
    ("kernel_size", "height", "width"), [(31, 56, 50), (31, 28, 28), (31, 14, 13), (7, 56, 56), (63, 20, 9)]
)
@pytest.mark.parametrize("last", [False, True])
def test_a_frame_holds_every_pixel_that_a_tile_reads(kernel_size: int, height: int, width: int, last: bool) -> None:
    """What the kernels do with frames, in Python."""
    pytest.importorskip("cuda.core")
    from oriented1d.operator import cuda
    from oriented1d.operator.cuda import source

    angles = tuple(geometry.layer_angles(8).tolist())
    image = max(height, width)
    part = cuda._Part(angles, ())
    spec, _ = cuda._spec("gather", last, torch.float32, kernel_size, 1, part, True, 8, image, image, 232448)
    if not spec.block.region:
        pytest.skip("large images in channels_last lie in strips")
    numbers, threads, _ = source.planar_layout(spec)
    lists = np.split(
        source.places(spec, height, width), np.cumsum([1 if last else n for n in numbers])[:-1] * height * width
    )
    x = torch.randn(1, 1, height, width, dtype=torch.float64)
    w = torch.randn(1, kernel_size, dtype=torch.float64)
    for angle, program, places, number in zip(angles, source.programs(spec), lists, numbers, strict=True):
        f = source.frame(spec, program)
        assert number * f.tiles <= threads
        at = places[: height * width] // 4
        assert len(set(at.tolist())) == height * width
        memory = np.zeros(f.left + f.size + f.pitch)
        memory[at] = x.flatten().numpy()
        folded = [sum(w[0, t].item() for t in taps) for taps in program.fold]
        outputs = np.full_like(memory, np.nan)
        for tile in range(f.tiles):
            line, start = tile % f.lanes, tile // f.lanes * program.tile.length
            if line >= f.lines:
                continue
            base = f.left + line * f.pitch + start
            sums = np.zeros(program.tile.length)
            for row, u, uses in f.pixels:
                value = memory[f.left + (line + row) % f.lines * f.pitch + start + u]
                for i, d in uses:
                    sums[i] += folded[d] * value
            outputs[base : base + len(sums)] = sums
        taps = geometry.layer_taps(geometry.directions([angle]), kernel_size)
        expected = portable.forward(x, w, None, taps, 1, False).flatten().numpy()
        np.testing.assert_allclose(outputs[at], expected, rtol=0, atol=1e-12 * kernel_size)


@pytest.mark.parametrize(
    ("channels", "most", "vector", "sector", "expected"),
    [
        (192, 16, 4, 16, [(0, 16), (16, 8), (24, 8), (32, 16)]),
        (192, 16, 4, 0, [(0, 12), (12, 12), (24, 12), (36, 12)]),
        (96, 16, 4, 16, [(0, 12), (12, 12)]),
        (96, 8, 1, 8, [(0, 8), (8, 4), (12, 4), (16, 8)]),
        (384, 16, 8, 16, [(0, 16), (16, 16), (32, 16), (48, 16), (64, 16), (80, 16)]),
        (136, 16, 1, 0, [(0, 8), (8, 9), (17, 8), (25, 9)]),
        (136, 16, 4, 0, [(0, 8), (8, 9), (17, 8), (25, 9)]),  # not a multiple: the last has the rest
        (40, 7, 1, 0, [(0, 5), (5, 5)]),
    ],
)
def test_blocks_of_channels(
    channels: int, most: int, vector: int, sector: int, expected: list[tuple[int, int]]
) -> None:
    pytest.importorskip("cuda.core")
    from oriented1d.operator import cuda

    runs = geometry.layer_taps(geometry.directions(geometry.layer_angles(channels)), 7).runs[:2]
    assert [cut for run in runs for cut in cuda._cuts(run, most, vector, sector)] == expected


@pytest.mark.parametrize(("slots", "team"), [(0, 1), (1, 1), (7, 1), (500, 1), (9, 2), (500, 3)])
def test_every_image_is_the_work_of_one_block(slots: int, team: int) -> None:
    pytest.importorskip("cuda.core")
    from oriented1d.operator import cuda

    rows = [[(0, 0, 8), (0, 8, 5)], [(1, 13, 4)], [(2, 17, 4), (2, 21, 4), (2, 25, 1)]]
    groups, images = [2, 1, 3], 37
    starts, work, parts = cuda._work(rows, groups, [1.0, 5.0, 2.5], images, slots, team)
    assert starts[0] == 0
    assert starts[-1] == len(work)
    assert (np.diff(starts) >= 0).all()
    done: dict[tuple[int, ...], list[int]] = {}
    numbers: dict[tuple[int, ...], list[int]] = {}
    for *row, group, first, stop, part, _ in work.tolist():
        done.setdefault((*row, group), []).extend(range(first, stop))
        numbers.setdefault(tuple(row), []).append(part)
    expected = {
        (*row, group) for part, number in zip(rows, groups, strict=True) for row in part for group in range(number)
    }
    assert set(done) == expected
    assert all(sorted(seen) == list(range(images)) for seen in done.values())
    for row, count in zip(itertools.chain(*rows), parts.tolist(), strict=True):
        assert sorted(numbers[row]) == list(range(count))


def test_tables_share_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal ones are one: a size that was forgotten and comes again takes no more."""
    pytest.importorskip("cuda.core")
    from oriented1d.operator.cuda import compiler

    success, allocated = compiler.driver.CUresult.CUDA_SUCCESS, []

    def allocate(size: int) -> tuple:
        allocated.append(np.full(size + 256, 255, dtype=np.uint8))
        return success, -(-allocated[-1].ctypes.data // 256) * 256

    def copy(to: int, source: int, size: int, stream: str) -> tuple:
        assert stream == "stream"
        ctypes.memmove(to, source, size)
        return (success,)

    fake = SimpleNamespace(
        CUresult=compiler.driver.CUresult,
        CUstream_flags=compiler.driver.CUstream_flags,
        cuStreamCreate=lambda flags: (success, "stream"),
        cuMemAlloc=allocate,
        cuMemcpyHtoDAsync=copy,
        cuStreamSynchronize=lambda stream: (success,),
    )
    monkeypatch.setattr(compiler, "driver", fake)
    monkeypatch.setattr(compiler, "_bind", lambda device: None)
    monkeypatch.setattr(compiler, "_stores", collections.defaultdict(compiler._Store))
    device = torch.device("cuda", 0)
    rng = np.random.default_rng(0)
    arrays = [rng.integers(-(2**31), 2**31, size, dtype=np.int32) for size in (1, 7, (50, 8), 64, 10**6, 3, (2, 5))]
    placed = [compiler.DeviceArray(array, device) for array in arrays]
    for array, there in zip(arrays, placed, strict=True):
        seen = np.ctypeslib.as_array(ctypes.cast(there.pointer, ctypes.POINTER(ctypes.c_int32)), array.shape)
        assert np.array_equal(seen, array)
        assert there.pointer % 256 == 0
    assert [len(chunk) - 256 for chunk in allocated] == [2**20, 4 * 10**6, 2**20]
    for array, there in zip(arrays, placed, strict=True):
        assert compiler.DeviceArray(array.copy(), device).pointer == there.pointer
    assert compiler.DeviceArray(arrays[0], torch.device("cuda", 1)).pointer != placed[0].pointer
    assert len(allocated) == 4
    fake.cuMemAlloc = lambda size: (compiler.driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY, 0)
    with pytest.raises(RuntimeError, match=r"cannot copy numbers to a device .*OUT_OF_MEMORY"):
        compiler.DeviceArray(np.zeros(2**20, dtype=np.int32), device)


# On a GPU ------------------------------------------------------------------------------------------------------------


def check(x, w, angles, b=None, *, stride=1, residual=False, g=None) -> None:
    """Forward and all gradients against the portable path in float64."""
    leaves = [t.detach().requires_grad_() for t in (x, w, b) if t is not None]
    with use_backend("cuda"):
        y = oriented_conv1d(leaves[0], leaves[1], angles, *leaves[2:], stride=stride, residual=residual)
        g = torch.randn_like(y) if g is None else g
        ours = [y, *torch.autograd.grad(y, leaves, g)]
    plain = [t.detach().double().contiguous().requires_grad_() for t in leaves]
    with use_backend("portable"):
        z = oriented_conv1d(plain[0], plain[1], angles, *plain[2:], stride=stride, residual=residual)
        theirs = [z, *torch.autograd.grad(z, plain, g.double())]
    errors = [relative_error(a, e) for a, e in zip(ours, theirs, strict=True)]
    assert max(errors) < TOLERANCE[x.dtype], errors


@pytest.fixture
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(make):
        def call(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return call

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


SIZES = [(1, 1), (5, 3), (7, 7), (13, 20), (14, 14), (28, 27), (56, 56), (61, 75), (3, 130)]


@pytest.mark.gpu
@pytest.mark.usefixtures("_poison")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(
    ("kernel_size", "stride"), [(31, 1), (31, 2), (7, 1), (15, 3), (63, 1), (63, 2), (1, 1), (3, 2)]
)
def test_every_size(dtype: torch.dtype, fmt: str, kernel_size: int, stride: int) -> None:
    for (height, width), channels in zip(SIZES, itertools.cycle([16, 24, 5, 96, 9]), strict=False):
        x = torch.randn(3, channels, height, width, device="cuda").to(dtype).to(memory_format=FORMATS[fmt])
        w, b = (torch.randn(s, device="cuda").to(dtype) for s in ((channels, kernel_size), (channels,)))
        check(x, w, geometry.layer_angles(channels), b, stride=stride, residual=True)


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", FORMATS)
def test_every_angle(fmt: str) -> None:
    angles = torch.linspace(-4, 7, 40)
    x = torch.randn(2, 40, 33, 29, device="cuda").to(memory_format=FORMATS[fmt])
    check(x, torch.randn(40, 15, device="cuda"), angles)
    shuffled = angles[torch.randperm(40)].repeat_interleave(2)
    x = torch.randn(2, 80, 20, 29, device="cuda").to(memory_format=FORMATS[fmt])
    check(x, torch.randn(80, 9, device="cuda"), shuffled)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views(dtype: torch.dtype) -> None:
    def make(*size: int) -> torch.Tensor:
        return torch.randn(*size, device="cuda").to(dtype)

    views = [
        make(2, 16, 18, 24)[:, 4:12],
        make(2, 18, 24, 17).permute(0, 3, 1, 2)[:, 3:11],
        make(2, 8, 24, 18).transpose(2, 3),
        make(4, 8, 36, 50)[1::2, :, ::2, 1:49:2],
        make(2, 8, 1, 24).expand(2, 8, 18, 24),
        make(2 * 8 * 18 * 24 + 1)[1:].view(2, 8, 18, 24),
        make(2 * 8 * 18 * 24 + 1)[1:].view(2, 18, 24, 8).permute(0, 3, 1, 2),
    ]
    for view in views:
        check(view, make(8, 7), geometry.layer_angles(8))
        check(view, make(8, 7), geometry.layer_angles(8), stride=2)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("stride", [1, 2])
def test_the_forward_pass_begins_to_compile_all_of_the_backward_pass(
    dtype: torch.dtype, autocast: bool, fmt: str, stride: int
) -> None:
    from oriented1d.operator.cuda import compiler

    # No other test has compiled it; the two in bfloat16 would have the same kernel for the gradient of the weights.
    angles = torch.full((16,), 0.1 + 0.01 * torch.rand(()).item() + 0.02 * autocast).double()
    x = torch.randn(2, 16, 20, 20, device="cuda", dtype=dtype).to(memory_format=FORMATS[fmt])
    w = torch.randn(16, 7, device="cuda", dtype=torch.float32 if autocast else dtype)
    before = len(compiler._codes)
    with torch.autocast("cuda", dtype, enabled=autocast):
        with torch.no_grad():
            oriented_conv1d(x, w, angles, stride=stride)
        assert len(compiler._codes) == before + 1
        y = oriented_conv1d(x.requires_grad_(), w.requires_grad_(), angles, stride=stride)
    begun = set(compiler._codes)
    assert len(begun) > before + 1
    y.sum().backward()
    assert set(compiler._codes) == begun


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", FORMATS)
def test_weight_gradient_is_the_same_bits_every_time(fmt: str) -> None:
    x = torch.randn(32, 96, 28, 28, device="cuda").to(memory_format=FORMATS[fmt])
    w = torch.randn(96, 31, device="cuda", requires_grad=True)
    g = torch.randn_like(x)
    grads = [torch.autograd.grad(oriented_conv1d(x, w, geometry.layer_angles(96)), w, g)[0] for _ in range(3)]
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])
    assert grads[0].abs().sum() > 0


@pytest.mark.gpu
def test_other_stream() -> None:
    layer = OrientedConv1d(64, 31).cuda()
    x = torch.randn(8, 64, 56, 56, device="cuda")
    expected = layer(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        later = x * 2  # not there yet on any other stream
        y = layer(later)
    torch.cuda.current_stream().wait_stream(stream)
    bias = layer.bias.detach()[:, None, None]
    assert relative_error(y - bias, 2 * (expected.detach() - bias)) < 1e-6


@pytest.mark.gpu
def test_first_use_in_a_thread_of_autograd() -> None:
    """The threads of autograd start without a CUDA context of their own."""
    script = (
        "import torch, oriented1d\n"
        "x = torch.ones(2, 8, 20, 20, device='cuda', dtype=torch.bfloat16, requires_grad=True)\n"
        "w = torch.ones(8, 7, device='cuda', dtype=torch.bfloat16, requires_grad=True)\n"
        "y = oriented1d.oriented_conv1d(x, w, [0.3] * 8, stride=2)\n"
        "print([g.float().sum().item() for g in torch.autograd.grad(y, (x, w), torch.ones_like(y))])\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    sums = [float(part) for part in run.stdout.strip("[]\n").split(",")]
    assert sums[0] == pytest.approx(sums[1], rel=0.02)
    assert sums[0] > 1000


@pytest.mark.gpu
def test_network_trains_as_on_the_cpu() -> None:
    model = timm.create_model("convnext_atto_1dpp", num_classes=10, depths=(1, 1, 2, 1), layer_scale_init_value=0.5)
    x = torch.randn(4, 3, 64, 64)
    gradients = []
    for device in ("cpu", "cuda"):
        model = model.to(device)
        loss = (model(x.to(device)) * torch.arange(10, device=device)).sum()
        gradients.append([g.cpu() for g in torch.autograd.grad(loss, list(model.parameters()))])
    for ours, theirs in zip(gradients[1], gradients[0], strict=True):
        assert relative_error(ours, theirs) < 2e-3  # convolutions of cuDNN and matrix products may use TF32


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_second_device() -> None:
    layer = OrientedConv1d(64, 31)
    x = torch.randn(2, 64, 28, 28)
    results = [layer.to(device)(x.to(device)).cpu() for device in ("cpu", "cuda:0", "cuda:1")]
    assert relative_error(results[1], results[0]) < 1e-6
    assert relative_error(results[2], results[0]) < 1e-6


@pytest.mark.gpu
def test_graph_capture() -> None:
    layer = OrientedConv1d(64, 31).cuda()
    x = torch.randn(8, 64, 28, 28, device="cuda")
    layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        y = layer(x)
    x.copy_(torch.randn_like(x))
    y.fill_(torch.nan)
    graph.replay()
    assert torch.equal(y, layer(x))
    expected = layer.double().cpu()(x.double().cpu())
    assert relative_error(y.cpu(), expected) < 1e-5


@pytest.mark.gpu
def test_reduce_overhead() -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 1), OrientedConv1d(64, 31), torch.nn.GELU()).cuda()
    compiled = torch.compile(network, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        x = torch.randn(4, 3, 28, 28, device="cuda")
        fast, eager = compiled(x), network(x)
        assert relative_error(fast, eager) < 1e-5
        ours = torch.autograd.grad(fast.square().sum(), list(network.parameters()))
        theirs = torch.autograd.grad(eager.square().sum(), list(network.parameters()))
        assert max(relative_error(a, b) for a, b in zip(ours, theirs, strict=True)) < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    layer = OrientedConv1d(64, 31).cuda()
    x = torch.randn(2, 64, 28, 28, device="cuda", requires_grad=True)
    with torch.autocast("cuda", dtype):
        y = layer(x)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    layer.double()
    z = layer(x.detach().to(dtype).double())
    assert relative_error(y, z) < 2 * TOLERANCE[dtype]
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(3, 64, 30, 28), (2, 24, 70, 9), (2, 96, 14, 14)])
def test_autocast_is_casting_by_hand(
    dtype: torch.dtype, fmt: str, stride: int, shape: tuple[int, int, int, int]
) -> None:
    x = torch.randn(shape, device="cuda").to(memory_format=FORMATS[fmt])
    w, b = torch.randn(shape[1], 31, device="cuda"), torch.randn(shape[1], device="cuda")
    leaves = [t.requires_grad_() for t in (x, w, b)]
    angles, how = geometry.layer_angles(shape[1]), {"stride": stride, "residual": True}
    with torch.autocast("cuda", dtype):
        y = oriented_conv1d(x, w, angles, b, **how)
    low = [t.to(dtype) for t in leaves]
    expected = oriented_conv1d(low[0], low[1], angles, low[2], **how)
    g = torch.randn_like(y)
    ours, theirs = ([z, *torch.autograd.grad(z, leaves, g)] for z in (y, expected))
    assert [t.dtype for t in ours] == [dtype, *[torch.float32] * 3]
    for a, e in zip(ours, theirs, strict=True):
        assert torch.equal(a, e)
        assert a.abs().sum() > 0


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("stride", [1, 2])
def test_an_autocast_call_is_one_kernel(fmt: str, stride: int) -> None:
    layer = OrientedConv1d(64, 31, stride=stride).cuda()
    x = torch.randn(2, 64, 28, 28, device="cuda", dtype=torch.bfloat16).to(memory_format=FORMATS[fmt])
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        assert kernels(lambda: layer(x)) == ["oriented_gather"]


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", FORMATS)
def test_more_than_two_to_the_31_numbers(fmt: str) -> None:
    images = 2**31 // (64 * 112 * 112) + 2
    x = torch.empty(images, 64, 112, 112, device="cuda", dtype=torch.bfloat16, memory_format=FORMATS[fmt])
    x.normal_()
    assert x.numel() > 2**31
    w = torch.randn(64, 7, device="cuda").bfloat16()
    layer = geometry.layer_taps(geometry.directions(geometry.layer_angles(64)), 7)
    y = oriented_conv1d(x, w, layer.directions)
    expected = portable.forward(x[-1:].double().contiguous(), w.double(), None, layer, 1, False)
    assert relative_error(y[-1:], expected) < TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
def test_what_the_kernels_do_not_run_takes_the_portable_path() -> None:
    x, w = torch.randn(1, 8, 20, 20, device="cuda"), torch.randn(8, 7, device="cuda")
    with pytest.warns(UserWarning, match="no CUDA kernels for a stride over 3"):
        y = oriented_conv1d(x, w, geometry.layer_angles(8), stride=4)
    with use_backend("portable"):
        assert torch.equal(y, oriented_conv1d(x, w, geometry.layer_angles(8), stride=4))
    with use_backend("cuda"), pytest.raises(RuntimeError, match=r"cannot run torch\.float64"):
        oriented_conv1d(x.double(), w.double(), geometry.layer_angles(8))


@pytest.mark.gpu
def test_processes_share_the_cache(tmp_path) -> None:
    script = (
        "import torch, oriented1d\n"
        "x = torch.ones(1, 8, 9, 9, device='cuda')\n"
        "y = oriented1d.oriented_conv1d(x, torch.ones(8, 5, device='cuda'), [0.7] * 8)\n"
        "print(y.sum().item())\n"
    )
    environment = {**os.environ, "ORIENTED1D_CACHE": str(tmp_path)}
    runs = [
        subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    sums = [run.communicate(timeout=300)[0] for run in runs]
    assert all(run.returncode == 0 for run in runs)
    assert len(set(sums)) == 1
    assert float(sums[0]) > 0
