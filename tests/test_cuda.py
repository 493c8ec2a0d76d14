"""CUDA without a GPU: the library over a GPU in software, and what a missing one says."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_models import batches, tiny
from helpers_program import INF, Builder, Grid, noise, programs, run_reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adalayer_native import cuda, ops
from adalayer_native._recent import Recent
from adalayer_native.cuda import engine as cuda_engine
from adalayer_native.cuda import layers, library
from adalayer_native.errors import DeviceError, InputError
from adalayer_native.pruning import pattern_mask

REPOSITORY = Path(__file__).resolve().parent.parent


def emulated_library() -> Path | None:
    """The newest one of this tree's builds; ``ADALAYER_CUDA_EMULATED`` names another."""
    named = os.environ.get("ADALAYER_CUDA_EMULATED")
    if named:
        return Path(named)
    found = list((REPOSITORY / "build").glob("*/libadalayer_cuda_emulated.so"))
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


@pytest.fixture
def emulated(monkeypatch):
    path = emulated_library()
    if path is None:
        pytest.skip("needs libadalayer_cuda_emulated.so, which ADALAYER_BUILD_TESTS=ON builds")
    monkeypatch.setenv("ADALAYER_CUDA_LIBRARY", str(path))
    monkeypatch.setattr(library, "_loaded", None)
    for module in (cuda_engine, layers):
        monkeypatch.setattr(module, "stream_number", lambda device: 0)
    monkeypatch.setattr(layers, "_engines", Recent(layers._ENGINE_LIMIT))
    monkeypatch.setattr(layers, "_linears", Recent(layers._ENGINE_LIMIT))
    yield
    library._loaded = None


def operate(operator, *args):
    """What the operator does on GPU tensors, with CPU tensors for the GPU in software."""
    return ops.cuda.run_cuda(ops.geometry.call_of(operator, args, {}))


def run(engine, program, inputs, nhwc=False):
    orders = [nhwc and any_order for any_order in engine.any_order()]
    arrays = [
        np.ascontiguousarray(x.transpose(0, 2, 3, 1) if last else x, dtype=np.float32)
        for x, last in zip(inputs, orders, strict=True)
    ]
    batch, values = arrays[0].shape[0], program.values()
    outputs = [
        np.full((batch, *values[number][2:5]), -1, np.float32) for number in program.outputs()
    ]
    engine.run([x.ctypes.data for x in arrays], orders, batch, [y.ctypes.data for y in outputs])
    return outputs


def test_random_programs_on_a_gpu_in_software(emulated):
    @settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
    @given(
        program=programs(ids=False),
        batch=st.integers(1, 3),
        choice=st.integers(-1, 5),
        part=st.integers(0, 2),
        graph=st.booleans(),
        nhwc=st.booleans(),
        seed=st.integers(0, 1000),
    )
    def check(program, batch, choice, part, graph, nhwc, seed):
        images = noise(program, batch, seed)
        engine = cuda.CudaEngine(
            program, 0, graph=graph, tune=False, choice=choice, images_per_pass=part
        )
        expected = run_reference(program, images)
        for a, b in zip(run(engine, program, images, nhwc), expected, strict=True):
            np.testing.assert_array_equal(a, b)

    check()


def test_token_ids_stay_on_the_cpu(emulated):
    b, grid = Builder(), Grid()
    ids = b.input((1, 1, 4), "i32")
    table = b.constant(np.zeros((5, 3), np.uint8))
    x = b.node("embedding", [ids], b.value((3, 1, 4), grid), constants=[table])
    program = b.finish([b.node("dequantize", [x], b.value((3, 1, 4)))])
    with pytest.raises(InputError, match="'v1' is token ids, which programs read on the CPU alone"):
        cuda.CudaEngine(program, 0)


def weights(shape, bits):
    half = 2 ** (bits - 1)
    return torch.randint(-half, half, shape, dtype=torch.int8)


