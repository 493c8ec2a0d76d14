"""Compiled engines against the module trees that they come from."""

from __future__ import annotations

import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers_engine import native_of, node_differences, plan_of
from helpers_models import tiny
from helpers_patterns import PATTERNS, Net, Residual, small_engine, smooth
from torch import Tensor, nn

import adalayer_native as ada
from adalayer_native import ops
from adalayer_native.engine import Coverage, Engine, compiler
from adalayer_native.engine.parts import NativePart
from adalayer_native.engine.policy import Times
from adalayer_native.engine.segments import is_layer
from adalayer_native.errors import (
    CalibrationError,
    InputError,
    UnsupportedModelError,
)


@pytest.fixture(scope="module")
def small() -> tuple[nn.Module, Engine]:
    return small_engine()


# -- operators ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PATTERNS)
@torch.no_grad()
def test_pattern(name: str) -> None:
    """Law 2 on the same inputs, and over the whole network where no sum of torch's tips a level."""
    make, channels = PATTERNS[name]
    torch.manual_seed(5)
    model = Net(make(), channels)
    native = native_of(model, smooth(16, seed=1))
    x = smooth(4, seed=2)
    differences = node_differences(native, x)
    assert len(differences) >= 3
    for item in differences:
        item.check()
    engine = ada.compile(native, x[:1], policy="native", strict=True)
    expected, got = native(x), engine(x)
    if not any(item.count for item in differences):
        assert torch.equal(got, expected)
    assert got.shape == expected.shape
    assert float((got - expected).abs().max()) <= 0.02 * float(expected.abs().max())


class Fixed(nn.Module):
    """Constants along the batch in torch, among results, and beside the size of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.row = nn.Conv2d(3, 4, 1), nn.Parameter(torch.randn(1, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = F.relu(self.conv(x)).mean((2, 3))
        rows = self.row.expand(x.shape[0], -1)
        both = torch.cat([torch.zeros_like(y), rows, y], 1)
        sorted_, _ = torch.cat([y, rows, torch.zeros_like(y)], 1).sort(1)
        return both @ both.T.detach()[:, :1], sorted_, rows.unsqueeze(2).permute(0, 2, 1), rows * 2


@torch.no_grad()
def test_constants_outside_of_programs() -> None:
    torch.manual_seed(7)
    x = smooth(3, seed=2)
    native = native_of(Fixed(), smooth(16, seed=1))
    engine = ada.compile(native, x, policy="native")
    for images in (x, x[:1]):
        for got, expected in zip(engine(images), native(images), strict=True):
            torch.testing.assert_close(got, expected)


class PatchEncoder(nn.Module):
    """torch's own encoder on patches and a class token: its attention has the batch second."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.token, self.positions = (nn.Parameter(torch.randn(1, n, 16)) for n in (1, 10))
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patches(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.token.expand(x.shape[0], -1, -1), y], 1) + self.positions
        return self.head(self.encoder(y)[:, 0])


@torch.no_grad()
def test_transformer_encoder_on_patches() -> None:
    """All of its layers are native; between them values go out to torch and come back."""
    torch.manual_seed(6)
    x = smooth(3, seed=2)
    native = native_of(ada.capture(PatchEncoder().eval(), x), smooth(16, seed=1))
    for item in node_differences(native, x):
        item.check()
    engine = ada.compile(native, x[:1], policy="native")
    rows = engine.coverage(rounds=0)
    assert sum(row.op == "conv" and row.kind == "native" for row in rows) == 6
    assert {row.op for row in rows if row.kind == "torch" and "linear" in row.op} == set()
    for images in (x, x[:1]):
        torch.testing.assert_close(engine(images), native(images), rtol=0.02, atol=0.02)
    again = pickle.loads(pickle.dumps(engine))
    assert torch.equal(again(x), engine(x))


