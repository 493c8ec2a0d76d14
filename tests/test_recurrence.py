"""Recurrent layers: captured as linear layers, the operator's law, and modules, simulation and
engine alike."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers_engine import compiled, native_of, plan_of
from torch import Tensor, nn

import adalayer_native as ada
from adalayer_native.errors import UnsupportedModelError
from adalayer_native.files import save
from adalayer_native.nn import Recurrence
from adalayer_native.ops.recurrence import EXACT
from adalayer_native.plan import supported_layers
from adalayer_native.quantization import calibrate, convert, prepare, restore, simulate
from adalayer_native.recurrent import KINDS, cells_of, gates_of, states_of
from adalayer_native.rounding import fma_float32

exact_function = torch.ops.adalayer.exact_function.default


def sequences(batch: int = 3, steps: int = 6, width: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(batch, steps, width, generator=torch.Generator().manual_seed(seed))


def torch_operators(engine: ada.Engine) -> list[str]:
    """What the engine leaves to torch."""
    return [row.op for row in engine.coverage().rows if row.kind == "torch"]


def torch_layer(kind: str, *sizes: int, **options: Any) -> nn.RNNBase:
    options.setdefault("batch_first", True)
    if kind in ("lstm", "gru"):
        return {"lstm": nn.LSTM, "gru": nn.GRU}[kind](*sizes, **options)
    return nn.RNN(*sizes, nonlinearity=kind, **options)


class Network(nn.Module):
    """A recurrent layer between two linear ones."""

    def __init__(self, layer: nn.RNNBase, width: int = 8) -> None:
        super().__init__()
        self.before = nn.Linear(width, layer.input_size)
        self.rnn = layer
        directions = 2 if layer.bidirectional else 1
        self.after = nn.Linear(directions * layer.hidden_size, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.before(x))
        if not self.rnn.batch_first:
            return self.after(self.rnn(x.transpose(0, 1))[0]).transpose(0, 1)
        return self.after(self.rnn(x)[0])


# -- the operator ---------------------------------------------------------------------------------


def by_hand(
    kind: str, products: Tensor, weight: Tensor, multiplier: Tensor, bias: Tensor,
    grid: tuple[float, int, int], state: Tensor, cell: Tensor, reverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """States and cells behind every step: sums in int64, the rest one float32 operation at a
    time."""
    scale, zero, bits = grid
    inverse, top = np.float32(1.0) / np.float32(scale), 2**bits - 1
    h, c, units = state.clone(), cell.clone(), weight.shape[1]
    states, cells = torch.zeros(*products.shape[:2], units), torch.zeros(*products.shape[:2], units)
    steps = list(range(products.shape[1]))
    for t in reversed(steps) if reverse else steps:
        levels = np.rint(np.clip(h.numpy() * inverse, -zero, top - zero)).astype(np.int64)
        sums = torch.from_numpy(levels @ weight.numpy().astype(np.int64).T)
        own = fma_float32(sums.float(), multiplier.expand(sums.shape), bias.expand(sums.shape))
        x, y = products[:, t].split(units, -1), own.split(units, -1)
        if kind == "lstm":
            i, f, o = (exact_function(x[k] + y[k], "sigmoid") for k in (0, 1, 3))
            c = fma_float32(f, c, i * exact_function(x[2] + y[2], "tanh"))
            h = o * exact_function(c, "tanh")
        elif kind == "gru":
            r, z = (exact_function(x[k] + y[k], "sigmoid") for k in (0, 1))
            n = exact_function(fma_float32(r, y[2], x[2]), "tanh")
            h = fma_float32(z, h - n, n)
        else:
            total = x[0] + y[0]
            h = exact_function(total, "tanh") if kind == "tanh" else total.clamp(min=0.0)
        states[:, t], cells[:, t] = h, c
    return states, cells


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("units", "steps", "bits"), [(1, 1, 8), (5, 7, 2), (17, 4, 4), (70, 3, 8)])
def test_the_law(kind: str, units: int, steps: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(units)
    outputs, images = gates_of(kind) * units, 5
    half = 2 ** (bits - 1)
    weight = torch.randint(-half, half, (outputs, units), generator=generator, dtype=torch.int8)
    weight_scale = torch.rand(outputs, generator=generator) / (half * units**0.5)
    bias = torch.randn(outputs, generator=generator)
    products = torch.randn(images, steps, outputs, generator=generator)
    state, cell = torch.randn(2, images, units, generator=generator)
    grid = (0.011, 100, 8) if bits > 2 else (0.05, 30, 6)
    layer = Recurrence.from_quantized(
        weight, bits, weight_scale, bias, input_scale=grid[0], input_zero_point=grid[1],
        input_bits=grid[2], kind=kind,
    )  # fmt: skip
    multiplier = weight_scale * torch.tensor(grid[0])
    begin = (state, cell) if kind == "lstm" else (state, None)
    for reverse in (False, True):
        wanted, cells = by_hand(
            kind, products, weight, multiplier, bias, grid, state, cell, reverse
        )
        assert torch.equal(layer(products, *begin, reverse), wanted)
        if kind == "lstm":
            both = layer(products, *begin, reverse, True)
            assert torch.equal(both, torch.cat([wanted, cells], -1))
    zeros = torch.zeros(images, units)
    wanted, _ = by_hand(kind, products, weight, multiplier, bias, grid, zeros, zeros, False)
    assert torch.equal(layer(products), wanted)
    assert torch.equal(layer(products[2:3]), wanted[2:3])


def test_all_instruction_sets_and_threads() -> None:
    # Weights of all eight bits, and levels of all: sums of pairs of products exceed 16 bits.
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-128, 128, (3 * 37, 37), generator=generator, dtype=torch.int8)
    layer = Recurrence.from_quantized(
        weight,
        8,
        torch.full((3 * 37,), 0.002),
        None,
        input_scale=0.004,
        input_zero_point=9,
        kind="gru",
    )
    products = sequences(9, 20, 3 * 37)
    wanted = layer(products)
    before = ada.ops.get_num_threads(), ada.ops.active_isa()
    try:
        for isa in ada.ops.isas():
            ada.ops.force_isa(isa)
            for threads in (1, 2):
                ada.ops.set_num_threads(threads)
                assert torch.equal(layer(products), wanted), isa
    finally:
        ada.ops.set_num_threads(before[0])
        ada.ops.force_isa("auto")


def test_the_operator_is_one_for_torch() -> None:
    layer = Recurrence.rounded("lstm", nn.Linear(5, 20), 4)
    state = torch.zeros(2, 5)
    arguments = (
        sequences(2, 3, 20),
        *layer.operator()[1].values(),
        state,
        state,
        "lstm",
        True,
        True,
    )
    torch.library.opcheck(torch.ops.adalayer.recurrence.default, arguments)


def test_errors_say_what_is_wrong() -> None:
    layer = Recurrence.rounded("lstm", nn.Linear(5, 20))
    with pytest.raises(ValueError, match=r"Recurrence\(lstm, 5\): expected 20 channels on axis -1"):
        layer(sequences(2, 3, 15))
    with pytest.raises(ValueError, match="expected 3 dimensions"):
        layer(torch.zeros(2, 20))
    with pytest.raises(ValueError, match=r"a state of \[2, 5\], got \[1, 5\]"):
        layer(sequences(2, 3, 20), torch.zeros(1, 5), torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"a cell of \[2, 5\], got \[2, 4\]"):
        layer(sequences(2, 3, 20), torch.zeros(2, 5), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="cells are an LSTM's"):
        Recurrence.rounded("gru", nn.Linear(5, 15))(sequences(2, 3, 15), cells=True)
    with pytest.raises(ValueError, match="kind must be one of lstm, gru, tanh, relu, got 'rnn'"):
        Recurrence.rounded("rnn", nn.Linear(5, 5))
    with pytest.raises(ValueError, match=r"weight must be \[3 \* H, H\] for 'gru'"):
        Recurrence.rounded("gru", nn.Linear(5, 20))
    with pytest.raises(RuntimeError, match="backward through the native layer"):
        layer(sequences(2, 3, 20).requires_grad_()).sum().backward()
    damaged = copy.deepcopy(layer)
    damaged.weight_packed[0] += 1
    with pytest.raises(ValueError, match="the magic number is wrong"):
        damaged(sequences(2, 3, 20))


# -- networks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("units", "steps", "options"),
    [
        (5, 6, {}),
        (1, 3, {"bidirectional": True}),
        (16, 1, {"bidirectional": True, "num_layers": 2}),
        (9, 5, {"batch_first": False, "bias": False, "num_layers": 2, "dropout": 0.3}),
    ],
)
def test_networks(kind: str, units: int, steps: int, options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    model = Network(torch_layer(kind, 6, units, **options)).eval()
    x = sequences(steps=steps)
    native, engine = compiled(model, x)
    assert torch_operators(engine) == []
    with torch.no_grad():
        wanted = model(x)
    got = native(x)
    assert F.cosine_similarity(got.flatten(), wanted.flatten(), 0) > 0.99
    rows = [row for row in engine.coverage().rows if row.op == "recurrence"]
    gates = gates_of(kind)
    assert [row.macs for row in rows] == [gates * units * units * steps] * len(rows)
    assert all(row.bits == 8 and row.input_bits == 8 and row.bytes for row in rows)


def test_names_are_those_of_the_model() -> None:
    graph = ada.capture(
        Network(nn.LSTM(6, 5, 2, batch_first=True, bidirectional=True)), sequences()
    )
    names = [
        f"rnn.weight_{part}_l{layer}{direction}"
        for layer in (0, 1)
        for direction in ("", "_reverse")
        for part in ("ih", "hh")
    ]
    assert list(supported_layers(graph)) == ["before", *names, "after"]
    with torch.no_grad():
        assert graph(sequences(steps=11)).shape == (3, 11, 4)


def test_layers_that_no_plan_names_stay_in_torch() -> None:
    model = Network(torch_layer("gru", 6, 5)).eval()
    prepared = prepare(model, plan_of(model), sequences())
    calibrate(prepared, [sequences()], progress=False)
    with pytest.raises(UnsupportedModelError, match="its recurrent weights are float: the plan"):
        ada.compile(convert(prepared), sequences(), policy="native", strict=True)


class Ends(nn.Module):
    """What is behind the last step, of states and cells."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.before = nn.Linear(8, 6)
        self.rnn = torch_layer(kind, 6, 7, 2, bidirectional=True)
        self.after = nn.Linear(42 if kind == "lstm" else 28, 4)

    def forward(self, x: Tensor) -> Tensor:
        y, last = self.rnn(self.before(x))
        parts = [y[:, 0]]
        if isinstance(last, tuple):
            last, cell = last
            parts += [cell[-1], cell[0]]
        return self.after(torch.cat([*parts, last[-2], last[-1]], 1))


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_last_states(kind: str) -> None:
    torch.manual_seed(2)
    model = Ends(kind).eval()
    # (Node by node it cannot be judged: states and cells are one value on two grids.)
    graph = ada.capture(model, sequences())
    prepared = prepare(graph, plan_of(graph))
    calibrate(prepared, [sequences()], observer="minmax", progress=False)
    native = convert(prepared)
    engine = ada.compile(native, sequences(), policy="native")
    assert torch_operators(engine) == []
    with torch.no_grad():
        got, wanted = native(sequences()), model(sequences())
        with simulate(prepared) as exact:
            assert torch.equal(exact(sequences()), got)
    assert torch.equal(engine(sequences()), got)
    assert F.cosine_similarity(got.flatten(), wanted.flatten(), 0) > 0.99


