"""Every criterion on a layer whose answer is known in closed form, and its use."""

from __future__ import annotations

import math

import pytest
import torch
from helpers_models import batches, tiny
from torch import nn

from adalayer_native.allocation import Budget, allocate
from adalayer_native.errors import CalibrationError, PlanError
from adalayer_native.importance import CRITERIA, analyze
from adalayer_native.importance.batches import Batch, loss_of
from adalayer_native.importance.registry import Probe

ISSUE = {
    "accuracy",
    "accuracy_drop",
    "activation_entropy",
    "activation_sensitivity",
    "fisher",
    "gradient",
    "hessian_trace",
    "input_output_change",
    "kl",
    "kurtosis",
    "latency",
    "parameter_proportion",
    "sparsity",
    "variance",
    "weight_entropy",
    "weight_error",
    "zscore",
}


class One(nn.Module):
    """One linear layer without bias; its weight is given."""

    def __init__(self, weight: list[list[float]]) -> None:
        super().__init__()
        value = torch.tensor(weight)
        self.fc = nn.Linear(value.shape[1], value.shape[0], bias=False)
        with torch.no_grad():
            self.fc.weight.copy_(value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


def measure(name, weight, x=((0.0,),), quantized=None, target=None, loss_fn=None) -> float:
    """The criterion's value for a network of one layer."""
    if not isinstance(x, torch.Tensor):
        x = torch.tensor(x)
        x = x.expand(-1, len(weight[0])) if x.shape[1] != len(weight[0]) else x
    model = One(weight).eval()
    labels = None if target is None else torch.tensor(target)
    with torch.no_grad():
        output = model(x)
    loss = loss_of(output, output, labels, loss_fn)
    found: dict[str, float] = {}
    rounded = torch.tensor(weight if quantized is None else quantized)
    probe = Probe(
        model, {"fc": model.fc}, {"fc": rounded}, loss_fn, {}, found.__setitem__, output, loss
    )
    CRITERIA[name].measure(probe, Batch(x, labels, 0))
    assert model.fc.weight.requires_grad and model.fc.weight.grad is None
    assert not model.fc._forward_hooks
    return found["fc"]


def square(output: torch.Tensor, _: object) -> torch.Tensor:
    return output.square().mean() / 2


def plain(output: torch.Tensor, _: object) -> torch.Tensor:
    return output.mean()


EYE = [[1.0, 0.0], [0.0, 1.0]]
FOUR = [[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [1.0, 2.0]]


def test_the_issue_s_criteria_are_all_there() -> None:
    assert set(CRITERIA) == ISSUE
    for name, each in CRITERIA.items():
        assert each.name == name
        assert each.measure.__doc__ and "``" in each.measure.__doc__


def test_accuracy_is_the_loss_increase() -> None:
    # Twice the output is four times the squared loss.
    x = torch.tensor(FOUR)
    base = float(square(x, None))
    value = measure("accuracy", EYE, x, [[2.0, 0.0], [0.0, 2.0]], loss_fn=square)
    assert value == pytest.approx(3 * base)


@pytest.mark.parametrize(
    ("quantized", "drop"), [([[0.0, 1.0], [1.0, 0.0]], 100), ([[1.0, 0.0], [0.0, 0.4]], 25)]
)
def test_accuracy_drop(quantized, drop) -> None:
    for target in ([0, 1, 0, 1], None):  # the float model is right, so labels change nothing
        value = measure("accuracy_drop", EYE, torch.tensor(FOUR), quantized, target)
        assert value == drop
    with pytest.raises(CalibrationError, match="class labels of shape"):
        measure("accuracy_drop", EYE, torch.tensor(FOUR), target=FOUR, loss_fn=square)


def test_kl() -> None:
    # Softmax (3/4, 1/4) against (1/2, 1/2).
    value = measure(
        "kl", [[math.log(3), 0.0], [0.0, 0.0]], ((1.0, 0.0),), [[0.0, 0.0], [0.0, 0.0]], [1]
    )
    assert value == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-5)


def test_gradient_fisher_and_hessian() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    weight, quantized = [[1.0, 1.0]], [[1.5, 0.0]]  # the change is (0.5, -1)
    # The loss is the mean output: its gradient by w is the mean of x, (2, 3), of one image x.
    value = measure("gradient", weight, x, quantized, loss_fn=plain)
    assert value == pytest.approx(((2 * 0.5) ** 2 + 3**2) / 2)
    value = measure("fisher", weight, x, quantized, loss_fn=plain)
    images = [(1 * 0.5) ** 2 + 2**2, (3 * 0.5) ** 2 + 4**2]
    assert value == pytest.approx(sum(images) / 2 / 2)
    # Half the mean square of w x: the Hessian is the mean of x x^T, here diag(1, 4) / 2.
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    value = measure("hessian_trace", weight, x, quantized, loss_fn=square)
    assert value == pytest.approx((1 + 4) / 2 / 2 * (0.25 + 1))
    # A linear loss has no curvature.
    assert measure("hessian_trace", weight, x, quantized, loss_fn=plain) == 0


def test_hessian_trace_of_a_full_hessian() -> None:
    # H = mean of x x^T has trace mean |x|^2 whatever stands beside the diagonal.
    x = torch.tensor([[1.0, 0.5], [0.25, 2.0]])
    values = []
    model = One([[1.0, 1.0]]).eval()
    for index in range(200):
        found: dict[str, float] = {}
        probe = Probe(
            model, {"fc": model.fc}, {"fc": torch.tensor([[2.0, 1.0]])}, square, {},
            found.__setitem__, model(x).detach(), 0.0,
        )  # fmt: skip
        CRITERIA["hessian_trace"].measure(probe, Batch(x, None, index))
        values.append(found["fc"])
    exact = float(x.square().sum(1).mean()) / 2
    error = 2 * float((x[:, 0] * x[:, 1]).mean()) / 2  # sd of one vector's estimate
    assert abs(sum(values) / 200 - exact) < 4 * error / math.sqrt(200 * 8)
    assert max(values) - min(values) > 1e-3


def test_fisher_needs_labels_by_image() -> None:
    with pytest.raises(CalibrationError, match="one label per image"):
        measure("fisher", EYE, torch.tensor(FOUR), target=0, loss_fn=plain)


def test_output_and_weight_errors() -> None:
    larger = [[1.5, 0.0], [0.0, 1.5]]
    assert measure("weight_error", EYE, torch.tensor(FOUR), larger) == pytest.approx(0.25)
    assert measure("activation_sensitivity", EYE, torch.tensor(FOUR), larger) == pytest.approx(0.25)
    # Only the first input is ever on: an error of the other weight changes nothing.
    on, other = torch.tensor([[1.0, 0.0], [3.0, 0.0]]), [[1.0, 0.7], [0.0, 0.2]]
    assert measure("activation_sensitivity", EYE, on, other) == 0
    assert measure("weight_error", EYE, on, other) == pytest.approx((0.49 + 0.64) / 2)


def test_input_output_change() -> None:
    turned = [[0.6, -0.8], [0.8, 0.6]]
    for weight in (EYE, turned, [[-3.0, 0.0], [0.0, -3.0]]):
        assert measure("input_output_change", weight, torch.tensor(FOUR)) == pytest.approx(
            0, abs=1e-6
        )
    # Two orthogonal images of which the layer lets one through: K is I and diag(1, 0).
    value = measure("input_output_change", [[1.0, 0.0]], torch.tensor(EYE))
    assert value == pytest.approx(1 - 1 / math.sqrt(2))
    assert measure("input_output_change", [[1.0, 0.0]], torch.tensor([[1.0, 2.0]])) == 0


@pytest.mark.parametrize(
    ("name", "weight", "expected"),
    [
        ("zscore", [1.0] + 9 * [0.0], 0.1),  # mean 0.1, deviation 0.3
        ("zscore", [1.0, -1.0], 0.0),  # exactly one deviation away
        ("zscore", [2.0, 2.0], 0.0),
        ("weight_entropy", [1.0, 2.0, 3.0, 4.0], 2.0),
        ("weight_entropy", [5.0, 5.0], 0.0),
        ("weight_entropy", [float(v) for v in range(256)], 8.0),
        ("weight_entropy", [0.0, 0.0, 0.0, 1.0], 2 - 0.75 * math.log2(3)),
        ("variance", [1.0, -1.0, 1.0, -1.0], 1.0),
        ("variance", [3.0, 3.0], 0.0),
        ("sparsity", [1.0, 0.0, 0.001, -1.0], 0.5),
        ("sparsity", [0.0, 0.0], 1.0),
        ("kurtosis", [1.0, -1.0], 1.0),
        ("kurtosis", [float(v) for v in range(10)], 3 - 6 / 5 * 101 / 99),  # discrete uniform
        ("kurtosis", [2.0, 2.0], 0.0),
        ("parameter_proportion", [1.0, 2.0], 1.0),
    ],
)
def test_properties_of_weights(name, weight, expected) -> None:
    assert measure(name, [weight]) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_activation_entropy_is_of_the_input() -> None:
    half = torch.tensor([[1.0, 3.0], [3.0, 1.0]])
    assert measure("activation_entropy", [[1.0, 1.0]], half) == pytest.approx(1.0)
    assert measure("activation_entropy", [[1.0, 1.0]], torch.ones(2, 2)) == 0


def test_parameter_proportion_and_layers_called_twice() -> None:
    scores = analyze(tiny(), batches(1), criteria=["parameter_proportion"], progress=False)
    counts = {"conv1": 216, "conv2": 864, "fc": 192}
    for name, count in counts.items():
        assert scores[name].raw == pytest.approx(count / 1272)
    assert scores["conv2"].A == 1

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2, bias=False)
            nn.init.eye_(self.fc.weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.fc(x).clamp(max=1.0))

    x = torch.tensor([[1.0, 3.0], [3.0, 5.0]])  # entropies 1.5 bits, then 0
    scores = analyze(Twice(), [x], criteria=["activation_entropy"], progress=False)
    assert scores["fc"].raw == pytest.approx(0.75)


