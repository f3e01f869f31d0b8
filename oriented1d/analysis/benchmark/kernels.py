"""Where the time of a network goes on a GPU: ``oriented1d benchmark kernels``.

The kernels of a step are sorted by what they do, and beside their time stands the least that such layers can take on
this device: their bytes over the bandwidth of a copy, or their operations over the rate of a matrix product, both
measured in the same process.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from typing import Any

import torch
from torch import Tensor, nn

from oriented1d.analysis import networks
from oriented1d.analysis.benchmark import network
from oriented1d.analysis.benchmark.network import Case, Measurement
from oriented1d.analysis.benchmark.results import quantiles
from oriented1d.analysis.flops import run_on_meta
from oriented1d.layers import OrientedConv1d
from oriented1d.models.convnext import OrientedStem
from oriented1d.training.errors import UserError

ORIENTED, DEPTHWISE, PRODUCTS, POINTWISE, OTHER = KINDS = (
    "oriented layers",
    "depthwise 2D layers",
    "matrix products, other convolutions",
    "norms, activations, sums",
    "other",
)

_NAMES = (
    (ORIENTED, r"^oriented_"),
    (POINTWISE, r"^triton_|layer_norm|elementwise|reduce_kernel|GammaBeta|cat_|softmax|Softmax|multi_tensor"),
    (DEPTHWISE, r"depthwise|dgrad2d_grouped|grouped_direct|c1_k1"),
    (PRODUCTS, r"nvjet|cutlass|xmma|gemm|gemv|splitK|cudnn|convolution|fprop|dgrad|wgrad|cublas"),
)


def kind_of(kernel: str) -> str:
    """One of :data:`KINDS`, by the name of a kernel."""
    return next((kind for kind, pattern in _NAMES if re.search(pattern, kernel)), OTHER)


@dataclasses.dataclass(frozen=True)
class Device:
    """What a device reaches.

    Attributes:
        bandwidth: bytes a second, read and written, of a copy.
        rate: operations a second (two for a multiply-add) of a matrix product in the dtype of the network.
    """

    bandwidth: float
    rate: float


@dataclasses.dataclass(frozen=True)
class KernelMeasurement(Measurement):
    """What one network and mode gave.

    Attributes:
        kernels: of a step: for each kind the number of kernels, and their milliseconds together.
        device: what bounds them.
    """

    kernels: dict[str, tuple[int, float]]
    device: Device


def measure(case: Case) -> KernelMeasurement:
    """Measure one network and mode in this process."""
    from torch.profiler import ProfilerActivity, profile

    steps = 3
    device = torch.device(case.device)
    step, measured = network.prepare(case)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        for _ in range(steps):
            step()
        torch.cuda.synchronize(device)
    kernels = dict.fromkeys(KINDS, (0, 0.0))
    for event in recorded.events() or ():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            number, ms = kernels[kind_of(event.name)]
            kernels[kind_of(event.name)] = number + 1, ms + event.time_range.elapsed_us() / 1e3
    kernels = {kind: (round(number / steps), ms / steps) for kind, (number, ms) in kernels.items()}
    return KernelMeasurement(
        measured.ms, measured.peak_memory_mib, kernels, _device(device, network.DTYPES[case.dtype])
    )


def _device(device: torch.device, dtype: torch.dtype) -> Device:
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = quantiles(network.times(lambda: target.copy_(source), device, 20))[1]
    side = 8192
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    network.times(lambda: left @ right, device, 5)
    product = quantiles(network.times(lambda: left @ right, device, 20))[1]
    return Device(2 * source.numel() / copy * 1e3, 2 * side**3 / product * 1e3)


def floors(model: nn.Module, case: Case, device: Device) -> dict[str, float]:
    """Milliseconds that the layers of each kind take at least, if each reads its inputs and writes its outputs once.

    Training adds, for each layer, what its gradients must read and write. Layers that a kernel joins need not write
    what lies between them, so a kind can take less than its floor; the layers of the 1D stem that are one kernel are
    counted as one.
    """
    itemsize = torch.empty((), dtype=network.DTYPES[case.dtype]).element_size()
    training = case.mode == "training"
    found: dict[nn.Module, tuple[str, float]] = {}
    sizes: dict[nn.Module, tuple[int, int]] = {}

    def seconds(volumes: float, operations: float = 0.0) -> float:
        return case.batch * max(volumes * itemsize / device.bandwidth, operations / device.rate)

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        if not isinstance(output, Tensor) or not inputs:
            return
        read, written = sizes[module] = inputs[0].numel(), output.numel()  # of one image
        three = 3 if training else 1  # the output, and two gradients
        if isinstance(module, OrientedConv1d):
            found[module] = ORIENTED, seconds(three * (read + written))
        elif isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1:
            found[module] = DEPTHWISE, seconds(three * (read + written))
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            operations = 2 * written * module.weight[0].numel()
            found[module] = PRODUCTS, seconds(three * (read + written), three * operations)
        elif isinstance(module, (nn.LayerNorm, nn.GroupNorm)) or type(module).__name__ == "GELU":  # timm has its own
            # Backward reads the input and one gradient and writes the other. A module that runs twice counts once.
            found[module] = POINTWISE, seconds((5 if training else 2) * written)
        elif hasattr(module, "drop_path"):  # a residual block: its sum, and its scale
            found[module] = POINTWISE, seconds((6 if training else 3) * written)

    hooks = [module.register_forward_hook(note) for module in model.modules()]
    try:
        run_on_meta(model, case.size)
    finally:
        for hook in hooks:
            hook.remove()
    for stem in model.modules():
        if isinstance(stem, OrientedStem) and itemsize == 2:  # one kernel from the images to the norm's output
            written = sizes[stem.dw1][1]
            found[stem.dw1] = ORIENTED, seconds((3 if training else 1) * (sizes[stem.pw1][0] + written))
            del found[stem.pw1], found[stem.norm1]
    result = dict.fromkeys(KINDS, 0.0)
    for kind, floor in found.values():
        result[kind] += 1e3 * floor
    return result


def run(options: argparse.Namespace) -> list[dict[str, object]]:
    """Rows of each network, mode and kind, and one of the whole step.

    Raises:
        UserError: the device is not a GPU.
    """
    if options.device.type != "cuda":
        raise UserError(f"--device: expected a GPU, got {options.device}: kernels are a GPU's")
    return [row for case in network.cases(options) for row in rows_of(case, network.isolated(measure, case))]


def rows_of(case: Case, result: KernelMeasurement | str) -> list[dict[str, object]]:
    """Lines of the table and the CSV file; ``result`` is a measurement, or what went wrong."""
    common = network.columns(case)
    if isinstance(result, str):
        empty = dict.fromkeys(("kind", "kernels", "ms", "floor_ms", "gb_per_s", "tflop_per_s"), "")
        return [common | empty | {"error": result}]
    floor = floors(networks.create(case.model), case, result.device)
    rows: dict[str, tuple[int, float, float | None]] = {
        kind: (*result.kernels[kind], floor[kind]) for kind in KINDS if result.kernels[kind][0]
    }
    totals = [sum(column) for column in zip(*result.kernels.values(), strict=True)]
    rows["all kernels"] = int(totals[0]), totals[1], sum(floor.values())
    rows["a step, not profiled"] = 0, quantiles(result.ms)[1], None
    reached = {"gb_per_s": f"{result.device.bandwidth / 1e9:.0f}", "tflop_per_s": f"{result.device.rate / 1e12:.0f}"}
    return [
        common
        | {
            "kind": kind,
            "kernels": number or "",
            "ms": f"{ms:.3f}",
            "floor_ms": f"{least:.3f}" if least else "",
            **reached,
            "error": "",
        }
        for kind, (number, ms, least) in rows.items()
    ]