class Begins(nn.Module):
    """States to begin with: an input, what a layer makes of one, a parameter."""

    def __init__(self, kind: str, how: str) -> None:
        super().__init__()
        self.before = nn.Linear(8, 6)
        self.state = nn.Linear(4, 5)
        self.fixed = nn.Parameter(torch.randn(1, 1, 5))
        self.rnn = torch_layer(kind, 6, 5)
        self.after = nn.Linear(5, 4)
        self.how = how

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        if self.how == "parameter":
            state = self.fixed.expand(1, x.shape[0], 5) + 0 * given.sum()
            state = self.fixed.expand(1, x.shape[0], 5)
        else:
            state = (given if self.how == "input" else self.state(given)).unsqueeze(0)
        begin: Any = (state, torch.tanh(state)) if isinstance(self.rnn, nn.LSTM) else state
        return self.after(self.rnn(self.before(x), begin)[0])


@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("how", ["layer", "input", "parameter"])
def test_states_to_begin_with(kind: str, how: str) -> None:
    torch.manual_seed(3)
    model = Begins(kind, how).eval()
    given = 2.0 * torch.randn(3, 5 if how == "input" else 4)
    native, engine = compiled(model, sequences(), given)
    with torch.no_grad():
        wanted = model(sequences(), given)
    assert F.cosine_similarity(native(sequences(), given).flatten(), wanted.flatten(), 0) > 0.99
    if kind == "gru":
        assert torch_operators(engine) == []