def test_latency_is_what_the_engine_says(monkeypatch) -> None:
    scores = analyze(tiny(), batches(2), criteria=["latency"], progress=False)
    times = {name: scores[name].raw for name in scores}
    assert all(value >= 0 for value in times.values())
    from adalayer_native.engine import latency

    known = {"conv1": 4.0, "conv2": 8.0, "fc": 2.0}
    monkeypatch.setattr(latency.LayerTimes, "column", lambda *_: (known, 1.0))
    scores = analyze(tiny(), batches(2), criteria=["latency"], progress=False)
    assert {name: s.A for name, s in scores.layers.items()} == {
        "conv1": 0.5, "conv2": 1.0, "fc": 0.25
    }  # fmt: skip


def test_several_at_once_equal_each_alone(tmp_path) -> None:
    model, data = tiny(), batches(2)
    names = [name for name in sorted(CRITERIA) if name != "latency"]
    cache = tmp_path / "cache.json"
    together = analyze(model, data, criterion="kl", criteria=names, cache=cache, progress=False)
    assert together.criterion == "kl" and set(together.criteria) == set(names)
    for name in names:
        alone = analyze(model, data, criterion=name, progress=False)
        other = together.by(name)
        assert other.criterion == name
        for layer in alone:
            assert other[layer].raw == alone[layer].raw
            assert other[layer].A == alone[layer].A
            assert abs(other[layer].I - alone[layer].I) < 1e-12
    assert together.criterion == "kl"  # by() leaves the original alone
    # The cache keeps each criterion by itself: another choice of them measures nothing again.
    measured = []
    original = nn.Conv2d.forward
    nn.Conv2d.forward = lambda self, x: (measured.append(1), original(self, x))[1]  # type: ignore[method-assign]
    try:
        again = analyze(model, data, criteria=["fisher", "kurtosis"], cache=cache, progress=False)
    finally:
        nn.Conv2d.forward = original  # type: ignore[method-assign]
    assert len(measured) == 2  # one image through two convolutions, for the FLOPs
    assert again.criteria == ("fisher", "kurtosis")
    assert again["fc"].criteria["fisher"] == together["fc"].criteria["fisher"]
    with pytest.raises(PlanError, match=r"'kl' was not measured.*fisher, kurtosis"):
        again.by("kl")