def test_operators_on_a_gpu_in_software(emulated):
    """The functions behind the operators, which know nothing of where the memory is."""

    @settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
    @given(
        groups=st.sampled_from([1, 1, 2, 4]),
        inputs=st.integers(1, 9),
        outputs=st.integers(1, 9),
        kernel=st.sampled_from([(1, 1), (3, 3), (2, 5)]),
        stride=st.integers(1, 2),
        dilation=st.integers(1, 2),
        bits=st.integers(2, 8),
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
        last=st.booleans(),
        residual=st.booleans(),
        grid=st.sampled_from([(0.0, 0, 0), (0.05, 20, 7)]),
        bounds=st.sampled_from([(None, None), (0.0, 6.0)]),
        seed=st.integers(0, 1000),
    )
    def check(
        groups,
        inputs,
        outputs,
        kernel,
        stride,
        dilation,
        bits,
        dtype,
        last,
        residual,
        grid,
        bounds,
        seed,
    ):
        torch.manual_seed(seed)
        o = groups * outputs
        x = torch.randn(2, groups * inputs, 9, 8).to(dtype)
        x = x.to(memory_format=torch.channels_last) if last else x
        packed = ops.pack_weight(weights((o, inputs, *kernel), bits), bits)
        scale, bias = torch.rand(o) * 0.01, torch.randn(o)
        args = (0.03, 100, 8, kernel, (stride, stride), (1, 2, 0, 1), (dilation, dilation), groups)
        plain = ops.conv2d(x, packed, scale, bias, *args)
        addend = torch.randn_like(plain) if residual else None
        args += (*bounds, addend, *grid)
        expected = ops.conv2d(x, packed, scale, bias, *args)
        got = operate("conv2d", x, packed, scale, bias, *args)
        assert torch.equal(got, expected)
        assert got.stride() == expected.stride()

    check()


def test_other_operators_on_a_gpu_in_software(emulated):
    x = torch.randn(2, 12, 5, 6)
    scale, bias = torch.rand(8) * 0.01, torch.randn(8)
    packed = ops.pack_weight(weights((8, 3, 3, 4), 4), 4)
    args = (0.03, 100, 8, (3, 4), (2, 3), (1, 0), (1, 1), (1, 1), 4)
    expected = ops.conv_transpose2d(x, packed, scale, bias, *args)
    assert torch.equal(operate("conv_transpose2d", x, packed, scale, bias, *args), expected)
    flat = ops.pack_weight(weights((8, 6), 3), 3)
    expected = ops.linear(x, flat, scale, bias, 0.05, 128, 8)
    assert torch.equal(operate("linear", x, flat, scale, bias, 0.05, 128, 8), expected)
    got = ops.cuda.linear_weight_only_cuda(x.half(), flat, scale, bias)
    torch.testing.assert_close(got, ops.linear_weight_only(x.half(), flat, scale, bias))
    levels = torch.randint(0, 256, (2, 12, 9, 8), dtype=torch.uint8)
    whole = ops.pack_weight(weights((8, 12, 3, 3), 5), 5)
    args = (17, 90, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 5, 250)
    expected = ops.conv2d_u8(levels, whole, scale, bias * 20, *args)
    assert torch.equal(operate("conv2d_u8", levels, whole, scale, bias * 20, *args), expected)
    for t in (x, x.half(), x.transpose(0, 2), x[:, ::2], x[:0]):
        expected = ops.fake_quantize(t, 0.1, 30, 6)
        assert torch.equal(ops.cuda.fake_quantize_cuda(t, 0.1, 30, 6), expected)
        assert torch.equal(ops.cuda.quantize_cuda(t, 0.1, 30, 6), ops.quantize(t, 0.1, 30, 6))


def test_changed_parameters_are_noticed(emulated):
    packed = ops.pack_weight(weights((4, 3, 1, 1), 4), 4)
    scale, bias = torch.rand(4), torch.zeros(4)
    x = torch.rand(1, 3, 4, 4)
    args = (0.1, 0, 8, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1)
    for change in (lambda: None, lambda: bias.add_(1), lambda: scale.mul_(2)):
        change()
        expected = ops.conv2d(x, packed, scale, bias, *args)
        for _ in range(2):
            assert torch.equal(operate("conv2d", x, packed, scale, bias, *args), expected)
    packed.copy_(ops.pack_weight(weights((4, 3, 1, 1), 4).flip(0), 4))
    expected = ops.conv2d(x, packed, scale, bias, *args)
    assert torch.equal(operate("conv2d", x, packed, scale, bias, *args), expected)


