"""Launches of `cuda/activation.cu`: what is done to rows of activations between GEMMs."""

from __future__ import annotations

import struct
from functools import cache

import torch
from torch import Tensor

from vllm_intscale import jit, reference
from vllm_intscale.activations import new_activation
from vllm_intscale.errors import IntScaleError
from vllm_intscale.routing import Routing

DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.int32: 2}  # DTYPE in common.cuh
ROW_THREADS = 256
MAX_ROW_THREADS = 1024  # kMaxThreads of rows.cuh
HELD_COLUMNS = 16  # of a thread of quantize_activation, kHeld * kVector of rows.cuh
MAX_NORM_K = MAX_ROW_THREADS * HELD_COLUMNS  # all columns of norm_quantize are held
MAX_ADDENDS = 3  # of norm_quantize
MAX_ROW_BLOCKS = 8  # of a portable cluster
MAX_ROW_BYTES = 96 * 1024  # shared memory for one row of silu_mul_quantize


def dtype_code(dtype: torch.dtype) -> int:
    """DTYPE of the kernels. Raises IntScaleError for a dtype without kernels."""
    if dtype not in DTYPES:
        raise IntScaleError(
            f"dtype {dtype} has no CUDA kernels; serve with --dtype bfloat16 or float16"
        )
    return DTYPES[dtype]


@cache
def row_kernel(function: str, dtype: torch.dtype) -> jit.Kernel:
    """One of `activation.cu`."""
    shared = MAX_ROW_BYTES if function == "silu_mul_quantize" else 0
    return jit.Kernel("activation.cu", function, (("DTYPE", dtype_code(dtype)),), shared)


