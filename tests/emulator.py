"""Runs kernels of `cuda/` on a CPU, as they are: only functions made of PTX are replaced.

`emulator.h` has those, and the machine: threads, shared memory, mbarriers, bulk copies, wgmma,
clusters, words on their way between GPUs. So what a kernel computes, and whether its threads wait
for each other for ever, can be tested without a GPU. It says nothing of the memory model, of speed,
and of what ptxas makes of it.
"""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from vllm_intscale import activations, jit, sm90_gemm
from vllm_intscale.row_kernels import dtype_code
from vllm_intscale.sm90_tiles import Tile

HEADER = Path(__file__).with_name("emulator.h")
COMPILER = shutil.which("g++")
OPTIONS = ("-std=c++20", "-O1", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing", "-w")
NOT_USED = {"copy16"}  # by these kernels
FUNCTION = re.compile(
    r"(?:template <[^>]*>\n)?__device__ __forceinline__ [^;{}()]*?\b(\w+)"
    r"\((?:[^(){}]|\([^()]*\))*\) *\{"
)
GEMM = """
extern "C" const char* emulate(int grid, int threads, int cluster, uint32_t seed, int64_t* sizes,
                               const int8_t* a8, const float* token_scale, const uint8_t* weight,
                               const float* unit, const float* channel_scale, const uint16_t* bias,
                               Out* out, int4* partials, int m, int m_pad, int n, int k_blocks,
                               int whole_tiles, const int4* tiles, const int* tile_count,
                               int least_idle) {
  static std::string error;
  Machine of_this_launch = {grid, threads, cluster, seed};
  of_this_launch.readable = {{a8, sizes[0]}, {weight, sizes[1]}, {partials, sizes[2]}};
  of_this_launch.writable = {{out, sizes[3]}};
  kernel = [=] {
    w4a8_gemm(a8, token_scale, weight, unit, channel_scale, bias, out, partials, m, m_pad, n,
              k_blocks, whole_tiles, tiles, tile_count, least_idle);
  };
  error = run(of_this_launch);
  return error.c_str();
}
"""


def _without(functions: set[str], source: str) -> str:
    """Without the definitions of these functions."""
    kept, at = [], 0
    while match := FUNCTION.search(source, at):
        depth, end = 1, match.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(source[end], 0)
            end += 1
        kept.append(source[at : match.start() if match[1] in functions else end])
        at = end
    return "".join([*kept, source[at:]])


@functools.cache
def host_source(file: str) -> str:
    """A kernel's source for a host compiler."""
    source = jit.read_source(file)
    # wgmma's macros, from the declaration of the function that they define on.
    start = source.index("template <int N>\n__device__ __forceinline__ void wgmma_s8")
    end = source.index("\n", source.index("DEFINE_WGMMA(256"))
    source = source[:start] + source[end:]
    source = re.sub(r"#ifdef __CUDACC_RTC__.*?#endif", "", source, flags=re.DOTALL)
    dynamic = r"\1* const \2 = reinterpret_cast<\1*>(shared_of_block());"
    source = re.sub(r"extern __shared__ (?:__align__\(1024\) )?(\w+) (\w+)\[\];", dynamic, source)
    static = r"using \2_t = \1\3; \2_t& \2 = static_of_block<\2_t>(__LINE__);"
    source = re.sub(r"__shared__ ([\w*]+) (\w+)((?:\[.*\])?);", static, source)
    emulated = set(re.findall(r"^(?:inline )?[\w:<>&*]+ (\w+)\(", HEADER.read_text(), re.MULTILINE))
    source = _without(emulated | NOT_USED, source)
    assert "asm" not in source, re.findall(r".*asm.*", source)
    return source


def put_in_defect(monkeypatch: pytest.MonkeyPatch, file: str, right: str, wrong: str) -> None:
    """Have a kernel's source say `wrong` where it says `right`, until the test ends."""
    source = jit.read_source(file)
    assert source.count(right) == 1
    monkeypatch.setattr(jit, "read_source", lambda _: source.replace(right, wrong))
    for cached in ("host_source", "compiled"):
        monkeypatch.setitem(globals(), cached, globals()[cached].__wrapped__)


@functools.cache
def compiled(kernel: jit.Kernel, entry: str) -> ctypes.CDLL:
    """With its function `emulate`, which the source `entry` defines."""
    assert COMPILER
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "kernel.cpp", Path(folder) / "kernel.so"
        source.write_text(f'#include "emulator.h"\n{host_source(kernel.file)}\n{entry}')
        macros = [f"-D{name}={value}" for name, value in kernel.defines]
        command = [COMPILER, *OPTIONS, "-shared", "-fPIC", f"-I{HEADER.parent}", *macros]
        subprocess.run([*command, str(source), "-o", str(library)], check=True)
        loaded = ctypes.CDLL(str(library))
    loaded.emulate.restype = ctypes.c_char_p
    return loaded


class Rows(NamedTuple):
    """Where rows of experts lie, and their tiles, as moe_routing.cu leaves them."""

    first: list[int]  # row of each expert
    tiles: Tensor
    tile_count: Tensor
    total: int


def group_rows(rows: list[int], tile_m: int) -> Rows:
    """As many rows of each expert, in tiles of `tile_m`."""
    tiles, first = [], []
    total = 0
    for expert, own in enumerate(rows):
        first.append(total)
        own_tiles, start = -(-own // tile_m), len(tiles)
        for i in range(own_tiles):
            group = i // 16 * 16
            of_tile = min(tile_m, own - i * tile_m)
            described = 256 * (start + group) + min(16, own_tiles - group)
            tiles.append((expert, total + i * tile_m, of_tile, described))
        total += -(-own // 8) * 8
    unused = [(1 << 30,) * 4] * 3  # there could be more tiles than there are
    return Rows(
        first,
        torch.tensor(tiles + unused, dtype=torch.int32),
        torch.tensor([len(tiles)], dtype=torch.int32),
        max(8, total),
    )


def gemm(
    a8: Tensor,
    token_scale: Tensor,
    weight: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    dtype: torch.dtype,
    tile: Tile,
    splits: int,
    multiprocessors: int,
    rows: Rows | None = None,
    seed: int = 0,
) -> Tensor:
    """`sm90_gemm.gemm` on a GPU of so many multiprocessors; a8 int8 `[M, K]`.

    Raises AssertionError for a deadlock, an access out of bounds, bytes that nobody expects, and
    flags that are left raised. seed: of when bulk copies end.
    """
    blocks, unit, channel_scale = weight
    (m, n), k_blocks = (a8.shape[0], channel_scale.shape[-1]), blocks.shape[-3]
    swizzled = activations.swizzle(a8)
    flags = torch.zeros(activations.FLAG_BYTES, dtype=torch.int8)
    a8 = _aligned(torch.cat([swizzled.flatten(), flags]))
    form, group_size = sm90_gemm.form_of(blocks, unit), sm90_gemm.group_size_of(blocks)
    most = m if rows is None else rows.tiles.shape[0]
    shape = (most, n, k_blocks, group_size, form, dtype_code(dtype), multiprocessors)
    plan = sm90_gemm._plan(*shape, tile, splits, False, rows is not None)
    poison = torch.iinfo(dtype).max if dtype is torch.int32 else torch.nan
    out = torch.full((m, -(-n // 8) * 8), poison, dtype=dtype)
    partials = torch.full((max(4, plan.partials),), 2**30, dtype=torch.int32)
    tensors = (a8, token_scale, _aligned(blocks), unit, channel_scale, bias, out)
    scratch = partials if plan.partials else None
    tiles = (None, None) if rows is None else (rows.tiles, rows.tile_count)
    sizes = (ctypes.c_int64 * 4)(a8.nbytes, blocks.nbytes, partials.nbytes, out.nbytes)

    def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
        return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())

    error = compiled(plan.kernel, GEMM).emulate(
        *(*plan.grid, plan.threads, plan.cluster, seed, sizes),
        *map(pointer, (*tensors, scratch)),
        *(m, swizzled.shape[1], n, k_blocks, plan.whole_tiles),
        *map(pointer, tiles),
        0,  # streams every ragged wave
    )
    assert not error, error.decode()
    assert not a8[-activations.FLAG_BYTES :].any(), "flags are left raised"
    return out[:, :n]


def _aligned(tensor: Tensor) -> Tensor:
    """A copy at a multiple of 16 bytes, which bulk copies need."""
    space = torch.empty(tensor.nbytes + 16, dtype=torch.uint8)
    start = -space.data_ptr() % 16
    copy = space[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)
