"""The contract: config, packing, overflow bound and names."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from vllm_intscale.errors import IntScaleError
from vllm_intscale.format import (
    ACCUMULATOR_MAX,
    INT16_MAX,
    CheckpointConfig,
    LayerScheme,
    accumulator_bound,
    check_agreement,
    largest_group_size,
    matches,
    validate_layer,
)
from vllm_intscale.packing import pack_codes, unpack_codes
from vllm_intscale.reference import accumulate

FULL = CheckpointConfig(
    bits=8,
    group_size=64,
    amplifier=1024,
    max_group_scale=100,
    ignore=("lm_head", r"re:.*\.gate"),
    overrides={"a.b": {"bits": 4}, r"re:a\..*": {"group_size": 32, "max_group_scale": 7}},
    source={"model": "someone/something", "nested": {"free": [1, "form"]}},
)


@pytest.mark.parametrize("config", [CheckpointConfig(), FULL])
def test_config_survives_json(config: CheckpointConfig) -> None:
    assert CheckpointConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "changes",
    [
        {"quant_method": "gptq"},
        {"format_version": 2},
        {"format_version": "1"},
        {"symmetric": False},
        {"activation": {"bits": 8, "granularity": "tensor", "dynamic": True}},
        {"input_transform": {}},
        {"unknown": 1},
        {"bits": 3},
        {"bits": "4"},
        {"group_size": 256},
        {"group_size": None},
        {"max_group_scale": 0},
        {"max_group_scale": 32768},
        {"amplifier": "tensor"},
        {"amplifier": 0},
        {"amplifier": 1.5},
        {"amplifier": 2**24 + 1},
        {"ignore": ["re:("]},
        {"overrides": {"a": {"bits": 5}}},
        {"overrides": {"a": {"amplifier": 4}}},
        {"overrides": {"re:[": {}}},
    ],
)
def test_config_refuses(changes: dict[str, object]) -> None:
    with pytest.raises(IntScaleError, match="^quantization_config: .+$"):
        CheckpointConfig.from_dict(FULL.to_dict() | changes)


def test_input_transform_may_be_null() -> None:
    assert CheckpointConfig.from_dict(FULL.to_dict() | {"input_transform": None}) == FULL


def test_scheme_of_a_layer() -> None:
    # A number as amplifier aims at no max_group_scale: only int16 limits it.
    assert FULL.scheme_of("x") == LayerScheme(8, 64, INT16_MAX)
    assert FULL.scheme_of("a.b") == LayerScheme(4, 64, INT16_MAX)  # the first match counts
    assert FULL.scheme_of("a.c") == LayerScheme(8, 32, INT16_MAX)
    assert FULL.scheme_of("lm_head") is None
    assert FULL.scheme_of("x.mlp.gate") is None
    assert CheckpointConfig(max_group_scale=9).scheme_of("x") == LayerScheme(4, 128, 9)


def test_patterns_match_whole_names() -> None:
    assert matches("a.b", "a.b")
    assert not matches("a.b", "a.b.c") and not matches("a.b", "axb")
    assert matches("re:.*b", "a.b")
    assert not matches("re:b", "a.b")


@pytest.mark.parametrize(
    ("k", "group_size", "expected"),
    [
        (4096, 128, 128),
        (4096, 32, 32),
        (192, 128, 64),
        (352, 128, 32),
        (352, 64, 32),
        (128, 64, 64),
        (100, 128, None),
        (16, 128, None),
    ],
)
def test_largest_group_size(k: int, group_size: int, expected: int | None) -> None:
    assert largest_group_size(k, group_size) == expected


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_is_what_the_format_says(bits: int) -> None:
    half, per_word = 1 << (bits - 1), 32 // bits
    codes = torch.randint(-half, half, (3, 5, 16 * per_word), dtype=torch.int8)
    codes[0, 0, : 2 * half if bits == 4 else 64] = torch.arange(-half, half)[:64].to(torch.int8)
    words = pack_codes(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (3, 5, 16)
    stored = (codes.numpy().astype(np.int64) + half).reshape(3, 5, 16, per_word)
    expected = sum(stored[..., i] << (bits * i) for i in range(per_word))
    assert np.array_equal(words.numpy().view(np.uint32), expected)
    assert torch.equal(unpack_codes(words, bits), codes)


def test_bound_is_reached_and_never_exceeded() -> None:
    codes = torch.randint(-8, 8, (7, 256), dtype=torch.int8)
    codes[0] = -8
    group_scale = torch.randint(-255, 256, (7, 4), dtype=torch.int16)
    bound = accumulator_bound(codes, group_scale)
    assert bound.dtype == torch.int64
    weight = codes.long() * group_scale.long().repeat_interleave(64, 1)
    worst = (127 * weight.sign()).to(torch.int8)  # the activations that reach each bound
    assert torch.equal(accumulate(worst, codes, group_scale).diagonal().long(), bound)
    assert torch.equal(bound, 127 * weight.abs().sum(1))
    for activations in (worst, torch.randint(-127, 128, (50, 256), dtype=torch.int8)):
        assert bool((accumulate(activations, codes, group_scale).long().abs() <= bound).all())


@pytest.mark.parametrize("bits", [4, 8])
def test_bound_of_extreme_values_does_not_wrap(bits: int) -> None:
    codes = torch.full((1, 1 << 15), -(1 << (bits - 1)), dtype=torch.int8)
    group_scale = torch.full((1, 1 << 8), -INT16_MAX, dtype=torch.int16)
    expected = 127 * INT16_MAX * (1 << (bits - 1)) << 15
    assert accumulator_bound(codes, group_scale).item() == expected


@pytest.mark.parametrize("excess", [0, 1])
def test_the_limit_itself_is_allowed(excess: int) -> None:
    codes = torch.zeros(1, 512, dtype=torch.int8)
    group_scale = torch.tensor([[INT16_MAX, 2, 1, 0]], dtype=torch.int16)
    codes[0, :128] = 4  # 512
    codes[0, :4] = 5  # + 4
    codes[0, 128:256] = 6  # 768
    codes[0, 128:134] = 7  # + 6
    codes[0, 256] = -excess
    # 32767 * 516 + 2 * 774 is the largest whole number whose 127-fold fits.
    bound = int(accumulator_bound(codes, group_scale))
    assert bound == (ACCUMULATOR_MAX // 127 + excess) * 127
    tensors = {
        "qweight": pack_codes(codes, 4),
        "group_scale": group_scale,
        "channel_scale": torch.ones(1),
    }
    scheme = LayerScheme(max_group_scale=INT16_MAX)
    if excess:
        with pytest.raises(IntScaleError, match=str(bound)):
            validate_layer("w", tensors, scheme, 512)
    else:
        validate_layer("w", tensors, scheme, 512)


def test_meta_tensors_are_checked_for_shape_and_dtype() -> None:
    scheme = LayerScheme()
    specs = scheme.tensor_specs(16, 256)
    tensors = {n: torch.empty(s, dtype=d, device="meta") for n, (d, s) in specs.items()}
    validate_layer("w", tensors, scheme, 256)
    stacks = {n: torch.empty(3, *s, dtype=d, device="meta") for n, (d, s) in specs.items()}
    validate_layer("w", stacks, scheme, 256)
    tensors["qweight"] = tensors["qweight"].float()
    with pytest.raises(IntScaleError, match=r"^w\.qweight is torch.float32 \[16, 32\]"):
        validate_layer("w", tensors, scheme, 256)


def test_parts_of_a_fused_layer_must_agree() -> None:
    assert check_agreement("qkv", [LayerScheme(), LayerScheme()]) == LayerScheme()
    assert check_agreement("qkv", [None, None]) is None
    with pytest.raises(IntScaleError, match="qkv"):
        check_agreement("qkv", [LayerScheme(), None])
