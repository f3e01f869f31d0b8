"""What is installed, what would run, and whether it computes the right thing: ``oriented1d doctor``."""

from __future__ import annotations

import argparse
import functools
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module, metadata
from pathlib import Path

import torch
from torch import Tensor

import oriented1d
from oriented1d import geometry
from oriented1d.operator import cpu, library, oriented_conv1d, stem, use_backend
from oriented1d.operator.cuda import compiler
from oriented1d.training.errors import UserError
from oriented1d.training.files import check_writable

# As in pyproject.toml, by extra; what the required ones bring along for the operator stands beside them.
PACKAGES: dict[str, tuple[str, ...]] = {
    "": ("torch", "torchvision", "timm", "numba", "numpy", "safetensors", "rich", "cuda-core"),
    "train": (
        "lightning",
        "torchmetrics",
        "jsonargparse",
        "tensorboard",
        "matplotlib",
        "scikit-learn",
        "pycocotools",
    ),
    "export": ("onnx", "onnxscript", "onnx-ir", "onnxruntime"),
}
_BROUGHT_ALONG = ("cuda-bindings", "triton")
_VARIABLES = (
    "ORIENTED1D_CACHE",
    "XDG_CACHE_HOME",
    "NUMBA_CACHE_DIR",
    "NUMBA_DISABLE_JIT",
    "NUMBA_NUM_THREADS",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LAYER = geometry.directions(geometry.layer_angles(64))
_KERNEL_SIZE = 31
_CASES = (
    (torch.float32, torch.contiguous_format, 1),
    (torch.float32, torch.channels_last, 2),
    (torch.bfloat16, torch.channels_last, 1),
)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def nvrtc_version() -> str:
    """Version of the CUDA compiler, or why there is none."""
    try:
        from cuda.bindings import nvrtc

        result, major, minor = nvrtc.nvrtcVersion()
    except Exception as error:  # a missing package, or a missing library of a present one
        return f"missing ({error})"
    return f"{major}.{minor}" if result == nvrtc.nvrtcResult.NVRTC_SUCCESS else f"cannot be used ({result})"


def versions() -> list[str]:
    """Lines with the versions of everything that the package uses, and the optional packages that are missing."""
    lines = [
        f"oriented1d {oriented1d.__version__} in {Path(oriented1d.__file__).parent}",
        f"Python {platform.python_version()} on {platform.platform()}",
        f"CUDA of torch {torch.version.cuda or 'none'}, NVRTC {nvrtc_version()}",
    ]
    for extra, packages in PACKAGES.items():
        found = {package: _version(package) for package in packages + (() if extra else _BROUGHT_ALONG)}
        there = ", ".join(f"{package} {version}" for package, version in found.items() if version is not None)
        missing = ", ".join(package for package, version in found.items() if version is None)
        lines.append(f"{f'extra {extra}' if extra else 'packages'}: {there or 'nothing'}")
        if missing:
            how = f": pip install 'oriented1d[{extra}]'" if extra else ""
            lines.append(f"  missing: {missing}{how}")
    lines += [f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ]
    return lines


def devices() -> list[torch.device]:
    """The CPU and the GPUs of this machine."""
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]


def describe(device: torch.device) -> str:
    """Name and size of a device."""
    if device.type == "cpu":
        name = platform.processor() or platform.machine()
        return f"cpu: {name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads of torch"
    properties = torch.cuda.get_device_properties(device)
    capability = f"{properties.major}.{properties.minor}"
    return f"{device}: {properties.name}, compute capability {capability}, {properties.total_memory / 2**30:.0f} GiB"


def no_numba() -> str | None:
    """Why the CPU's compiled loops cannot run; None if they can."""
    if cpu.available():
        return None
    try:
        import_module("oriented1d.operator.cpu_kernels")
    except ImportError as error:
        return f"numba cannot be imported ({error})"
    return "NUMBA_DISABLE_JIT is set"


def choices(device: torch.device) -> Iterator[str]:
    """The backend that the operator would choose on a device, and why, with the dtypes that it is chosen for."""
    dtypes: dict[tuple[str, str], list[str]] = {}
    for dtype in _DTYPES:
        images = torch.empty(1, _LAYER.channels, 8, 8, dtype=dtype, device=device)
        taps = geometry.layer_taps(_LAYER, _KERNEL_SIZE)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # says the same as this line
            chosen = library.backend_for(images, taps, stride=1).__name__.rpartition(".")[2]
        if device.type == "cpu":
            why = no_numba() or f"numba {_version('numba')} compiles its loops"
        else:
            from oriented1d.operator import cuda

            reason = cuda.unsupported(images, taps, 1)
            why = f"no kernels for {reason}" if reason else f"NVRTC {nvrtc_version()} compiles its kernels"
            if reason is None and dtype.itemsize == 2 and compiler.capability(device) >= (8, 0):
                why += ", which use tensor cores"
        dtypes.setdefault((chosen, why), []).append(_short(dtype))
    for (chosen, why), names in dtypes.items():
        yield f"{device} {', '.join(names)}: {chosen} ({why})"


def _short(value: torch.dtype | torch.memory_format) -> str:
    return str(value).removeprefix("torch.").removesuffix("_format")


def cache_folders() -> Iterator[str]:
    """Where compiled code is kept, and whether it can be."""
    folders = {"CUDA kernels": str(compiler.cache_folder())}
    if no_numba() is None:
        folders["CPU loops"] = import_module("oriented1d.operator.cpu_kernels").gather.stats.cache_path
    for what, folder in folders.items():
        try:
            check_writable(folder, what)
            yield f"{what}: {folder} (writable)"
        except UserError as error:
            yield f"{error}; they are compiled anew in each process"


