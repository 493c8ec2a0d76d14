"""Bad input to everything that decides or repairs: an error that says what, or a sound result."""

from __future__ import annotations

import pytest
import torch
from helpers_models import batches, tiny
from torch import nn

import adalayer_native as ada
from adalayer_native.allocation.repaired import RepairedWeights
from adalayer_native.repair.equalize import equalize_layers, pairs_of
from adalayer_native.repair.streams import Data

pytestmark = pytest.mark.usefixtures("own_cache")

METHODS = ["adalayer", "uniform", "optimal"]
FEW = {"widths": (2, 4, 8), "sparsities": (0.0, 0.6), "step": None, "rounds": 1, "trials": 2}


def compress(model: nn.Module, data: list, method: str, budget=None, **options) -> ada.Compressed:
    if method == "optimal":
        options["options"] = FEW
    return ada.compress(
        model.eval(),
        data,
        budget or ada.Budget(size=0.5),
        method=method,
        allocate_options=options,
        progress=False,
    )


def prepared(model: nn.Module, data: list, bits: int = 4, sparsity: float = 0.0):
    fixed = {"conv1": (bits, sparsity), "conv2": (bits, sparsity)}
    plan = ada.allocate(None, ada.Budget(bits=8), method="uniform", model=model, fixed=fixed)
    return ada.calibrate(ada.prepare(model, plan), data, progress=False)


