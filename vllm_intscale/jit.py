"""CuPy as the run-time compiler: CUDA source in `cuda/` to a loaded kernel, once per process.

Launches go through NVIDIA's driver bindings: CuPy's launcher knows neither clusters nor
overlapping launches.

CuPy keeps compiled kernels on disk, keyed by source text, options, architecture and NVRTC
version, and publishes them atomically. Added here: `#include "..."` is pasted into the source, so
that the key covers it; a file lock, so that N ranks on a cold cache compile once, not N times;
and a writable cache folder chosen before CuPy is imported (its import fails without one).
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import re
import tempfile
import threading
import time
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

from vllm_intscale.errors import IntScaleError

logger = logging.getLogger("vllm.intscale")  # below vLLM's logger, so that its handlers apply

MIN_COMPUTE_CAPABILITY = (8, 0)
MAX_ARGUMENTS = 32  # of a kernel


@dataclass(frozen=True)
class Kernel:
    """One compiled variant: a function of a source file under a set of macros.

    shared_bytes: the most dynamic shared memory that a launch may ask for; 0: the usual 48 KB.
    arch: the architecture to compile for, such as sm_90a; empty: the device's own.
    """

    file: str
    function: str
    defines: tuple[tuple[str, int], ...] = ()
    shared_bytes: int = 0
    arch: str = ""

    def __str__(self) -> str:
        macros = ",".join(f"{name}={value}" for name, value in self.defines)
        return f"{self.file}:{self.function}[{macros}]"


def source_folder() -> Path:
    """The kernel sources: inside the installed package, or at the top of a checkout."""
    package = Path(__file__).parent
    return next(p for p in (package / "cuda", package.parent / "cuda") if p.is_dir())


def read_source(file: str) -> str:
    """The text of a source file with its local includes pasted in."""
    text = (source_folder() / file).read_text()
    return re.sub(r'#include "([^"]+)"', lambda match: read_source(match[1]), text)


@cache
def import_cupy() -> Any:
    """CuPy, with a usable cache folder; IntScaleError if it or NVRTC is not installed."""
    named = os.environ.get("CUPY_CACHE_DIR") or "~/.cupy/kernel_cache"
    try:
        folder = Path(named).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        writable = False
    if not writable:
        folder = Path(tempfile.gettempdir()) / f"cupy_cache_{os.getuid()}"
        logger.warning("kernel cache %s is not writable; using %s", named, folder)
        folder.mkdir(parents=True, exist_ok=True)
    os.environ["CUPY_CACHE_DIR"] = str(folder)
    try:
        import cupy

        cupy.cuda.nvrtc.getVersion()  # loads NVRTC, which importing does not
    except (ImportError, RuntimeError) as error:
        major = (torch.version.cuda or "13").partition(".")[0]
        reason = str(error).partition("\n")[0]
        raise IntScaleError(
            f"CuPy or NVRTC cannot be loaded ({reason}); they compile the CUDA kernels: "
            f"pip install 'cupy-cuda{major}x[ctk]'"
        ) from None
    return cupy


def compile_options(kernel: Kernel) -> tuple[str, ...]:
    """What NVRTC gets for this variant; CuPy adds -ftz=true and, if none is set, -arch."""
    arch = (f"-arch={kernel.arch}",) if kernel.arch else ()
    return ("-std=c++17", *arch, *(f"-D{name}={value}" for name, value in kernel.defines))


def check_device(device: int) -> None:
    """Refuse a GPU that is too old, naming it."""
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_COMPUTE_CAPABILITY:
        raise IntScaleError(
            f"GPU {device} ({torch.cuda.get_device_name(device)}) has compute capability "
            f"{capability[0]}.{capability[1]}; the W4A8 kernels need 8.0 (A100) or newer"
        )


@cache
def load(kernel: Kernel, device: int) -> Any:
    """Compile or fetch from the cache, load on the device, and return the CuPy function.

    Raises IntScaleError while a CUDA graph is being captured: loading a module there is illegal,
    and a kernel that first appears after warm-up would stall a request.
    """
    if torch.cuda.is_current_stream_capturing():
        raise IntScaleError(f"kernel {kernel} was not compiled before graph capture; report this")
    check_device(device)
    cupy = import_cupy()
    from filelock import FileLock

    source = read_source(kernel.file)
    options = compile_options(kernel)
    key = hashlib.sha256(
        "\0".join(
            (source, *options, str(torch.cuda.get_device_capability(device)))
            + (str(cupy.cuda.nvrtc.getVersion()), cupy.__version__)
        ).encode()
    ).hexdigest()[:32]
    start = time.perf_counter()
    lock = FileLock(Path(os.environ["CUPY_CACHE_DIR"]) / f"intscale_{key}.lock")
    with cupy.cuda.Device(device), contextlib.ExitStack() as stack:
        with contextlib.suppress(PermissionError):  # another user's: both compile, which is safe
            stack.enter_context(lock)
        try:
            module = cupy.RawModule(code=source, options=options)
            function = module.get_function(kernel.function)
            if kernel.shared_bytes:
                function.max_dynamic_shared_size_bytes = kernel.shared_bytes
        except cupy.cuda.compiler.CompileException as error:
            log = str(error).strip().splitlines()
            raise IntScaleError(
                f"kernel {kernel} does not compile for GPU {device}: {log[0] if log else error}; "
                "report this with the output of `python -c 'import cupy; cupy.show_config()'`"
            ) from error
    logger.debug("%s ready in %.2f s", kernel, time.perf_counter() - start)
    return function


@cache
def _driver() -> Any:
    """NVIDIA's driver bindings; IntScaleError if they are not installed."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise IntScaleError(
            f"cuda-bindings cannot be imported ({error}); it launches the CUDA kernels: "
            "pip install cuda-bindings"
        ) from None
    return driver


