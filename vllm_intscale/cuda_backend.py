"""The CUDA side of the operators, on the kernels in `cuda/`.

Every function here has the signature of the operator it implements (`ops`), plus `tile` where a
test or a benchmark may force one. All are bit-identical to `reference`. Dense layers run on
`sm90_gemm` where the GPU is a Hopper, and otherwise, as experts do everywhere, on `sm80_gemm`.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from torch import Tensor

from vllm_intscale import jit, sm80_gemm, sm90_gemm
from vllm_intscale.activations import new_activation
from vllm_intscale.errors import IntScaleError
from vllm_intscale.packing import unpack_codes
from vllm_intscale.sm80_gemm import Routing

DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.int32: 2}  # DTYPE in common.cuh
ROW_THREADS = 256
MAX_ROW_THREADS = 1024  # kMaxThreads of activation.cu
HELD_COLUMNS = 16  # of a thread of quantize_activation, kHeld * kVector of activation.cu
MAX_ROW_BYTES = 96 * 1024  # shared memory for one row of silu_mul_quantize


def _dtype_code(dtype: torch.dtype) -> int:
    if dtype not in DTYPES:
        raise IntScaleError(
            f"dtype {dtype} has no CUDA kernels; serve with --dtype bfloat16 or float16"
        )
    return DTYPES[dtype]


def describe(qweight: Tensor, group_scale: Tensor) -> str:
    """What runs a prepared weight, for the log."""
    if _is_hopper_layout(qweight):
        return f"sm90_w4a8_gemm (wgmma, {_form_of(group_scale)} form)"
    return "sm80_w4a8_gemm (mma.sync, accumulate form)"


# ---- weights and activations --------------------------------------------------------------------


def _is_hopper_layout(qweight: Tensor) -> bool:
    return qweight.dtype == torch.uint8


def _form_of(group_scale: Tensor) -> str:
    return "fold" if group_scale.numel() else "accumulate"


def _hopper_form(codes: Tensor, group_scale: Tensor) -> str:
    """INTSCALE_FORM or, where the weight allows it, the faster one, which is "fold"."""
    form = os.environ.get("INTSCALE_FORM", "")
    if form not in ("", *sm90_gemm.FORMS):
        raise IntScaleError(
            f"INTSCALE_FORM is {form!r}; it must be one of {', '.join(sm90_gemm.FORMS)}"
        )
    foldable = form != "accumulate" and sm90_gemm.foldable(codes, group_scale)
    if form == "fold" and not foldable:
        raise IntScaleError(
            "INTSCALE_FORM is 'fold', which needs group scales of at most "
            f"{sm90_gemm.MAX_FOLD_SCALE} and no negative one beside the code -8; unset it"
        )
    return "fold" if foldable else "accumulate"


def prepare_weight(
    qweight: Tensor, group_scale: Tensor, channel_scale: Tensor, bits: int = 4
) -> tuple[Tensor, Tensor, Tensor]:
    """Checkpoint layout to that of the kernels, see `sm90_gemm` and `sm80_gemm.prepare_weight`.

    A stack `[E, ...]` is one of experts.
    """
    assert bits == 4  # loading refuses others
    if qweight.dim() == 2 and torch.cuda.get_device_capability(qweight.device)[0] == 9:
        codes = unpack_codes(qweight, 4)
        form = _hopper_form(codes, group_scale)
        return sm90_gemm.prepare_weight(codes, group_scale, channel_scale, form)
    return *sm80_gemm.prepare_weight(qweight, group_scale), channel_scale


def integer_weight(qweight: Tensor, group_scale: Tensor, n: int, k: int) -> Tensor:
    """The integers that channel_scale multiplies, int32 `[N, K]`, of a prepared weight."""
    if _is_hopper_layout(qweight):
        return sm90_gemm.integer_weight(qweight, group_scale, n, k)
    return sm80_gemm.integer_weight(qweight, group_scale, n, k)


# ---- operators ----------------------------------------------------------------------------------


def _row_kernel(function: str, dtype: torch.dtype) -> jit.Kernel:
    shared = MAX_ROW_BYTES if function == "silu_mul_quantize" else 0
    return jit.Kernel("activation.cu", function, (("DTYPE", _dtype_code(dtype)),), shared)


ROUTING = jit.Kernel("moe_routing.cu", "group_slots")


def kernels(weight: tuple[Tensor, Tensor], dtype: torch.dtype) -> list[jit.Kernel]:
    """Every kernel that a linear layer or a stack of experts with this prepared weight can launch.

    weight: qweight and group_scale. Raises IntScaleError for a dtype without kernels.
    """
    qweight, group_scale = weight
    code = _dtype_code(dtype)
    needed = [_row_kernel("quantize_activation", dtype)]
    if _is_hopper_layout(qweight):
        form, group_size = _form_of(group_scale), sm90_gemm.group_size_of(qweight)
        return needed + [t.kernel(group_size, form, code) for t in sm90_gemm.tiles(form)]
    group_size, experts = sm80_gemm.group_size_of(qweight, group_scale), qweight.dim() == 5
    needed += [tile.kernel(group_size, code, grouped=experts) for tile in sm80_gemm.TILES]
    if experts:
        needed += [_row_kernel("silu_mul_quantize", dtype), _row_kernel("weighted_sum", dtype)]
        needed += [ROUTING]
    return needed


def warm_up(weight: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    """Compile and load them on the weight's device, so that none compiles while serving.

    Raises IntScaleError for a dtype or GPU without kernels, or if CuPy is missing.
    """
    _load_together(tuple(kernels(weight, dtype)), weight[0].device.index)


@cache  # layers have few sets of kernels between them
def _load_together(needed: tuple[jit.Kernel, ...], device: int) -> None:
    jit.import_cupy()  # once, before there are threads
    with ThreadPoolExecutor(len(needed)) as pool:  # NVRTC lets them compile side by side
        list(pool.map(lambda kernel: jit.load(kernel, device), needed))


def quantize_activation(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.quantize_activation`; x `[M, K]` bf16 or fp16, K a multiple of 8.

    a8 is int8 `[ceil(K / 128), M rounded up to 8, 128]`, in the layout that `common.cuh` describes.
    """
    if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        x = x.contiguous()
    m, k = x.shape
    a8 = new_activation(x, m, k)
    token_scale = x.new_empty(m, dtype=torch.float32)
    if m:
        kernel = _row_kernel("quantize_activation", x.dtype)
        args = (x, a8, token_scale, *map(np.int64, (k, x.stride(0), a8.shape[1])))
        threads = min(MAX_ROW_THREADS, -(-k // (32 * HELD_COLUMNS)) * 32)
        jit.launch(kernel, x.device, (m,), threads, args, overlap=True)
    return a8, token_scale


def silu_mul_quantize(gate_up: Tensor, slot_expert: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.silu_mul` and `quantize_activation` of rows whose expert is local, fused."""
    rows, k = gate_up.shape[0], gate_up.shape[1] // 2
    if 2 * k > MAX_ROW_BYTES:
        raise IntScaleError(
            f"experts of intermediate size {k} exceed the fused activation's limit of "
            f"{MAX_ROW_BYTES // 2}; raise --tensor-parallel-size"
        )
    a8 = new_activation(gate_up, rows, k)
    token_scale = gate_up.new_empty(rows, dtype=torch.float32)
    kernel = _row_kernel("silu_mul_quantize", gate_up.dtype)
    args = (gate_up, slot_expert, a8, token_scale, np.int64(k), np.int64(a8.shape[1]))
    jit.launch(kernel, gate_up.device, (rows,), ROW_THREADS, args, shared_bytes=2 * k)
    return a8, token_scale


def gemm(
    a8: Tensor,
    token_scale: Tensor,
    qweight: Tensor,
    group_scale: Tensor,
    channel_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    tile: sm80_gemm.Tile | sm90_gemm.Tile | None = None,
    splits: int | None = None,
) -> Tensor:
    """See `reference.gemm`; the weight as `prepare_weight` made it. int32 gives accumulators.

    splits: blocks that share a tile's k; on Hopper, sm90_gemm.STREAMED, too.
    """
    m = token_scale.shape[0]
    out = a8.new_empty(m, channel_scale.shape[0], dtype=dtype)
    if not m:
        return out
    weight, code = (qweight, group_scale, channel_scale), _dtype_code(dtype)
    if _is_hopper_layout(qweight):
        assert not isinstance(tile, sm80_gemm.Tile)
        sm90_gemm.gemm(a8, token_scale, weight, bias, out, code, tile, splits)
    else:
        assert not isinstance(tile, sm90_gemm.Tile)
        sm80_gemm.gemm(a8, token_scale, weight, bias, out, code, tile, splits)
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
    tile: sm80_gemm.Tile,
) -> Tensor:
    """Each slot's row of a8 times its expert's weight: `[slots, N]`.

    Rows of slots without a local expert are left unwritten.
    """
    out = a8.new_empty(routing.slot_expert.shape[0], weight[2].shape[1], dtype=dtype)
    code = _dtype_code(dtype)
    sm80_gemm.gemm(a8, token_scale, weight, None, out, code, tile, routing=routing)
    return out


def moe(
    x: Tensor,
    w13: tuple[Tensor, Tensor, Tensor],
    w2: tuple[Tensor, Tensor, Tensor],
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    router_weight_on_input: bool,
    tile: sm80_gemm.Tile | None = None,
) -> Tensor:
    """See `reference.moe`; weights as `prepare_weight` made them."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not x.shape[0]:
        return out
    if router_weight_on_input:
        x = x * topk_weights.to(x.dtype)
        topk_weights = torch.ones_like(topk_weights)
    experts, (tokens, topk) = w13[0].shape[0], topk_ids.shape
    tile = tile or sm80_gemm.choose_grouped(tokens * topk, w13)
    routing = group_slots(topk_ids, expert_map, experts, tile.m)
    gate_up = grouped_gemm(*quantize_activation(x), w13, routing, x.dtype, tile)
    hidden = silu_mul_quantize(gate_up, routing.slot_expert)
    y = grouped_gemm(*hidden, w2, routing._replace(slots_per_row=1), x.dtype, tile)
    args = (y, topk_weights.float().contiguous(), routing.slot_expert, out)
    sizes = (np.int64(y.shape[1]), np.int64(topk))
    kernel = _row_kernel("weighted_sum", x.dtype)
    jit.launch(kernel, x.device, (tokens,), ROW_THREADS, (*args, *sizes))
    return out
