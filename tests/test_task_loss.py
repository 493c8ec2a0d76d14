"""Losses of several outputs: their values, their curvature, and what is said of guesses."""

from __future__ import annotations

import itertools
import math
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import adalayer_native as ada
from adalayer_native.allocation.sensitivity import LogitSensitivity
from adalayer_native.detection import box_iou
from adalayer_native.errors import CalibrationError
from adalayer_native.importance import TaskLoss, Term
from adalayer_native.importance.batches import Batch
from adalayer_native.importance.outputs import loss_key, loss_of, warn_of_guess

SCORES = Term("scores", "probabilities")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def test_classes_are_kl_per_position() -> None:
    y, z = drawn(2, 5, 3, 4), drawn(2, 5, 3, 4, seed=1)
    loss = TaskLoss.of({"output": "classes"})
    wanted = F.kl_div(z.log_softmax(1), y.log_softmax(1), reduction="none", log_target=True)
    torch.testing.assert_close(loss(z, y), wanted.sum(1).mean((1, 2)))
    torch.testing.assert_close(  # logits without positions
        loss(z[..., 0, 0], y[..., 0, 0]), wanted.sum(1)[:, 0, 0]
    )


@pytest.mark.parametrize("kind", ["binary", "probabilities"])
def test_scores_are_kl_over_what_is_seen(kind: str) -> None:
    y, z = drawn(2, 3, 2, 2), drawn(2, 3, 2, 2, seed=1)
    s, t = y.sigmoid(), z.sigmoid()
    both = (z, y) if kind == "binary" else (t, s)
    terms = s * (s / t).log() + (1 - s) * ((1 - s) / (1 - t)).log()
    seen = s.amax(1).sum((1, 2)).clamp(min=1)
    found = TaskLoss.of({"output": kind})(*both)
    torch.testing.assert_close(found, terms.sum((1, 2, 3)) / seen)


def test_boxes_count_by_their_size_and_where_something_is_seen() -> None:
    y = torch.tensor([[[0.0, 0, 10, 20], [5, 5, 9, 9]]])  # [1, 2 positions, 4]
    z = y + torch.tensor([[[1.0, 2, 0, 0], [4, 0, 0, 0]]])
    scores = torch.tensor([[[0.5, 1.0], [0.0, 0.25]]])  # the best 1 and 0.25
    spec = {"boxes": "boxes", "scores": "scores", "channels": "last"}
    loss = TaskLoss.of_detection(spec, boxes=1.0)
    found = loss({"boxes": z, "scores": scores}, {"boxes": y, "scores": scores})
    wanted = (1.0 * (0.1**2 + 0.1**2) / 4 + 0.25 * 1.0**2 / 4) / 1.25
    assert float(found) == pytest.approx(wanted, rel=1e-5)
    assert (
        float(
            loss.weighted(boxes=0.0)({"boxes": z, "scores": scores}, {"boxes": y, "scores": scores})
        )
        == 0
    )
    middle = TaskLoss.of_detection({**spec, "format": "cxcywh"}, boxes=1.0)
    y = torch.tensor([[[50.0, 50, 10, 20]]])
    found = middle(
        {"boxes": y + torch.tensor([1.0, 2, 1, 2]), "scores": torch.ones(1, 1, 1)},
        {"boxes": y, "scores": torch.ones(1, 1, 1)},
    )
    assert float(found) == pytest.approx(0.01, rel=1e-5)


def test_boxes_weigh_about_what_they_lose_of_their_iou() -> None:
    """A tenth of the side on every side, in all directions."""
    seen = torch.ones(1, 1, 1)
    loss = TaskLoss.of_detection({"boxes": "boxes", "scores": "scores", "channels": "last"})
    box = torch.tensor([[[0.0, 0, 10, 10]]])
    for signs in itertools.product((-1.0, 1.0), repeat=4):
        moved = box + torch.tensor(signs)
        found = float(loss({"boxes": moved, "scores": seen}, {"boxes": box, "scores": seen}))
        lost = 1 - float(box_iou(box[0].numpy(), moved[0].numpy())[0, 0])
        assert found == pytest.approx(lost, abs=0.07)


