"""Calibration data that says too little or cannot be meant; bits of all layers in a word."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers_models import batches, tiny
from torch import nn

import adalayer_native as ada
from adalayer_native.importance.calibration import check_calibration


def check(data: list, model: nn.Module | None = None, **options) -> None:
    check_calibration(ada.capture(model or tiny(), torch.zeros(2, 3, 8, 8)), data, **options)


def test_good_data_is_not_spoken_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(batches(2, 24))
        check(batches(2, 24, labels=False))
        check([(torch.rand(8, 3, 8, 8), torch.zeros(8, dtype=torch.long))])  # too few to tell


def test_one_sample_and_samples_that_are_all_the_same() -> None:
    x = torch.rand(1, 3, 8, 8)
    with pytest.warns(UserWarning, match="is a single sample: ranges, plan and repair"):
        check([x])
    with pytest.warns(UserWarning, match="all 12 calibration samples are the same"):
        check([x.repeat(8, 1, 1, 1), x.repeat(4, 1, 1, 1)])


def test_labels_out_of_range_name_the_batch_and_the_classes() -> None:
    first, second = batches(2, 8)
    for wrong in (4, -1):
        second[1][3] = wrong
        words = rf"batch 1: label {wrong} is out of range; the model has 4 classes.*0 to 3"
        with pytest.raises(ada.CalibrationError, match=words):
            check([first, second])
        with pytest.raises(ada.CalibrationError, match=words):
            ada.compress(tiny(), [first, second], ada.Budget(bits=4), progress=False)
        check([first, second], labels=False)  # a loss_fn knows what they mean
    second[1][3] = -100
    check([first, second])


def test_a_class_without_a_sample() -> None:
    x, y = torch.rand(64, 3, 8, 8), torch.arange(64) % 3
    with pytest.warns(UserWarning, match="has no sample of class 3: what is measured"):
        check([(x, y)])


def test_bits_of_all_layers_in_a_word() -> None:
    data = batches(2, 24, labels=False)
    result = ada.compress(tiny(), data, 8, progress=False)
    assert {entry.bits for entry in result.plan.layers.values()} == {8}
    assert {entry.sparsity for entry in result.plan.layers.values()} == {0.0}
    fixed = {"fixed": {"fc": 8}, "activation_bits": 6, "exclude": ["conv1"]}
    result = ada.compress(tiny(), data, 4, allocate_options=fixed, progress=False)
    assert [e.bits for e in result.plan.layers.values()] == [None, 4, 8]
    assert result.plan["conv2"].activation_bits == 6
    with pytest.raises(ada.PlanError, match="from 2 to 8, got 9"):
        ada.compress(tiny(), data, 9, progress=False)
    with pytest.raises(ada.PlanError, match="not both"):
        ada.compress(tiny(), data, 8, plan=result.plan, progress=False)
    with pytest.raises(ada.PlanError, match="need no search"):
        ada.compress(tiny(), data, 8, allocate_options={"candidates": 3}, progress=False)


class Best(nn.Module):
    """A network that says which class it is, and nothing that a distance is known of."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = tiny()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scores(x).argmax(1)


def test_a_result_that_nothing_can_be_learned_from_is_repaired_all_the_same() -> None:
    result = ada.compress(Best().eval(), batches(2, 24, labels=False), 8, progress=False)
    assert result.repair is not None and result.repair.learned is None
    assert all(row.held_error is not None for row in result.repair.layers.values())


class WithFloat(nn.Module):
    """A network with a layer that is kept in float."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.odd = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.odd(torch.relu(self.first(x))))).mean((2, 3))


@pytest.mark.parametrize("method", ["uniform", "adalayer", "optimal", "fixed"])
def test_a_width_that_float_layers_make_impossible_is_refused_by_every_method(method: str) -> None:
    torch.manual_seed(2)
    model = ada.capture(WithFloat().eval(), torch.rand(4, 3, 8, 8))
    exclude = {"exclude": ["odd"]}
    data = batches(2, 12, labels=False)
    options = {"bits": 2} if method == "fixed" else {}
    scores = ada.analyze(model, data, progress=False) if method == "adalayer" else None
    words = r"smallest reachable average width is \d+\.\d+ bits.*layer 'odd' stays float, 32 bits"
    with pytest.raises(ada.BudgetError, match=words):
        ada.allocate(
            scores, ada.Budget(bits=4), method=method, model=model, calibration=data,
            progress=False, **options, **exclude,
        )  # fmt: skip