def test_falling_criteria_make_few_important() -> None:
    values = {"a": 0.1, "b": 0.5, "c": 1.0}
    assert CRITERIA["sparsity"].contribution(values) == pytest.approx({"a": 1, "b": 5 / 9, "c": 0})
    assert CRITERIA["variance"].contribution(values) == values
    assert CRITERIA["accuracy"].contribution({"a": -1.0, "b": 0.0}) == {"a": 0.0, "b": 0.0}


def test_errors_at_other_bits() -> None:
    # What was lost at the probe's bits grows with the squared error; a property of the layer
    # weighs the relative error.
    assert CRITERIA["kl"].error(2.0, 0.5, 1.0, 10.0) == 1.0
    assert CRITERIA["kurtosis"].error(2.0, 0.5, 1.0, 10.0) == pytest.approx(0.1)
    assert CRITERIA["zscore"].error(0.25, 5.0, 1.0, 10.0) == pytest.approx(0.375)
    assert CRITERIA["kl"].error(2.0, 0.0, 0.0, 0.0) == 0


@pytest.mark.parametrize("name", sorted(ISSUE))
def test_every_criterion_in_the_solver_and_as_a(name: str, tmp_path) -> None:
    model, data = tiny(), batches(2)
    plan = allocate(
        None, Budget(bits=4), method="optimal", model=model, calibration=data,
        options={"measure": name, "rounds": 0, "sparsities": (0.0,)}, tables=tmp_path,
        progress=False,
    )  # fmt: skip
    assert plan.average_bits <= 4
    errors = {n: entry["E"] for n, entry in (plan.scores or {}).items()}
    assert all(value >= 0 for value in errors.values())
    scores = analyze(model, data, criterion=name, progress=False)
    plan = allocate(scores, Budget(bits=4), model=model, progress=False)
    assert plan.average_bits <= 4
    assert {n: entry["A"] for n, entry in (plan.scores or {}).items()} == {
        n: s.A for n, s in scores.layers.items()
    }