def test_fewer_bits_and_zeros() -> None:
    torch.manual_seed(4)
    model = Network(nn.GRU(6, 40, batch_first=True)).eval()
    graph = ada.capture(model, sequences())
    plan = plan_of(graph, 4, activation_bits=6)
    plan["rnn.weight_hh_l0"].sparsity = 0.5
    prepared = prepare(graph, plan)
    calibrate(prepared, [sequences(seed=k) for k in range(3)], progress=False)
    native = convert(prepared)
    layer = native.get_submodule("rnn.weight_hh_l0")
    assert isinstance(layer, Recurrence)
    assert (layer.bits, layer.input_bits) == (4, 6)
    engine = ada.compile(native, sequences(), policy="native")
    assert torch.equal(engine(sequences()), native(sequences()))


# -- around them ----------------------------------------------------------------------------------


def test_files(tmp_path: Any) -> None:
    torch.manual_seed(5)
    model = Network(nn.LSTM(6, 9, batch_first=True, bidirectional=True)).eval()
    native, engine = compiled(model, sequences())
    wanted = native(sequences())
    save(native, tmp_path / "model.safetensors")
    again = restore(model, tmp_path / "model.safetensors", sequences())
    assert torch.equal(again(sequences()), wanted)
    engine.save(tmp_path / "model.ada")
    assert torch.equal(ada.load(tmp_path / "model.ada")(sequences()), wanted)
    copied = pickle.loads(pickle.dumps(native))
    assert torch.equal(copied(sequences()), wanted)
    assert torch.equal(copy.deepcopy(native)(sequences()), wanted)