def _row_threads(k: int) -> int:
    return min(MAX_ROW_THREADS, -(-k // (32 * HELD_COLUMNS)) * 32)


def aligned(x: Tensor) -> Tensor:
    """With rows that can be read 16 bytes at a time."""
    if x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)  # `contiguous` might not copy


def quantize_activation(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.quantize_activation`; x `[M, K]` bf16 or fp16, K a multiple of 8.

    a8 is int8 `[ceil(K / 128), M rounded up to 8, 128]`, in the layout that `common.cuh` describes.
    """
    x = aligned(x)
    m, k = x.shape
    a8 = new_activation(x, m, k)
    token_scale = x.new_empty(m, dtype=torch.float32)
    if m:
        kernel = row_kernel("quantize_activation", x.dtype)
        args = (x, a8, token_scale, k, x.stride(0), a8.shape[1])
        jit.launch(kernel, x.device, (m,), _row_threads(k), args, overlap=True)
    return a8, token_scale


def quantize_slots(x: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """`quantize_activation` of each token into the rows of its slots; x as `aligned` gives it.

    What wrote x must have been launched before `group_rows`: this kernel reads it early.
    """
    (m, k), topk = x.shape, routing.slot_row.shape[1]
    a8 = new_activation(x, routing.rows, k)
    token_scale = x.new_empty(routing.rows, dtype=torch.float32)
    kernel = row_kernel("quantize_slots", x.dtype)
    args = (x, routing.slot_row, a8, token_scale, k, x.stride(0), a8.shape[1], topk)
    jit.launch(kernel, x.device, (m,), _row_threads(k), args, overlap=True)
    return a8, token_scale


def _blocks_of_row(slots: int, k: int) -> int:
    """Into how many blocks silu_mul_quantize splits a row: few rows would leave the GPU idle."""
    blocks = 1
    while blocks < MAX_ROW_BLOCKS and slots * blocks <= 512 and k > blocks * ROW_THREADS * 8:
        blocks *= 2
    return blocks


@cache
def float32_bits(number: float) -> int:
    """As a launch takes it."""
    (bits,) = struct.unpack("I", struct.pack("f", number))
    return int(bits)


def norm_quantize(
    addends: list[Tensor], weight: Tensor, epsilon: float, keep_norm: bool, keep_sum: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.rms_norm` and `quantize_activation` of its result, fused.

    addends: up to MAX_ADDENDS `[M, K]`, weight `[K]`, bf16 or fp16, K a multiple of 8, at most
    MAX_NORM_K. Gives a8, token_scale, the normed rows and the sum (empty unless `keep_norm` and
    `keep_sum`). Raises IntScaleError for more addends and for unlike ones.
    """
    if len(addends) > MAX_ADDENDS:
        raise IntScaleError(f"norm_quantize adds up {MAX_ADDENDS} tensors at most: {len(addends)}")
    x = addends[0]
    for other in (weight, *addends[1:]):
        if other.dtype is not x.dtype:
            raise IntScaleError(f"norm_quantize of {x.dtype} and {other.dtype}; convert one")
    rows = weight[None]
    weight = aligned(rows)
    m, k = x.shape
    a8, token_scale = new_activation(x, m, k), x.new_empty(m, dtype=torch.float32)
    y, added = (x.new_empty((m, k) if wanted else 0) for wanted in (keep_norm, keep_sum))
    if m:
        inputs = [aligned(addend).contiguous() for addend in addends]
        unused = [None] * (MAX_ADDENDS - len(inputs))
        outputs = (a8, token_scale, y if keep_norm else None, added if keep_sum else None)
        args = (*inputs, *unused, weight, float32_bits(epsilon), *outputs, k, a8.shape[1])
        kernel, threads = row_kernel("norm_quantize", x.dtype), reference.norm_threads(k)
        early = weight is rows  # it reads weights early, not those that were copied just now
        jit.launch(kernel, x.device, (m,), threads, args, overlap=early)
    return a8, token_scale, y, added


def silu_mul_quantize(
    gate_up: Tensor, routing: Routing | None = None, blocks: int | None = None
) -> tuple[Tensor, Tensor]:
    """`reference.silu_mul` and `quantize_activation` of rows `[rows, 2 K]`, fused.

    routing: only the rows of its slots. blocks: that share a row, a cluster: 1, 2, 4 or 8; more
    than one on Hopper only.
    """
    gate_up = aligned(gate_up).contiguous()
    rows, k = gate_up.shape[0], gate_up.shape[1] // 2
    if 2 * k > MAX_ROW_BYTES:
        raise IntScaleError(
            f"intermediate size {k} exceeds the fused activation's limit of "
            f"{MAX_ROW_BYTES // 2}; raise --tensor-parallel-size"
        )
    a8 = new_activation(gate_up, rows, k)
    token_scale = gate_up.new_empty(rows, dtype=torch.float32)
    kernel, slots = row_kernel("silu_mul_quantize", gate_up.dtype), routing and routing.slot_row
    count = rows if slots is None else slots.numel()
    if not count:
        return a8, token_scale
    if blocks is None:
        hopper = torch.cuda.get_device_capability(a8.device)[0] == 9
        blocks = _blocks_of_row(count, k) if hopper else 1
    assert blocks in (1, 2, 4, 8)
    args = (gate_up, slots, a8, token_scale, k, a8.shape[1])
    grid, shared_bytes = (count * blocks,), 16 * -(-k // (8 * blocks))
    jit.launch(kernel, a8.device, grid, ROW_THREADS, args, shared_bytes, blocks, overlap=True)
    return a8, token_scale


def rotary_embedding(
    qkv: Tensor, positions: Tensor, cos_sin_cache: Tensor, q_heads: int, k_heads: int
) -> tuple[Tensor, Tensor]:
    """See `reference.rotary_embedding`; bf16 or fp16, D a multiple of 16, positions int64.

    What wrote positions and cos_sin_cache must have ended: this kernel reads them early, unless
    it gets copies.
    """
    qkv, place = aligned(qkv), positions.contiguous()
    cos_sin = aligned(cos_sin_cache).contiguous()
    early = place is positions and cos_sin is cos_sin_cache
    m, head_size = len(qkv), cos_sin.shape[1]
    q, k = (qkv.new_empty(m, heads, head_size) for heads in (q_heads, k_heads))
    if m:
        sizes = (m, q_heads, k_heads, head_size // 2)
        args = (qkv, place, cos_sin, q, k, *sizes, qkv.stride(0))
        grid = (-(-(q.numel() + k.numel()) // (16 * ROW_THREADS)),)
        kernel = row_kernel("rotary_embedding", qkv.dtype)
        jit.launch(kernel, qkv.device, grid, ROW_THREADS, args, overlap=early)
    return q, k
