"""CUDA C++ to machine code, through NVRTC and NVIDIA's ``cuda.core``, with a cache on disk."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import os
import threading
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

try:
    from cuda.bindings import driver
    from cuda.core import Device, Kernel, LaunchConfig, ObjectCode, Program, ProgramOptions, Stream, launch
    from cuda.core.utils import FileStreamProgramCache

    _IMPORT_ERROR: str | None = None
except Exception as error:  # a missing package, or a missing library of a present one
    _IMPORT_ERROR = f"cuda.core cannot be imported ({error})"

OLDEST = (7, 5)


@functools.cache
def unavailable(device: torch.device) -> str | None:
    """Why kernels cannot be compiled for a device; None if they can."""
    if torch.version.hip is not None:
        return "ROCm"
    if _IMPORT_ERROR is not None:
        return _IMPORT_ERROR
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return f"compute capability {capability[0]}.{capability[1]}, older than {OLDEST[0]}.{OLDEST[1]}"
    return None


@functools.cache
def limits(device: torch.device) -> tuple[int, int]:
    """Processors of a device, and bytes of shared memory that a block can have."""
    properties = Device(device.index).properties
    return properties.multiprocessor_count, properties.max_shared_memory_per_block_optin


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def cache_folder() -> Path:
    """Where machine code is kept: ``$ORIENTED1D_CACHE``, or ``oriented1d`` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "oriented1d"
    return Path(os.environ.get("ORIENTED1D_CACHE") or default)


class Source(Protocol):
    """What kernels are compiled from; hashable."""

    @property
    def text(self) -> str:
        """The CUDA C++."""

    @property
    def functions(self) -> dict[str, str]:
        """Its kernels: what they are called here, and in the source and in a profile."""


@dataclasses.dataclass
class Compiled:
    """The kernels of one source."""

    kernels: dict[str, Kernel]

    def reserve(self, name: str, shared: int, device: torch.device) -> None:
        """Allow a kernel more than 48 KiB of shared memory."""
        if shared > 48 * 1024:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            (error,) = driver.cuKernelSetAttribute(attribute, shared, self.kernels[name].handle, device.index)
            if error != driver.CUresult.CUDA_SUCCESS:
                raise RuntimeError(f"{name}: cannot have {shared} bytes of shared memory ({error})")

    def launch(self, name: str, config: LaunchConfig, *arguments: int) -> None:
        """Launch on the current stream of the current device."""
        device = torch.cuda.current_device()
        _bind(device)
        # torch.cuda.current_stream() makes an object of this number, which takes longer than the launch.
        stream = torch._C._cuda_getCurrentRawStream(device)
        launch(_stream(stream), config, self.kernels[name], *arguments)


class _Bound(threading.local):
    def __init__(self) -> None:
        self.devices: set[int] = set()


_bound = _Bound()


def _bind(device: int) -> None:
    # The threads of autograd have a current device, but nothing may have made its context current in them yet.
    if device not in _bound.devices:
        Device(device).set_current()
        _bound.devices.add(device)


class DeviceArray:
    """Numbers on a device, outside of PyTorch's memory: that of a CUDA graph being recorded must not hold them.

    They stay there, since a graph may read them again at any time; equal ones are one.
    """

    def __init__(self, array: np.ndarray, device: torch.device) -> None:
        _bind(device.index)
        array = np.ascontiguousarray(array)
        self.pointer: int = _stores[device.index].place(array)


_CHUNK = 2**20  # bytes


