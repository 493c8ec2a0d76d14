"""Tensor trains: known answers, the layers made of them, and the way through compress."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

import adalayer_native as ada
from adalayer_native.errors import (
    CalibrationError,
    FileFormatError,
    PlanError,
    UnsupportedModelError,
)
from adalayer_native.nn import TensorTrainConv2d, TensorTrainLinear
from adalayer_native.nn.tensor_train import emptied
from adalayer_native.tensor_train import choose
from adalayer_native.tensor_train.decompose import matrix_modes, svd_train, train_of_matrix


def filled(train: TensorTrainLinear | TensorTrainConv2d) -> nn.Module:
    """A train of noise."""
    torch.manual_seed(0)
    for parameter in train.parameters():
        nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1)
    return train


def dense(train: TensorTrainLinear, columns: int) -> nn.Linear:
    """The linear layer that a train stands for."""
    exact = copy.deepcopy(train).double()
    nothing = exact(torch.zeros(columns, dtype=torch.float64))
    layer = nn.Linear(columns, len(nothing)).double()
    layer.weight.data = (exact(torch.eye(columns, dtype=torch.float64)) - nothing).T.detach()
    layer.bias.data = nothing.detach()
    return layer.float()


@pytest.mark.parametrize(
    ("rows", "columns", "ranks"),
    [(64, 96, (3,)), (64, 96, (2, 3)), (12, 30, (1,)), (8, 8, (2, 2)), (36, 4, (4,))],
)
def test_a_matrix_that_is_a_train_gives_back_its_ranks(rows, columns, ranks):
    modes = matrix_modes(rows, columns, len(ranks) + 1)
    layer = dense(filled(TensorTrainLinear(modes, ranks, True)), columns)
    cores, lost = train_of_matrix(layer.weight.detach(), modes, 1e-5)
    assert lost < 1e-5
    assert [len(core) // m for core, (m, _) in zip(cores[1:], modes[1:], strict=True)] == [*ranks]
    found = ada.tensor_train(nn.Sequential(layer), error=1e-5, clock=False, progress=False)
    assert found.layers["0"].weights <= sum(core.numel() for core in cores)
    x = torch.randn(3, 5, columns)
    torch.testing.assert_close(found.model(x), layer(x), rtol=1e-4, atol=1e-5)


def test_a_matrix_of_rank_five_has_rank_five():
    torch.manual_seed(0)
    layer = nn.Linear(96, 64)
    layer.weight.data = torch.randn(64, 5) @ torch.randn(5, 96)
    found = ada.tensor_train(nn.Sequential(layer), error=1e-4, clock=False, progress=False)
    train = found.layers["0"]
    assert train.modes == ((64, 1), (1, 96))
    assert train.ranks == (5,)
    assert train.weights == 5 * (64 + 96)
    assert train.error < 1e-4
    assert found.float_bytes > 4 * 64 * 96


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    error=st.floats(0.0, 0.9),
    seed=st.integers(0, 99),
)
def test_the_error_stays_within_what_is_allowed(sizes, error, seed):
    tensor = torch.randn(sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    cores, said = svd_train(tensor, error)
    product = cores[0]
    for core in cores[1:]:
        product = torch.tensordot(product, core, dims=1)
    assert product.shape == (1, *sizes, 1)
    lost = float((product[0, ..., 0] - tensor).norm())
    assert lost <= (error + 1e-12) * float(tensor.norm()) * (1 + 1e-9)
    assert abs(lost - said * float(tensor.norm())) < 1e-7 * float(tensor.norm())


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 300), columns=st.integers(1, 300), count=st.integers(2, 4))
def test_modes_multiply_to_the_sizes(rows, columns, count):
    modes = matrix_modes(rows, columns, count)
    products = [1, 1]
    for mode in modes:
        products = [p * size for p, size in zip(products, mode, strict=True)]
    assert products == [rows, columns]
    assert len(modes) == count


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": (1, 5), "dilation": 2, "padding": "same"},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect", "bias": False},
        {"kernel_size": 1, "stride": 2},
    ],
)
def test_a_convolution_of_full_rank_is_itself(options):
    torch.manual_seed(1)
    layer = nn.Conv2d(6, 10, **options)
    # Twice the output channels of rank 5: the train is smaller, and nothing is lost.
    layer.weight.data[5:] = layer.weight.data[:5]
    found = ada.tensor_train(nn.Sequential(layer), rank=6, clock=False, progress=False)
    x = torch.randn(2, 6, 9, 11)
    if "0" in found.layers:
        torch.testing.assert_close(found.model(x), layer(x), rtol=1e-4, atol=1e-5)
    else:
        assert "weights instead of" in found.kept["0"]
        assert layer.weight.numel() <= 6 * 11
    assert found.model(x).shape == layer(x).shape


def network() -> nn.Sequential:
    """Layers of low rank, so that a train loses nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
    for index in (2, 7):
        weight = model[index].weight.data.flatten(1)
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        model[index].weight.data = ((u[:, :4] * s[:4]) @ v[:4]).reshape_as(model[index].weight)
    return model.eval()


