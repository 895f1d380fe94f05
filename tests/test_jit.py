"""Compiling kernels, as far as it goes without a GPU: sources, includes, errors, the wheel."""

from __future__ import annotations

import ctypes
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import generators
import pytest
import sass
import torch
from gpu_layers import HALF

from vllm_intscale import all_reduce, cuda_backend, jit, sm90_tiles
from vllm_intscale.errors import IntScaleError

ROOT = Path(__file__).parents[1]
# What the README names: A100, A10/3090, L40S/4090, H100/H200, RTX 50 / RTX PRO 6000; group sizes.
ARCHITECTURES = (
    *((80, (128,), HALF), (90, (128,), HALF[:1])),
    pytest.param(90, (128,), HALF[1:], marks=pytest.mark.slow),
    *(pytest.param(arch, (32, 64), HALF, marks=pytest.mark.slow) for arch in (80, 90)),
    *(pytest.param(arch, (32, 64, 128), HALF, marks=pytest.mark.slow) for arch in (86, 89, 120)),
)


@pytest.fixture(autouse=True)
def fresh_caches() -> Iterator[None]:
    jit.load.cache_clear()
    jit.import_cupy.cache_clear()
    yield
    jit.load.cache_clear()
    jit.import_cupy.cache_clear()


def one_line(error: pytest.ExceptionInfo[IntScaleError]) -> str:
    message = str(error.value)
    assert message and "\n" not in message
    return message


def test_includes_are_pasted_into_the_source() -> None:
    for path in jit.source_folder().glob("*.cu"):
        source = jit.read_source(path.name)
        assert '#include "' not in source
        assert "mul_rn" in source  # of common.cuh


def test_moved_accumulators_are_found() -> None:
    """As ptxas once moved them: between a multiplication and the wait for it."""
    multiply = ["IGMMA.64x8x32.S8.S8 R24, R32, gdesc[UR16], R24, gsb0"]
    wait = ["WARPGROUP.DEPBAR.LE gsb0, 0x1"]
    move = ["IMAD.MOV.U32 R29, RZ, RZ, R25"]
    assert sass.touched_in_flight([*multiply, *wait, *move]) == move
    assert sass.touched_in_flight([*multiply, "STG.E.128 desc[UR4][R2.64], R24"])
    assert sass.touched_in_flight([*multiply, "LDS.128 R22, [R2]"])
    assert not sass.touched_in_flight([*multiply, "WARPGROUP.DEPBAR.LE gsb0, 0x0", *move])
    assert not sass.touched_in_flight([*multiply, *multiply, "PRMT R28, R29, R30, R31"])


@pytest.mark.parametrize(("arch", "group_sizes", "dtypes"), ARCHITECTURES)
def test_every_variant_compiles_without_local_memory(
    arch: int, group_sizes: tuple[int, ...], dtypes: tuple[torch.dtype, ...], tmp_path: Path
) -> None:
    """With NVRTC itself, for every architecture; no GPU is needed for that.

    On Hopper, nothing may touch accumulators of a wgmma in flight, either.
    """
    cuobjdump = sass.find_cuobjdump()
    nvrtc = pytest.importorskip("cupy", reason="needs CuPy and NVRTC").cuda.nvrtc
    variants: set[jit.Kernel] = set()
    for dtype, group_size in itertools.product(dtypes, group_sizes):
        hopper = (*sm90_tiles.FORMS, sm90_tiles.INT8) if arch == 90 else ()
        for family in ("sm80", "sm80_int8", *hopper):
            bits = 8 if family.endswith(sm90_tiles.INT8) else 4
            w = generators.weight(64, 128, group_size, bits=bits, foldable=True)
            packed = generators.packed(w, bits)
            matrix = cuda_backend.prepare_matrix(*packed, family)
            stack = cuda_backend.prepare_stack(*(t[None] for t in packed), family)
            for weight in (matrix, stack):
                variants.update(cuda_backend.kernels(weight[:2], dtype))
        variants |= {all_reduce.kernel(dtype, columns) for columns in (8192, 16384)}
    rows, routing = 6 + 2, 1  # of activation.cu and all_reduce.cu; of moe_routing.cu
    int4 = 7 * 2 + (21 + 15 if arch == 90 else 0)  # for each group size
    int8 = 7 * 2 + (11 + 9 if arch == 90 else 0)
    of_dtype = rows + int4 * len(group_sizes) + int8
    assert len(variants) == routing + of_dtype * len(dtypes)

    def check(kernel: jit.Kernel) -> None:
        source = jit.read_source(kernel.file)
        options = [*jit.compile_options(kernel), "-ftz=true"]
        options += [] if kernel.arch else [f"-arch=sm_{arch}"]
        program = nvrtc.createProgram(source, kernel.file, (), ())
        try:
            nvrtc.compileProgram(program, [*options, "--ptxas-options=-v"])
        except nvrtc.NVRTCError:
            pytest.fail(f"{kernel} for sm_{arch}: {nvrtc.getProgramLog(program)}")
        log = nvrtc.getProgramLog(program)
        assert "0 bytes stack frame, 0 bytes spill stores" in log, f"{kernel} sm_{arch}: {log}"
        assert "serialized" not in log, f"{kernel} sm_{arch}: {log}"
        if cuobjdump and kernel.arch:
            cubin = tmp_path / f"{threading.get_ident()}.cubin"
            cubin.write_bytes(nvrtc.getCUBIN(program) + b"\0")  # CuPy takes the last byte for a NUL
            instructions = sass.disassemble(cuobjdump, cubin)
            few_tokens = dict(kernel.defines)["TILE_M"] == 8
            multiply = "IMMA.16832." if few_tokens else "IGMMA.64x"
            assert any(line.startswith(multiply) for line in instructions)
            assert not sass.touched_in_flight(instructions), kernel
        nvrtc.destroyProgram(program)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        assert len(list(pool.map(check, variants))) == len(variants)
    if arch == 90 and cuobjdump is None:
        pytest.skip("all but accumulators in flight: needs cuobjdump, CUDA toolkit's or Triton's")