@pytest.mark.parametrize("kernel", [5, (5, 1)])
@torch.no_grad()
def test_average_pooling_over_a_window_larger_than_the_padded_image(kernel: Any) -> None:
    """One window with ceil_mode, which torch computes."""
    pool = nn.AvgPool2d(kernel, 2, ceil_mode=True)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), pool, nn.Conv2d(8, 8, 1))
    x = torch.randn(2, 3, 4, 4)
    native = native_of(model, x)
    with pytest.raises(UnsupportedModelError, match="window larger than the padded image"):
        ada.compile(native, x[:1], policy="native", strict=True)
    assert torch.equal(ada.compile(native, x[:1], policy="native")(x), native(x))


@pytest.mark.parametrize("name", ["residual", "convnext", "up", "pre-activation"])
@pytest.mark.parametrize(("bits", "activation_bits"), [(2, 8), (3, 5), (5, 4), (7, 8)])
@torch.no_grad()
def test_odd_widths(name: str, bits: int, activation_bits: int) -> None:
    make, channels = PATTERNS[name]
    torch.manual_seed(5)
    native = native_of(
        Net(make(), channels), smooth(16, seed=1), bits=bits, activation_bits=activation_bits
    )
    for item in node_differences(native, smooth(3, seed=2)):
        item.check()
    engine = ada.compile(native, smooth(1, seed=0), policy="native", strict=True)
    widths = {row.bits for row in engine.coverage(rounds=0) if row.bits}
    assert widths == {bits}


@pytest.mark.parametrize("name", PATTERNS)
@torch.no_grad()
def test_executor_equals_the_interpreter(name: str) -> None:
    make, channels = PATTERNS[name]
    torch.manual_seed(5)
    native = native_of(Net(make(), channels), smooth(16, seed=1))
    engine = ada.compile(native, smooth(1, seed=0), policy="native", strict=True)
    (step,) = engine._steps
    assert isinstance(step.run, NativePart)
    x = smooth(3, seed=2)
    expected = torch.empty(3, 5)
    step.run.program.run_reference([x.data_ptr()], [False], 3, [expected.data_ptr()])
    assert torch.equal(engine(x), expected)
    assert torch.equal(engine(x.contiguous(memory_format=torch.channels_last)), expected)


