"""Where quantized activations lie on the GPU: the layout that `common.cuh` describes."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_intscale.errors import IntScaleError

FLAG_BYTES = 4096  # kFlagBytes of common.cuh


def new_activation(like: Tensor, rows: int, k: int) -> Tensor:
    """Uninitialized int8 activations of `rows` x `k` in the kernels' layout, flags behind them."""
    blocks, padded = -(-k // 128), -(-rows // 8) * 8
    buffer = like.new_empty(blocks * padded * 128 + FLAG_BYTES, dtype=torch.int8)
    return buffer.as_strided((blocks, padded, 128), (padded * 128, 128, 1))


def check_flags(a8: Tensor) -> None:
    """Refuse activations without the flags that `quantize_activation` leaves behind them."""
    if a8.untyped_storage().nbytes() < a8.storage_offset() + a8.numel() + FLAG_BYTES:
        raise IntScaleError(
            f"quantized activations {list(a8.shape)} are a copy without the {FLAG_BYTES} bytes of "
            "flags behind them; pass on what torch.ops.intscale.quantize_activation returned"
        )


def swizzle(a8: Tensor) -> Tensor:
    """int8 `[rows, K]` to the layout of `new_activation`, its padding zero."""
    rows, k = a8.shape
    a8 = torch.nn.functional.pad(a8, (0, -k % 128, 0, -rows % 8))
    chunks = a8.view(a8.shape[0], a8.shape[1] // 128, 8, 16)
    row = torch.arange(chunks.shape[0], device=a8.device) % 8
    order = torch.arange(8, device=a8.device) ^ row[:, None]
    chunks = chunks.gather(2, order[:, None, :, None].expand(chunks.shape))
    blocks = chunks.transpose(0, 1).flatten(2)
    flags = a8.new_zeros(FLAG_BYTES)
    return torch.cat((blocks.flatten(), flags))[: blocks.numel()].view(blocks.shape)


def unswizzle(a8: Tensor, rows: int, k: int) -> Tensor:
    """The inverse: int8 `[rows, K]`."""
    flat = a8.transpose(0, 1).flatten(1)  # swapping chunks by XOR is its own inverse
    return swizzle(flat).transpose(0, 1).flatten(1)[:rows, :k]