def test_launch_passes_each_argument_in_a_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver is a fake one that reads the slots: addresses, nulls, integers of either sign."""
    tensors = torch.zeros(3), torch.zeros(5, dtype=torch.int8)[1:]
    arguments = (*tensors, None, 7, -3, 2**40 + 1, 0)
    wanted = [*(t.data_ptr() for t in tensors), 0, 7, 2**64 - 3, 2**40 + 1, 0]
    seen = []
    together = threading.Barrier(2)

    class Driver:
        def cuLaunchKernelEx(self, config: str, function: str, pointers: int, extra: int) -> Any:
            assert (config, function, extra) == ("config", "function", 0)
            together.wait(10)  # both threads have written theirs
            addresses = (ctypes.c_void_p * len(wanted)).from_address(pointers)
            seen.append([ctypes.c_uint64.from_address(a or 0).value for a in addresses])
            return (0,)

    monkeypatch.setattr(jit, "_driver", Driver)
    monkeypatch.setattr(jit, "_function", lambda *_: "function")
    monkeypatch.setattr(jit, "_launch_config", lambda *_: "config")
    monkeypatch.setattr(jit, "_can_overlap", lambda _: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 0, raising=False)
    kernel, device = jit.Kernel("file.cu", "function"), torch.device("cuda:0")

    def launch(args: tuple[Any, ...]) -> None:
        jit.launch(kernel, device, (1,), 32, args)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(launch, (arguments, tuple(reversed(arguments)))))
    assert sorted(seen) == sorted([wanted, wanted[::-1]])


def test_missing_cupy_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(IntScaleError) as error:
        jit.import_cupy()
    assert "pip install 'cupy-cuda" in one_line(error)


def test_missing_nvrtc_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which CuPy loads when it is first needed."""
    cupy = MagicMock()
    cupy.cuda.nvrtc.getVersion.side_effect = RuntimeError("Failed to dlopen libnvrtc.so.13\nwhy")
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    with pytest.raises(IntScaleError) as error:
        jit.import_cupy()
    assert "(Failed to dlopen libnvrtc.so.13)" in one_line(error)


def test_gpu_below_sm_80_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    with pytest.raises(IntScaleError) as error:
        jit.check_device(0)
    message = one_line(error)
    assert "Tesla T4" in message and "7.5" in message and "8.0" in message


def test_unsupported_dtype_names_the_remedy() -> None:
    with pytest.raises(IntScaleError, match="--dtype bfloat16"):
        cuda_backend.quantize_activation(torch.ones(1, 8))
    a8, ones = torch.zeros(1, 8, 128, dtype=torch.int8), torch.ones(8)
    with pytest.raises(IntScaleError, match="bias is torch.float32 and the output torch.bfloat16"):
        cuda_backend.gemm(a8, ones[:1], a8, ones, ones, ones, torch.bfloat16)


def test_kernels_are_compiled_beside_another_users(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whose lock, in a cache that both may write to, cannot be taken."""
    cupy = MagicMock(__version__="14")
    cupy.cuda.compiler.CompileException = ValueError
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(jit, "import_cupy", lambda: cupy)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    denied = MagicMock(side_effect=PermissionError)
    monkeypatch.setattr("filelock.FileLock.acquire", denied)
    kernel = jit.Kernel("activation.cu", "quantize_activation", (("DTYPE", 0),))
    function = jit.load.__wrapped__(kernel, 0)
    denied.assert_called_once()
    assert function is cupy.RawModule.return_value.get_function.return_value


@pytest.mark.parametrize("folder", ["file/cache", ""])
def test_unwritable_cache_falls_back_to_a_temporary_folder(
    folder: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """So does the usual one of a user without a home."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / folder) if folder else "")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", MagicMock(side_effect=KeyError))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setitem(sys.modules, "cupy", MagicMock())
    jit.import_cupy()
    assert os.environ["CUPY_CACHE_DIR"].startswith(str(tmp_path / "cupy_cache_"))
    assert "not writable" in caplog.text


def test_wheel_brings_the_kernel_sources_and_the_plugin(tmp_path: Path) -> None:
    """Installed elsewhere and run from elsewhere, nothing of the checkout is needed."""
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*install, str(site), str(wheel)], check=True, capture_output=True)
    code = (
        "from importlib.metadata import distribution as d; from vllm_intscale import jit;"
        "print(jit.source_folder()); print(sorted(p.name for p in jit.source_folder().iterdir()));"
        "print(*sorted(e.name + '=' + e.value for e in d('vllm-intscale').entry_points))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(site)},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    assert output[0] == str(site / "vllm_intscale" / "cuda")
    assert output[1] == str(sorted(p.name for p in (ROOT / "cuda").glob("*.cu*")))
    assert output[2] == "intscale=vllm_intscale.cli:main intscale=vllm_intscale:register"
