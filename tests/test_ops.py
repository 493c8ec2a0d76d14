"""Operators: schema, fake kernels, opcheck, argument errors, packing, threads."""

from __future__ import annotations

import multiprocessing
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adalayer_native import _C, ops
from adalayer_native.errors import FileFormatError


@pytest.fixture
def layer():
    torch.manual_seed(0)
    w = torch.randint(-8, 8, (6, 5, 3, 3), dtype=torch.int8)
    return ops.pack_weight(w, 4), torch.rand(6) * 0.01, torch.randn(6)


CONV = ([3, 3], [1, 1], [1, 1, 1, 1], [1, 1], 1)


def test_opcheck_conv2d(layer):
    packed, scale, bias = layer
    for x in (
        torch.randn(2, 5, 7, 6),
        torch.randn(2, 5, 7, 6).to(memory_format=torch.channels_last),
        torch.randn(2, 5, 7, 6, dtype=torch.bfloat16),
        torch.randn(0, 5, 7, 6),
    ):
        torch.library.opcheck(ops.conv2d, (x, packed, scale, bias, 0.02, 99, 8, *CONV, 0.0, None))


def test_opcheck_conv2d_u8(layer):
    packed, scale, bias = layer
    x = torch.randint(0, 256, (2, 5, 7, 6), dtype=torch.uint8)
    for layout in (torch.contiguous_format, torch.channels_last):
        args = (x.contiguous(memory_format=layout), packed, scale, bias, 10, 20, *CONV)
        torch.library.opcheck(ops.conv2d_u8, args)


def test_opcheck_linear_and_elementwise():
    packed = ops.pack_weight(torch.randint(-2, 2, (4, 9), dtype=torch.int8), 2)
    scale, bias = torch.rand(4), torch.randn(4)
    for x in (torch.randn(9), torch.randn(3, 9), torch.randn(2, 3, 9, dtype=torch.half)):
        torch.library.opcheck(ops.linear, (x, packed, scale, bias, 0.1, 5, 8))
    x = torch.randn(2, 3, 4, 5)
    for tensor in (x, x.to(memory_format=torch.channels_last), x.transpose(0, 2)):
        torch.library.opcheck(ops.quantize, (tensor, 0.1, 3, 8))
        torch.library.opcheck(ops.fake_quantize, (tensor, 0.1, 3, 8))


