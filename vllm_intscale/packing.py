"""Integer codes packed into int32 words, the way compressed-tensors' `pack-quantized` does it.

A word holds `32 / bits` codes along K, lowest bits first, each stored as `code + 2**(bits-1)`:

    bits = 4   word = (c0 + 8) | (c1 + 8) << 4 | ... | (c7 + 8) << 28
    bits = 8   word = (c0 + 128) | (c1 + 128) << 8 | ... | (c3 + 128) << 24

Words are handled as their bytes: every platform that torch supports is little-endian.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack signed codes `[..., K]` (any integer dtype, -2**(bits-1) .. 2**(bits-1)-1).

    Returns int32 `[..., K * bits / 32]`. K must be a multiple of `32 / bits`.
    """
    unsigned = codes.to(torch.int8).contiguous().view(torch.uint8) + (1 << (bits - 1))
    if bits == 4:
        pairs = unsigned.view(torch.int16)
        unsigned = (pairs | (pairs >> 4)).to(torch.uint8)  # modulo 256
    return unsigned.view(torch.int32)


def unpack_codes(words: Tensor, bits: int) -> Tensor:
    """Inverse of `pack_codes`: int32 `[..., W]` to signed int8 codes `[..., W * 32 / bits]`."""
    return (unpack_unsigned(words, bits) - (1 << (bits - 1))).view(torch.int8)


def unpack_unsigned(words: Tensor, bits: int) -> Tensor:
    """What is stored, `code + 2**(bits-1)`: uint8 `[..., W * 32 / bits]`, maybe a view."""
    stored = words.contiguous().view(torch.uint8)
    if bits == 8:
        return stored
    pairs = stored.to(torch.int16)  # each becomes two bytes, which vectorizes
    return ((pairs | (pairs << 4)) & 0x0F0F).view(torch.uint8)
