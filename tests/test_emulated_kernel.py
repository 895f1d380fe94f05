"""The Hopper kernel's source against `reference`, bit for bit, without a GPU: see `emulator`.

Over shapes that end inside of tiles, of clusters and of 128 k. `test_kernels` and
`test_expert_kernels` are the same on a GPU, and what counts.
"""

from __future__ import annotations

import itertools
from typing import Any

import emulator
import pytest
import torch
from generators import activation, assert_same_bits
from gpu_layers import arithmetic, prepared, weight_for

from vllm_intscale import reference
from vllm_intscale.reference import Weight
from vllm_intscale.sm90_tiles import FORMS, INT8, STREAMED, Tile, grouped_tiles, tiles

pytestmark = pytest.mark.skipif(emulator.COMPILER is None, reason="needs g++")
SPLITS = (1, 2, 3, 8, STREAMED)
# One of a kind; `-m slow` runs the others. Compiling takes two seconds each.
USUAL_DENSE = {
    *(("fold", n) for n in ("8x64", "16x128", "128x64", "256x256")),
    (INT8, "128x128"),
}
USUAL_GROUPED = {
    *(("fold", "8x128"), ("fold", "256x256"), ("accumulate", "16x128")),
}


def variants(listed: Any, usual: set[tuple[str, str]]) -> list[Any]:
    """Forms, group sizes, tiles and output types."""
    found = []
    for form, group_size in itertools.product((*FORMS, INT8), (128, 64, 32)):
        for tile in listed(form) if form != INT8 or group_size == 128 else ():
            name = f"{tile.m}x{tile.n}"
            for dtype in (torch.bfloat16, torch.float16, torch.int32):
                often = (form, name) in usual and group_size == 128 and dtype is torch.bfloat16
                if group_size < 128 and dtype is torch.float16:
                    continue
                values = (form, group_size, tile, dtype)
                label = f"{form}-{group_size}-{name}-{str(dtype)[6:]}"
                marks = () if often else (pytest.mark.slow,)
                found.append(pytest.param(*values, id=label, marks=marks))
    return found


def outputs(
    a8: torch.Tensor,
    token_scale: torch.Tensor,
    exact: Weight,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    acc = reference.accumulate(a8, exact.codes, exact.group_scale)
    if dtype is torch.int32:
        return acc
    return reference.scale_output(acc, token_scale, exact.channel_scale, bias, dtype)


@pytest.mark.parametrize(("form", "group_size", "tile", "dtype"), variants(tiles, USUAL_DENSE))
def test_gemm(form: str, group_size: int, tile: Tile, dtype: torch.dtype) -> None:
    """One token and one channel; a tile and a bit; k of one block, and odd."""
    for n, k, m in ((1, 96, 3), (64, 128, 1), (192, 384, 13), (328, 1408, tile.m + 5)):
        if k % group_size:
            continue
        w = weight_for(form, n, k, group_size)
        a8, token_scale = activation(m, k)
        bias = None if dtype is torch.int32 else torch.randn(n).to(dtype)
        expected = outputs(a8, token_scale, arithmetic(w, form), bias, dtype)
        weight = prepared(w, form)
        for splits, multiprocessors in itertools.product(SPLITS, (2, 3)):
            if splits not in tile.splits(k, group_size, form):
                continue
            y = emulator.gemm(
                *(a8, token_scale, weight, bias, dtype, tile, splits, multiprocessors), seed=k
            )
            assert_same_bits(y, expected, f"N={n} K={k} M={m} splits {splits}")


def check_experts(
    form: str, group_size: int, tile: Tile, dtype: torch.dtype, n: int, k: int, rows: list[int]
) -> None:
    """As many rows of each expert, with splits of k and sizes of a GPU."""
    experts = [weight_for(form, n, k, group_size, seed=seed) for seed in range(len(rows))]
    parts = zip(*(prepared(w, form) for w in experts), strict=True)
    stack = tuple(torch.stack(tensors) for tensors in parts)
    placed = emulator.group_rows(rows, tile.m)
    a8, token_scale = activation(placed.total, k)
    for splits, multiprocessors in itertools.product((1, 2, STREAMED), (2, 5)):
        if splits not in tile.splits(k, group_size, form):
            continue
        y = emulator.gemm(
            *(a8, token_scale, stack, None, dtype, tile, splits, multiprocessors, placed), seed=k
        )
        for w, first, count in zip(experts, placed.first, rows, strict=True):
            own = slice(first, first + count)
            expected = outputs(a8[own], token_scale[own], arithmetic(w, form), None, dtype)
            assert_same_bits(y[own], expected, f"N={n} K={k} {rows} splits {splits}")


@pytest.mark.parametrize(
    ("form", "group_size", "tile", "dtype"), variants(grouped_tiles, USUAL_GROUPED)
)
def test_gemm_of_experts(form: str, group_size: int, tile: Tile, dtype: torch.dtype) -> None:
    """Experts without rows, with as many as a tile's widths and one more, and with two tiles."""
    widths = tile.widths(form)
    for n, k, rows in (
        (192, 384, [3, 0, widths[0], tile.m - 1]),
        (64, 128, [0, 0, 9, 0]),
        (64, 128, [0, 0, 0]),
        (328, 640, [tile.m, 1, 5, tile.m + 1]),
        (128, 256, [*widths[1:-1], *(width + 1 for width in widths[:-1]), 5]),
    ):
        check_experts(form, group_size, tile, dtype, n, k, rows)


@pytest.mark.parametrize(
    ("right", "wrong", "finding"),
    [
        ("(SHARE == 1 && i == 0) || i < copies", "true", "outside of global memory"),
        (
            "release(at.previous + kEmpty);\n    if",
            "release(at.barriers + kEmpty);\n    if",
            "elements differ",
        ),
        ("wgmma_wait<FOLD || more ? 1 : 0>();", "wgmma_wait<2>();", "elements differ"),
        ("rows > width", "rows > width + 1", "elements differ"),
        ("kReady, ring.parity);\n#if BITS", "kFull, ring.parity);\n#if BITS", "elements differ"),
    ],
    ids=[
        *("copies too much", "frees a stage too early", "waits too little", "leaves out a row"),
        "does not wait for tables and tokens",
    ],
)
def test_defects_are_found(
    right: str, wrong: str, finding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulator.put_in_defect(monkeypatch, "sm90_w4a8_gemm.cu", right, wrong)
    tile = grouped_tiles("fold")[-1]
    assert tile.share == 2 and tile.narrower
    with pytest.raises(AssertionError, match=finding):
        check_experts("fold", 128, tile, torch.bfloat16, 64, 1408, [tile.narrower[0] + 1])


def test_defect_of_few_tokens_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multipliers that wait for weights, but not for tables and tokens."""
    right, wrong = "v.barriers + kReady, ring", "v.barriers + kFull, ring"
    emulator.put_in_defect(monkeypatch, "sm90_w4a8_gemm.cu", right, wrong)
    tile = grouped_tiles("fold")[0]
    assert tile.m == 8
    with pytest.raises(AssertionError, match="elements differ"):
        check_experts("fold", 128, tile, torch.bfloat16, 64, 1408, [7])