def test_wrong_arguments_are_errors(layer):
    packed, scale, bias = layer
    good = torch.randn(1, 5, 7, 6)

    def run(x=good, p=packed, s=scale, b=bias, grid=(0.02, 99, 8), conv=CONV):
        return ops.conv2d(x, p, s, b, *grid, *conv)

    with pytest.raises(TypeError, match=r"float32.*got torch.float64"):
        run(good.double())
    with pytest.raises(ValueError, match="4 dimensions"):
        run(good[0])
    with pytest.raises(ValueError, match=r"\[6, 4, 3, 3\], got \[6, 5, 3, 3\]"):
        run(torch.randn(1, 4, 7, 6))
    with pytest.raises(ValueError, match="smaller than the dilated kernel"):
        run(torch.randn(1, 5, 0, 6), conv=([3, 3], [1, 1], [0, 0, 0, 0], [1, 1], 1))
    with pytest.raises(ValueError, match="stride"):
        run(conv=([3, 3], [0, 1], [0, 0, 0, 0], [1, 1], 1))
    with pytest.raises(ValueError, match="divisible by groups"):
        run(conv=([3, 3], [1, 1], [0, 0, 0, 0], [1, 1], 4))
    with pytest.raises(ValueError, match="zero point"):
        run(grid=(0.02, 300, 8))
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="scale must be positive and finite"):
            run(grid=(bad, 0, 8))
    with pytest.raises(ValueError, match="bits"):
        run(grid=(0.1, 0, 9))
    with pytest.raises(TypeError, match="bias must be contiguous float32"):
        run(b=bias.double())
    with pytest.raises(TypeError, match="weight_packed"):
        run(p=packed.float())
    damaged = packed.clone()
    damaged[70] ^= 1
    _C.clear_cache()  # the payload is verified when it is unpacked, which a known hash skips
    with pytest.raises(ValueError, match="damaged"):
        run(p=damaged)
    with pytest.raises(ValueError, match="buffer has"):
        run(p=packed[:-1].clone())


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(2, 8),
    shape=st.tuples(*[st.integers(1, 9)] * 4),
    zeros=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_pack_round_trip_and_smaller_encoding(bits, shape, zeros, seed):
    g = torch.Generator().manual_seed(seed)
    w = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, generator=g, dtype=torch.int8)
    w[torch.rand(shape, generator=g) < zeros] = 0
    packed = ops.pack_weight(w, bits)
    info = ops.packed_info(packed)
    assert torch.equal(ops.unpack_weight(packed), w)
    n, nonzero = w.numel(), int((w != 0).sum())

    def fields(count: int) -> int:
        widths = {8: (4, 4), 7: (4, 2, 1), 6: (4, 2), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,)}
        return sum((count * width + 7) // 8 for width in widths[bits])

    # Blocks of 16 x 64 at one kernel position; 64 input channels are more than there are here.
    live = torch.stack([(part != 0).any(dim=1).any(dim=0) for part in w.split(16)])
    in_blocks = sum(
        part.shape[0] * part.shape[1] * int(kept.sum())
        for part, kept in zip(w.split(16), live, strict=True)
    )
    sizes = {
        "dense": fields(n),
        "blocks": (live.numel() + 7) // 8 + fields(in_blocks),
        "bitmask": (n + 7) // 8 + fields(nonzero),
    }
    smallest = min(sizes.values())
    assert packed.numel() == 64 + smallest
    assert info["encoding"] == next(name for name, size in sizes.items() if size == smallest)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.integers(2, 8),
    shape=st.tuples(st.integers(1, 70), st.integers(1, 140), st.integers(1, 2), st.integers(1, 2)),
    zeros=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_blocks_of_zeros_are_left_out(bits, shape, zeros, seed):
    g = torch.Generator().manual_seed(seed)
    w = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, generator=g, dtype=torch.int8)
    blocks = (-(-shape[0] // 16), -(-shape[1] // 64), *shape[2:])
    keep = torch.rand(blocks, generator=g) >= zeros
    wide = keep.repeat_interleave(16, 0)[: shape[0]].repeat_interleave(64, 1)[:, : shape[1]]
    w *= wide
    packed = ops.pack_weight(w, bits)
    assert torch.equal(ops.unpack_weight(packed), w)
    stored = ops.packed_info(packed)["stored"]
    if ops.packed_info(packed)["encoding"] == "blocks":
        assert stored <= int(wide.sum())
    # A block costs a bit; whatever else is smaller may be stored instead.
    streams = {8: 2, 7: 3, 6: 2, 5: 2, 4: 1, 3: 2, 2: 1}[bits]
    assert packed.numel() <= 64 + keep.numel() / 8 + 1 + int(wide.sum()) * bits / 8 + streams


def test_a_mask_of_blocks_that_lies_is_damage():
    w = torch.ones((32, 64, 1, 1), dtype=torch.int8)
    w[16:] = 0
    packed = ops.pack_weight(w, 4)
    assert ops.packed_info(packed)["encoding"] == "blocks"
    wrong = packed.clone()
    wrong[64] = 3
    with pytest.raises(FileFormatError, match="hash"):
        ops.unpack_weight(wrong)


def test_pack_rejects_what_does_not_fit():
    with pytest.raises(ValueError, match="-9 does not fit in 4 bits"):
        ops.pack_weight(torch.full((1, 1), -9, dtype=torch.int8), 4)
    with pytest.raises(ValueError, match="bits must be 2 to 8"):
        ops.pack_weight(torch.zeros((1, 1), dtype=torch.int8), 9)
    with pytest.raises(TypeError, match="int8"):
        ops.pack_weight(torch.zeros((1, 1)), 4)
    with pytest.raises(ValueError, match="at least one"):
        ops.pack_weight(torch.zeros((0, 3), dtype=torch.int8), 4)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_bytes_are_refused_never_misread(data):
    packed = ops.pack_weight(torch.arange(-8, 8, dtype=torch.int8).reshape(4, 4), 4)
    raw = bytearray(packed.numpy().tobytes())
    kind = data.draw(st.sampled_from(["flip", "cut", "grow", "random header"]))
    if kind == "flip":
        position = data.draw(st.integers(0, len(raw) - 1))
        raw[position] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        raw = raw[: data.draw(st.integers(1, len(raw) - 1))]
    elif kind == "grow":
        raw += b"\0" * data.draw(st.integers(1, 9))
    else:
        raw[8:48] = data.draw(st.binary(min_size=40, max_size=40))
    with pytest.raises(FileFormatError):
        ops.unpack_weight(torch.frombuffer(raw, dtype=torch.uint8))


def test_changed_weights_are_never_served_from_the_cache(layer):
    packed, scale, bias = layer
    x = torch.randn(1, 5, 7, 6)
    args = (0.02, 99, 8, *CONV)
    first = ops.conv2d(x, packed, scale, bias, *args)
    other = ops.pack_weight(-ops.unpack_weight(packed).clamp(-7, 7), 4)
    packed.copy_(other)  # in place, as load_state_dict does
    second = ops.conv2d(x, packed, scale, bias, *args)
    assert not torch.equal(first, second)
    assert torch.equal(second, ops.conv2d(x, other, scale, bias, *args))


def test_many_threads_call_one_layer(layer):
    packed, scale, bias = layer
    x = torch.randn(2, 5, 40, 40)
    want = ops.conv2d(x, packed, scale, bias, 0.02, 99, 8, *CONV)
    failures: list[str] = []

    def work() -> None:
        for _ in range(50):
            if not torch.equal(ops.conv2d(x, packed, scale, bias, 0.02, 99, 8, *CONV), want):
                failures.append("different")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


def _child(queue, x, packed, scale, bias) -> None:
    # Bytes, not a torch reduction: torch's own OpenMP pool does not survive a fork.
    queue.put(ops.conv2d(x, packed, scale, bias, 0.02, 99, 8, *CONV).numpy().tobytes())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork_after_use(layer):
    packed, scale, bias = layer
    x = torch.randn(4, 5, 64, 64)
    want = ops.conv2d(x, packed, scale, bias, 0.02, 99, 8, *CONV).numpy().tobytes()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_child, args=(queue, x, packed, scale, bias))
    child.start()
    assert queue.get() == want
    child.join(60)
    assert child.exitcode == 0


def test_thread_settings():
    assert ops.get_num_threads() == torch.get_num_threads()
    ops.set_num_threads(3)
    assert ops.get_num_threads() == 3
    ops.set_num_threads(None)
    with pytest.raises(ValueError, match="at least 1"):
        ops.set_num_threads(0)
