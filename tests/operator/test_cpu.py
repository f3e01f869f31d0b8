"""The numba loops against the portable path in float64."""

import math
import multiprocessing
import subprocess
import sys
import threading

import pytest
import torch

from oriented1d import geometry, oriented_conv1d, use_backend
from oriented1d.operator import cpu
from tests.operator.reference import relative_error

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
SIZES = [(1, 1), (5, 3), (9, 14), (31, 47), (2, 130), (70, 1)]

pytestmark = pytest.mark.skipif(not cpu.available(), reason="numba cannot be imported")


def all_directions(
    x: torch.Tensor, w: torch.Tensor, angles: torch.Tensor, b: torch.Tensor | None, stride: int, backend: str
) -> list[torch.Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, w, b) if t is not None]
    generator = torch.Generator().manual_seed(1)
    with use_backend(backend):
        y = oriented_conv1d(leaves[0], leaves[1], angles, *leaves[2:], stride=stride, residual=True)
        g = torch.randn(y.shape, generator=generator).to(y.dtype)
        return [y, *torch.autograd.grad(y, leaves, g)]


def check(
    x: torch.Tensor, w: torch.Tensor, angles: torch.Tensor, b: torch.Tensor | None = None, stride: int = 1
) -> None:
    # The gradient is rounded to the dtype before it is made double, so that both see the same.
    ours = all_directions(x, w, angles, b, stride, "cpu")
    leaves = [t.detach().double().requires_grad_() for t in (x, w, b) if t is not None]
    g = torch.randn(ours[0].shape, generator=torch.Generator().manual_seed(1)).to(x.dtype).double()
    with use_backend("portable"):
        y = oriented_conv1d(leaves[0], leaves[1], angles, *leaves[2:], stride=stride, residual=True)
        theirs = [y, *torch.autograd.grad(y, leaves, g)]
    errors = [relative_error(a, e) for a, e in zip(ours, theirs, strict=True)]
    assert max(errors) < TOLERANCE[x.dtype], errors


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("kernel_size", "stride"), [(1, 1), (3, 2), (7, 1), (15, 3), (31, 1), (31, 2), (63, 1)])
def test_every_size(dtype: torch.dtype, fmt: torch.memory_format, kernel_size: int, stride: int) -> None:
    for size, channels in zip(SIZES, (16, 5, 40, 24, 9, 130), strict=True):
        x = torch.randn(2, channels, *size).to(dtype).to(memory_format=fmt)
        w, b = torch.randn(channels, kernel_size).to(dtype), torch.randn(channels).to(dtype)
        check(x, w, geometry.layer_angles(channels), b, stride)


@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last])
def test_every_angle(fmt: torch.memory_format) -> None:
    angles = torch.linspace(-4, 7, 40)[torch.randperm(40)].repeat_interleave(2)
    check(torch.randn(2, 80, 33, 29).to(memory_format=fmt), torch.randn(80, 15), angles)


@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last])
def test_images_in_several_bands(fmt: torch.memory_format) -> None:
    check(torch.randn(1, 8, 300, 500).to(memory_format=fmt), torch.randn(8, 31), geometry.layer_angles(8))


@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_reaches_only_what_reads_it(fmt: torch.memory_format, value: float) -> None:
    x, w, angles = torch.randn(1, 32, 41, 41), torch.randn(32, 31), geometry.layer_angles(32)
    x[0, ::3, 20, 20] = value
    x[0, 1, 0, 40] = value
    ours = all_directions(x.to(memory_format=fmt), w, angles, None, 1, "cpu")
    theirs = all_directions(x, w, angles, None, 1, "portable")
    for actual, expected in zip(ours, theirs, strict=True):
        assert torch.equal(actual.isfinite(), expected.isfinite())
        finite = expected.isfinite()
        assert relative_error(actual[finite], expected[finite]) < 2e-6
    assert not ours[0].isfinite().all()


def test_results_are_the_same_bits_on_any_number_of_threads() -> None:
    x, w, angles = torch.randn(4, 48, 30, 30), torch.randn(48, 31), geometry.layer_angles(48)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, threads, threads):
            torch.set_num_threads(count)
            results.append(all_directions(x, w, angles, None, 1, "cpu"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_two_threads_at_once() -> None:
    x, w, angles = torch.randn(4, 48, 40, 40), torch.randn(48, 31), geometry.layer_angles(48)
    expected = all_directions(x, w, angles, None, 1, "cpu")
    wrong = []

    def work() -> None:
        for _ in range(5):
            with torch.no_grad():
                y = oriented_conv1d(x, w, angles, residual=True)
            if not torch.equal(y, expected[0]):
                wrong.append(y)

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def _in_child(queue: multiprocessing.Queue) -> None:
    torch.set_num_threads(1)  # as the workers of a DataLoader do: PyTorch's own threads do not survive a fork
    torch.manual_seed(3)
    x = torch.randn(4, 48, 40, 40)
    # Summed by numpy: PyTorch's own parallel operators wait for ever in a child of a process that used OpenMP.
    queue.put(float(oriented_conv1d(x, torch.ones(48, 31), [0.5] * 48).numpy().sum()))


def test_forked_child_of_a_process_that_used_threads() -> None:
    torch.manual_seed(3)
    x = torch.randn(4, 48, 40, 40)
    expected = float(oriented_conv1d(x, torch.ones(48, 31), [0.5] * 48).numpy().sum())
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == pytest.approx(expected, rel=1e-5)
    child.join(timeout=60)
    assert child.exitcode == 0


def test_without_numba_the_portable_path_runs() -> None:
    script = (
        "import sys; sys.modules['numba'] = None\n"
        "import torch, oriented1d\n"
        "from oriented1d import geometry\n"
        "from oriented1d.operator import cpu, library, portable\n"
        "x, layer = torch.randn(1, 8, 9, 9), geometry.layer_taps(geometry.directions([0.0] * 8), 5)\n"
        "assert not cpu.available() and library.backend_for(x, layer, 1) is portable\n"
        "print(oriented1d.oriented_conv1d(torch.ones(1, 8, 9, 9), torch.ones(8, 5), [0.0] * 8)[0, 0, 4, 4].item())\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "5.0", run.stderr


def test_memory_of_forward_and_backward() -> None:
    """At most 4 times the input's bytes beside it, by PyTorch's own count; the workspaces are small and counted too."""
    x = torch.randn(8, 96, 56, 56, requires_grad=True)
    w = torch.randn(96, 31, requires_grad=True)
    g, angles = torch.randn(x.shape), geometry.layer_angles(96)
    with torch.profiler.profile(profile_memory=True) as profile:
        oriented_conv1d(x, w, angles).backward(g)
    now = peak = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    assert x.numel() * 4 < peak <= 4 * x.numel() * 4
