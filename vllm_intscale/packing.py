"""Integer codes packed into int32 words, the way compressed-tensors' `pack-quantized` does it.

A word holds `32 / bits` codes along K, lowest bits first, each stored as `code + 2**(bits-1)`:

    bits = 4   word = (c0 + 8) | (c1 + 8) << 4 | ... | (c7 + 8) << 28
    bits = 8   word = (c0 + 128) | (c1 + 128) << 8 | ... | (c3 + 128) << 24
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack signed codes `[..., K]` (any integer dtype, -2**(bits-1) .. 2**(bits-1)-1).

    Returns int32 `[..., K * bits / 32]`. K must be a multiple of `32 / bits`.
    """
    per_word = 32 // bits
    unsigned = (codes.to(torch.int32) + (1 << (bits - 1))).unflatten(-1, (-1, per_word))
    words: Tensor = unsigned[..., 0].clone()
    for i in range(1, per_word):
        words |= unsigned[..., i] << (bits * i)
    return words


def unpack_codes(words: Tensor, bits: int) -> Tensor:
    """Inverse of `pack_codes`: int32 `[..., W]` to signed int8 codes `[..., W * 32 / bits]`."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    unsigned = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return (unsigned - (1 << (bits - 1))).to(torch.int8).flatten(-2)