def pictures() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(16, 3, 8, 8, generator=generator) for _ in range(2)]


def test_through_compress_to_a_file_and_back(tmp_path: Path):
    model, data = network(), pictures()
    options = {"error": 1e-3, "clock": False, "layers": ["2", "7"]}
    result = ada.compress(
        model, data, 8, method="tensor_train", effort="low",
        allocate_options={"options": options}, progress=False,
    )  # fmt: skip
    assert result.decomposed is not None
    assert set(result.decomposed.layers) == {"2", "7"}
    assert {name.partition(".")[0] for name in result.plan.layers} == {"0", "2", "7", "9"}
    x = data[0]
    with torch.no_grad():
        want, got = model(x), result.model(x)
    assert float((want - got).norm() / want.norm()) < 0.05
    path = tmp_path / "train.safetensors"
    ada.save(result.model, path)
    for fresh in (network(), result.decomposed.model):  # with the trains, and without
        assert torch.equal(ada.restore(fresh, path)(x), got)
    engine = ada.compile(result.model, x)
    assert torch.equal(engine(x), got)
    engine.save(tmp_path / "train.ada")
    assert torch.equal(ada.load(tmp_path / "train.ada")(x), got)


def test_cores_with_axes_exchanged_run_natively():
    train = filled(TensorTrainLinear(((4, 4), (4, 8), (4, 8)), (3, 3), True))
    model = nn.Sequential(nn.Conv2d(4, 16, 1), nn.ReLU(), nn.Flatten(), train).eval()
    data = [torch.randn(8, 4, 4, 4)]
    result = ada.compress(model, data, 8, effort="low", progress=False)
    assert not result.kept_float
    assert not result.float_work
    engine = ada.compile(result.model, data[0], strict=True)
    assert torch.equal(engine(data[0]), result.model(data[0]))


def test_a_budget_in_size_is_of_the_model_before():
    result = ada.compress(
        network(), pictures(), ada.Budget(size=0.06), method="tensor_train", effort="low",
        allocate_options={"options": {"error": 1e-3, "clock": False}}, progress=False,
    )  # fmt: skip
    assert result.decomposed is not None
    state = result.model.state_dict()
    packed = sum(v.numel() * v.element_size() for v in state.values())
    assert packed <= 0.06 * result.decomposed.float_bytes
    assert packed > 0.06 * ada.allocation.float_bytes(result.decomposed.model)


def test_the_clock_decides(monkeypatch):
    model, data = network(), pictures()

    class Sleeper:
        def __init__(self, seconds: float) -> None:
            self.seconds = seconds

        def __call__(self, x: Tensor) -> None:
            choose.time.sleep(self.seconds)

    slow = {"conv": "train", "linear": "dense"}

    def engine(layer: nn.Module, x: Tensor) -> Sleeper:
        kind = "conv" if isinstance(layer, (nn.Conv2d, TensorTrainConv2d)) else "linear"
        form = "dense" if isinstance(layer, (nn.Conv2d, nn.Linear)) else "train"
        return Sleeper(2e-3 if slow[kind] == form else 1e-4)

    monkeypatch.setattr(choose, "_engine", engine)
    found = ada.tensor_train(model, data, error=1e-3, layers=["2", "7"], progress=False)
    assert "ms instead of" in found.kept["2"]
    train = found.layers["7"]
    assert train.seconds is not None
    assert train.dense_seconds is not None
    assert train.seconds < train.dense_seconds
    assert isinstance(found.model[2], nn.Conv2d)


def test_the_clock_runs_the_native_layers():
    found = ada.tensor_train(network(), pictures(), error=1e-3, layers=["7"], progress=False)
    if "7" in found.layers:
        assert found.layers["7"].seconds is not None
    else:
        assert "ms instead of" in found.kept["7"]