def test_any_number_of_steps() -> None:
    class Signal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(8, 8, 3, 2, 1)
            self.rest = Network(nn.GRU(6, 9, batch_first=True, bidirectional=True))

        def forward(self, x: Tensor) -> Tensor:
            return self.rest(self.conv(x).transpose(1, 2))

    torch.manual_seed(6)
    x = sequences(steps=8, width=20)
    native = native_of(ada.capture(Signal().eval(), x), x)
    engine = ada.compile(native, x, policy="native", sizes={"x": {2: (4, 60)}})
    for length in (4, 60, 33):
        x = sequences(steps=8, width=length)
        assert torch.equal(engine(x), native(x))


def test_prepared_copies_and_training() -> None:
    torch.manual_seed(7)
    model = Network(nn.LSTM(6, 5, batch_first=True)).eval()
    graph = ada.capture(model, sequences())
    prepared = prepare(graph, plan_of(graph, 4))
    calibrate(prepared, [sequences()], progress=False)
    with torch.no_grad():
        wanted = prepared(sequences())
        for other in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
            assert torch.equal(other(sequences()), wanted)
            # Its own layer goes from step to step, and not the original's.
            other.get_submodule("rnn.weight_hh_l0").weight.zero_()
            assert not torch.equal(other(sequences()), wanted)
        assert torch.equal(prepared(sequences()), wanted)
    prepared.train()
    prepared(sequences()).square().sum().backward()
    for name in ("rnn.weight_ih_l0", "rnn.weight_hh_l0"):
        assert prepared.get_submodule(name).weight.grad.abs().sum() > 0


def test_gradients_are_those_of_torch() -> None:
    torch.manual_seed(8)
    model = Network(nn.GRU(6, 5, batch_first=True)).eval()
    graph = ada.capture(model, sequences())
    model(sequences()).square().sum().backward()
    wanted = model.rnn.weight_hh_l0.grad.clone()
    graph.zero_grad()
    graph(sequences()).square().sum().backward()
    found = graph.get_submodule("rnn.weight_hh_l0").weight.grad
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


