"""What benchmarks compute with: weights of peers, tiles to time, random checkpoints."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from vllm_intscale import sm90_tiles
from vllm_intscale.bench import (
    gemm,
    peers,
    random_checkpoint,
    random_formats,
    tiles,
)
from vllm_intscale.checkpoint import validate_checkpoint
from vllm_intscale.errors import IntScaleError
from vllm_intscale.format import ACCUMULATOR_MAX, TENSOR_NAMES, accumulator_bound
from vllm_intscale.packing import unpack_codes

# ---- weights of peers ---------------------------------------------------------------------------


def test_int4_weights_of_vllm_are_the_weight() -> None:
    """Packed along K, lowest bits first, groups of 128: what the kernels' repacking takes."""
    pytest.importorskip("vllm")
    from vllm.scalar_type import scalar_types

    weight = (torch.randn(32, 512) * 0.02).to(torch.bfloat16)
    for code_type, offset in ((scalar_types.uint4b8, 8), (scalar_types.int4, 0)):
        packed, scale = peers.int4_weight(weight, code_type)
        assert packed.shape == (64, 32) and packed.t().is_contiguous()
        codes = torch.stack([(packed >> (4 * i)) & 15 for i in range(8)], 1).flatten(0, 1) - offset
        codes = torch.where(codes > 7, codes - 16, codes)
        restored = codes * scale.float().repeat_interleave(128, 0)
        assert scale.dtype == torch.bfloat16
        assert peers.probe_error(restored.t(), weight) < 0.13


def test_our_weight_is_below_the_limit_of_the_probe() -> None:
    from vllm_intscale import reference
    from vllm_intscale.format import LayerScheme
    from vllm_intscale.packing import unpack_codes
    from vllm_intscale.quantize.rtn import quantize_rows

    weight, x = (torch.randn(rows, 1024).to(torch.bfloat16) for rows in (64, 16))
    rows = quantize_rows("test", weight, LayerScheme(), "channel")
    codes = unpack_codes(rows.qweight, 4)
    y = reference.linear(x, reference.Weight(codes, rows.group_scale, rows.channel_scale))
    assert peers.probe_error(y, x @ weight.t()) < peers.PEERS["intscale"].limit


def test_tiles_to_time_hold_the_one_that_would_be_chosen() -> None:
    for form, (n, k), m in itertools.product(sm90_tiles.FORMS, gemm.SHAPES.values(), gemm.TOKENS):
        tile, splits = sm90_tiles.choose(m, n, k, 128, form, 132)
        assert (sm90_tiles.TILES.index(tile), splits) in tiles.variants(m, n, k, form)


# ---- random checkpoints -------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(random_checkpoint.MODELS))
def test_random_checkpoint(name: str, tmp_path: Path) -> None:
    """A smaller one of each kind is valid, and what it dequantizes to is of the usual size."""
    small = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
    out = tmp_path / name
    random_checkpoint.write_random({**random_checkpoint.MODELS[name], **small}, out)
    validate_checkpoint(out)
    with safe_open(out / "model-00001.safetensors", "pt") as file:
        q, s, c = (file.get_tensor(f"model.layers.1.self_attn.k_proj.{n}") for n in TENSOR_NAMES)
    w = unpack_codes(q, 4) * s.repeat_interleave(128, dim=1) * c[:, None]
    assert w.shape == (128, 256) and w.std() == pytest.approx(0.02, rel=0.2)
    with safe_open(out / "model-00001.safetensors", "pt") as file:
        biases = {key for key in file.keys() if key.endswith(".bias")}  # noqa: SIM118
    parts = "qkv" if name.startswith("qwen2") else ""
    assert biases == {f"model.layers.1.self_attn.{part}_proj.bias" for part in parts}
    with pytest.raises(IntScaleError, match="exists"):
        random_checkpoint.write_random(small, out)


@pytest.mark.parametrize("name", list(random_checkpoint.MODELS))
def test_random_layers_of_real_width_cannot_overflow(name: str) -> None:
    """A projection down of the 70B is 28672 wide: scales of 255 would be too large there."""
    k = random_checkpoint.MODELS[name]["intermediate_size"]
    layer = random_formats.FORMATS["intscale"].linear("down", 256, k)
    w, s = layer["down.qweight"].cpu(), layer["down.group_scale"].cpu()
    assert accumulator_bound(unpack_codes(w, 4), s).max() <= ACCUMULATOR_MAX
    assert s.min() >= 32 and len(s.unique()) > 32
