"""The CUDA side of the operators, on the kernels in `cuda/`.

Every function here has the signature of the operator it implements (`ops`), plus `tile` where a
test or a benchmark may force one. All are bit-identical to `reference`. They run on `sm90_gemm`
where the GPU is a Hopper, on `sm80_gemm` otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_intscale import jit, reference, sm80_gemm, sm90_gemm, sm90_tiles
from vllm_intscale.all_reduce import all_reduce_norm_quantize
from vllm_intscale.errors import IntScaleError
from vllm_intscale.packing import unpack_codes
from vllm_intscale.reference import Weight
from vllm_intscale.routing import KERNEL as ROUTING
from vllm_intscale.routing import Routing, group_rows
from vllm_intscale.row_kernels import (
    ROW_THREADS,
    aligned,
    dtype_code,
    norm_quantize,
    quantize_activation,
    quantize_slots,
    rotary_embedding,
    row_kernel,
    silu_mul_quantize,
)
from vllm_intscale.sm90_tiles import INT8

__all__ = [
    "all_reduce_norm_quantize",
    "norm_quantize",
    "quantize_activation",
    "quantize_slots",
    "rotary_embedding",
    "silu_mul_quantize",
]

DENSE_ROW_KERNELS = (
    *("quantize_activation", "norm_quantize", "silu_mul_quantize"),
    "rotary_embedding",
)
ROWS = 1024  # of 8-bit weights folded at a time: bounds the extra memory


def describe(qweight: Tensor, group_scale: Tensor) -> str:
    """What runs a prepared weight, for the log."""
    if _is_hopper_layout(qweight):
        return f"sm90_w4a8_gemm (wgmma, {sm90_gemm.form_of(qweight, group_scale)} form)"
    bits = sm80_gemm.layout_of(qweight, group_scale).bits
    return f"sm80_w4a8_gemm (mma.sync, {'accumulate' if bits == 4 else INT8} form)"


# ---- weights and activations --------------------------------------------------------------------


def _is_hopper_layout(qweight: Tensor) -> bool:
    return qweight.dtype == torch.uint8


Agree = Callable[[bool], bool]  # whether something holds on all ranks, of which each tells its own


def _hopper_form(matrices: Iterable[tuple[Tensor, Tensor]], agree: Agree = bool) -> str:
    """INTSCALE_FORM or, where all qweight and group_scale allow it, the faster one, "fold"."""
    if (form := sm90_tiles.wanted_form()) == "accumulate":
        return form
    possible = agree(all(sm90_gemm.foldable(unpack_codes(q, 4), scale) for q, scale in matrices))
    if form == "fold" and not possible:
        raise IntScaleError(
            "INTSCALE_FORM is 'fold', which needs group scales of at most "
            f"{sm90_gemm.MAX_FOLD_SCALE} and no negative one beside the code -8; unset it"
        )
    return "fold" if possible else "accumulate"


def prepare_weight(
    qweight: Tensor,
    group_scale: Tensor,
    channel_scale: Tensor,
    bits: int = 4,
    agree: Agree = bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Checkpoint layout to that of the kernels, see `sm90_gemm` and `sm80_gemm.prepare_weight`.

    A stack `[E, ...]` is one of experts, all of one form; agree: on all ranks that have some.
    8-bit weights compute as `reference.fold` has them, on every GPU.
    """
    hopper = torch.cuda.get_device_capability(qweight.device)[0] == 9
    stack = qweight.dim() == 3
    if bits == 8:
        family = INT8 if hopper else "sm80_int8"
    elif hopper:
        experts = zip(qweight, group_scale, strict=True) if stack else [(qweight, group_scale)]
        family = _hopper_form(experts, agree)
    else:
        family = "sm80"
    prepare = prepare_stack if stack else prepare_matrix
    return prepare(qweight, group_scale, channel_scale, family)


def prepare_matrix(
    qweight: Tensor, group_scale: Tensor, channel_scale: Tensor, family: str
) -> tuple[Tensor, Tensor, Tensor]:
    """For the portable kernel, "sm80" or "sm80_int8", or for a form of the Hopper kernel.

    The forms are `sm90_tiles.FORMS` and, for 8-bit weights, INT8.
    """
    if family in (INT8, "sm80_int8"):
        codes, channel_scale = _fold(qweight, group_scale, channel_scale)
        module = sm90_gemm if family == INT8 else sm80_gemm
        return *module.prepare_int8(codes), channel_scale
    if family == "sm80":
        return *sm80_gemm.prepare_weight(qweight, group_scale), channel_scale
    return sm90_gemm.prepare_weight(unpack_codes(qweight, 4), group_scale, channel_scale, family)