def test_repair_and_scores() -> None:
    torch.manual_seed(9)
    model = Network(nn.LSTM(6, 12, batch_first=True)).eval()
    data = [sequences(16, seed=k) for k in range(4)]
    graph = ada.capture(model, data[0])
    scores = ada.analyze(graph, data, criterion="weight_error", progress=False)
    assert "rnn.weight_hh_l0" in scores.layers
    prepared = prepare(graph, plan_of(graph, 3))
    calibrate(prepared, data, progress=False)
    with torch.no_grad():
        wanted = model(data[0])
        before = (prepared(data[0]) - wanted).square().sum()
        report = ada.repair(prepared, data, progress=False)
        assert set(report.layers) == set(supported_layers(graph))
        assert (prepared(data[0]) - wanted).square().sum() < before
        native = convert(prepared)
        with simulate(prepared) as exact:
            assert torch.equal(exact(data[0]), native(data[0]))


def test_a_layer_that_stays_in_float() -> None:
    torch.manual_seed(10)
    model = Network(nn.LSTM(6, 5, batch_first=True)).eval()
    graph = ada.capture(model, sequences())
    plan = plan_of(graph)
    del plan.layers["rnn.weight_hh_l0"]
    prepared = prepare(graph, plan)
    calibrate(prepared, [sequences()], progress=False)
    native = convert(prepared)
    with torch.no_grad():
        wanted = native(sequences())
        assert F.cosine_similarity(wanted.flatten(), model(sequences()).flatten(), 0) > 0.99
        engine = ada.compile(native, sequences(), policy="native")
        assert torch.allclose(engine(sequences()), wanted, atol=0.05)
    assert {"adalayer.recurrent_states.default", "adalayer.recurrent_cells.default"} <= set(
        torch_operators(engine)
    )


@pytest.mark.parametrize(
    "layer", [lambda: nn.LSTM(6, 5, batch_first=True, proj_size=3), lambda: Weights()]
)
def test_what_stays_in_torch(layer: Callable[[], nn.Module]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before = nn.Linear(8, 6)
            self.rnn = layer()

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.rnn(self.before(x))[0]
            return found

    model = Model().eval()
    graph = ada.capture(model, sequences())
    assert list(supported_layers(graph)) == ["before"]
    engine = ada.compile(native_of(graph, sequences()), sequences(), policy="native")
    assert any("lstm" in name for name in torch_operators(engine))


class Weights(nn.Module):
    """An LSTM whose weights depend on its input."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 5, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        factor = 1 + 0 * x.mean()
        weights = [factor * weight for weight in self.lstm._flat_weights]
        zeros = torch.zeros(1, x.shape[0], 5)
        return torch._VF.lstm(x, (zeros, zeros), weights, True, 1, 0.0, False, False, True)


def test_packed_sequences_are_refused() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(8, 5, batch_first=True)
            self.after = nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            lengths = torch.full((x.shape[0],), x.shape[1])
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
            return self.after(self.rnn(packed)[1][0][-1])

    with pytest.raises(UnsupportedModelError):
        ada.capture(Model().eval(), sequences())


def test_onnx_has_no_such_layer(tmp_path: Any) -> None:
    pytest.importorskip("onnx")
    graph = ada.capture(Network(nn.GRU(6, 5, batch_first=True)).eval(), sequences())
    native = native_of(graph, sequences())
    with pytest.raises(UnsupportedModelError, match="recurrence"):
        ada.to_onnx(native, tmp_path / "model.onnx", sequences())


def test_comparing_leaves_recurrent_products_out() -> None:
    model = Network(nn.GRU(6, 5, batch_first=True)).eval()
    graph = ada.capture(model, sequences())
    native = native_of(graph, sequences())
    found = ada.compare(graph, native, [sequences()], progress=False)
    names = {row.name for row in found}
    assert "rnn.weight_ih_l0" in names and "rnn.weight_hh_l0" not in names


@pytest.mark.parametrize("kind", KINDS)
def test_two_steps_are_torchs_layer(kind: str) -> None:
    layer = torch_layer(kind, 6, 5)
    x = sequences(width=6)
    products = F.linear(x, layer.weight_ih_l0, layer.bias_ih_l0)

    def product(h: Tensor) -> Tensor:
        return F.linear(h, layer.weight_hh_l0, layer.bias_hh_l0)

    with torch.no_grad():
        wanted = layer(x)[0]
        entering = states_of(products, product, None, None, kind, False)
        rest = (None, None, kind, False, False)
        torch.testing.assert_close(cells_of(products, product(entering), *rest), wanted)
        exact = cells_of(products, product(entering), *rest, EXACT)
        torch.testing.assert_close(exact, wanted, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(entering[:, 1:], wanted[:, :-1])