def test_values_count_by_their_spread() -> None:
    y = torch.stack([drawn(4, 6), 100 + 10 * drawn(4, 6, seed=1)], dim=1)  # [4, 2, 6]
    z = y + torch.tensor([0.1, 1.0]).view(1, 2, 1)
    sigma = y.movedim(1, 2).flatten(0, 1).var(0, correction=0)
    wanted = (0.1**2 / sigma[0] + 1.0 / sigma[1]) / 2
    torch.testing.assert_close(TaskLoss.of({"output": "values"})(z, y), wanted.expand(4))
    same = torch.full((2, 1, 3), 2.0)  # a channel without spread counts by its size
    assert TaskLoss.of({"output": "values"})(same * 1.1, same).tolist() == pytest.approx([0.01] * 2)


class Head(nn.Module):
    """Boxes, scores, a depth and classes from one layer each, behind a shared one."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Conv2d(3, 6, 3, padding=1)
        self.parts = nn.ModuleDict(
            {
                name: nn.Conv2d(6, n, 1)
                for name, n in {"boxes": 4, "scores": 3, "depth": 1, "kind": 5}.items()
            }
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = torch.tanh(self.trunk(x))
        found = {name: layer(y) for name, layer in self.parts.items()}
        found["boxes"] = 10 + 8 * torch.sigmoid(found["boxes"]) * torch.tensor(
            [-1.0, -1, 1, 1]
        ).view(1, 4, 1, 1)
        found["scores"] = torch.sigmoid(found["scores"] - 1)
        return found


ALL = TaskLoss.of(
    [
        SCORES,
        Term("boxes", "boxes", 0.5, where=SCORES),
        Term("depth", "values", where=SCORES),
        Term("kind", "classes", 2.0),
    ]
)


@pytest.mark.parametrize("layer", ["trunk", "parts.boxes", "parts.scores", "parts.depth"])
def test_the_prediction_is_the_loss_to_second_order(layer: str) -> None:
    """Of a small change of a weight, over 300 random vectors.

    Its relative standard deviation is at most sqrt(2 / 300), 8 %; four of them, and some for what
    is of third order.
    """
    torch.manual_seed(0)
    model, x = Head().eval(), drawn(5, 3, 6, 6)
    module = model.get_submodule(layer)
    measure = LogitSensitivity(
        model, [Batch(x, None, 0)], {layer: module}, directions=300, loss=ALL
    )
    with torch.no_grad():
        reference, weight = model(x), module.weight.clone()
        changed = weight + 0.01 * drawn(*weight.shape, seed=3)
        predicted = measure.error(layer, changed)
        module.weight.copy_(changed)
        real = float(ALL(model(x), reference).mean())
        module.weight.copy_(weight)
    assert real > 0
    assert predicted == pytest.approx(real, rel=0.4)
    assert math.isclose(float(ALL(reference, reference).sum()), 0.0, abs_tol=1e-9)


def test_what_is_kept_is_that_of_another_loss_only_if_it_computes_the_same() -> None:
    def made(power: int) -> Any:
        return lambda y, t: (y - t).abs().pow(power).mean()

    assert loss_key(made(2)) == loss_key(made(2))
    assert loss_key(made(2)) != loss_key(made(3))  # what it closes over
    first, second = lambda y, t: (y - t).abs(), lambda y, t: (y - t).abs() + 1
    assert loss_key(first) != loss_key(second)  # its code
    assert loss_key(partial(first, t=1)) != loss_key(partial(first, t=2))
    assert loss_key(ALL) != loss_key(ALL.weighted(kind=3.0)) and loss_key(ALL) == loss_key(ALL)
    assert loss_key(nn.HuberLoss(delta=1.0)) == loss_key(nn.HuberLoss(delta=1.0))


def test_labels_are_not_looked_at() -> None:
    y, z = drawn(2, 5), drawn(2, 5, seed=1)
    loss = TaskLoss.of({"output": "classes"})
    assert loss_of(z, y, torch.tensor([1, 2]), loss) == pytest.approx(float(loss(z, y).mean()))


def test_the_solver_protects_what_the_task_needs(tmp_path: Path) -> None:
    """With boxes that count for nothing, their layer gets fewer bits than with them alone."""
    torch.manual_seed(0)
    model = Head().eval()
    data = [drawn(8, 3, 6, 6, seed=k) for k in range(4)]
    options = {"weight_of": "rounded", "sparsities": [0.0], "rounds": 0, "interactions": False}
    bits = {}
    for name, loss in (
        ("boxes", TaskLoss.of([Term("boxes", "boxes", where=SCORES)])),
        ("kind", TaskLoss.of({"kind": "classes"})),
    ):
        plan = ada.allocate(
            None, ada.Budget(bits=4), method="optimal", model=model, calibration=data,
            loss_fn=loss, options=options, tables=tmp_path, progress=False,
        )  # fmt: skip
        bits[name] = {layer: entry.bits for layer, entry in plan.layers.items()}
        assert plan.scores is not None
        assert f"parts.{name}" in plan.protected()
        assert f"parts.{name}" in str(plan)
    assert bits["boxes"]["parts.boxes"] > bits["kind"]["parts.boxes"]
    assert bits["kind"]["parts.kind"] > bits["boxes"]["parts.kind"]


def test_a_loss_without_a_known_curvature_is_measured(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Head().eval()
    calls: list[Any] = []

    def depth_alone(output: dict[str, Tensor], target: Tensor) -> Tensor:
        calls.append(target)
        return (output["depth"] - target).square().flatten(1).mean(dim=1)

    x = [drawn(4, 3, 6, 6, seed=k) for k in range(4)]
    data = [(each, drawn(4, 1, 6, 6, seed=9)) for each in x]
    plan = ada.allocate(
        None, ada.Budget(bits=4), method="optimal", model=model, calibration=data,
        loss_fn=depth_alone, options={"weight_of": "rounded", "rounds": 0, "interactions": False},
        tables=tmp_path, progress=False,
    )  # fmt: skip
    scores = plan.scores or {}
    assert scores["parts.boxes"]["E"] < 1e-9  # nothing of it reaches the loss
    assert len(calls) > 4 and all(isinstance(target, Tensor) for target in calls)
    assert "calibration_accuracy" not in plan.measured


def test_repair_learns_by_the_task_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, data = Head().eval(), [drawn(16, 3, 6, 6, seed=k) for k in range(2)]
    seen: list[int] = []
    original = TaskLoss.__call__

    def counting(self: TaskLoss, output: Any, float_output: Any) -> Tensor:
        found = original(self, output, float_output)
        seen.append(int(found.requires_grad))
        return found

    monkeypatch.setattr(TaskLoss, "__call__", counting)
    ada.compress(model, data, 3, loss_fn=ALL, progress=False)
    assert sum(seen) > 0


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({}, "at least one output"),
        ({"output": "softmax"}, "unknown kind 'softmax', expected one of"),
        ({"logits": "classes"}, r"no output 'logits', its outputs are \['output'\]"),
        ({"output": "boxes"}, "5 channels on axis 1, expected 4 for 'boxes'"),
        ([Term("output", "classes", channels=(0, 1))], "1 channels on axis 1, expected at least 2"),
    ],
)
def test_outputs_that_are_not_there(outputs: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        TaskLoss.of(outputs)(drawn(2, 5, 3), drawn(2, 5, 3))


def test_scores_for_other_positions() -> None:
    loss = TaskLoss.of([Term("boxes", "boxes", where=SCORES)])
    outputs = {"boxes": drawn(1, 4, 3), "scores": drawn(1, 2, 4).sigmoid()}
    with pytest.raises(CalibrationError, match="3 positions, its scores 'scores' have 4"):
        loss(outputs, outputs)
    with pytest.raises(CalibrationError, match="where='values', expected scores"):
        Term("boxes", "boxes", where=Term("depth", "values"))


def test_a_guess_is_said() -> None:
    y = drawn(2, 24, 6, 6)
    with pytest.warns(UserWarning, match=r"\[N, 24, 6, 6\] is taken for logits of 24 classes"):
        warn_of_guess(y)
    with pytest.warns(UserWarning, match="output 1"):
        warn_of_guess((y, y))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_guess({"seg_logits": y})
        warn_of_guess(y, target=torch.zeros(2, 6, 6, dtype=torch.int64))
        warn_of_guess({"boxes": y, "scores": y})  # squared errors
        warn_of_guess(y[..., 0, 0])
        warn_of_guess(torch.zeros(2, 3, 4, 4, dtype=torch.int64))  # nothing to compare


def test_compress_says_what_it_guesses() -> None:
    torch.manual_seed(0)
    data = [drawn(4, 3, 6, 6)]
    with pytest.warns(UserWarning, match="taken for logits"):
        ada.compress(nn.Conv2d(3, 8, 3).eval(), data, 8, progress=False)  # repairs learn by it
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is compared
        ada.compress(nn.Conv2d(3, 8, 3).eval(), data, 8, repair=False, progress=False)