class Overflows(nn.Module):
    """Finite weights and images, but a NaN between the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv(x)).mean((2, 3))
        return self.fc(torch.sqrt(x - 1e6))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("data", [[], [torch.zeros(0, 3, 8, 8)]])
def test_no_calibration_images(method: str, data: list) -> None:
    with pytest.raises(ada.CalibrationError, match=r"empty|at least 2"):
        compress(tiny(), data, method)


def test_no_images_for_a_repair() -> None:
    ready = prepared(tiny(), batches())
    for data in ([], [torch.zeros(0, 3, 8, 8)]):
        with pytest.raises(ada.CalibrationError, match="empty"):
            ada.repair(ready, data, progress=False)
        with pytest.raises(ada.CalibrationError, match="empty"):
            list(ada.layer_hessians(tiny(), data, progress=False))
        with pytest.raises(ada.CalibrationError, match="empty"):
            RepairedWeights(tiny(), data, ["fc"], progress=False)("fc", 4, 0.0)


@pytest.mark.parametrize("method", METHODS)
def test_activations_that_are_not_numbers(method: str) -> None:
    with pytest.raises(ada.CalibrationError, match=r"NaN|nan|finite"):
        compress(Overflows(), batches(), method, ada.Budget(bits=4))


def test_activations_that_are_not_numbers_in_a_repair() -> None:
    model, data = Overflows().eval(), [x for x, _ in batches()]
    with pytest.raises(ada.CalibrationError, match="'fc': its input contains NaN"):
        list(ada.layer_hessians(model, data, progress=False))
    with pytest.raises(ada.CalibrationError, match="'fc': its input contains NaN"):
        RepairedWeights(model, data, ["conv", "fc"], progress=False)("fc", 4, 0.0)
    plan = ada.allocate(None, ada.Budget(bits=4), method="uniform", model=model)
    with pytest.raises(ada.CalibrationError, match=r"NaN or infinite"):
        ada.calibrate(ada.prepare(model, plan), data, progress=False)


@pytest.mark.filterwarnings("ignore:all 16 calibration samples are the same")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constant_images_singular_covariances_and_a_layer_of_zeros(method: str, value) -> None:
    model = tiny()
    with torch.no_grad():
        model.conv2.weight.zero_()  # what follows is constant for every image
    for data in (batches(), [torch.full((16, 3, 8, 8), value)]):
        result = compress(model, data, method)
        assert bool(torch.isfinite(result.model(batches()[0][0])).all())
        assert result.repair is not None and result.repair.layers["conv2"].error == 0.0


@pytest.mark.parametrize("sparsity", [0.0, 0.95])
def test_the_ends_of_sparsity(sparsity: float) -> None:
    ready = prepared(tiny(), batches(), sparsity=sparsity)
    ada.repair(ready, batches(), progress=False)
    levels = ada.convert(ready).conv2.weight_packed
    assert levels.numel() > 0
    mask = ready.get_submodule("conv2").mask
    assert (mask is None) == (sparsity == 0.0)
    if mask is not None:
        assert int((~mask).sum()) == round(sparsity * mask.numel())


def test_everything_pruned_is_refused() -> None:
    with pytest.raises(ada.PlanError, match="'conv1': sparsity must be"):
        compress(tiny(), batches(), "uniform", fixed={"conv1": (4, 1.0)})
    plan = ada.allocate(None, ada.Budget(bits=4), method="uniform", model=tiny())
    with pytest.raises(ada.PlanError, match="sparsity must"):
        plan["conv1"].sparsity = 1.0
    weights = RepairedWeights(tiny(), batches(), ["conv1"], progress=False)
    with pytest.raises(ada.PlanError, match="sparsity must"):
        weights("conv1", 4, 1.0)


@pytest.mark.parametrize("method", METHODS)
def test_overrides_of_unknown_layers(method: str) -> None:
    for option in ({"fixed": {"conv9": 4}}, {"exclude": ["conv9"]}):
        with pytest.raises(ada.PlanError, match=r"unknown layer 'conv9'; closest names: .*conv"):
            compress(tiny(), batches(), method, **option)
    plan = ada.allocate(None, ada.Budget(bits=4), method="uniform", model=tiny())
    with pytest.raises(ada.PlanError, match="unknown layer 'conv9'"):
        plan["conv9"].bits = 4


def test_budgets_that_contradict_each_other() -> None:
    with pytest.raises(ada.BudgetError, match="not by both"):
        ada.Budget(size=0.1, bytes=100)
    # A fixed layer that is larger than the whole file may be.
    with pytest.raises(ada.BudgetError, match="cannot be met: the smallest reachable size"):
        compress(tiny(), batches(), "optimal", ada.Budget(size=0.3), fixed={"conv2": 8, "fc": 8})
    with pytest.raises(ada.BudgetError, match=r"cannot be met.*smallest reachable average width"):
        compress(tiny(), batches(), "optimal", ada.Budget(size=0.9, bits=0.01))


def test_equalization_of_channels_that_never_vary() -> None:
    for data in ([torch.zeros(8, 3, 8, 8)], [torch.ones(8, 3, 8, 8)]):
        model = tiny()
        with torch.no_grad():
            model.conv1.weight.zero_()
            model.conv2.weight[3].zero_()
        ready = prepared(model, data)
        assert pairs_of(ready)
        with torch.no_grad():
            before = ready(data[0])
        equalize_layers(ready, Data(ready, data, None), progress=False)
        with torch.no_grad():
            after = ready(data[0])
        assert bool(torch.isfinite(after).all())
        assert float((after - before).abs().max()) <= 0.1 * float(before.abs().max()) + 1e-6


# -- patterns of zeros --------------------------------------------------------------------------

BLOCKS = ["block16x64", "block32x64", "2:4"]


def grouped() -> nn.Sequential:
    """Depthwise, grouped, transposed and plain layers of more than one block."""
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 1, groups=4), nn.ReLU(), nn.ConvTranspose2d(64, 32, 2, 2, groups=2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4),
    ).eval()  # fmt: skip


def by_pattern(model: nn.Module, pattern: str, sparsity: float = 0.5) -> ada.Plan:
    plan = ada.allocate(None, ada.Budget(bits=4), method="uniform", model=model, progress=False)
    for name in plan:
        plan[name].sparsity = sparsity
        plan[name].pattern = pattern
    return plan


@pytest.mark.parametrize("pattern", ["unstructured", *BLOCKS])
@pytest.mark.parametrize("equalize", [False, True])
def test_groups_and_depthwise_in_every_repair(pattern: str, equalize: bool) -> None:
    model, data = grouped(), [x for x, _ in batches()]
    ready = ada.calibrate(ada.prepare(model, by_pattern(model, pattern)), data, progress=False)
    report = ada.repair(ready, data, equalize=equalize, bn_reestimate=True, progress=False)
    assert len(report.layers) == 5
    assert all(row.error <= row.plain_error * (1 + 1e-6) for row in report.layers.values())
    # The native layers find all weights on their grid, zeros included.
    native = ada.convert(ready)
    assert bool(torch.isfinite(native(data[0])).all())
    for name, hessian in ada.layer_hessians(model, data, progress=False):
        (solution,) = hessian.solutions([(3, 0.5)], pattern=pattern, passes=1)
        assert solution.error <= solution.plain_error * (1 + 1e-6), name


@pytest.mark.parametrize("pattern", ["unstructured", *BLOCKS])
def test_singular_covariances_and_zeros_by_every_pattern(pattern: str) -> None:
    model = grouped()
    with torch.no_grad():
        model[6].weight.zero_()
    for value in (0.0, 1.0):
        data = [torch.full((8, 3, 8, 8), value)]
        ready = ada.calibrate(ada.prepare(model, by_pattern(model, pattern)), data, progress=False)
        report = ada.repair(ready, data, progress=False)
        assert report.layers["6"].error == 0.0
        assert bool(torch.isfinite(ada.convert(ready)(batches()[0][0])).all())


@pytest.mark.parametrize("pattern", BLOCKS)
def test_sparsity_one_by_every_pattern_is_refused(pattern: str) -> None:
    model, data = grouped(), [x for x, _ in batches()]
    weights = RepairedWeights(model, data, ["0"], progress=False)
    with pytest.raises(ada.PlanError, match="sparsity"):
        weights("0", 4, 1.0, pattern)
    assert not bool((weights("0", 4, 0.0, pattern)[0] == 0).all())
    with pytest.raises(ada.PlanError, match="sparsity"):
        by_pattern(model, pattern, 1.0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:all 16 calibration samples are the same")
def test_patterns_of_awkward_layers_are_options() -> None:
    model, data = grouped(), batches()
    with torch.no_grad():
        model[6].weight.zero_()
    options = {**FEW, "sparsities": (0.0, 0.5), "patterns": ("unstructured", *BLOCKS)}
    for x in (data, [torch.ones(16, 3, 8, 8)]):
        plan = ada.allocate(
            None, ada.Budget(bits=2.2), method="optimal", model=model, calibration=x,
            options=options, progress=False,
        )  # fmt: skip
        assert plan.average_bits <= 2.2 + 1e-9
        result = ada.compress(model, x, None, plan=plan, progress=False)
        assert bool(torch.isfinite(result.model(data[0][0])).all())


def test_activations_that_are_not_numbers_under_a_latency_budget() -> None:
    with pytest.raises(ada.CalibrationError, match=r"NaN|nan|finite"):
        compress(Overflows(), batches(), "optimal", ada.Budget(latency=100.0))
