"""Every instruction set is bit-equal to the scalar reference, and the reference to numpy int64."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from oracle import Conv, accumulate, fma32, requantize

from adalayer_native import _C, ops

FAST_ISAS = [name for name in ops.isas() if name != "scalar"]
# Layers compared with the scalar reference, per instruction set: all of them, and those of random
# shape. conftest.py prints the counts at the end of the run and fails it where one is zero.
CASES: Counter[str] = Counter()
RANDOM_CASES: Counter[str] = Counter()


@pytest.fixture(autouse=True)
def _restore():
    yield
    ops.force_isa("auto")
    ops.set_num_threads(None)


def weights(rng: np.random.Generator, conv: Conv, bits: int, fill: str = "random") -> np.ndarray:
    lo, hi = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    shape = (conv.o, conv.c // conv.groups, conv.kh, conv.kw)
    if fill == "low":
        return np.full(shape, lo, np.int8)
    if fill == "high":
        return np.full(shape, hi, np.int8)
    return rng.integers(lo, hi, shape, dtype=np.int8, endpoint=True)


def run_u8(conv, q, packed, scale, bias, z_in, z_out, lo=0, hi=255):
    return ops.conv2d_u8(
        q,
        packed,
        scale,
        bias,
        z_in,
        z_out,
        (conv.kh, conv.kw),
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        lo,
        hi,
    )


def run_f32(conv, x, packed, scale, bias, s_in, z_in, bits=8, lo=None, hi=None):
    return ops.conv2d(
        x,
        packed,
        scale,
        bias,
        s_in,
        z_in,
        bits,
        (conv.kh, conv.kw),
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        lo,
        hi,
    )


def check_all_isas(conv: Conv, bits: int, seed: int, *, fill="random", levels="random", threads=2):
    """u8 and float outputs, both memory formats, on every instruction set against the reference."""
    rng = np.random.default_rng(seed)
    z_in, z_out = (int(v) for v in rng.integers(0, 256, 2))
    w = weights(rng, conv, bits, fill)
    shape = (conv.n, conv.c, conv.h, conv.w)
    q = rng.integers(0, 256, shape, dtype=np.uint8)
    if levels != "random":
        q[:] = 0 if levels == "low" else 255
        z_in = 255 if levels == "low" else 0
    packed = ops.pack_weight(torch.from_numpy(w), bits)
    k = w[0].size
    scale = torch.from_numpy(
        (rng.uniform(0.2, 2, conv.o) * rng.choice([-1, 1], conv.o) / (2**bits * np.sqrt(k))).astype(
            np.float32
        )
    )
    bias = torch.from_numpy(rng.normal(0, 20, conv.o).astype(np.float32))
    x = torch.from_numpy((q.astype(np.float32) - z_in) * np.float32(0.0371))
    levels_t = torch.from_numpy(q)
    ops.set_num_threads(1)
    ops.force_isa("scalar")
    want_u8 = run_u8(conv, levels_t, packed, scale, bias, z_in, z_out, 3, 250)
    want_f32 = run_f32(conv, x, packed, scale, bias, 0.0371, z_in, lo=-40.0, hi=30.0)
    for isa in FAST_ISAS:
        ops.force_isa(isa)
        ops.set_num_threads(threads)
        for layout in (torch.contiguous_format, torch.channels_last):
            got_u8 = run_u8(
                conv,
                levels_t.contiguous(memory_format=layout),
                packed,
                scale,
                bias,
                z_in,
                z_out,
                3,
                250,
            )
            got_f32 = run_f32(
                conv,
                x.contiguous(memory_format=layout),
                packed,
                scale,
                bias,
                0.0371,
                z_in,
                lo=-40.0,
                hi=30.0,
            )
            where = f"{isa}, {layout}, {conv}, bits {bits}, seed {seed}"
            assert torch.equal(got_u8, want_u8), where
            assert torch.equal(got_f32, want_f32), where
        CASES[isa] += 1
    return q, w, z_in, scale, bias, want_u8, z_out


def test_reference_equals_numpy_int64():
    cases = [
        Conv(),
        Conv(n=2, c=6, h=7, w=4, o=9, padding=(1, 2, 0, 1), stride=(2, 1), groups=3),
        Conv(c=5, h=9, w=9, o=5, groups=5, dilation=(2, 3), padding=(2, 3, 2, 3)),
        Conv(c=70, h=1, w=1, o=3, kh=1, kw=1),
    ]
    for seed, conv in enumerate(cases):
        for bits in (2, 5, 8):
            q, w, z_in, scale, bias, got, z_out = check_all_isas(conv, bits, seed)
            acc = accumulate(conv, q, w, z_in)
            want = requantize(acc, scale.numpy(), bias.numpy(), 3, 250, z_out)
            assert np.array_equal(got.numpy(), want)


def test_float_output_is_one_fused_multiply_add():
    conv = Conv(c=7, o=6)
    rng = np.random.default_rng(5)
    w = weights(rng, conv, 8)
    q = rng.integers(0, 256, (1, 7, 5, 5), dtype=np.uint8)
    s_in, z = np.float32(0.0123), 77
    scale = rng.normal(0, 0.02, 6).astype(np.float32)
    bias = rng.normal(0, 1, 6).astype(np.float32)
    acc = accumulate(conv, q, w, z)
    packed = ops.pack_weight(torch.from_numpy(w), 8)
    x = torch.from_numpy((q.astype(np.float32) - z) * s_in)
    for isa in ops.isas():
        ops.force_isa(isa)
        got = run_f32(
            conv, x, packed, torch.from_numpy(scale), torch.from_numpy(bias), float(s_in), z
        ).numpy()
        for index, value in np.ndenumerate(acc):
            c = index[1]
            assert got[index] == fma32(np.float32(value), np.float32(s_in * scale[c]), bias[c]), isa


TILE_SHAPES = [
    # Channels around the 4/8/16/32/64 pixel pitches, outputs around the 16 and 32 wide tiles,
    # maps around 16 and 32 positions.
    *[Conv(c=c, o=17, h=6, w=6, padding=(1, 1, 1, 1)) for c in (1, 4, 5, 8, 9, 16, 17, 32, 33)],
    *[Conv(c=c, o=33, h=4, w=4, padding=(1, 1, 1, 1)) for c in (63, 64, 65, 128, 129)],
    *[Conv(c=64, o=o, h=3, w=5, kh=1, kw=1) for o in (1, 15, 16, 17, 31, 32, 33, 47, 64, 65)],
    *[Conv(c=20, o=20, h=1, w=w, kh=1, kw=1) for w in (1, 15, 16, 17, 31, 32, 33, 63, 65)],
    *[
        Conv(n=n, c=3, o=8, h=9, w=9, kh=7, kw=7, stride=(2, 2), padding=(3, 3, 3, 3))
        for n in (1, 2, 5)
    ],
    Conv(n=3, c=64, o=64, h=7, w=7, padding=(1, 1, 1, 1)),
    # Images of one pixel, as squeeze-and-excitation has them: both layouts are the same bytes.
    *[Conv(n=n, c=20, o=33, h=1, w=1, kh=1, kw=1) for n in (2, 5, 37)],
    Conv(n=3, c=12, o=8, h=1, w=1, kh=1, kw=1, groups=4),
    *[
        Conv(n=3, c=17, o=o, h=1, w=1, padding=(1, 1, 1, 1), groups=g)
        for o, g in ((9, 1), (17, 17))
    ],
    Conv(c=16, o=16, h=8, w=8, stride=(2, 2), padding=(1, 1, 1, 1)),
    Conv(c=16, o=16, h=8, w=8, stride=(2, 2), padding=(0, 0, 1, 1)),
    Conv(c=64, o=32, h=9, w=8, stride=(3, 2), padding=(2, 1, 0, 3), dilation=(2, 1)),
    Conv(c=12, o=24, h=8, w=8, groups=4, padding=(1, 1, 1, 1)),
    Conv(c=12, o=6, h=8, w=8, groups=2, dilation=(1, 2), padding=(2, 2, 2, 2)),
    Conv(c=2, o=2, h=4, w=4, kh=1, kw=7, padding=(0, 3, 0, 3)),
    Conv(c=2, o=2, h=4, w=4, kh=7, kw=1, padding=(3, 0, 3, 0)),
    Conv(c=1, o=1, h=2, w=2, kh=1, kw=1, stride=(5, 7)),
    Conv(c=3, o=2, h=2, w=2, kh=3, kw=3, padding=(5, 6, 7, 8), stride=(2, 3)),
    Conv(c=3, o=2, h=1, w=40, kh=1, kw=20),
    *[
        Conv(n=2, c=c, o=c, h=7, w=9, groups=c, padding=(1, 1, 1, 1), stride=s)
        for c in (2, 15, 16, 17, 31, 32, 33)
        for s in ((1, 1), (2, 2))
    ],
    Conv(c=24, o=24, h=9, w=9, kh=5, kw=5, groups=24, padding=(4, 4, 4, 4), dilation=(2, 2)),
    Conv(c=8, o=16, h=5, w=5, groups=8, padding=(1, 1, 1, 1)),  # depth multiplier 2
]


@pytest.mark.parametrize("conv", TILE_SHAPES, ids=str)
def test_tile_edges(conv):
    for bits in (2, 3, 4, 5, 6, 7, 8):
        check_all_isas(conv, bits, seed=bits)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("fill", ["low", "high"])
@pytest.mark.parametrize("levels", ["low", "high"])
def test_all_extreme_values(bits, fill, levels):
    for conv in (
        Conv(c=64, o=32, h=6, w=6, padding=(1, 1, 1, 1)),
        Conv(c=16, o=16, h=6, w=6, groups=16, padding=(1, 1, 1, 1)),
    ):
        check_all_isas(conv, bits, seed=bits, fill=fill, levels=levels)


def test_zero_sizes():
    for isa in ops.isas():
        ops.force_isa(isa)
        packed = ops.pack_weight(torch.ones(4, 3, 3, 3, dtype=torch.int8), 4)
        one, zero = torch.ones(4), torch.zeros(4)
        out = run_f32(Conv(), torch.empty(0, 3, 5, 5), packed, one, zero, 0.1, 3)
        assert out.shape == (0, 4, 3, 3)
        conv = Conv(padding=(2, 2, 2, 2))
        # An empty map that padding makes large enough: the result is the bias alone.
        out = run_f32(conv, torch.empty(1, 3, 0, 4), packed, one, zero + 2, 0.1, 3)
        assert out.shape == (1, 4, 2, 6) and bool((out == 2).all())


@st.composite
def conv_cases(draw) -> Conv:
    def size(low, high):
        return st.integers(low, high)

    groups = draw(st.sampled_from([1, 1, 1, 2, 3, 5]))
    per_group = draw(st.sampled_from([1, 2, 3, 7, 16, 21, 40, 64, 70]))
    depthwise = draw(st.booleans()) and groups > 1
    channels = groups if depthwise else groups * per_group
    conv = Conv(
        n=draw(size(1, 3)),
        c=channels,
        h=draw(size(1, 12)),
        w=draw(size(1, 12)),
        o=channels if depthwise else groups * draw(size(1, 40)),
        kh=draw(size(1, 5)),
        kw=draw(size(1, 5)),
        stride=(draw(size(1, 3)), draw(size(1, 3))),
        padding=tuple(draw(size(0, 4)) for _ in range(4)),
        dilation=(draw(size(1, 3)), draw(size(1, 3))),
        groups=groups,
    )
    assume(conv.valid)
    return conv


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(
    conv=conv_cases(), bits=st.integers(2, 8), seed=st.integers(0, 2**31), threads=st.integers(1, 4)
)
def test_random_shapes(conv, bits, seed, threads):
    check_all_isas(conv, bits, seed, threads=threads)
    RANDOM_CASES.update(FAST_ISAS)


@pytest.mark.parametrize("bits", range(2, 9))
def test_linear_rows_and_extremes(bits):
    """1 to 33 rows: few take the matrix-vector product, more the matrix product and its tails."""
    fills = [("random", "random"), ("low", "high"), ("high", "high"), ("low", "low")]
    for rows in (1, 2, 3, 4, 5, 12, 13, 25, 31, 32, 33):
        fill, levels = fills[rows % 4]
        conv = Conv(n=rows, c=200, h=1, w=1, o=70, kh=1, kw=1)
        check_all_isas(conv, bits, seed=rows, fill=fill, levels=levels)
    for fill, levels in fills:
        for conv in (
            Conv(c=1100, h=1, w=1, o=530, kh=1, kw=1),
            Conv(n=2, c=24, h=3, w=2, o=34, groups=2, kh=2, kw=2),  # two positions, two groups
        ):
            check_all_isas(conv, bits, seed=bits, fill=fill, levels=levels, threads=3)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 70),
    features=st.integers(1, 300),
    outs=st.integers(1, 100),
    bits=st.integers(2, 8),
    seed=st.integers(0, 2**31),
)
def test_random_linear(rows, features, outs, bits, seed):
    rng = np.random.default_rng(seed)
    w = torch.from_numpy(weights(rng, Conv(c=features, o=outs, kh=1, kw=1), bits)[:, :, 0, 0])
    packed = ops.pack_weight(w, bits)
    x = torch.from_numpy(rng.normal(0, 2, (rows, features)).astype(np.float32))
    scale, bias = torch.rand(outs), torch.randn(outs)
    results = []
    for isa in ops.isas():
        ops.force_isa(isa)
        results.append(ops.linear(x, packed, scale, bias, 0.02, 100, 8))
    assert all(torch.equal(results[0], r) for r in results[1:])
    CASES.update(FAST_ISAS)
    RANDOM_CASES.update(FAST_ISAS)


@pytest.mark.parametrize("isa", ops.isas())
def test_quantize_clamps_rounds_to_even_and_sends_nan_to_the_lowest_level(isa):
    ops.force_isa(isa)
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, 1e30, -1e30, float("inf"), float("-inf"), float("nan")])
    x = x.repeat(5)[:41]
    got = ops.quantize(x, 1.0, 10, 4)
    want = torch.tensor([10, 12, 12, 10, 15, 0, 15, 0, 0], dtype=torch.uint8).repeat(5)[:41]
    assert torch.equal(got, want)
    again = ops.fake_quantize(x, 1.0, 10, 4)
    assert torch.equal(again, want.float() - 10)


@pytest.mark.parametrize(
    "isa",
    ["scalar", "avx2", "avxvnni", "avx512", "avx512vnni", "amx", "neon", "dotprod", "i8mm"],
)
def test_force_isa_by_environment(isa):
    # The extension alone: the package imports torch, which takes seconds.
    code = "import sys; sys.path.append(sys.argv[1]); import _C; print(_C.active_isa())"
    if isa == "scalar":
        code = "from adalayer_native import ops; print(ops.active_isa())"
    env = {**os.environ, "ADALAYER_FORCE_ISA": isa}
    done = subprocess.run(
        [sys.executable, "-c", code, Path(_C.__file__).parent],
        env=env, capture_output=True, text=True,
    )  # fmt: skip
    if isa in ops.isas():
        assert done.returncode == 0 and done.stdout.split()[-1] == isa, done.stderr
    else:
        assert done.returncode != 0 and isa in done.stderr


def test_unknown_isa_is_an_error():
    with pytest.raises(ValueError, match="avx9"):
        ops.force_isa("avx9")