def test_profile_and_sizes(emulated):
    from helpers_engine import native_of

    import adalayer_native as ada

    native = native_of(tiny(), batches(labels=False)[0])
    engine = ada.compile(native, batches(labels=False)[0][:1], policy="native", strict=True)
    program = engine._steps[0].run.program
    found = cuda.CudaEngine(program, 0)
    rows = found.profile(2, 1, 2)
    assert [row[0] for row in rows] == [name for _, name, *_ in program.nodes()]
    assert all(row[2] for row in rows)
    assert found.weight_bytes() > 0
    assert found.info().nodes == len(rows)


@pytest.fixture
def on_gpu(emulated, monkeypatch):
    """A compiled network and the same on the GPU in software."""
    from helpers_engine import native_of

    import adalayer_native as ada

    monkeypatch.setattr(cuda, "device_index", lambda device: 0)
    images = batches(labels=False)[0]
    engine = ada.compile(native_of(tiny(), images), images[:1], policy="native", strict=True)
    return engine, engine.to("cuda"), images


def test_coverage_of_an_engine_on_a_gpu(on_gpu):
    engine, moved, _ = on_gpu
    rows, expected = list(moved.coverage(rounds=2)), list(engine.coverage(rounds=0))
    assert [(r.name, r.op, r.bits, r.macs) for r in rows] == [
        (r.name, r.op, r.bits, r.macs) for r in expected
    ]
    assert all(row.kernel and row.microseconds > 0 for row in rows)


def test_tensors_of_another_device_are_named(on_gpu):
    engine, moved, images = on_gpu
    assert moved.device == torch.device("cuda", 0)
    with pytest.raises(InputError, match="expected a tensor on cuda:0, got one on cpu"):
        moved(images)
    with pytest.raises(InputError, match="expected a tensor on cpu, got one on meta"):
        engine(images.to("meta"))
    x = torch.rand(2, 3, 4, 4)
    packed = ops.pack_weight(weights((4, 3, 1, 1), 4), 4)
    args = (torch.rand(4), torch.zeros(4), 0.1, 0, 8, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1)
    with pytest.raises(InputError, match="the input is on cpu, but weight_packed is on meta"):
        operate("conv2d", x, packed.to("meta"), *args)
    residual = torch.zeros(2, 4, 4, 4, device="meta")
    with pytest.raises(InputError, match="the input is on cpu, but residual is on meta"):
        operate("conv2d", x, packed, *args, None, None, residual)


def test_memory_that_is_not_there_is_an_error(on_gpu, monkeypatch):
    engine, _, images = on_gpu
    expected = engine(images[:2])
    program = engine._steps[0].run.program
    found = cuda.CudaEngine(program, 0, tune=False)
    images = np.ascontiguousarray(images[:2].numpy())
    memory = images.ctypes.data
    outputs = [memory] * len(program.outputs())
    with monkeypatch.context() as small:
        small.setenv("ADALAYER_FAKE_CUDA_BYTES", "1000")
        with pytest.raises(MemoryError, match=r"allocating \d+ bytes on the device: out of memory"):
            found.run([memory], [False], 2, outputs)
        with pytest.raises(MemoryError, match="out of memory"):
            cuda.CudaEngine(program, 0)
    # What failed left nothing behind.
    got = run(found, program, [images])[0].reshape(expected.shape)
    np.testing.assert_array_equal(got, expected.numpy())
    with pytest.raises(InputError, match="input 0 is not aligned to the 4 bytes"):
        found.run([memory + 1], [False], 1, outputs)
    with pytest.raises(InputError, match="input 0 has no memory"):
        found.run([0], [False], 1, outputs)
    found.run([0], [False], 0, [0] * len(outputs))
    with pytest.raises(InputError, match="there is no CUDA device 3"):
        cuda.CudaEngine(program, 3)


