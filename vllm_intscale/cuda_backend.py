"""The CUDA side of the operators: weight layout, tile choice and launches of `cuda/*.cu`.

Every function here has the signature of the operator it implements (`ops`), plus `tile` where a
test or a benchmark may force one. All are bit-identical to `reference`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vllm_intscale import jit
from vllm_intscale.errors import IntScaleError
from vllm_intscale.packing import unpack_codes

DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.int32: 2}  # DTYPE in common.cuh
ROW_THREADS = 256  # kThreads of activation.cu
MAX_ROW_BYTES = 96 * 1024  # shared memory for one row of silu_mul_quantize


def _dtype_code(dtype: torch.dtype) -> int:
    if dtype not in DTYPES:
        raise IntScaleError(
            f"dtype {dtype} has no CUDA kernels; serve with --dtype bfloat16 or float16"
        )
    return DTYPES[dtype]


class Tile(NamedTuple):
    """Block tile of `sm80_w4a8_gemm.cu`: channels x tokens, and how its warps share the work."""

    n: int
    m: int
    warps_n: int
    warps_m: int
    warps_k: int
    stages: int

    @property
    def threads(self) -> int:
        return 32 * self.warps_n * self.warps_m * self.warps_k

    def kernel(self, group_size: int, dtype: torch.dtype, grouped: bool) -> jit.Kernel:
        stage_k = 128 * self.warps_k
        stage_bytes = self.n * stage_k // 2 + self.m * stage_k + stage_k // group_size * self.n * 2
        names = ("TILE_N", "TILE_M", "WARPS_N", "WARPS_M", "WARPS_K", "STAGES")
        return jit.Kernel(
            "sm80_w4a8_gemm.cu",
            "w4a8_gemm",
            (
                *zip(names, self, strict=True),
                ("GROUP", group_size),
                ("GROUPED", int(grouped)),
                ("DTYPE", _dtype_code(dtype)),
            ),
            self.stages * stage_bytes,
        )


# Few tokens: narrow tiles fill the chip with weight streams. Many: wide tiles reuse what they load.
TILES = (
    Tile(n=32, m=16, warps_n=1, warps_m=1, warps_k=4, stages=4),
    Tile(n=64, m=64, warps_n=2, warps_m=2, warps_k=2, stages=3),
    Tile(n=128, m=128, warps_n=2, warps_m=4, warps_k=1, stages=3),
)


def tile_for(tokens: int) -> Tile:
    """The tile for this many tokens (per expert, on average, if grouped).

    Measured on an H100 over the layers of LLaMA-3-8B: twice its tokens is where a tile stops
    being the fastest or close to it (32 tokens, down_proj: 31 us against 60 us of the next).
    """
    return next((tile for tile in TILES if tokens <= 2 * tile.m), TILES[-1])


def describe() -> str:
    """What runs, for the log."""
    return "sm80_w4a8_gemm (mma.sync m16n8k32, accumulate form, CuPy/NVRTC)"


# ---- weight layout ------------------------------------------------------------------------------


def _padded(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def prepare_weight(qweight: Tensor, group_scale: Tensor, bits: int = 4) -> tuple[Tensor, Tensor]:
    """Checkpoint layout to tensor-core tiles (pictured in `sm80_w4a8_gemm.cu`).

    qweight int32 `[N, K/8]` to `[N/16, K/64, 32, 4]`, group_scale int16 `[N, K/g]` to
    `[K/g, N]`, with N padded to 16 and K to 64 by zeros; `[E, ...]` one expert at a time, which
    bounds the extra memory to one matrix.
    """
    assert bits == 4  # loading refuses others
    if qweight.dim() == 3:
        matrices = (prepare_weight(q, s) for q, s in zip(qweight, group_scale, strict=True))
        for expert, matrix in enumerate(matrices):
            if expert == 0:
                stack = tuple(t.new_empty(len(qweight), *t.shape) for t in matrix)
            for target, tensor in zip(stack, matrix, strict=True):
                target[expert] = tensor
        return stack[0], stack[1]
    codes = unpack_codes(qweight, 4)
    n, k = codes.shape
    pad_n = _padded(n, 16) - n
    codes = torch.nn.functional.pad(codes, (0, _padded(k, 64) - k, 0, pad_n))
    # [tile, nibble, row, k_tile, word, t, byte] to [tile, k_tile, row, t, word, byte, nibble]
    nibbles = codes.view(-1, 2, 8, codes.shape[1] // 64, 4, 4, 4).permute(0, 3, 2, 5, 4, 6, 1)
    packed = (nibbles[..., 0] & 15) | (nibbles[..., 1] << 4)
    tiles = packed.contiguous().view(torch.int32).view(packed.shape[0], packed.shape[1], 32, 4)
    return tiles, torch.nn.functional.pad(group_scale.mT, (0, pad_n)).contiguous()


def integer_weight(qweight: Tensor, group_scale: Tensor, n: int, k: int) -> Tensor:
    """`code * S`, int32 `[N, K]`, of a prepared weight of N x K."""
    packed = qweight.contiguous().view(torch.int8).view(*qweight.shape[:2], 8, 4, 4, 4)
    nibbles = torch.stack(((packed << 4) >> 4, packed >> 4), dim=-1)
    codes = nibbles.permute(0, 6, 2, 1, 4, 3, 5).reshape(qweight.shape[0] * 16, -1)[:n, :k]
    scale = group_scale[:, :n].mT.to(torch.int32)
    return codes * scale.repeat_interleave(k // scale.shape[1], dim=1)


# ---- operators ----------------------------------------------------------------------------------


def _row_kernel(function: str, dtype: torch.dtype) -> jit.Kernel:
    shared = MAX_ROW_BYTES if function == "silu_mul_quantize" else 0
    return jit.Kernel("activation.cu", function, (("DTYPE", _dtype_code(dtype)),), shared)


ROUTING = jit.Kernel("moe_routing.cu", "group_slots")


def kernels(dtype: torch.dtype, group_size: int, moe: bool) -> list[jit.Kernel]:
    """Every kernel that a linear layer, or a mixture of experts, of this kind can launch.

    Raises IntScaleError for a dtype without kernels.
    """
    needed = [_row_kernel("quantize_activation", dtype)]
    needed += [tile.kernel(group_size, dtype, grouped=moe) for tile in TILES]
    if moe:
        needed += [_row_kernel("silu_mul_quantize", dtype), _row_kernel("weighted_sum", dtype)]
        needed += [ROUTING]
    return needed


def warm_up(dtype: torch.dtype, group_size: int, moe: bool) -> None:
    """Compile and load them on the current device, so that none compiles while serving.

    Raises IntScaleError for a dtype or GPU without kernels, or if CuPy is missing.
    """
    for kernel in kernels(dtype, group_size, moe):
        jit.load(kernel, torch.cuda.current_device())


def quantize_activation(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.quantize_activation`; x `[M, K]` bf16 or fp16, K a multiple of 8."""
    if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        x = x.contiguous()
    m, k = x.shape
    a8 = torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format)
    token_scale = x.new_empty(m, dtype=torch.float32)
    if m:
        kernel = _row_kernel("quantize_activation", x.dtype)
        args = (x, a8, token_scale, np.int64(k), np.int64(x.stride(0)))
        jit.launch(kernel, x.device, (m,), ROW_THREADS, args)
    return a8, token_scale