def test_a_layer_that_is_called_in_two_places_stays_one():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(32, 32)
            self.other = self.one

        def forward(self, x: Tensor) -> Tensor:
            return self.other(torch.relu(self.one(x)))

    model = Twice()
    found = ada.tensor_train(model, rank=2, clock=False, progress=False)
    assert isinstance(found.model.one, TensorTrainLinear)
    assert found.model.one is found.model.other
    assert model.one is model.other
    assert type(model.one) is nn.Linear


def test_layers_that_are_more_than_their_weight_stay():
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))
    model[0].register_forward_hook(lambda module, inputs, output: output)
    model[1].weight = model[2].weight
    parametrize.register_parametrization(model[3], "weight", nn.Identity())
    found = ada.tensor_train(model, rank=2, clock=False, progress=False)
    assert not found.layers
    assert found.kept == {
        "0": "it has hooks",
        "1": "another layer shares its weights",
        "2": "another layer shares its weights",
    }


def test_a_model_that_takes_the_weight_itself():
    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.layer.weight)

    with pytest.raises(UnsupportedModelError, match="takes more than its output"):
        ada.tensor_train(Takes(), [torch.randn(4, 32)], rank=2, clock=False, progress=False)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "largest error of a weight, or the largest rank"),
        ({"error": 0.0}, "above 0 and below 1, got 0.0"),
        ({"error": float("nan")}, "above 0 and below 1, got nan"),
        ({"rank": 0}, "whole number from 1, got 0"),
        ({"rank": 1.5}, "whole number from 1, got 1.5"),
        ({"rank": 4096}, "rank 4096 is above 64"),
        ({"rank": 4, "layers": ["nope"]}, "'nope' is no linear layer"),
        ({"rank": 4, "exclude": ["1"]}, "'1' is no linear layer"),
    ],
)
def test_bad_arguments(options, text):
    with pytest.raises(PlanError, match=text):
        ada.tensor_train(network(), clock=False, progress=False, **options)


def test_what_cannot_be_decomposed():
    with pytest.raises(UnsupportedModelError, match="needs the module itself"):
        ada.tensor_train(ada.capture(network(), pictures()[0]), rank=2, clock=False)
    with pytest.raises(UnsupportedModelError, match="no layer inside"):
        ada.tensor_train(nn.Sequential(nn.ReLU()), rank=2, clock=False)
    with pytest.raises(CalibrationError, match="the clock needs calibration data"):
        ada.tensor_train(network(), rank=2)
    broken = network()
    broken[7].weight.data[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="'7': its weights contain NaN"):
        ada.tensor_train(broken, rank=2, clock=False, progress=False)
    zero = nn.Sequential(nn.Linear(8, 8))
    nn.init.zeros_(zero[0].weight)
    found = ada.tensor_train(zero, rank=2, clock=False, progress=False)
    assert found.kept == {"0": "its weights are all zero"}
    noise = nn.Sequential(nn.Linear(64, 64))
    found = ada.tensor_train(noise, error=0.01, rank=2, clock=False, progress=False)
    assert "rank 2 leaves an error of" in found.kept["0"]
    with pytest.raises(PlanError, match="names layers as they are"):
        ada.compress(
            network(), pictures(), None, plan=ada.Plan({}), method="tensor_train", progress=False
        )


def test_files_whose_trains_do_not_fit(tmp_path: Path):
    result = ada.compress(
        network(), pictures(), 8, method="tensor_train", effort="low", progress=False,
        allocate_options={"options": {"rank": 4, "clock": False, "layers": ["7"]}},
    )  # fmt: skip
    good = tmp_path / "good.safetensors"
    ada.save(result.model, good)
    tensors = load_file(good)
    old = next(key for key in tensors if ".core2" in key).split(".")[1]
    for new, text in (
        (old.replace("core2_", "core3_"), r"expected cores from 1 on, got \[1, 3\]"),
        ("core2_7x9", "expected modes of a 64x512 matrix"),
    ):
        bad = tmp_path / "bad.safetensors"
        save_file({key.replace(f".{old}.", f".{new}."): v for key, v in tensors.items()}, bad)
        with pytest.raises(FileFormatError, match=text):
            ada.restore(network(), bad)
    with pytest.raises(FileFormatError, match=r"layers .*core1_64x1.* are not in"):
        ada.restore(ada.capture(network(), pictures()[0]), good)
    with pytest.raises(ValueError, match="expected modes"):
        emptied(nn.Conv2d(3, 4, 3), ((4, 1), (1, 3)), (2, 2))