def test_views_and_empty_batches_on_a_gpu_in_software(emulated):
    packed = ops.pack_weight(weights((5, 6, 3, 3), 3), 3)
    scale, bias = torch.rand(5) * 0.01, torch.randn(5)
    args = (0.03, 100, 8, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1)
    whole = torch.randn(4, 12, 9, 11)
    for x in (whole[:, 3:9, 1:, 2:], whole[:, ::2], whole[1:, :6].transpose(2, 3), whole[:0, :6]):
        expected = ops.conv2d(x, packed, scale, bias, *args)
        assert torch.equal(operate("conv2d", x, packed, scale, bias, *args), expected)


@pytest.mark.parametrize(
    ("pattern", "sparsity", "kernel"),
    [("2:4", 0.5, " 2:4"), ("block32x64", 0.75, " blocks"), ("block16x64", 0.75, " blocks")],
)
def test_pruned_layers_have_kernels_of_their_own(emulated, pattern, sparsity, kernel):
    """Some choice runs on the form without zeros, every one gives the bits of the CPU."""
    torch.manual_seed(1)
    w = weights((64, 128, 1, 1), 4)
    w *= pattern_mask(torch.rand(w.shape), sparsity, pattern)
    b = Builder()
    x = b.input((128, 3, 4))
    levels = b.node("quantize", [x], b.value((128, 3, 4), Grid()))
    constants = [
        b.weights(w.numpy(), 4),
        b.constant(np.full(64, 1e-3, np.float32)),
        b.constant(np.zeros(64, np.float32)),
        -1,
    ]
    ints = [1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 255, 0]
    y = b.node("conv", [levels], b.value((64, 3, 4)), ints, [1.0, -INF, INF], constants)
    program = b.finish([y])
    images = noise(program, 2, 3)
    expected = run_reference(program, images)
    seen = set()
    for choice in range(9):
        engine = cuda.CudaEngine(program, 0, tune=False, choice=choice)
        rows = engine.profile(1, 1, 1)
        seen.add(next(row[2] for row in rows if row[1] == "conv"))
        for a, b in zip(run(engine, program, images), expected, strict=True):
            np.testing.assert_array_equal(a, b)
    assert any(kernel in name for name in seen), seen


def test_a_build_without_kernels_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("ADALAYER_CUDA_LIBRARY", str(tmp_path / "libadalayer_cuda.so"))
    monkeypatch.setattr(library, "_loaded", None)
    with pytest.raises(DeviceError, match="ADALAYER_CUDA=1 pip install"):
        library.library()
    (tmp_path / "libadalayer_cuda.so").write_bytes(b"not a library")
    with pytest.raises(DeviceError, match="cannot be loaded"):
        library.library()


def test_devices_that_are_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not cuda.available()
    with pytest.raises(DeviceError, match="torch sees no CUDA device"):
        cuda.device_index("cuda")
    with pytest.raises(DeviceError, match="expected a CUDA device, got mps"):
        cuda.device_index("mps")


def test_an_old_device_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(library, "library", lambda: None)
    assert "compute capability 7.5" in str(cuda.why_unavailable())


def test_an_engine_on_the_cpu_stays_there():
    from helpers_engine import native_of

    import adalayer_native as ada

    native = native_of(tiny(), batches(labels=False)[0])
    x = batches(labels=False)[0]
    engine = ada.compile(native, x[:1], policy="native", strict=True)
    again = engine.to("cpu")
    assert again.device == torch.device("cpu")
    assert torch.equal(again(x), engine(x))


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
def test_linear_weight_only_on_the_cpu(dtype):
    w = torch.randint(-4, 4, (5, 9), dtype=torch.int8)
    packed, scale, bias = ops.pack_weight(w, 3), torch.rand(5), torch.randn(5)
    x = torch.randn(2, 4, 9).to(dtype)
    torch.library.opcheck(ops.linear_weight_only, (x, packed, scale, bias))
    expected = (x.float() @ w.T.float()) * scale + bias
    got = ops.linear_weight_only(x, packed, scale, bias)
    torch.testing.assert_close(got, expected.to(dtype))
    with pytest.raises(TypeError, match="float16"):
        ops.linear_weight_only(x.float(), packed, scale, bias)