def _fold(qweight: Tensor, group_scale: Tensor, channel_scale: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.fold` of 8-bit weights, some rows at a time: int8 `[N, K]` and float32 `[N]`."""
    parts = [
        reference.fold(Weight(unpack_codes(words, 8), *scales))
        for words, *scales in zip(
            *(t.split(ROWS) for t in (qweight, group_scale, channel_scale)), strict=True
        )
    ]
    return torch.cat([p.codes for p in parts]), torch.cat([p.channel_scale for p in parts])


def prepare_stack(
    qweight: Tensor, group_scale: Tensor, channel_scale: Tensor, family: str
) -> tuple[Tensor, Tensor, Tensor]:
    """One expert at a time, which bounds the extra memory to one matrix."""
    stack: tuple[Tensor, ...] = ()
    experts = zip(qweight, group_scale, channel_scale, strict=True)
    for expert, tensors in enumerate(experts):
        matrix = prepare_matrix(*tensors, family)
        stack = stack or tuple(t.new_empty(len(qweight), *t.shape) for t in matrix)
        for target, tensor in zip(stack, matrix, strict=True):
            target[expert] = tensor
    return stack[0], stack[1], stack[2]


def integer_weight(qweight: Tensor, group_scale: Tensor, n: int, k: int) -> Tensor:
    """The integers that channel_scale multiplies, int32 `[N, K]`, of a prepared weight."""
    if _is_hopper_layout(qweight):
        return sm90_gemm.integer_weight(qweight, group_scale, n, k)
    return sm80_gemm.integer_weight(qweight, group_scale, n, k)


# ---- operators ----------------------------------------------------------------------------------


def kernels(weight: tuple[Tensor, Tensor], dtype: torch.dtype) -> list[jit.Kernel]:
    """Every kernel that a linear layer or a stack of experts with this prepared weight can launch.

    weight: qweight and group_scale. Raises IntScaleError for a dtype without kernels.
    """
    qweight, group_scale = weight
    code, experts = dtype_code(dtype), qweight.dim() == 5
    names = ["quantize_slots", "silu_mul_quantize", "weighted_sum"] if experts else []
    needed = [row_kernel(name, dtype) for name in names or DENSE_ROW_KERNELS]
    if experts:
        needed.append(ROUTING)
    if _is_hopper_layout(qweight):
        form = sm90_gemm.form_of(qweight, group_scale)
        group_size = sm90_gemm.group_size_of(qweight)
        tiles = sm90_tiles.grouped_tiles(form) if experts else sm90_tiles.tiles(form)
        return needed + [t.kernel(group_size, form, code, grouped=experts) for t in tiles]
    layout = sm80_gemm.layout_of(qweight, group_scale)
    return needed + [tile.kernel(layout, code, grouped=experts) for tile in sm80_gemm.TILES]


def warm_up(weight: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    """Compile and load them on the weight's device, so that none compiles while serving.

    Raises IntScaleError for a dtype or GPU without kernels, or if CuPy is missing.
    """
    _load_together(tuple(kernels(weight, dtype)), weight[0].device.index)


@cache  # layers have few sets of kernels between them
def _load_together(needed: tuple[jit.Kernel, ...], device: int) -> None:
    jit.import_cupy()  # once, before there are threads
    # NVRTC lets them compile side by side; a new thread is on GPU 0, where CuPy would leave memory.
    with ThreadPoolExecutor(len(needed), "", torch.cuda.set_device, (device,)) as pool:
        list(pool.map(lambda kernel: jit.load(kernel, device), needed))


def gemm(
    a8: Tensor,
    token_scale: Tensor,
    qweight: Tensor,
    group_scale: Tensor,
    channel_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    tile: sm80_gemm.Tile | sm90_tiles.Tile | None = None,
    splits: int | None = None,
) -> Tensor:
    """See `reference.gemm`; the weight as `prepare_weight` made it. int32 gives accumulators.

    splits: blocks that share a tile's k; on Hopper, sm90_tiles.STREAMED, too.
    """
    m = token_scale.shape[0]
    out = a8.new_empty(m, channel_scale.shape[0], dtype=dtype)
    if not m:
        return out
    if bias is not None and bias.dtype is not dtype:
        raise IntScaleError(f"bias is {bias.dtype} and the output {dtype}; convert the bias")
    weight, code = (qweight, group_scale, channel_scale), dtype_code(dtype)
    if _is_hopper_layout(qweight):
        assert not isinstance(tile, sm80_gemm.Tile)
        sm90_gemm.gemm(a8, token_scale, weight, bias, out, code, tile, splits)
    else:
        assert not isinstance(tile, sm90_tiles.Tile)
        sm80_gemm.gemm(a8, token_scale, weight, bias, out, code, tile, splits)
    return out


def grouped_gemm(
    a8: Tensor,
    token_scale: Tensor,
    weight: tuple[Tensor, Tensor, Tensor],
    routing: Routing,
    dtype: torch.dtype,
    tile: sm80_gemm.Tile | sm90_tiles.Tile,
    splits: int = 1,
    out: Tensor | None = None,
) -> Tensor:
    """Each row of a8 that is a slot's times its expert's weight: `[rows, N]`.

    Rows that are no slot's are left unwritten. tile.m is that of the routing.
    """
    if out is None:
        out = a8.new_empty(routing.rows, weight[2].shape[1], dtype=dtype)
    code = dtype_code(dtype)
    if isinstance(tile, sm90_tiles.Tile):
        sm90_gemm.gemm(a8, token_scale, weight, None, out, code, tile, splits, routing=routing)
    else:
        assert splits == 1
        sm80_gemm.gemm(a8, token_scale, weight, None, out, code, tile, routing=routing)
    return out


GroupedPlan = tuple[sm80_gemm.Tile | sm90_tiles.Tile, int]  # with the splits of k


def _choose_grouped(
    tokens: int, topk: int, experts: int, stacks: Sequence[tuple[Tensor, Tensor, Tensor]]
) -> Sequence[GroupedPlan]:
    """For each of these stacks of local experts; tiles of all of them have as many tokens.

    experts: on all ranks together.
    """
    if not _is_hopper_layout(stacks[0][0]):
        slots = -(-tokens * topk * stacks[0][0].shape[0] // experts)
        return [(sm80_gemm.choose_grouped(slots, stacks[0]), 1)] * len(stacks)
    shapes = tuple(
        sm90_tiles.Matrix(
            scale.shape[1],
            blocks.shape[2] * sm90_tiles.BLOCK_K,
            sm90_gemm.group_size_of(blocks),
            sm90_gemm.form_of(blocks, unit),
        )
        for blocks, unit, scale in stacks
    )
    multiprocessors = sm90_gemm.multiprocessors_of(stacks[0][0].device.index)
    local_experts = stacks[0][0].shape[0]
    return sm90_tiles.choose_grouped(tokens, topk / experts, local_experts, shapes, multiprocessors)


class Buffers(NamedTuple):
    """Where `moe` leaves its output `[M, H]` and those of its GEMMs, `[rows, 2 I]`, `[rows, H]`.

    rows: `routing.grouped_rows`. gate_up may share its memory with out.
    """

    out: Tensor
    gate_up: Tensor | None = None
    y: Tensor | None = None


def moe(
    x: Tensor,
    w13: tuple[Tensor, Tensor, Tensor],
    w2: tuple[Tensor, Tensor, Tensor],
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    router_weight_on_input: bool,
    plans: Sequence[GroupedPlan] | None = None,
    buffers: Buffers | None = None,
) -> Tensor:
    """See `reference.moe`; weights as `prepare_weight` made them. plans: of w13 and of w2."""
    if buffers is None:
        buffers = Buffers(torch.empty_like(x, memory_format=torch.contiguous_format))
    out = buffers.out
    if not x.shape[0]:
        return out
    if router_weight_on_input:
        x = x * topk_weights.to(x.dtype)
        topk_weights = torch.ones_like(topk_weights)
    x = aligned(x)
    local_experts, (tokens, topk) = w13[0].shape[0], topk_ids.shape
    experts = local_experts if expert_map is None else expert_map.numel()
    first, second = plans or _choose_grouped(tokens, topk, experts, (w13, w2))
    routing = group_rows(topk_ids, expert_map, local_experts, first[0].m)
    a8 = quantize_slots(x, routing)
    gate_up = grouped_gemm(*a8, w13, routing, x.dtype, *first, out=buffers.gate_up)
    hidden = silu_mul_quantize(gate_up, routing)
    y = grouped_gemm(*hidden, w2, routing, x.dtype, *second, out=buffers.y)
    args = (y, topk_weights.float().contiguous(), routing.slot_row, out, y.shape[1], topk)
    kernel = row_kernel("weighted_sum", x.dtype)
    jit.launch(kernel, x.device, (tokens,), ROW_THREADS, args, overlap=True)
    return out
