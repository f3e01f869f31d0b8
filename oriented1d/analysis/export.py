"""Networks as files for other programs: ``oriented1d export``.

ONNX has no oriented convolution, so the file holds depthwise convolutions in its place (:class:`BoxConv2d`). A file of
``torch.export`` keeps the operator as it is, and needs this package to run.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from oriented1d import geometry
from oriented1d.analysis import networks
from oriented1d.analysis.flops import multiply_adds
from oriented1d.files import unfinished
from oriented1d.layers import OrientedConv1d
from oriented1d.training.errors import UserError
from oriented1d.training.files import check_writable

TOLERANCE = {"onnx": 1e-4, "torch-export": 1e-6}  # of the largest output, or of 1 if that is less
ENDINGS = {"onnx": ".onnx", "torch-export": ".pt2"}


class BoxConv2d(nn.Module):
    """An oriented layer as ordinary convolutions: ``(N, C, H, W)`` to ``(N, C, ceil(H / stride), ceil(W / stride))``.

    The channels of one direction are a depthwise convolution whose kernel is the bounding box of the taps, with their
    weights on the pixels they read (added up where taps coincide) and zeros elsewhere. The identity of a ``residual``
    layer is one more on the centre. Works at any image size.

    Args:
        layer: the layer to imitate. Its weights are copied, in their dtype, as they are now.
    """

    def __init__(self, layer: OrientedConv1d) -> None:
        super().__init__()
        self.stride = layer.stride
        weight = layer.weight.detach().flatten(1)
        runs = geometry.layer_taps(geometry.directions(layer.theta), layer.kernel_size).runs
        self.counts = [run.stop - run.start for run in runs]
        self.kernels = nn.ParameterList()
        for run in runs:
            height, width = box(run)
            kernel = weight.new_zeros(run.stop - run.start, 1, height, width)
            for tap, (dy, dx) in enumerate(run.offsets.tolist()):
                kernel[:, 0, height // 2 + dy, width // 2 + dx] += weight[run.start : run.stop, tap]
            if layer.residual:
                kernel[:, 0, height // 2, width // 2] += 1
            self.kernels.append(nn.Parameter(kernel, requires_grad=False))
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone(), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, C, ceil(H / stride), ceil(W / stride))``."""
        biases: Sequence[Tensor | None] = [None] * len(self.counts)
        if self.bias is not None:
            biases = self.bias.split(self.counts)
        parts = zip(input.split(self.counts, dim=1), self.kernels, biases, strict=True)
        return torch.cat(
            [
                F.conv2d(x, kernel, bias, self.stride, (kernel.shape[2] // 2, kernel.shape[3] // 2), groups=len(kernel))
                for x, kernel, bias in parts
            ],
            dim=1,
        )


def box(run: geometry.DirectionTaps) -> tuple[int, int]:
    """Height and width in pixels, both odd, of the smallest box that holds the taps of a direction.

    Taps are symmetric, so the output pixel is its centre.
    """
    dy, dx = np.abs(run.offsets).max(axis=0).tolist()
    return 2 * dy + 1, 2 * dx + 1


def with_boxes(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with a :class:`BoxConv2d` in the place of each oriented layer."""
    if isinstance(model, OrientedConv1d):
        return BoxConv2d(model)
    copied = copy.deepcopy(model)
    for parent in list(copied.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, OrientedConv1d):
                setattr(parent, name, BoxConv2d(child))
    return copied


def box_costs(model: nn.Module) -> list[tuple[int, float, tuple[int, int], float]]:
    """For each kernel size and angle of the oriented layers of ``model``, the box and what it costs.

    Returns:
        ``(K, angle in radians, (height, width) in pixels, multiply-adds of the box for each of the K taps)``, sorted.
    """
    rows = set()
    for layer in model.modules():
        if isinstance(layer, OrientedConv1d):
            for run in geometry.layer_taps(geometry.directions(layer.theta), layer.kernel_size).runs:
                size = box(run)
                rows.add((layer.kernel_size, run.angle, size, math.prod(size) / layer.kernel_size))
    return sorted(rows)


def cost_lines(model: nn.Module, size: int) -> list[str]:
    """What :func:`with_boxes` costs at ``size`` x ``size`` pixels, for people to read. Empty if it changes nothing."""
    rows = box_costs(model)
    if not rows:
        return []
    lines = ["each oriented layer is a depthwise convolution of the taps' bounding box for each direction"]
    for kernel_size in sorted({row[0] for row in rows}):
        cells = [
            f"{math.degrees(angle):g}° {height}x{width} ({ratio:.1f})"
            for k, angle, (height, width), ratio in rows
            if k == kernel_size
        ]
        lines.append(f"K={kernel_size}, box (multiply-adds for each tap): {', '.join(cells)}")
    taps, boxes = multiply_adds(model, size), multiply_adds(with_boxes(model), size)
    lines.append(
        f"multiply-adds of the network at {size}x{size}: {boxes / 1e9:.2f} G with boxes, {taps / 1e9:.2f} G with taps "
        f"({boxes / taps:.2f})"
    )
    return lines


def export_onnx(
    model: nn.Module,
    output: str | os.PathLike[str],
    size: int = 224,
    dynamic_size: bool = False,
    opset: int | None = None,
) -> float | None:
    """Write ``model`` as one ONNX file of standard operators, with any number of images.

    The input is named ``images``, the output ``logits``, or ``features0``, ``features1``, ... if there are several.
    The file is checked by ``onnx.checker``, and run by onnxruntime on the CPU where that is installed: a file whose
    outputs differ from those of ``model`` is not kept.

    Args:
        model: takes images ``(N, 3, H, W)``, float32, on the CPU; in evaluation mode.
        output: the file.
        size: height and width in pixels.
        dynamic_size: take images of other sizes too.
        opset: version of the ONNX operators; None for PyTorch's choice.

    Returns:
        largest absolute difference of an output to ``model``'s; None if onnxruntime is not installed.

    Raises:
        UserError: the onnx packages are missing, or PyTorch cannot write this ``opset``.
        RuntimeError: onnxruntime's outputs differ by more than 1e-4 (of the largest output, if that is more than 1).
    """
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"--to onnx needs {package}, which is not installed: pip install 'oriented1d[export]'")
    import onnx

    images = torch.randn(2, 3, size, size)
    outputs = _outputs(model, images)
    names = ["logits"] if len(outputs) == 1 else [f"features{i}" for i in range(len(outputs))]
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    with unfinished(output) as path:
        with _quiet():
            program = torch.onnx.export(
                with_boxes(model),
                (images,),
                input_names=["images"],
                output_names=names,
                dynamic_shapes=(_dynamic(dynamic_size),),
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
            assert program is not None
            for node in program.model.graph.all_nodes():  # stack traces: the paths of this machine
                node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
            program.save(path, external_data=False)
        written = next(entry.version for entry in onnx.load(path).opset_import if entry.domain == "")
        if opset is not None and written != opset:
            raise UserError(f"--opset: expected a version that PyTorch can write for this network, got {opset}")
        onnx.checker.check_model(path, full_check=True)
        if importlib.util.find_spec("onnxruntime") is None:
            return None
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

        def run(images: Tensor) -> list[Tensor]:
            return [torch.from_numpy(array) for array in session.run(None, {"images": images.numpy()})]

        return _check(model, run, size, dynamic_size, TOLERANCE["onnx"], "onnxruntime")


def export_program(
    model: nn.Module, output: str | os.PathLike[str], size: int = 224, dynamic_size: bool = False
) -> float:
    """Write ``model`` as a program of ``torch.export``, with any number of images.

    The program calls ``torch.ops.oriented1d``: ``import oriented1d`` before ``torch.export.load``. It is loaded again
    and run, and a file whose outputs differ from those of ``model`` is not kept.

    Args:
        model: takes images ``(N, 3, H, W)``, float32, on the CPU; in evaluation mode.
        output: the file.
        size: height and width in pixels.
        dynamic_size: take images of other sizes too.

    Returns:
        largest absolute difference of an output to ``model``'s.

    Raises:
        RuntimeError: the outputs differ by more than 1e-6 (of the largest output, if that is more than 1).
    """
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    with unfinished(output) as path:
        with _quiet():
            images = torch.randn(2, 3, size, size)
            program = torch.export.export(model, (images,), dynamic_shapes=(_dynamic(dynamic_size),))
            for node in program.graph.nodes:  # the paths of this machine
                node.meta.pop("stack_trace", None)
            torch.export.save(program, path)
            loaded = torch.export.load(path).module()
        return _check(
            model, lambda x: _outputs(loaded, x), size, dynamic_size, TOLERANCE["torch-export"], "the loaded program"
        )


def _dynamic(dynamic_size: bool) -> dict[int, object]:
    batch = Dim("batch")
    # AUTO: the smallest size is that of a last stage of more than one pixel, which tracing finds out.
    return {0: batch, 2: Dim.AUTO, 3: Dim.AUTO} if dynamic_size else {0: batch}


def _outputs(model: Callable[[Tensor], Tensor | Sequence[Tensor]], images: Tensor) -> list[Tensor]:
    with torch.no_grad():
        outputs = model(images)
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def _check(
    model: nn.Module,
    run: Callable[[Tensor], list[Tensor]],
    size: int,
    dynamic_size: bool,
    tolerance: float,
    what: str,
) -> float:
    """The largest difference, on other numbers of images (and another size) than the file was made with."""
    shapes = [(1, 3, size, size), (3, 3, size, size)]
    if dynamic_size:
        shapes.append((1, 3, size + 32, size + 65))
    worst = 0.0
    for shape in shapes:
        images = torch.randn(shape)
        for expected, actual in zip(_outputs(model, images), run(images), strict=True):
            if actual.shape != expected.shape:
                raise RuntimeError(f"{what}: expected outputs {tuple(expected.shape)}, got {tuple(actual.shape)}")
            difference = (actual - expected).abs().max().item()
            if not difference <= tolerance * max(1.0, expected.abs().max().item()):  # so that NaN is an error too
                raise RuntimeError(f"{what}: expected the outputs of PyTorch within {tolerance:g}, got {difference:g}")
            worst = max(worst, difference)
    return worst


@contextmanager
def _quiet() -> Iterator[None]:
    # Tracing logs what PyTorch's own developers look at.
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def main(argv: Sequence[str] | None = None) -> int:
    """``oriented1d export``."""
    parser = argparse.ArgumentParser(
        prog="oriented1d export", description="Write a network for other programs, with any number of images."
    )
    parser.add_argument("model", help="network of ours or of timm, such as convnext_tiny_1d")
    parser.add_argument("out", help="file to write: .onnx or .pt2")
    parser.add_argument("--to", choices=list(ENDINGS), required=True, help="kind of file")
    parser.add_argument("--weights", help="checkpoint, or 'timm' for what timm downloads (default: random, seed 0)")
    parser.add_argument("--ema", action="store_true", help="take the moving average of the weights")
    parser.add_argument("--size", type=int, default=224, help="height and width in pixels (default %(default)s)")
    parser.add_argument("--dynamic-size", action="store_true", help="take images of other sizes too")
    parser.add_argument("--features", action="store_true", help="write stage outputs instead of logits")
    parser.add_argument("--opset", type=int, help="version of the ONNX operators (default: PyTorch's)")
    options = parser.parse_args(argv)
    ending = ENDINGS[options.to]
    if Path(options.out).suffix != ending:
        parser.error(f"out: expected a name that ends in {ending}, got {options.out}")
    if options.size < 1:
        parser.error(f"--size: expected at least 1, got {options.size}")
    if options.opset is not None and options.to != "onnx":
        parser.error("--opset: expected --to onnx beside it")
    check_writable(Path(options.out).parent, "out")
    torch.manual_seed(0)
    keywords = {"features_only": True} if options.features else {}
    model = networks.create(options.model, options.weights, options.ema, **keywords)
    if options.to == "onnx":
        difference = export_onnx(model, options.out, options.size, options.dynamic_size, options.opset)
        for line in cost_lines(model, options.size):
            print(line)
        checked = "onnxruntime is not installed: not compared with PyTorch"
        if difference is not None:
            checked = f"largest difference of onnxruntime to PyTorch: {difference:.1e}"
    else:
        difference = export_program(model, options.out, options.size, options.dynamic_size)
        checked = f"largest difference of the loaded program to PyTorch: {difference:.1e}; it needs `import oriented1d`"
    if options.weights is None:
        print("the weights are random (--weights FILE)")
    print(checked)
    print(f"wrote {options.out} ({Path(options.out).stat().st_size / 1e6:.1f} MB)")
    return 0
