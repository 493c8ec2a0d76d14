"""The microscope judges by a task's own loss where one is given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers_microscope import prepared_of
from torch import Tensor, nn

import adalayer_native as ada
from adalayer_native import CalibrationError


class Detector(nn.Module):
    """Boxes in pixels around every position, and scores that are high at a few of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.sides = nn.Conv2d(16, 4, 1)
        self.classes = nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = self.stem(x).relu()
        middle = torch.tensor([200.0, 200.0, 300.0, 300.0]).view(1, 4, 1, 1)
        boxes = middle + 40 * self.sides(found)
        return {
            "boxes": boxes.flatten(2).transpose(1, 2),
            "scores": (4 * self.classes(found) - 3).sigmoid().flatten(2).transpose(1, 2),
        }


@pytest.fixture(scope="module")
def case() -> tuple[nn.Module, nn.Module, list[Tensor]]:
    """A detector, the same of 8 bits but for 3 in both heads, and pictures."""
    torch.manual_seed(3)
    model = Detector().eval()
    data = [torch.randn(16, 3, 8, 8) for _ in range(3)]
    captured = ada.capture(model, data[0])
    native = ada.convert(prepared_of(captured, data, 8, {"sides": 3, "classes": 3}))
    return captured, native, data


LOSS = ada.TaskLoss.of_detection({"boxes": "boxes", "scores": "scores", "channels": "last"})


def gains(found: ada.Comparison) -> dict[str, float]:
    return {item.name: item.recovered for item in found.suggestions}


def test_suggestions_are_judged_by_the_task(case: Any) -> None:
    model, native, data = case
    found = ada.compare(model, native, data, loss_fn=LOSS, progress=False)
    assert found.measure == "task_loss" and found.summary().startswith("task loss ")
    judging, rest = (torch.cat([x[k::2] for x in data]) for k in (1, 0))
    assert found.suggestions
    with torch.no_grad():

        def loss(network: Any, x: Tensor) -> float:
            return float(LOSS(network(x), model(x)).mean())

        assert found.error == pytest.approx(loss(native, rest), rel=1e-3)
        for item in (*found.suggestions, found.together):
            assert item is not None
            assert item.before == pytest.approx(loss(native, judging), rel=1e-3)
            assert item.after == pytest.approx(loss(item.apply(native), judging), rel=1e-3)


def test_the_task_decides_what_comes_first(case: Any) -> None:
    """Squares of pixels say that scores, below 1, need nothing; the task knows better."""
    model, native, data = case
    plain = ada.compare(model, native, data, progress=False)
    assert plain.measure == "squared_error"
    by_scores = ada.compare(
        model, native, data, loss_fn=LOSS.weighted(boxes=0.0), output=None, progress=False
    )
    only = {name for name, gain in gains(by_scores).items() if gain > 0.5}
    assert only == {"classes"} and by_scores.suggestions[0].name == "classes"
    by_boxes = ada.compare(model, native, data, loss_fn=LOSS.weighted(scores=0.0), progress=False)
    assert by_boxes.suggestions[0].name == "sides"
    # The table of layers is the same: it is about layers.
    for row in plain:
        assert by_scores[row.name].own == pytest.approx(row.own)


def test_any_loss_and_an_engine(case: Any) -> None:
    """A loss that is not 0 for the float model's own results counts what it grows by."""
    model, native, data = case

    def loss_fn(output: Any, target: Any) -> Tensor:
        return 5 + (output["scores"] - target["scores"]).square().mean()

    engine = ada.compile(native, data[0][:2])
    found = ada.compare(model, engine, data, loss_fn=loss_fn, progress=False)
    assert found.measure == "loss_fn" and 0 < found.error < 0.1
    assert found.suggestions[0].name == "classes" and found.suggestions[0].recovered > 0.5


def test_a_loss_that_does_not_fit(case: Any) -> None:
    model, native, data = case
    wrong = ada.TaskLoss.of({"depth": "values"})
    with pytest.raises(CalibrationError, match="has no output 'depth'"):
        ada.compare(model, native, data, loss_fn=wrong, progress=False)
    with pytest.raises(CalibrationError, match="loss_fn gives nan for"):
        ada.compare(
            model, native, data, loss_fn=lambda y, t: torch.tensor(torch.nan), progress=False
        )