@cache
def _can_overlap(device: int) -> bool:
    return torch.cuda.get_device_capability(device)[0] >= 9


@cache
def _function(kernel: Kernel, device: int) -> Any:
    return _driver().CUfunction(load(kernel, device).kernel.ptr)


_of_thread = threading.local()


def _arguments() -> tuple[Any, int]:
    """A slot of 8 bytes for each argument, and the address of an array of the slots' addresses.

    Shorter integers lie in the low bytes of a slot. A launch copies them before it returns, so that
    a thread needs no more than one set.
    """
    try:
        found: tuple[Any, int] = _of_thread.arguments
    except AttributeError:
        values = (ctypes.c_uint64 * MAX_ARGUMENTS)()
        start = ctypes.addressof(values)
        addresses = (start + 8 * i for i in range(MAX_ARGUMENTS))
        _of_thread.pointers = (ctypes.c_void_p * MAX_ARGUMENTS)(*addresses)  # kept alive
        found = _of_thread.arguments = values, ctypes.addressof(_of_thread.pointers)
    return found


@lru_cache(4096)
def _launch_config(
    grid: tuple[int, ...], threads: int, shared_bytes: int, cluster: int, overlap: bool, stream: int
) -> Any:
    driver = _driver()
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = (*grid, 1, 1)[:3]
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes = shared_bytes
    config.hStream = driver.CUstream(stream)
    attributes = []
    ids = driver.CUlaunchAttributeID
    if cluster > 1:
        attribute = driver.CUlaunchAttribute()
        attribute.id = ids.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        attribute.value.clusterDim.x = cluster
        attribute.value.clusterDim.y = attribute.value.clusterDim.z = 1
        attributes.append(attribute)
    if overlap:
        attribute = driver.CUlaunchAttribute()
        attribute.id = ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        attributes.append(attribute)
    config.attrs, config.numAttrs = attributes, len(attributes)
    return config


def launch(
    kernel: Kernel,
    device: torch.device,
    grid: tuple[int, ...],
    threads: int,
    args: tuple[Any, ...],
    shared_bytes: int = 0,
    cluster: int = 1,
    overlap: bool = False,
) -> None:
    """Launch on torch's current stream of `device`.

    args: tensors (their address is passed), None (a null pointer) and integers, of whatever width
    the kernel declares.
    cluster: blocks of a cluster, along x. overlap: the kernel may start before the one before it
    has ended, and waits for it where it has to (programmatic dependent launch, which there is from
    Hopper on; before, it starts after it).
    """
    index = device.index
    assert index is not None
    if index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, device, grid, threads, args, shared_bytes, cluster, overlap)
    # What torch.cuda.current_stream would wrap in an object: Inductor's code asks for it like this.
    stream = torch._C._cuda_getCurrentRawStream(index)
    overlap = overlap and _can_overlap(index)
    config = _launch_config(grid, threads, shared_bytes, cluster, overlap, stream)
    values, pointers = _arguments()
    values[: len(args)] = [a if type(a) is int else 0 if a is None else a.data_ptr() for a in args]
    (error,) = _driver().cuLaunchKernelEx(config, _function(kernel, index), pointers, 0)
    if error:
        raise IntScaleError(
            f"kernel {kernel} cannot be launched on grid {grid}, {threads} threads, {shared_bytes} "
            f"bytes of shared memory, cluster {cluster}: {error.name}; report this"
        )