class _Store:
    """Arrays on one device.

    A new size of images has dozens of them. So they share allocations, and are copied beside PyTorch's stream: the host
    waits for the copy and not for the work before it.
    """

    def __init__(self) -> None:
        self._pointers: dict[tuple[bytes, int], int] = {}
        self._stream: driver.CUstream | None = None
        self._free = self._end = 0

    def place(self, array: np.ndarray) -> int:
        """Where an array with these bytes is."""
        key = hashlib.sha256(array.data).digest(), array.nbytes
        with _lock:
            if key not in self._pointers:
                self._pointers[key] = self._copy(array)
            return self._pointers[key]

    def _copy(self, array: np.ndarray) -> int:
        if self._stream is None:
            self._stream = _checked(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
        if self._end - self._free < array.nbytes:
            size = max(_CHUNK, array.nbytes)
            self._free = int(_checked(driver.cuMemAlloc(size)))
            self._end = self._free + size
        pointer = self._free
        self._free += -(-array.nbytes // 256) * 256
        _checked(driver.cuMemcpyHtoDAsync(pointer, array.ctypes.data, array.nbytes, self._stream))
        _checked(driver.cuStreamSynchronize(self._stream))
        return pointer


_stores: collections.defaultdict[int, _Store] = collections.defaultdict(_Store)


def _checked(result: tuple[Any, ...]) -> Any:
    """What a function of the driver gives, behind its error."""
    error, *values = result
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"cannot copy numbers to a device ({error})")
    return values[0] if values else None


_already = contextlib.nullcontext()


def current(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """``torch.cuda.device(device)``, at a fifth of the time where that is the current one."""
    return _already if device.index == torch.cuda.current_device() else torch.cuda.device(device)


@functools.lru_cache(maxsize=1024)
def _stream(handle: int) -> Stream:
    return Stream.from_handle(handle)


def config(grid: tuple[int, int, int], threads: int, shared: int) -> LaunchConfig:
    return LaunchConfig(grid=grid, block=threads, shmem_size=shared)


def machine_code(spec: Source, architecture: str) -> ObjectCode:
    """Compile for an architecture such as ``sm_90``; from the cache where it has been compiled before."""
    options = ProgramOptions(name="oriented1d", arch=architecture, std="c++17")
    program = Program(spec.text, "c++", options)
    try:
        with FileStreamProgramCache(cache_folder(), max_size_bytes=2**30) as cache:
            return program.compile("cubin", cache=cache)
    except OSError as error:
        warnings.warn(f"compiled kernels are not kept: {error}", stacklevel=2)
        return program.compile("cubin")


_lock = threading.RLock()
_codes: dict[tuple[Source, str], Future[ObjectCode]] = {}
_compiled: dict[tuple[Source, int | None], Compiled] = {}
# NVRTC compiles in as many threads as there are; processes of one machine share them.
_THREADS = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
_pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="oriented1d")
_later: dict[tuple[Source, str], None] = {}  # in the order in which they were asked for
_in_background = 0


def begin(spec: Source, device: torch.device) -> Future[ObjectCode]:
    """Start to compile in another thread, which does nothing on the device (a graph may be being recorded there)."""
    key = spec, _architecture(device)
    with _lock:
        if key not in _codes:
            _codes[key] = _pool.submit(machine_code, *key)
        return _codes[key]


def begin_later(spec: Source, device: torch.device) -> None:
    """Compile when a thread has nothing else to do. What has not begun when the interpreter ends is left out."""
    with _lock:
        _later[spec, _architecture(device)] = None
        _fill()


def _architecture(device: torch.device) -> str:
    major, minor = capability(device)
    return f"sm_{major}{minor}"


def _fill() -> None:
    # One thread is left to `begin`. Waiting outside the pool, the others do not keep the interpreter from ending.
    global _in_background
    with _lock:
        while _later and _in_background < max(1, _THREADS - 1):
            key = next(iter(_later))
            del _later[key]
            if key in _codes:
                continue
            try:
                _codes[key] = future = _pool.submit(machine_code, *key)
            except RuntimeError:  # the interpreter ends
                return _later.clear()
            _in_background += 1
            future.add_done_callback(functools.partial(_ended, key))


def _ended(key: tuple[Source, str], future: Future[ObjectCode]) -> None:
    global _in_background
    with _lock:
        if future.exception() is not None:
            del _codes[key]  # nobody asked for it yet; who does may have more luck
        _in_background -= 1
        _fill()


def compile(spec: Source, device: torch.device) -> Compiled:
    key = (spec, device.index)
    if key not in _compiled:
        code = begin(spec, device).result()
        with _lock:
            if key not in _compiled:
                _compiled[key] = Compiled({name: code.get_kernel(there) for name, there in spec.functions.items()})
    return _compiled[key]
