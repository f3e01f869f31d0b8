"""The CUDA kernels on a CPU: their text as C++ for the host (``emulator.hpp``), launched on tensors of the CPU."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from oriented1d.operator import cuda
from oriented1d.operator.cuda import compiler, stem

COMPILER = shutil.which("g++") if sys.platform == "linux" else None
ASCENDING, DESCENDING = 0, 1  # orders of blocks, warps and lanes; larger numbers are seeds of random ones
_HEADER = Path(__file__).with_suffix(".hpp")
# Half the time is the compiler's: -Og takes it half as long as -O1. A fortified longjmp does not leave its stack.
_FLAGS = ["-std=c++17", "-Og", "-w", "-shared", "-fPIC", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE"]
_FENCE = 256  # bytes of NaN on both sides of a tensor

# What stands in an asm statement, and the function of the emulator that does it.
_INSTRUCTIONS = {
    "cvt.rn.bf16x2.f32": "cvt_bf16x2",
    "cvt.f32.f16": "cvt_from_half",
    "cvt.rn.f16.f32": "cvt_to_half",
    "@p ld.global.nc.v4.u32": "load_4",
    "@p ld.global.nc.v2.u32": "load_2",
    "@p ld.global.nc.u16": "load_u16",
    "@p st.global.v4.u32": "store_4",
    "@p st.global.v2.u32": "store_2",
    "@p st.global.u16": "store_u16",
    "@p st.global.f32": "store_from_shared",
    "ld.shared.u32": "load_shared",
    "@p cp.async.ca.shared.global [%0], [%1], 4": "copy_async_4_if",
    "cp.async.ca.shared.global [%0], [%1], %2": "copy_async",
    "cp.async.cg.shared.global [%0], [%1], 16": "copy_async_16",
    "cp.async.commit_group": "commit_group",
    "cp.async.wait_group": "wait_group",
    "ldmatrix.sync.aligned.m8n8.x4": "ldmatrix_4",
    "ldmatrix.sync.aligned.m8n8.x2.trans": "ldmatrix_2_transposed",
    "m16n8k16.row.col.f32.bf16.bf16.f32": "mma_16_bf16",
    "{%10,%10,%10,%10}": "mma_16_first",
    "mma.sync.aligned.m16n8k16": "mma_16",
    "mma.sync.aligned.m16n8k8": "mma_8",
    "prmt.b32 %0, %1, 0, %2": "prmt",
}
_STRING = r'"(?:[^"\\]|\\.)*"'


def _split(text: str, separator: str) -> list[str]:
    """The parts between separators that are in no string and no bracket."""
    parts, depth, start = [], 0, 0
    for match in re.finditer(rf"{_STRING}|[{separator}()\[\]{{}}]", text):
        found = match.group()
        depth += (found in "([{") - (found in ")]}")
        if depth == 0 and found == separator:
            parts.append(text[start : match.start()].strip())
            start = match.end()
    return [*parts, text[start:].strip()]


def _closing(text: str) -> int:
    """Where the bracket closes that was opened before."""
    depth = 1
    for match in re.finditer(rf"{_STRING}|[()]", text):
        depth += (match.group() == "(") - (match.group() == ")")
        if depth == 0:
            return match.start()
    raise ValueError("a bracket is not closed")


def _statement(body: str) -> str:
    """A call for what stands in the brackets of an asm statement."""
    template, *operands = _split(body.replace("\\\n", " "), ":")
    instruction = "".join(string[1:-1] for string in re.findall(_STRING, template))
    if not instruction:
        return ""  # only hides something from the compiler
    name = next((name for part, name in _INSTRUCTIONS.items() if part in instruction), None)
    if name is None:
        raise NotImplementedError(instruction)
    # Macros between the strings are arguments too: the types of a product, whether a matrix is transposed.
    arguments = list(dict.fromkeys(re.findall(r"\w+", re.sub(_STRING, " ", template))))
    for group in operands[:2]:
        arguments += [re.sub(rf"^{_STRING}\s*", "", operand) for operand in _split(group, ",") if operand]
    return f"emulator::{name}({', '.join(arguments)})"


def translate(spec: compiler.Source) -> str:
    """C++ for the host. For each kernel it has a function ``emulated_NAME(shape, arguments)``."""
    parts, end = [], 0
    text = re.sub(
        r"extern __shared__ __align__\(\d+\) ([\w ]+?) (\w+)\[\];",
        r"static \1* const \2 = (\1*)emulator::shared;",
        spec.text,
    )
    for match in re.finditer(r"\basm\s*(?:volatile)?\s*\(", text):
        body = text[match.end() :]
        length = _closing(body)
        parts += [text[end : match.start()], _statement(body[:length])]
        end = match.end() + length + 1
    entries = [
        f'extern "C" const char* emulated_{name}(const int* shape, const long long* arguments)'
        f" {{ return emulator::launch<{name}>(shape, arguments); }}"
        for name in spec.functions.values()
    ]
    return "\n".join([_HEADER.read_text(), "".join(parts) + text[end:], *entries, ""])


class Emulation:
    """What stands in for a device.

    Attributes:
        processors: few, so that a block has more than one thing to do.
        capability: the compute capability.
        memory: bytes of shared memory that a block can have.
        order: in which blocks, warps and lanes run.
        begun: what was begun to be compiled, in this order.
        launched: what the kernels that ran were compiled from.
    """

    def __init__(self, folder: Path, pool: ThreadPoolExecutor) -> None:
        self.processors = 3
        self.capability = (9, 0)
        self.memory = 232448
        self.order = ASCENDING
        self.begun: list[compiler.Source] = []
        self.launched: list[compiler.Source] = []
        self._folder, self._pool = folder, pool
        self._libraries: dict[str, Future[ctypes.CDLL]] = {}
        self._tensors: list[tuple[Tensor, int]] = []

    def begin(self, spec: compiler.Source, device: torch.device | None = None) -> Future[ctypes.CDLL]:
        self.begun.append(spec)
        major, minor = self.capability
        text = f"#define __CUDA_ARCH__ {major}{minor}0\n" + translate(spec)
        if text not in self._libraries:
            self._libraries[text] = self._pool.submit(self._library, text)
        return self._libraries[text]

    def _library(self, text: str) -> ctypes.CDLL:
        path = self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
        if not path.exists():
            subprocess.run([COMPILER, *_FLAGS, "-x", "c++", "-", "-o", path], input=text.encode(), check=True)
        return ctypes.CDLL(str(path))

    def compile(self, spec: compiler.Source, device: torch.device) -> SimpleNamespace:
        library = self.begin(spec).result()

        def launch(name: str, config: tuple[tuple[int, int, int], int, int], *arguments: int) -> None:
            (across, down, _), threads, shared = config
            function = getattr(library, f"emulated_{spec.functions[name]}")
            function.restype = ctypes.c_char_p
            failure = function(
                (ctypes.c_int * 5)(across, down, threads, shared, self.order),
                (ctypes.c_longlong * len(arguments))(*arguments),
            )
            self.launched.append(spec)
            assert not failure, f"{spec.functions[name]}: {failure.decode()}"

        return SimpleNamespace(launch=launch, reserve=lambda *_: None)

    def poisoned(self, make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The like of ``torch.empty`` for floating point: full of NaN, between fences of NaN."""

        def empty(*args, **kwargs) -> Tensor:
            pattern = make(*args, **kwargs | {"device": "meta"})
            if not pattern.is_floating_point():
                return make(*args, **kwargs)
            size = pattern.numel() * pattern.dtype.itemsize
            memory = torch.full((size + 2 * _FENCE,), 255, dtype=torch.uint8)
            self._tensors.append((memory, size))
            return memory[_FENCE : _FENCE + size].view(pattern.dtype).as_strided(pattern.shape, pattern.stride())

        return empty

    def check_fences(self) -> None:
        for memory, size in self._tensors:
            assert (memory[:_FENCE] == 255).all(), "written before a tensor"
            assert (memory[_FENCE + size :] == 255).all(), "written behind a tensor"
        self._tensors.clear()


