"""Plans: values, JSON, editing, fitting a model."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
from helpers_models import tiny
from torch import nn

from adalayer_native.errors import (
    AdaError,
    BudgetError,
    CalibrationError,
    DataError,
    FileFormatError,
    PlanError,
    UnsupportedModelError,
)
from adalayer_native.plan import LayerPlan, Plan, supported_layers


def make_plan() -> Plan:
    model = tiny()
    return Plan(
        {
            "conv1": LayerPlan("conv1", "conv2d", model.conv1.weight.numel(), 8),
            "conv2": LayerPlan("conv2", "conv2d", model.conv2.weight.numel(), 4, 0.25),
            "fc": LayerPlan("fc", "linear", model.fc.weight.numel(), None),
        },
        method="adalayer",
        hyper={"gamma": 0.5},
        scores={"conv1": {"A": 1.0, "F": 0.5, "R": 0.2, "I": 0.85}},
        measured={"calibration_loss": 0.125},
    )


def replace_unchecked(layer: LayerPlan, field: str, value: object) -> LayerPlan:
    """A copy with one value that the constructor takes and ``check`` may refuse."""
    return LayerPlan(**{**dataclasses.asdict(layer), field: value})


@pytest.mark.parametrize(
    "kind",
    [BudgetError, CalibrationError, DataError, FileFormatError, PlanError, UnsupportedModelError],
)
def test_errors_are_value_errors_too(kind: type[Exception]) -> None:
    assert issubclass(kind, AdaError)
    assert issubclass(kind, ValueError)


def test_json_round_trip(tmp_path) -> None:
    plan = make_plan()
    assert Plan.from_json(plan.to_json()) == plan
    plan.save(tmp_path / "deep" / "plan.json")
    assert Plan.load(tmp_path / "deep" / "plan.json") == plan
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["plan.json"]


def test_editing_and_average_bits() -> None:
    plan = make_plan()
    params = {name: plan[name].params for name in plan}
    expected = (params["conv1"] * 8 + params["conv2"] * 0.75 * 4 + params["fc"] * 32) / sum(
        params.values()
    )
    assert plan.average_bits == pytest.approx(expected)
    plan["conv1"].bits = 3
    assert "3" in str(plan)
    plan.validate(tiny())
    assert len(plan) == 3
    assert "fc" in plan


def test_items_are_assigned() -> None:
    plan = make_plan()
    plan["conv1"] = 6
    assert (plan["conv1"].bits, plan["conv1"].sparsity) == (6, 0.0)
    plan["conv2"] = (3, 0.5)
    assert (plan["conv2"].bits, plan["conv2"].sparsity) == (3, 0.5)
    plan["conv2"] = None
    assert plan["conv2"].bits is None
    plan["conv2"] = make_plan()["conv2"]
    assert plan["conv2"] == make_plan()["conv2"]
    assert list(plan) == ["conv1", "conv2", "fc"]
    assert Plan.from_json(plan.to_json()) == plan
    assert copy.deepcopy(plan) == plan
    with pytest.raises(PlanError, match="unknown layer 'conv9'"):
        plan["conv9"] = 4
    with pytest.raises(PlanError, match="'conv1' cannot hold a plan for layer 'conv2'"):
        plan["conv1"] = plan["conv2"]
    for wrong in (1, 9, 4.0, "4", (4, 1.0), (4, -0.1)):
        with pytest.raises(PlanError, match="'conv1'"):
            plan["conv1"] = wrong
    with pytest.raises(PlanError, match="'conv1' has no 'bit'; it has name, kind"):
        plan["conv1"].bit = 4
    assert plan["conv1"].bits == 6


def test_params_after_is_the_papers_formula() -> None:
    # Figure 6, Conv4: 147.46 K, 5.8713 % pruned, 7 bits gives 30.362 K.
    layer = LayerPlan("conv4", "conv2d", 147_456, 7, 0.058713)
    assert layer.params_after == pytest.approx(30_362, rel=1e-3)


def test_unknown_layer_names_the_closest() -> None:
    with pytest.raises(PlanError, match=r"unknown layer 'conv3'; closest names: .*conv"):
        make_plan()["conv3"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bits", 1),
        ("bits", 9),
        ("bits", 4.0),
        ("bits", True),
        ("sparsity", 1.0),
        ("sparsity", -0.1),
        ("sparsity", float("nan")),
        ("sparsity", "0.5"),
        ("activation_bits", 1),
        ("activation_bits", None),
        ("kind", "conv3d"),
        ("pattern", "2:4"),
    ],
)
def test_values_out_of_range_name_the_layer(field: str, value: object) -> None:
    plan = make_plan()
    before = copy.deepcopy(plan)
    with pytest.raises(PlanError, match=f"'conv2'.*{field}"):
        setattr(plan["conv2"], field, value)
    assert plan == before  # a refused value is not there
    broken = replace_unchecked(plan["conv2"], field, value)
    with pytest.raises(PlanError, match=f"'conv2'.*{field}"):
        Plan({"conv2": broken}).validate(tiny())
    with pytest.raises(PlanError, match=f"'conv2'.*{field}"):
        plan["conv2"] = broken


def test_plan_of_another_model() -> None:
    plan = make_plan()
    with pytest.raises(PlanError, match="unknown layer 'conv1'"):
        plan.validate(nn.Sequential(nn.Linear(3, 3)))
    plan["conv1"].params = 7
    with pytest.raises(PlanError, match=r"'conv1'.*216 weights.*7"):
        plan.validate(tiny())
    plan = make_plan()
    plan["fc"].kind = "conv2d"
    with pytest.raises(PlanError, match=r"'fc'.*'linear'"):
        plan.validate(tiny())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ('{"format": "adalayer-plan", "version": 99}', "version 1, got 99"),
        ('{"format": "adalayer-plan", "version": 1}', "must be a list"),
        ('{"format": "adalayer-plan", "version": 1, "layers": [3]}', "must be an object"),
    ],
)
def test_broken_json(text: str, message: str) -> None:
    with pytest.raises(FileFormatError, match=message):
        Plan.from_json(text)


def test_json_with_wrong_layers() -> None:
    data = json.loads(make_plan().to_json())
    twice = copy.deepcopy(data)
    twice["layers"].append(twice["layers"][0])
    with pytest.raises(FileFormatError, match="'conv1' appears twice"):
        Plan.from_json(json.dumps(twice))
    extra = copy.deepcopy(data)
    extra["layers"][0]["colour"] = 1
    with pytest.raises(FileFormatError, match="colour"):
        Plan.from_json(json.dumps(extra))
    lacking = copy.deepcopy(data)
    del lacking["layers"][1]["bits"]
    with pytest.raises(FileFormatError, match=r"'conv2' lacks .*bits"):
        Plan.from_json(json.dumps(lacking))


def test_missing_file(tmp_path) -> None:
    with pytest.raises(FileFormatError, match=r"nowhere\.json"):
        Plan.load(tmp_path / "nowhere.json")


def test_shared_module_and_shared_weight() -> None:
    layer = nn.Linear(4, 4)
    with pytest.raises(UnsupportedModelError, match="'0' and '1' are one module"):
        supported_layers(nn.Sequential(layer, layer))
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    b.weight = a.weight
    with pytest.raises(UnsupportedModelError, match="'0' and '1' share one weight"):
        supported_layers(nn.Sequential(a, b))