def silu_mul_quantize(gate_up: Tensor, slot_expert: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.silu_mul` and `quantize_activation` of rows whose expert is local, fused."""
    rows, k = gate_up.shape[0], gate_up.shape[1] // 2
    if 2 * k > MAX_ROW_BYTES:
        raise IntScaleError(
            f"experts of intermediate size {k} exceed the fused activation's limit of "
            f"{MAX_ROW_BYTES // 2}; raise --tensor-parallel-size"
        )
    a8 = gate_up.new_empty(rows, k, dtype=torch.int8)
    token_scale = gate_up.new_empty(rows, dtype=torch.float32)
    kernel = _row_kernel("silu_mul_quantize", gate_up.dtype)
    args = (gate_up, slot_expert, a8, token_scale, np.int64(k))
    jit.launch(kernel, gate_up.device, (rows,), ROW_THREADS, args, shared_bytes=2 * k)
    return a8, token_scale


class Routing(NamedTuple):
    """Slots grouped by expert, as `moe_routing.cu` describes them."""

    sorted_slots: Tensor
    tile_expert: Tensor
    slot_expert: Tensor
    tile_count: Tensor
    slots_per_row: int


def launch_gemm(
    tile: Tile,
    a8: Tensor,
    token_scale: Tensor,
    weight: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    out: Tensor,
    routing: Routing | None,
) -> None:
    qweight, group_scale, channel_scale = weight
    n, k = channel_scale.shape[-1], a8.shape[1]
    kernel = tile.kernel(k // group_scale.shape[-2], out.dtype, grouped=routing is not None)
    m_tiles = routing.tile_expert.shape[0] if routing else -(-a8.shape[0] // tile.m)
    routing_args = (*routing[:2], routing[3], np.int32(routing[4])) if routing else ()
    args = (
        *(a8, token_scale, qweight, group_scale, channel_scale, bias, out),
        *(np.int32(a8.shape[0]), np.int32(n), np.int32(k)),
        *(routing_args or (None, None, None, np.int32(1))),
    )
    grid = (m_tiles, -(-n // tile.n))
    jit.launch(kernel, a8.device, grid, tile.threads, args, kernel.shared_bytes)


def gemm(
    a8: Tensor,
    token_scale: Tensor,
    qweight: Tensor,
    group_scale: Tensor,
    channel_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    tile: Tile | None = None,
) -> Tensor:
    """See `reference.gemm`; the weight as `prepare_weight` made it. int32 gives accumulators."""
    out = a8.new_empty(a8.shape[0], channel_scale.shape[0], dtype=dtype)
    if a8.shape[0]:
        tile = tile or tile_for(a8.shape[0])
        weight = (qweight, group_scale, channel_scale)
        launch_gemm(tile, a8, token_scale, weight, bias, out, None)
    return out


def group_slots(topk_ids: Tensor, expert_map: Tensor | None, experts: int, tile_m: int) -> Routing:
    """Group the slots of topk_ids int `[M, topk]` by local expert, in tiles of `tile_m` rows."""
    slots = topk_ids.numel()
    tiles = (slots + min(experts, slots) * (tile_m - 1)) // tile_m  # no routing needs more
    sizes = (tiles * tile_m, tiles, slots, 1)
    sorted_slots, tile_expert, slot_expert, tile_count = (
        topk_ids.new_empty(size, dtype=torch.int32) for size in sizes
    )
    scalars = (np.int64(slots), np.int64(experts), np.int64(tile_m))
    ids = topk_ids.to(torch.int32).contiguous()
    expert_map = None if expert_map is None else expert_map.to(torch.int32)
    args = (ids, expert_map, sorted_slots, tile_expert, slot_expert, tile_count, *scalars)
    jit.launch(ROUTING, topk_ids.device, (1,), 1024, args, shared_bytes=8 * experts)
    return Routing(sorted_slots, tile_expert, slot_expert, tile_count, topk_ids.shape[1])


def grouped_gemm(
    a8: Tensor,
    token_scale: Tensor,
    weight: tuple[Tensor, Tensor, Tensor],
    routing: Routing,
    dtype: torch.dtype,
    tile: Tile,
) -> Tensor:
    """Each slot's row of a8 times its expert's weight: `[slots, N]`.

    Rows of slots without a local expert are left unwritten.
    """
    out = a8.new_empty(routing.slot_expert.shape[0], weight[2].shape[1], dtype=dtype)
    launch_gemm(tile, a8, token_scale, weight, None, out, routing)
    return out


def moe(
    x: Tensor,
    w13: tuple[Tensor, Tensor, Tensor],
    w2: tuple[Tensor, Tensor, Tensor],
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    router_weight_on_input: bool,
    tile: Tile | None = None,
) -> Tensor:
    """See `reference.moe`; weights as `prepare_weight` made them."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not x.shape[0]:
        return out
    if router_weight_on_input:
        x = x * topk_weights.to(x.dtype)
        topk_weights = torch.ones_like(topk_weights)
    experts, (tokens, topk) = w13[0].shape[0], topk_ids.shape
    tile = tile or tile_for(-(-tokens * topk // experts))
    routing = group_slots(topk_ids, expert_map, experts, tile.m)
    gate_up = grouped_gemm(*quantize_activation(x), w13, routing, x.dtype, tile)
    hidden = silu_mul_quantize(gate_up, routing.slot_expert)
    y = grouped_gemm(*hidden, w2, routing._replace(slots_per_row=1), x.dtype, tile)
    args = (y, topk_weights.float().contiguous(), routing.slot_expert, out)
    sizes = (np.int64(y.shape[1]), np.int64(topk))
    kernel = _row_kernel("weighted_sum", x.dtype)
    jit.launch(kernel, x.device, (tokens,), ROW_THREADS, (*args, *sizes))
    return out