def test_flattened_features_need_no_copy() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 3, padding=1)
            self.fc1, self.fc2 = nn.Linear(6 * 5 * 5, 10), nn.Linear(10, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = F.adaptive_avg_pool2d(F.relu(self.conv(x)), 5)
            return self.fc2(F.relu(self.fc1(F.dropout(y.flatten(1), training=self.training))))

    torch.manual_seed(0)
    native = native_of(Flat(), smooth(8, seed=1))
    x = smooth(5, seed=2)
    engine = ada.compile(native, x, policy="native", strict=True)
    assert torch.equal(engine(x), native(x))
    operations = [row.op for row in engine.coverage(rounds=0)]
    assert operations == ["quantize", "conv", "adaptive_avg_pool", "conv", "conv"]


def test_one_kernel_per_chain() -> None:
    """Batch norm, addition, activation and requantization are in the convolutions."""
    torch.manual_seed(0)
    native = native_of(Net(Residual()), smooth(8, seed=1))
    engine = ada.compile(native, smooth(1, seed=0), policy="native", strict=True)
    operations = [row.op for row in engine.coverage(rounds=0)]
    assert operations.count("conv") == 6
    # relu of a sum that is read twice, once without it, is a table of its own.
    assert set(operations) == {"quantize", "conv", "lookup", "adaptive_avg_pool"}
    assert operations.count("lookup") <= 2


def test_functions_become_tables_of_their_convolution() -> None:
    torch.manual_seed(0)
    native = native_of(Net(F.hardswish), smooth(8, seed=1))
    engine = ada.compile(native, smooth(1, seed=0), policy="native", strict=True)
    assert "lookup" not in [row.op for row in engine.coverage(rounds=0)]


# -- results --------------------------------------------------------------------------------------


class Several(nn.Module):
    """Two inputs; results in a dictionary, one of them channels last, one a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(2, 4, 1)
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        features = F.relu(self.a(x) + self.b(y))
        out = self.head(features)
        return {"out": out, "more": [out.permute(0, 2, 3, 1), (torch.softmax(out, 1), None)]}


def several() -> tuple[nn.Module, Engine, tuple[Tensor, Tensor]]:
    torch.manual_seed(2)
    model = Several().eval()
    data = torch.randn(6, 5, 10, 10)
    inputs = data[:, :3].contiguous(), data[:, 3:, 1:9, 1:9]
    prepared = ada.prepare(model, plan_of(model), inputs)
    ada.calibrate(prepared, [inputs], progress=False)
    native = ada.convert(prepared)
    engine = ada.compile(native, tuple(t[:1] for t in inputs), policy="native", strict=True)
    return native, engine, inputs


@torch.no_grad()
def test_nested_results_and_several_inputs(tmp_path: Path) -> None:
    native, engine, inputs = several()
    engine.save(tmp_path / "model.ada")
    for run in (engine, ada.load(tmp_path / "model.ada")):
        expected, got = native(*inputs), run(*inputs)
        assert list(got) == ["out", "more"]
        torch.testing.assert_close(got["out"], expected["out"], rtol=0, atol=0.05)
        assert torch.equal(got["more"][0], got["out"].permute(0, 2, 3, 1))
        torch.testing.assert_close(got["more"][1][0], torch.softmax(got["out"], 1))
        assert got["more"][1][1] is None
        assert type(got["more"]) is list and type(got["more"][1]) is tuple
    arrays = engine.run(*(t.numpy() for t in inputs))
    assert np.array_equal(arrays["out"], engine(*inputs)["out"].numpy())
    with pytest.raises(InputError, match=r"expected 2 inputs \(x, y\), got 1"):
        engine(inputs[0])
    with pytest.raises(InputError, match=r"'y': expected a batch of 6 .* got 5"):
        engine(inputs[0], inputs[1][:5])


@torch.no_grad()
def test_batches_and_memory_formats(small: tuple[nn.Module, Engine]) -> None:
    native, engine = small
    x = torch.randn(9, 3, 8, 8)
    y = engine(x)
    assert torch.equal(y, native(x))
    for n in (0, 1, 2, 7):
        assert torch.equal(engine(x[:n]), y[:n])
    assert torch.equal(engine(x.contiguous(memory_format=torch.channels_last)), y)
    assert torch.equal(engine(x.flip(3).flip(3)), y)
    wide = torch.randn(9, 3, 8, 16)
    assert torch.equal(engine(wide[..., ::2]), native(wide[..., ::2]))
    assert torch.equal(engine(x[:1].expand(4, -1, -1, -1)), y[:1].expand(4, -1))
    assert torch.equal(engine(x.requires_grad_()), y)


@torch.no_grad()
def test_half_inputs_are_computed_in_the_same_way(small: tuple[nn.Module, Engine]) -> None:
    _, engine = small
    x = torch.randn(3, 3, 8, 8)
    for dtype in (torch.float16, torch.bfloat16):
        y = engine(x.to(dtype))
        assert y.dtype == dtype
        assert torch.equal(y, engine(x.to(dtype).float()).to(dtype))


@torch.no_grad()
def test_numpy(small: tuple[nn.Module, Engine]) -> None:
    native, engine = small
    x = np.random.default_rng(0).standard_normal((4, 3, 8, 8)).astype(np.float32)
    y = engine.run(x)
    assert isinstance(y, np.ndarray)
    assert np.array_equal(y, native(torch.from_numpy(x)).numpy())
    assert np.array_equal(engine.run(x[::-1]), y[::-1])
    x.setflags(write=False)
    assert np.array_equal(engine.run(x), y)
    with pytest.raises(InputError, match="float32, got float64"):
        engine.run(x.astype(np.float64))


@torch.no_grad()
def test_nan_and_infinity_as_in_the_module_tree(small: tuple[nn.Module, Engine]) -> None:
    native, engine = small
    x = torch.randn(2, 3, 8, 8)
    x[0, 0, 0, 0], x[0, 1, 2, 3], x[1, 2, 7, 7] = float("nan"), float("inf"), -float("inf")
    y = engine(x)
    assert bool(torch.isfinite(y).all())
    assert torch.equal(y, native(x))


def test_many_threads_at_once(small: tuple[nn.Module, Engine]) -> None:
    _, engine = small
    inputs = [torch.randn(1 + k % 3, 3, 8, 8) for k in range(8)]
    expected = [engine(x) for x in inputs]
    wrong: list[int] = []

    def work(k: int) -> None:
        for _ in range(50):
            if not torch.equal(engine(inputs[k]), expected[k]):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.zeros(1, 3, 8, 9), r"'x': expected shape \[batch, 3, 8, 8\], got .*9\]"),
        (lambda: torch.zeros(1, 4, 8, 8), r"'x': expected shape .* got \[1, 4, 8, 8\]"),
        (lambda: torch.zeros(3, 8, 8), r"'x': expected shape .* got \[3, 8, 8\]"),
        (lambda: torch.zeros(()), r"'x': expected shape .* got \[\]"),
        (lambda: torch.zeros(1, 3, 8, 8, dtype=torch.float64), r"expected torch.float32 .*float64"),
        (lambda: torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"expected torch.float32 .*uint8"),
        (lambda: torch.zeros(1, 3, 8, 8, device="meta"), "expected a tensor on cpu, got .* meta"),
        (lambda: torch.zeros(1, 3, 8, 8).to_sparse(), "expected a dense tensor"),
        (lambda: np.zeros((1, 3, 8, 8), np.float32), "expected a torch.Tensor, got ndarray"),
        (lambda: torch.zeros(1, 3, 8, 8).expand(1 << 45, -1, -1, -1), "does not fit into memory"),
    ],
)  # fmt: skip
def test_bad_input(small: tuple[nn.Module, Engine], make: Any, message: str) -> None:
    _, engine = small
    with pytest.raises(InputError, match=message):
        engine(make())


def test_models_that_are_not_converted() -> None:
    x = torch.zeros(1, 3, 8, 8)
    with pytest.raises(UnsupportedModelError, match=r"never calibrated.*adalayer_native\.compress"):
        ada.compile(tiny(), x)
    with pytest.raises(CalibrationError, match=r"convert\(prepared\)"):
        ada.compile(ada.prepare(tiny(), plan_of(tiny())), x)
    with pytest.raises(UnsupportedModelError, match=r"nn\.Module, got int"):
        ada.compile(3, x)  # type: ignore[arg-type]


def test_models_whose_layers_all_stayed_in_float() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).bfloat16().eval()
    x = torch.randn(2, 3, 8, 8).bfloat16()
    with pytest.warns(UserWarning, match="stays in float"):
        prepared = ada.prepare(model, plan_of(model))
    ada.calibrate(prepared, [x], progress=False)
    for stage in (prepared, ada.convert(prepared)):
        with pytest.raises(
            UnsupportedModelError,
            match=r"all 2 layers .* stayed in float.*layer '0': its weight is torch\.bfloat16.*'2'",
        ):
            ada.compile(stage, x)
    nothing = plan_of(tiny())
    for name in nothing:
        nothing[name].bits = None
    prepared = ada.prepare(tiny(), nothing)
    with pytest.raises(UnsupportedModelError, match=r"all layers stayed in float.*plan gives none"):
        ada.compile(ada.convert(prepared), torch.zeros(1, 3, 8, 8))
    many = nn.Sequential(*(nn.Linear(4, 4) for _ in range(9))).half().eval()
    with pytest.warns(UserWarning, match="stays in float"):
        prepared = ada.prepare(many, plan_of(many))
    with pytest.raises(UnsupportedModelError, match=r"all 9 layers .* and 4 more"):
        ada.compile(prepared, torch.zeros(1, 4))


def test_bad_examples(small: tuple[nn.Module, Engine]) -> None:
    native, _ = small
    for bad, message in (
        (torch.zeros(0, 3, 8, 8), "batch size of at least 1"),
        ([1, 2], "a tuple of tensors"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int32), "expected torch.float32"),
        ((torch.zeros(1, 3, 8, 8), torch.zeros(2, 3, 8, 8)), "captured with"),
        (torch.zeros(1, 4, 8, 8), "expected shape"),
    ):
        with pytest.raises(UnsupportedModelError, match=message):
            ada.compile(native, bad)
    with pytest.raises(ValueError, match="policy must be"):
        ada.compile(native, torch.zeros(1, 3, 8, 8), policy="slowest")


def test_fixed_batch_is_refused() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).reshape(2, 4, 64)

    with pytest.raises(UnsupportedModelError, match="dynamic batch"):
        native_of(Fixed(), torch.randn(2, 3, 8, 8))
    native = nn.Sequential(native_of(nn.Sequential(nn.Conv2d(3, 4, 1)), torch.randn(2, 3, 8, 8)))
    native.append(nn.Unflatten(0, (2, 1))).append(nn.Flatten(0, 1))
    with pytest.raises(UnsupportedModelError, match="dynamic batch"):
        ada.compile(native, torch.randn(2, 3, 8, 8))


# -- parts in torch -------------------------------------------------------------------------------


class Odd(nn.Module):
    """A cumulative sum, which the engine lacks, between native layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.c = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        y = torch.cumsum(self.b(x), dim=3)
        return self.c(F.relu(y) * x).mean((2, 3))


@torch.no_grad()
def test_fallback_between_native_parts(tmp_path: Path) -> None:
    native = native_of(Odd(), smooth(8, seed=1))
    x = smooth(3, seed=2)
    engine = ada.compile(native, x[:1], policy="native")
    for n in (1, 3):
        torch.testing.assert_close(engine(x[:n]), native(x[:n]), rtol=0, atol=2e-3)
    coverage = engine.coverage(batch=2, rounds=2)
    torch_rows = [row for row in coverage if row.kind == "torch"]
    assert "aten.cumsum.default" in [row.op for row in torch_rows]
    assert all(row.why for row in torch_rows)
    assert all(row.microseconds > 0 for row in torch_rows)
    assert coverage.native_share == 1.0  # of the multiply-accumulates: a, b and c are native
    assert [row.name for row in coverage if row.macs] == ["a", "b", "c"]
    assert "cumsum" in str(coverage)
    with pytest.raises(UnsupportedModelError, match=r"run in torch.*cumsum"):
        engine.save(tmp_path / "model.ada")
    assert list(tmp_path.iterdir()) == []
    for policy in compiler.POLICIES:
        with pytest.raises(UnsupportedModelError, match=r"strict: .*aten\.cumsum\.default"):
            ada.compile(native, x[:1], policy=policy, strict=True)


def test_what_is_faster_in_float_is_in_the_engine_too(monkeypatch, tmp_path):
    x = torch.randn(8, 3, 8, 8)
    native = native_of(tiny(), x)
    # A clock by which float always wins.
    monkeypatch.setattr(compiler, "float_choices", lambda times: [list(times.layers)])
    monkeypatch.setattr(compiler, "fastest_of", lambda engines, batch: engines[-1])
    for strict in (False, True):
        engine = ada.compile(native, x[:1], strict=strict)
        coverage = engine.coverage(rounds=0)
        assert {row.kind for row in coverage} == {"native", "float"}
        assert coverage.native_share == 0 and coverage.float_share == 1
        assert engine.save(tmp_path / "tiny.ada") > 0
        assert torch.equal(ada.load(tmp_path / "tiny.ada")(x), engine(x))


@torch.no_grad()
def test_partly_float_model_is_one_program() -> None:
    torch.manual_seed(0)
    model = Net(Residual()).eval()
    plan = plan_of(model)
    plan["pattern.b"].bits = None
    prepared = ada.prepare(model, plan)
    ada.calibrate(prepared, [smooth(8, seed=1)], observer="minmax", progress=False)
    native = ada.convert(prepared)
    x = smooth(3, seed=2)
    engine = ada.compile(native, x, policy="native", strict=True)
    assert torch.equal(engine(x), native(x))
    coverage = engine.coverage(rounds=0)
    assert 0.5 < coverage.native_share < 1.0
    assert [row.name for row in coverage if row.kind == "float"] == ["pattern.b"]


@torch.no_grad()
def test_layers_that_lose_against_float_run_in_float(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice is the clock's; what a float layer computes is law 2."""
    from adalayer_native.engine import compiler

    torch.manual_seed(0)
    native = native_of(Net(Residual()), smooth(8, seed=1))
    x = smooth(3, seed=2)

    def times(exported: Any, engine: Engine, batch: int) -> Times:
        assert batch == 3
        layers = [node for node in exported.graph.nodes if is_layer(node)]
        lost = {n: (2.0, 3.0 if compiler.layer_name(n) == "last" else 1.0) for n in layers}
        return Times(lost, 100.0)

    def second(engines: list[Engine], batch: int) -> Engine:
        assert len(engines) == 3 and engines[2].native_share == 0.0
        return engines[1]

    monkeypatch.setattr(compiler, "layer_times", times)
    monkeypatch.setattr(compiler, "fastest_of", second)
    engine = ada.compile(native, x)
    assert 0.0 < engine.native_share < 0.5
    torch.testing.assert_close(engine(x), native(x), rtol=0, atol=0.02)
    rows = {row.name: row for row in engine.coverage(rounds=0)}
    assert rows["pattern.a"].kind == rows["pattern.b"].kind == "float"
    assert rows["pattern.b"].bits == 8  # the file holds the packed weights
    assert rows["last"].kind == "native"


@torch.no_grad()
def test_fastest_measures_and_computes_the_same() -> None:
    native = native_of(tiny(), torch.randn(8, 3, 8, 8))
    x = torch.randn(4, 3, 8, 8)
    engine = ada.compile(native, x)
    torch.testing.assert_close(engine(x), native(x), rtol=0, atol=0.02)


@torch.no_grad()
def test_fastest_is_never_slower_than_all_in_float(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every layer loses a little, no single one clearly, the whole is still compared."""
    from adalayer_native.engine import compiler

    native = native_of(tiny(), torch.randn(8, 3, 8, 8))
    x = torch.randn(4, 3, 8, 8)

    def times(exported: Any, engine: Engine, batch: int) -> Times:
        layers = [node for node in exported.graph.nodes if is_layer(node)]
        return Times(dict.fromkeys(layers, (1.0, 0.9)), total)

    compared = []

    def last(engines: list[Engine], batch: int) -> Engine:
        compared.append(len(engines))
        return engines[-1]

    monkeypatch.setattr(compiler, "layer_times", times)
    monkeypatch.setattr(compiler, "fastest_of", last)
    total = 1.0  # less than the layers take in float
    assert ada.compile(native, x).native_share == 1.0 and not compared
    total = 5.0
    engine = ada.compile(native, x)
    assert compared == [2] and engine.native_share == 0.0
    assert {row.kind for row in engine.coverage(rounds=0)} == {"native", "float"}
    torch.testing.assert_close(engine(x), native(x), rtol=0, atol=0.02)


def test_the_fastest_engine_is_the_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from adalayer_native.engine import policy

    seconds = {"0": 3.0, "1": 2.0, "2": 2.0}
    monkeypatch.setattr(policy, "seconds_of", lambda engines, batch: seconds)
    assert policy.fastest_of(["native", "mixed", "float"], 1) == "mixed"


class Frames(nn.Module):
    """A convolution that sees the frames of all samples as its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.flatten(0, 1)).reshape(-1, 2, 4, 6, 6)


@torch.no_grad()
def test_fastest_does_not_time_layers_that_run_in_torch() -> None:
    x = torch.randn(3, 2, 3, 8, 8)
    native = native_of(Frames(), x)
    engine = ada.compile(native, x[:1])
    assert {row.kind for row in engine.coverage(rounds=0)} == {"torch"}
    assert torch.equal(engine(x), native(x))


# -- coverage -------------------------------------------------------------------------------------


def test_coverage(small: tuple[nn.Module, Engine]) -> None:
    native, engine = small
    coverage = engine.coverage(batch=2, rounds=3)
    assert isinstance(coverage, Coverage)
    assert coverage.native_share == engine.native_share == 1.0
    layers = {row.name: row for row in coverage if row.bits}
    assert list(layers) == ["conv1", "conv2", "fc"]
    assert layers["conv1"].macs == 8 * 3 * 9 * 64
    assert layers["conv1"].bytes == native.get_submodule("conv1").weight_packed.numel()
    assert all(row.microseconds > 0 and row.kernel for row in coverage)
    if ops.active_isa() != "scalar":
        assert " stem" in layers["conv1"].kernel
        assert " panels" in layers["conv2"].kernel
    assert coverage.microseconds == pytest.approx(sum(row.microseconds for row in coverage))
    text = str(coverage)
    assert "100.00 % of multiply-accumulates native" in text and "conv1" in text
    assert repr(engine) == "Engine(x[batch, 3, 8, 8]; native)"


@torch.no_grad()
def test_channels_last_input_that_is_read_as_floats_too() -> None:
    """Only quantization takes pixels in any order; what else reads the input gets planes."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.conv(x), x.softmax(1)

    native = native_of(Both().eval(), torch.randn(4, 3, 6, 5))
    x = torch.randn(2, 3, 6, 5)
    engine = ada.compile(native, x, policy="native")
    for image in (x, x.contiguous(memory_format=torch.channels_last)):
        for got, expected in zip(engine(image), native(image), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_pooling_of_tokens_runs_in_torch() -> None:
    """[N, T, C] is an image without channels for torch, and none for the engine."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(16, 16), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = F.avg_pool2d(self.first(x).relu(), (1, 2))
            z: Tensor = self.last(F.adaptive_avg_pool2d(y, (3, 8)))
            return z

    x = torch.randn(3, 6, 16)
    native = native_of(Tokens().eval(), x)
    engine = ada.compile(native, x, policy="native", weights="resident")
    assert torch.equal(engine(x), native(x))


@pytest.mark.parametrize(
    ("shape", "make"),
    [
        ((4, 12, 16), lambda: _Cut(20)),  # no token is left
        ((1, (1 << 20) + 5, 2), lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))),
    ],
)
@torch.no_grad()
def test_axes_that_no_program_has_stay_in_torch(shape: tuple[int, ...], make: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    native = native_of(make(), x)
    engine = ada.compile(native, x, policy="native")
    assert torch.equal(engine(x), native(x))


class _Cut(nn.Module):
    """Two linear layers, with some of the tokens in between."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first, self.a, self.b = first, nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)[:, self.first :])


@torch.no_grad()
def test_results_are_contiguous() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 12, 16)
    native = native_of(_Cut(3), x)
    engine = ada.compile(native, x, policy="native", strict=True)
    assert engine(x).is_contiguous()
    assert torch.equal(engine(x).view(-1, 3), native(x).view(-1, 3))
