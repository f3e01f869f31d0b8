"""The operator on NVIDIA GPUs: kernels written for the angles of a layer and compiled when first needed.

``tiles`` decides what a thread computes, ``source`` writes CUDA C++, ``compiler`` turns it into machine code and keeps
it on disk; this module chooses kernels, shapes grids and launches. See docs/kernels.md.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from oriented1d.geometry import Directions, DirectionTaps, LayerTaps, layer_taps
from oriented1d.operator.cuda import compiler, mma, source
from oriented1d.operator.cuda.source import Spec
from oriented1d.operator.layout import channels_last as is_channels_last
from oriented1d.operator.layout import memory_format, new_images

DTYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "half"}
_ANGLES_PER_KERNEL = 8
_LONGEST_KERNEL = 63
_LARGEST_STRIDE = 3  # the code of grad-input grows with its square
_MOST_ANGLES = 64


def unsupported(tensor: Tensor, taps: LayerTaps, stride: int) -> str | None:
    """Why these kernels cannot run a layer on tensors like this one; None if they can."""
    if tensor.numel() >= 2**31 and tensor.shape[1:].numel() >= 2**31:
        return "images of 2**31 numbers or more"
    return _unsupported(tensor.dtype, tensor.device, taps, stride)


@functools.lru_cache(maxsize=4096)
def _unsupported(dtype: torch.dtype, device: torch.device, taps: LayerTaps, stride: int) -> str | None:
    if dtype not in DTYPES:
        return str(dtype)
    if taps.kernel_size > _LONGEST_KERNEL:
        return f"a kernel size over {_LONGEST_KERNEL}"
    if len(set(taps.directions.angles)) > _MOST_ANGLES:
        return f"more than {_MOST_ANGLES} different angles in a layer"
    if stride > _LARGEST_STRIDE:
        return f"a stride over {_LARGEST_STRIDE}"
    return compiler.unavailable(device)


def forward(input: Tensor, weight: Tensor, bias: Tensor | None, taps: LayerTaps, stride: int, residual: bool) -> Tensor:
    last = is_channels_last(input)
    output = new_images(input, _output_shape(input.shape, stride), last)
    _gather("gather", input, output, weight, bias, taps, stride, last, reverse=False, residual=residual)
    return output


@functools.lru_cache(maxsize=4096)
def depthwise_unsupported(device: torch.device, dtype: torch.dtype, channels: int, kernel_size: int) -> str | None:
    """Why :func:`depthwise` cannot run layers like this one; None if it can."""
    if dtype not in (torch.bfloat16, torch.float16):
        return str(dtype)
    if kernel_size not in (3, 5, 7):
        return f"a kernel size of {kernel_size}"
    if channels % 8:
        return "channels in no multiple of 8"
    reason = compiler.unavailable(device)
    if reason is not None:
        return reason
    taps = _square_taps(channels, kernel_size)
    for side in _SIDES:
        shape = torch.Size((1, channels, side, side))
        problem = _Problem("gather", shape, shape, dtype, True, 16, device, taps, 1, True)
        if _mma_spec(problem, _parts(problem)[0]) is None:
            return "a device like this one"
    return None


def depthwise_fits(shape: torch.Size, kernel_size: int) -> bool:
    """Whether :func:`depthwise` takes so many images ``(N, C, H, W)`` of this size."""
    n, _, height, width = shape
    return 0 < shape.numel() < 2**31 and _countable(n, max(height, width), kernel_size)


def _square_taps(channels: int, kernel_size: int) -> LayerTaps:
    """The layer as far as this module looks: all channels are alike, as if they had one angle."""
    return layer_taps(Directions((0.0,), (channels,)), kernel_size)


def depthwise(input: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> Tensor:
    """Depthwise convolution with kernels of two dimensions at stride 1, zero outside the image, on tensor cores.

    Args:
        input: ``(N, C, H, W)``, see :func:`depthwise_fits`.
        weight: ``(C, 1, K, K)``, of the dtype of ``input`` or float32.
        bias: ``(C,)`` or None, of the dtype of ``weight``.
        reverse: turn the kernels by half a turn, which makes it the gradient of the input.

    Returns:
        ``(N, C, H, W)`` in channels_last.
    """
    x = input.contiguous(memory_format=torch.channels_last)
    if _alignment(x) < 16:
        x = x.clone()
    y = torch.empty_like(x)
    taps = _square_taps(x.shape[1], weight.shape[-1])
    _gather("gather", x, y, weight.flatten(1), bias, taps, 1, True, reverse, False, square=True)
    return y


def _output_shape(shape: torch.Size, stride: int) -> tuple[int, int, int, int]:
    n, c, height, width = shape
    return n, c, -(-height // stride), -(-width // stride)


def expect_gradients(input: Tensor, weight: Tensor, taps: LayerTaps, stride: int) -> None:
    """Start to compile what the backward pass of a call on ``input`` will need, while its forward pass is compiled."""
    wide = weight.dtype != input.dtype
    _expect_gradients(input.shape, input.dtype, is_channels_last(input), input.device, taps, stride, wide)


@functools.lru_cache(maxsize=4096)
def _expect_gradients(
    shape: torch.Size, dtype: torch.dtype, last: bool, device: torch.device, taps: LayerTaps, stride: int, wide: bool
) -> None:
    if shape.numel() == 0:
        return
    output = torch.Size(_output_shape(shape, stride))
    of_input = _Problem(
        "gather" if stride == 1 else "adjoint", output, shape, dtype, last, 16, device, taps, stride, wide=wide
    )
    with compiler.current(device):
        _begin(of_input)
        _begin(_Problem("weight", shape, output, dtype, last, 16, device, taps, stride))


@dataclasses.dataclass
class _Layer:
    """What is known of a layer in one direction.

    Attributes:
        problem: its first.
        sizes: the first two sizes of images.
        expected: kernels for all sizes have begun to be compiled.
    """

    problem: _Problem
    sizes: set[tuple[int, int]] = dataclasses.field(default_factory=set)
    expected: bool = False


_layers: dict[tuple[object, ...], _Layer] = {}
_MOST_LAYERS, _MOST_OF_A_NETWORK = 4096, 256  # convnext_base_1dpp has some 60
_SIDES = (7, 14, 16, 28, 32, 56, 64, 112)  # of outputs: one of every range that a kernel is chosen for


def _begin(problem: _Problem) -> list[tuple[Spec | mma.Spec, int]]:
    """Start to compile what a problem needs; and later, once a layer has had images of two sizes, what others need.

    There are a few kernels for a layer, each for a range of sizes. Where sizes change, several of them will be needed;
    and not by that layer alone. All those of a network, which were seen before, begin with it, beside each other: if
    each began when its turn comes in a forward pass, one would wait for the other.

    Returns:
        the kernels of this problem, with the bytes of shared memory of a block.
    """
    chosen = [_choose(problem, part) for part in _parts(problem)]
    for spec, _ in chosen:
        compiler.begin(spec, problem.device)
    kind, (_, _, height, width), _, *rest = problem
    if len(_layers) > _MOST_LAYERS:  # angles that are other ones at each call
        _layers.clear()
    layer = _layers.setdefault((kind, *rest), _Layer(problem))
    if len(layer.sizes) < 2:
        layer.sizes.add((height, width))
    if len(layer.sizes) == 2 and not layer.expected:
        # More than networks have are layers that may not come again.
        others = list(_layers.values()) if len(_layers) <= _MOST_OF_A_NETWORK else [layer]
        others = [other for other in others if other.problem.device == problem.device and not other.expected]
        _, _, first_height, first_width = layer.problem.in_shape
        _begin_sizes(others, (height / first_height, width / first_width))
    return chosen


def _begin_sizes(layers: list[_Layer], growth: tuple[float, float]) -> None:
    """Compile, when there are threads for it, what layers need when their first images grow so much, and then what
    other sizes need: those that differ least come first."""
    sizes = []
    for layer in layers:
        layer.expected = True
        problem = layer.problem
        _, _, height, width = problem.outer
        height, width = max(1, round(height * growth[0])), max(1, round(width * growth[1]))
        largest = _SIDES[-1] * problem.stride  # those that are larger need the same
        sizes.append((-1.0, problem, min(height, largest), min(width, largest)))  # before all others
        for side in _SIDES:
            difference = abs(math.log(side * problem.stride / max(height, width)))
            sizes.append((difference, problem, side * problem.stride, side * problem.stride))
    for _, problem, height, width in sorted(sizes, key=lambda size: size[0]):
        n, c, _, _ = problem.in_shape
        outer = torch.Size((n, c, height, width))
        inner = torch.Size(_output_shape(outer, problem.stride))
        shapes = (inner, outer) if problem.kind == "adjoint" else (outer, inner)
        other = problem._replace(in_shape=shapes[0], out_shape=shapes[1])
        for part in _parts(other):
            compiler.begin_later(_choose(other, part)[0], problem.device)


def grad_input(
    grad_output: Tensor,
    weight: Tensor,
    taps: LayerTaps,
    height: int,
    width: int,
    stride: int,
    residual: bool,
    channels_last: bool,
) -> Tensor:
    n, c, _, _ = grad_output.shape
    result = new_images(grad_output, (n, c, height, width), channels_last)
    # At stride 1 the taps are symmetric about the centre: the adjoint is the operator with the weights reversed.
    kind = "gather" if stride == 1 else "adjoint"
    _gather(kind, grad_output, result, weight, None, taps, stride, channels_last, stride == 1, residual)
    return result


def grad_weight(
    grad_output: Tensor, input: Tensor, taps: LayerTaps, stride: int, with_bias: bool
) -> tuple[Tensor, Tensor]:
    c = input.shape[1]
    last = is_channels_last(input)
    result = input.new_empty(c, taps.kernel_size)
    bias = input.new_empty(c if with_bias else 0)
    if grad_output.numel() == 0:
        return result.zero_(), bias.zero_()
    x = input.contiguous(memory_format=memory_format(last))
    g = grad_output.contiguous(memory_format=memory_format(last))
    with compiler.current(x.device):
        for launch in _launches("weight", x.shape, g.shape, x.dtype, last, _alignment(x, g), x.device, taps, stride):
            partial = x.new_empty(launch.partial, dtype=torch.float32)
            launch.run(x.data_ptr(), g.data_ptr(), partial.data_ptr())
            pointers = partial.data_ptr(), result.data_ptr(), bias.data_ptr() if with_bias else 0
            launch.reduce(*pointers)
    return result, bias


def _gather(
    kind: str,
    input: Tensor,
    output: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    taps: LayerTaps,
    stride: int,
    last: bool,
    reverse: bool,
    residual: bool,
    square: bool = False,
) -> None:
    if output.numel() == 0:
        return
    x = input.contiguous(memory_format=memory_format(last))
    w = weight.contiguous()
    b = bias.contiguous().data_ptr() if bias is not None else 0
    with compiler.current(x.device):
        alignment = _alignment(x, output)
        layer = last, alignment, x.device, taps, stride, square, w.dtype != x.dtype
        for launch in _launches(kind, x.shape, output.shape, x.dtype, *layer):
            launch.run(x.data_ptr(), output.data_ptr(), w.data_ptr(), b, after=(int(reverse), int(residual)))


def _alignment(*tensors: Tensor) -> int:
    """The bytes, 16 at most, that the addresses of tensors are multiples of."""
    bits = 16
    for tensor in tensors:
        bits |= tensor.data_ptr()
    return bits & -bits


@dataclasses.dataclass
class _Launch:
    """One kernel with its grid and the arguments that do not change from call to call."""

    code: compiler.Compiled
    grid: tuple[int, int, int]
    threads: int
    shared: int  # bytes
    constants: tuple[compiler.DeviceArray | int, ...]  # what the kernel takes between a call's pointers and flags
    table: compiler.DeviceArray  # int32, a row for each block of the second stage of a weight gradient
    rows: int
    channels: int
    partial: tuple[int, int, int]  # shape of the blocks' parts of a weight gradient
    parts: int  # of them, as the second stage takes it

    def __post_init__(self) -> None:
        self._config = compiler.config(self.grid, self.threads, self.shared)
        self._constants = tuple(value if isinstance(value, int) else value.pointer for value in self.constants)
        self._reduce_config = compiler.config((self.rows, 4, 1), 256, 0)
        self._reduce_constants = (self.table.pointer, self.channels, self.parts)

    def run(self, *pointers: int, after: tuple[int, ...] = ()) -> None:
        self.code.launch("run", self._config, *pointers, *self._constants, *after)

    def reduce(self, *pointers: int) -> None:
        self.code.launch("reduce", self._reduce_config, *pointers, *self._reduce_constants)


def _granule(taps: LayerTaps, table: list[tuple[int, int, int]], itemsize: int, pointers: int) -> int:
    """The largest copy, in bytes, that every address and every run of channels is a multiple of; 0 for none."""
    bits = taps.channels * itemsize | pointers
    for _, start, count in table:
        bits |= start * itemsize | count * itemsize
    return next((size for size in (16, 8, 4) if bits % size == 0), 0)


def _spec(
    kind: str,
    last: bool,
    dtype: torch.dtype,
    kernel_size: int,
    stride: int,
    part: _Part,
    even: bool,
    widest: int,
    outputs: int,
    image: int,
    memory: int,
    wide: bool = False,
) -> tuple[Spec, int]:
    """The kernel for a layer, with the largest blocks whose shared memory fits, and the bytes of it.

    ``widest`` is the number of channels of the commonest angle, ``outputs`` and ``image`` are the longer sides of both.
    """
    common, layer = (kind, last, DTYPES[dtype]), (kernel_size, stride, part.angles)
    # Frames of eight channels (32 bytes of each pixel) hold small images only, and are worth it for many taps.
    small = image <= 14 or (image <= 28 and kernel_size > 15)
    if last and not (dtype == torch.float32 and stride == 1 and small):
        # Two channels a thread halve the loads, but need twice the registers.
        vector = 2 if dtype.itemsize == 2 and even and kernel_size <= 31 and stride == 1 else 1
        blocks = 2 if vector == 2 or kernel_size > 31 else 3
        channels = 16 if vector == 2 and widest > 8 else 8
        along = 1 if outputs <= 14 else 2 if outputs <= 28 else 4
        length = 7 if outputs <= 7 else 14
        for tiles in (32, 16, 8):
            strip = source.Blocks(tiles=tiles, along=min(along, tiles // 4), channels=channels, resident=blocks)
            spec = Spec(*common, vector, *layer, length, strip, part.phase_rows, wide=wide)
            shared = source.strip_bytes(spec)
            if shared <= memory:
                break
    else:
        for region in (56, 28, 14, 7):
            if outputs <= region // 2 and region > 7:
                continue
            length = 14 if region == 56 else region
            inner = region * (1 if kind == "adjoint" else stride)
            ahead = dtype == torch.float32 and inner == region  # images of other strides and dtypes arrive when needed
            square = source.Blocks(region=region, whole=image <= inner, stages=2 if ahead else 1)
            spec, shared = _resident(Spec(*common, 1, *layer, length, square, part.phase_rows, wide=wide), memory)
            if ahead and not (last and kind == "weight"):  # as long as that takes no place from other blocks
                square = dataclasses.replace(square, stages=3)
                deeper, more = _resident(dataclasses.replace(spec, block=square), memory)
                if deeper.block.resident == spec.block.resident and more <= memory:
                    spec, shared = deeper, more
            if shared <= memory:
                break
    return spec, shared


def _resident(spec: Spec, memory: int) -> tuple[Spec, int]:
    """The same with the blocks that a processor has registers and shared memory for, and the bytes of one."""
    _, threads, shared = source.planar_layout(spec)
    registers = spec.length + spec.kernel_size + 50
    resident = max(1, min(65536 // (threads * registers), (memory + 1024) // (shared + 1024)))
    return dataclasses.replace(spec, block=dataclasses.replace(spec.block, resident=resident)), shared


def _cuts(run: DirectionTaps, most: int, vector: int, sector: int) -> list[tuple[int, int]]:
    """First channel and number of channels of the blocks of an angle: ``most`` at most, multiples of ``vector``.

    All have about as many; but blocks of a ``sector``, the channels of the 32 bytes that memory is read in, keep to it
    where that makes no more of them: 24 channels are 16 and 8.
    """
    units = -(-(run.stop - run.start) // vector)
    parts = -(-units // (most // vector))
    edges = [run.start + units * i // parts * vector for i in range(parts)] + [run.stop]
    whole = [run.start, *range((run.start // most + 1) * most, run.stop, most), run.stop]
    if most == sector and len(whole) <= len(edges):
        edges = whole
    return [(start, stop - start) for start, stop in itertools.pairwise(edges)]


@functools.lru_cache(maxsize=4096)
def _rows(
    taps: LayerTaps, angles: tuple[float, ...], most: tuple[int, ...], vector: int, sector: int
) -> tuple[list[tuple[int, int, int]], ...]:
    """For each program ``(program, first channel, number of channels)`` of its blocks, ``most[program]`` at most."""
    rows: list[list[tuple[int, int, int]]] = [[] for _ in most]
    phases = len(most) // len(angles)
    for run in taps.runs:
        if run.angle in angles:
            first = angles.index(run.angle) * phases
            for program in range(first, first + phases):
                rows[program] += [(program, *cut) for cut in _cuts(run, most[program], vector, sector)]
    return tuple(rows)


class _Part(NamedTuple):
    """What a kernel computes of a problem.

    Attributes:
        angles: distinct angles, whose channels it has.
        phase_rows: see ``source.Spec``.
    """

    angles: tuple[float, ...]
    phase_rows: tuple[int, ...]


class _Problem(NamedTuple):
    """What a launch is for.

    Attributes:
        kind: ``"gather"``, ``"adjoint"`` or ``"weight"``.
        in_shape, out_shape: of the images read and written; of a weight gradient, of images and gradients.
        last: they are channels_last.
        alignment: bytes, see :func:`_alignment`.
        square, wide: see ``source.Spec``.
    """

    kind: str
    in_shape: torch.Size
    out_shape: torch.Size
    dtype: torch.dtype
    last: bool
    alignment: int
    device: torch.device
    taps: LayerTaps
    stride: int
    square: bool = False
    wide: bool = False

    @property
    def outer(self) -> torch.Size:
        """Of the images before the layer."""
        return self.out_shape if self.kind == "adjoint" else self.in_shape

    @property
    def sector(self) -> int:
        """Channels of a pixel in 32 bytes, the least that is read from memory; 0 where channels lie apart."""
        return 32 // self.dtype.itemsize if self.last else 0

    @property
    def outputs(self) -> tuple[int, int]:
        """Height and width of the outputs of one program."""
        ho, wo = self.out_shape[2:]
        return (-(-ho // self.stride), -(-wo // self.stride)) if self.kind == "adjoint" else (ho, wo)


def _countable(images: int, longest: int, kernel_size: int) -> bool:
    """Whether tensor core kernels can count the lines of the frames of all images."""
    return images * (longest + kernel_size) < 2**29


def _mma_spec(problem: _Problem, part: _Part) -> mma.Spec | None:
    """The kernel for a layer on tensor cores; None where there is none for it."""
    kind, in_shape, _, dtype, last, alignment, device, taps, stride, square, wide = problem
    if compiler.capability(device) < (8, 0):
        return None
    n, _, hi, wi = in_shape
    outputs = problem.outputs
    if not _countable(n, max(hi, wi, *outputs), taps.kernel_size):
        return None
    vector = 1
    if last:
        most = (mma.WARPS,) * len(part.angles)
        table = list(itertools.chain(*_rows(taps, part.angles, most, 4, problem.sector)))
        vector = _granule(taps, table, dtype.itemsize, alignment) // 2
        # Sectors of large images that blocks share are read and written more than once.
        shared = vector < 8 if kind == "adjoint" else any((start | count) % problem.sector for _, start, count in table)
        if max(outputs) > 64 and shared and not square:
            return None
    _, memory = compiler.limits(device)
    layer, sizes = (taps.kernel_size, stride, part.angles), ((hi, wi), outputs)
    spec = mma.choose(kind, DTYPES[dtype], vector, *layer, *sizes, memory, last, part.phase_rows, square, wide)
    if spec is None or last:
        return spec
    rows = itertools.chain(*_rows(taps, part.angles, (spec.channels,) * len(part.angles), vector, problem.sector))
    return dataclasses.replace(spec, full=all(count == spec.channels for _, _, count in rows))


def _mma_launch(spec: mma.Spec, problem: _Problem) -> _Launch:
    n, c, hi, wi = problem.in_shape
    ho, wo = problem.out_shape[2:]
    device = problem.device
    processors, _ = compiler.limits(device)
    most = (spec.channels,) * len(mma.programs(spec))
    groups = list(itertools.chain(*_rows(problem.taps, spec.angles, most, spec.vector, problem.sector)))
    shares = mma.share(spec, groups, n, (hi, wi), problem.outputs, 2 * c * max(hi * wi, ho * wo), processors)
    splits = max(row[4] for row in shares.rows)
    table_there = compiler.DeviceArray(np.array(shares.rows, dtype=np.int32), device)
    launch = _Launch(
        compiler.compile(spec, device),
        (shares.strips, len(shares.rows), 1),
        32 * (max(count for _, _, count in groups) if spec.last else mma.WARPS),
        spec.shared_bytes,
        (table_there, n, c, hi, wi, ho, wo, int(shares.by_image)),
        table_there,
        len(shares.rows),
        c,
        (splits * shares.strips * spec.team, c, max(len(program.fold) for program, _ in mma.programs(spec)) + 1),
        shares.strips * spec.team,
    )
    launch.code.reserve("run", spec.shared_bytes, device)
    return launch


def _work(
    rows: Sequence[list[tuple[int, int, int]]],
    groups: list[int],
    costs: list[float],
    images: int,
    slots: int,
    team: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What each block does.

    Every new size of images asks for it, with thousands of segments: hence the arrays.

    Args:
        rows: for each program, ``(program, first channel, number of channels)`` of what a block works on at a time.
        groups: for each program, the regions or strips of an image.
        costs: for each program, what a row costs for one image and one group; all are alike if there are no ``slots``.
        images: number of images.
        slots: blocks that run at a time, between which all is shared out evenly; 0: one block for 16 images of a row.
        team: rows of a program that as many blocks work on side by side, because they lie in the same lines of memory;
            1 if there are no ``slots``.

    Returns:
        The first segment of each block ``(blocks + 1,)`` and the segments ``(S, 8)`` (program, first channel, number of
        channels, group, first image, behind the last image, part, 0); and the number of parts of each row, in the order
        of ``rows``. All int32.
    """
    table = np.array(list(itertools.chain(*rows)), dtype=np.int32).reshape(-1, 3)
    # A job is a team of rows and a group; `members` are its rows, -1 where the team is smaller.
    sizes = np.array([len(part) for part in rows])
    teams = -(-sizes // team)
    jobs_of = np.array(groups) * teams
    program = np.repeat(np.arange(len(rows)), jobs_of)
    jobs = len(program)
    number = np.arange(jobs) - (np.cumsum(jobs_of) - jobs_of)[program]  # of a job in its program
    group, team_of = np.divmod(number, teams[program])
    member = team_of[:, None] * team + np.arange(team)
    member = np.where(member < sizes[program, None], (np.cumsum(sizes) - sizes)[program, None] + member, -1)
    if not slots:
        return _work_alone(table[member[:, 0]], group, np.array(groups).repeat(sizes), images)
    each_cost = np.array(costs)[program, None]
    middle = np.cumsum(each_cost * images)[:, None] + (np.arange(images) + 0.5 - images) * each_cost
    # Two rounds even out what the costs do not say, but are worth it only if a block has much to do.
    rounds = 2 if jobs * team * images >= 12 * slots else 1
    blocks = max(1, min(slots * rounds // team, jobs * images))
    owner = np.minimum((middle * (blocks / (each_cost.sum() * images))).astype(np.int64), blocks - 1)
    # Neighbouring images of a job with the same owner are a segment, once for each member.
    begins = np.ones(owner.shape, dtype=bool)
    begins[:, 1:] = owner[:, 1:] != owner[:, :-1]
    job, first = np.nonzero(begins)
    last_of_job = np.append(job[1:] != job[:-1], True)
    stop = np.where(last_of_job, images, np.append(first[1:], images))
    segment, seat = np.nonzero(member[job] >= 0)
    row = member[job][segment, seat]
    # The parts of a row are numbered in the order of its segments.
    counts = np.bincount(row, minlength=len(table)).astype(np.int32)
    by_row = np.argsort(row, kind="stable")
    number_of = np.empty(len(row), dtype=np.int64)
    number_of[by_row] = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    work = np.zeros((len(row), 8), dtype=np.int32)
    work[:, :3], work[:, 3] = table[row], group[job[segment]]
    work[:, 4], work[:, 5], work[:, 6] = first[segment], stop[segment], number_of
    block = owner[job, first][segment] * team + seat
    starts = np.concatenate([[0], np.cumsum(np.bincount(block, minlength=blocks * team))]).astype(np.int32)
    return starts, work[np.argsort(block, kind="stable")], counts


def _work_alone(
    rows: np.ndarray, group: np.ndarray, groups: np.ndarray, images: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """:func:`_work` where each job has blocks of its own, one for 16 images; all are equally long."""
    first = np.arange(0, images, 16)[:, None]
    work = np.zeros((len(first), len(rows), 8), dtype=np.int32)
    work[..., :3], work[..., 3] = rows, group
    work[..., 4], work[..., 5], work[..., 6] = first, np.minimum(first + 16, images), group * len(first) + first // 16
    starts = np.arange(len(first) * len(rows) + 1, dtype=np.int32)
    return starts, work.reshape(-1, 8), (groups * len(first)).astype(np.int32)


def _parts(problem: _Problem) -> list[_Part]:
    """The kernels of a problem, each with as many angles as a kernel has programs for."""
    distinct = sorted(set(problem.taps.directions.angles))
    angles = [tuple(distinct[i : i + _ANGLES_PER_KERNEL]) for i in range(0, len(distinct), _ANGLES_PER_KERNEL)]
    rows: list[tuple[int, ...]] = [()]
    # Each row reads the gradients: small images are faster with all of them in a kernel, which takes the compiler as
    # many times as long.
    if problem.kind == "adjoint" and max(problem.outputs) > 64:
        rows = [(row,) for row in range(problem.stride)]
    return [_Part(*both) for both in itertools.product(angles, rows)]


def _choose(problem: _Problem, part: _Part) -> tuple[Spec | mma.Spec, int]:
    """The kernel for a part of a problem, and the bytes of shared memory of a block."""
    kind, in_shape, _, dtype, last, alignment, device, taps, stride, square, wide = problem
    if dtype.itemsize == 2:
        spec = _mma_spec(problem, part)
        if spec is not None:
            return spec, spec.shared_bytes
    if square:
        raise NotImplementedError("kernels of two dimensions are tensor cores' only")
    _, memory = compiler.limits(device)
    even = alignment % (2 * dtype.itemsize) == 0 and all(run.start % 2 == run.stop % 2 == 0 for run in taps.runs)
    widest = max(run.stop - run.start for run in taps.runs)
    sizes = max(problem.outputs), max(in_shape[2:])
    return _spec(kind, last, dtype, taps.kernel_size, stride, part, even, widest, *sizes, memory, wide)


@functools.lru_cache(maxsize=2**15)  # three for each layer and size: those of a thousand sizes of a network
def _launches(
    kind: str,
    in_shape: torch.Size,
    out_shape: torch.Size,
    dtype: torch.dtype,
    last: bool,
    alignment: int,
    device: torch.device,
    taps: LayerTaps,
    stride: int,
    square: bool = False,
    wide: bool = False,
) -> tuple[_Launch, ...]:
    n, c, hi, wi = in_shape
    ho, wo = out_shape[2:]
    problem = _Problem(kind, in_shape, out_shape, dtype, last, alignment, device, taps, stride, square, wide)
    oh, ow = problem.outputs
    processors, _ = compiler.limits(device)
    result = []
    for spec, shared in _begin(problem):
        if isinstance(spec, mma.Spec):
            result.append(_mma_launch(spec, problem))
            continue
        programs = source.programs(spec)
        if spec.block.region:
            most, threads, _ = source.planar_layout(spec)
        else:
            most = (spec.block.channels,) * len(programs)
        rows = _rows(taps, spec.angles, most, spec.vector, problem.sector)
        table = list(itertools.chain(*rows))
        slots, team = 0, 1
        copies: compiler.DeviceArray | int = 0
        if spec.block.region:
            groups = [-(-oh // spec.block.region) * -(-ow // spec.block.region)] * len(programs)
            slots = processors * spec.block.resident
            team = min(16, *map(len, rows)) if last else 1
            if source.listed(spec):
                copies = compiler.DeviceArray(source.places(spec, hi, wi), device)
        else:
            groups = source.strips(spec, oh, ow)
            threads = spec.block.tiles * max(count for _, _, count in table) // spec.vector
            copies = _granule(taps, table, dtype.itemsize, alignment)
        starts, work, parts = _work(rows, groups, source.costs(spec), n, slots, team)
        result.append(
            _Launch(
                compiler.compile(spec, device),
                (len(starts) - 1, 1, 1),
                threads,
                shared,
                (compiler.DeviceArray(starts, device), compiler.DeviceArray(work, device), c, hi, wi, ho, wo, copies),
                compiler.DeviceArray(np.column_stack([table, parts]).astype(np.int32), device),
                len(table),
                c,
                (int(parts.max()), c, max(len(program.fold) for program in programs) + 1),
                0,
            )
        )
        result[-1].code.reserve("run", shared, device)
    return tuple(result)