def test_solver_follows_the_criterion(tmp_path) -> None:
    # With shares of the weights as importance the largest layer gets the most bits per error.
    model, data = tiny(), batches(2)
    settings = {"measure": "parameter_proportion", "rounds": 0, "sparsities": (0.0,)}
    plan = allocate(
        None, Budget(bits=5), method="optimal", model=model, calibration=data, options=settings,
        tables=tmp_path, progress=False,
    )  # fmt: skip
    from adalayer_native.importance.analyze import dequantized_layer

    for layer, entry in plan.layers.items():
        weight = model.get_submodule(layer).weight.detach()
        assert entry.bits is not None
        error = float((dequantized_layer(model.get_submodule(layer), entry.bits) - weight)
                      .square().sum() / weight.square().sum())  # fmt: skip
        share = weight.numel() / 1272
        assert plan.scores is not None
        assert plan.scores[layer]["E"] == pytest.approx(share * error, rel=1e-4)


def test_bad_names() -> None:
    with pytest.raises(ValueError, match="did you mean 'kurtosis'"):
        analyze(tiny(), batches(), criteria=["kurtosi"], progress=False)
    with pytest.raises(ValueError, match="sequence of names, got the text 'kl'"):
        analyze(tiny(), batches(), criteria="kl", progress=False)
    with pytest.raises(PlanError, match=r"unknown measure 'magic'.*'logits'.*or a criterion"):
        allocate(
            None, Budget(bits=4), method="optimal", model=tiny(), calibration=batches(),
            options={"measure": "magic"}, progress=False,
        )  # fmt: skip