def available(device: torch.device) -> list[str]:
    """Backends that can run on a device."""
    reason = no_numba() if device.type == "cpu" else compiler.unavailable(device)
    return [*([device.type] if reason is None else []), "portable"]


def _results(inputs: Sequence[Tensor], stride: int) -> list[Tensor]:
    """Output and gradients of images, weight and bias, for given images, weight, bias and gradient of the output."""
    *leaves, grad_output = inputs
    images, weight, bias = (leaf.detach().requires_grad_() for leaf in leaves)
    output = oriented_conv1d(images, weight, _LAYER, bias, stride=stride, residual=True)
    gradients = torch.autograd.grad(output, (images, weight, bias), grad_output)
    return [output.detach(), *gradients]


def parity(device: torch.device, backend: str, dtype: torch.dtype, layout: torch.memory_format, stride: int) -> float:
    """Largest error of a backend's output and gradients, each relative to the largest value of the float64 result of
    the portable path on the CPU. Infinite where a value is not finite."""
    random = torch.Generator().manual_seed(0)
    n, c, h, w = 2, _LAYER.channels, 20, 23
    sizes = ((n, c, h, w), (c, _KERNEL_SIZE), (c,), (n, c, -(-h // stride), -(-w // stride)))
    inputs = [torch.randn(size, generator=random).to(dtype) for size in sizes]
    with use_backend("portable"):
        expected = _results([tensor.double() for tensor in inputs], stride)
    on_device = [
        tensor.to(device).contiguous(memory_format=layout if tensor.dim() == 4 else torch.contiguous_format)
        for tensor in inputs
    ]
    with use_backend(backend):
        actual = _results(on_device, stride)
    return _largest_error(actual, expected)


def _largest_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Relative to the largest value of each expected tensor. Infinite where a value is not finite."""
    errors = [
        ((ours.cpu().double() - theirs).abs().max() / theirs.abs().max()).nan_to_num(nan=torch.inf).item()
        for ours, theirs in zip(actual, expected, strict=True)
    ]
    return max(errors)


def stem_parity(device: torch.device) -> float:
    """As :func:`parity`, of the first half of the 1D stem in bfloat16, which has a kernel of its own on GPUs."""
    random = torch.Generator().manual_seed(0)
    c = _LAYER.channels
    sizes = ((2, 3, 24, 21), (c, 3), (c,), (c, _KERNEL_SIZE), (c,), (c,), (c,), (2, c, 12, 11))
    inputs = [torch.randn(size, generator=random).bfloat16() for size in sizes]

    def results(image: Tensor, *others: Tensor) -> list[Tensor]:
        *parameters, grad_output = others
        projection, offset, weight, bias, norm_weight, norm_bias = (p.detach().requires_grad_() for p in parameters)
        leaves = projection, offset, weight, bias, norm_weight, norm_bias
        oriented = weight, _LAYER.text, bias
        output = stem.oriented_stem(image, projection, offset, *oriented, norm_weight, norm_bias, 1e-6, 2)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad_output.to(output.dtype))]

    expected = results(*(tensor.double() for tensor in inputs))
    image, *others = (tensor.to(device) for tensor in inputs)
    return _largest_error(results(image, *(tensor.float() for tensor in others)), expected)


def _checks(device: torch.device) -> Iterator[tuple[str, torch.dtype, Callable[[], float]]]:
    for backend in available(device):
        for dtype, layout, stride in _CASES:
            what = f"{backend} {_short(dtype)} {_short(layout)} stride {stride}"
            yield what, dtype, functools.partial(parity, device, backend, dtype, layout, stride)
    image = torch.empty(1, 3, 8, 8, dtype=torch.bfloat16, device=device)
    if stem.supported(image, torch.empty(_LAYER.channels, _KERNEL_SIZE, device=device), _LAYER.text, 2):
        yield "stem bfloat16", torch.bfloat16, functools.partial(stem_parity, device)


def self_check() -> Iterator[tuple[bool, str]]:
    """For every backend of every device and a few kinds of images: whether :func:`parity` is small enough, and a line
    that says so."""
    for device in devices():
        for what, dtype, check in _checks(device):
            try:
                error = check()
                passed = error <= TOLERANCE[dtype]
                result = f"error {error:.1e} of {TOLERANCE[dtype]:.0e} allowed"
            except Exception as problem:  # whatever a compiler, a driver or a kernel raises is the finding
                passed = False
                result = f"{type(problem).__name__}: {' '.join(str(problem).split())}"
            yield passed, f"{'pass' if passed else 'FAIL'}  {device} {what}: {result}"


def main(argv: Sequence[str] | None = None) -> int:
    """``oriented1d doctor``. 1 if a backend computes something wrong, else 0."""
    description = "Print versions, devices, and which backend of the operator would run; check every backend."
    argparse.ArgumentParser(prog="oriented1d doctor", description=description).parse_args(argv)
    _print("Versions", versions())
    _print("Devices", map(describe, devices()))
    _print("Backends", (line for device in devices() for line in choices(device)))
    _print("Caches", cache_folders())
    start = time.monotonic()
    results: list[bool] = []
    print("Self-check: output and gradients against the portable path in float64")
    for passed, line in self_check():
        print(f"  {line}", flush=True)
        results.append(passed)
    failed = results.count(False)
    verdict = f"{failed} of {len(results)} checks failed" if failed else f"all {len(results)} checks passed"
    print(f"\n{verdict} ({time.monotonic() - start:.1f} s)")
    return 1 if failed else 0


def _print(title: str, lines: Iterable[str]) -> None:
    print(title)
    for line in lines:
        print(f"  {line}")
    print(flush=True)