class _Array:
    """What ``compiler.DeviceArray`` is on a device."""

    def __init__(self, array: np.ndarray, device: torch.device) -> None:
        self._array = np.ascontiguousarray(array)
        self.pointer = self._array.ctypes.data


@contextlib.contextmanager
def emulated(folder: Path) -> Iterator[Emulation]:
    """The functions of ``operator.cuda`` run in an emulation, on tensors of the CPU; ``folder`` keeps what is built."""
    caches = cuda._launches, cuda._expect_gradients, stem._plan
    for cache in caches:
        cache.cache_clear()
    cuda._layers.clear()
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool, pytest.MonkeyPatch.context() as patch:
            emulation = Emulation(folder, pool)
            for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
                patch.setattr(owner, name, emulation.poisoned(getattr(owner, name)))
            for name, stand_in in {
                "begin": emulation.begin,
                "begin_later": lambda spec, device: None,
                "compile": emulation.compile,
                "limits": lambda _: (emulation.processors, emulation.memory),
                "capability": lambda _: emulation.capability,
                "config": lambda *shape: shape,
                "current": lambda _: contextlib.nullcontext(),
                "DeviceArray": _Array,
            }.items():
                patch.setattr(compiler, name, stand_in)
            yield emulation
            emulation.check_fences()
    finally:
        for cache in caches:
            cache.cache_clear()
        cuda._layers.clear()
