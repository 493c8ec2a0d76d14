"""Any inputs and outputs, from analysis to the native model; what stays float is said."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers_calls import ModelOutput, Pair, Record
from helpers_models import batches, tiny
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

import adalayer_native as ada
from adalayer_native.allocation.measured_tables import Data
from adalayer_native.allocation.sensitivity import LogitSensitivity
from adalayer_native.capture import GraphModel, Inputs
from adalayer_native.capture.model import children_of
from adalayer_native.capture.work import float_work, work_of
from adalayer_native.importance.analyze import dequantized_layer
from adalayer_native.importance.batches import Batch
from adalayer_native.importance.outputs import (
    distance,
    logits_of,
    loss_of,
    metric_name,
    picked,
    results_of,
)
from adalayer_native.measure import accuracy
from adalayer_native.training import fit


class Two(nn.Module):
    """An image and a vector in, logits and features out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.side = nn.Linear(5, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, image: Tensor, vector: Tensor, scale: Tensor | None = None) -> Any:
        features = self.conv(image).relu().mean((2, 3)) + self.side(vector)
        if scale is not None:
            features = features * scale
        return ModelOutput(logits=self.head(features.relu()), features=features)


class Tokens(nn.Module):
    """A class for every token, with attention in between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, 8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.table(ids)
        scores = x @ x.transpose(1, 2)
        if mask is not None:
            scores = scores.masked_fill(~mask.bool()[:, None], -1e9)
        x = x + scores.softmax(-1) @ self.mix(x)
        return self.head(x)


def pairs(count: int = 2, size: int = 8) -> list[tuple[Tensor, Tensor, Tensor]]:
    random = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 3, 8, 8, generator=random),
            torch.randn(size, 5, generator=random),
            torch.randint(0, 4, (size,), generator=random),
        )
        for _ in range(count)
    ]


def named(labels: bool = True) -> list[dict[str, Tensor]]:
    keys = ("image", "vector", "labels") if labels else ("image", "vector")
    return [dict(zip(keys, batch, strict=False)) for batch in pairs()]


def texts(count: int = 2, labels: bool = True) -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(2)
    found = []
    for _ in range(count):
        batch = {
            "ids": torch.randint(0, 20, (8, 6), generator=random),
            "mask": torch.arange(6) < torch.randint(3, 7, (8, 1), generator=random),
        }
        if labels:
            truth = torch.randint(0, 5, (8, 6), generator=random)
            batch["labels"] = torch.where(batch["mask"], truth, -100)
        found.append(batch)
    return found


@pytest.fixture(scope="module")
def two() -> GraphModel:
    return ada.capture(Two(), pairs()[0][:2])


@pytest.fixture(scope="module")
def tokens() -> GraphModel:
    first = texts(labels=False)[0]
    return ada.capture(Tokens(), first)


def changed(model: nn.Module, name: str, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return torch.func.functional_call(model, {f"{name}.weight": weight}, args, kwargs)


# -- which outputs, which logits ------------------------------------------------------------------


def shapes(output: Any, *rest: Any) -> list[tuple[str, int | None]]:
    return [(result.path, result.classes) for result in results_of(output, *rest)]


A, B, C = torch.randn(4, 3), torch.randn(4, 6, 5), torch.randn(4, 7, 2, 2)


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (A, [("", 1)]),
        (C, [("", 1)]),
        (B, [("", 1)]),
        (A[:, :1], [("", None)]),  # one class is none
        (A[:, 0], [("", None)]),
        ((C, A), [("0", None), ("1", 1)]),
        ((A, B), [("0", None), ("1", None)]),
        ([A, [C, A > 0]], [("0", None), ("1.0", 1)]),
        ({"features": A, "logits": C}, [("features", None), ("logits", 1)]),
        ({"out": A}, [("out", 1)]),
        ({"out": C, "aux": C}, [("out", None), ("aux", None)]),
        (ModelOutput(start_logits=A, end_logits=A), [("start_logits", 1), ("end_logits", 1)]),
        (ModelOutput(logits=B, more=(A, A)), [("logits", 2), ("more.0", None), ("more.1", None)]),
        (Record(A, C), [("scores", None), ("hidden", None)]),
        (Pair({"logits": A}, None), [("first.logits", 1)]),
        ((A, 3, None, torch.arange(3)), [("0", 1)]),
    ],
)  # fmt: skip
def test_outputs_that_count_and_their_logits(output: Any, expected: list) -> None:
    assert shapes(output) == expected


def test_classes_of_tokens_are_last() -> None:
    assert shapes(B, None, frozenset({6})) == [("", 2)]
    assert shapes(B, None, frozenset({5})) == [("", 1)]
    assert logits_of(B, None, frozenset({6})).shape == (4, 5, 6)
    # Labels may say it, too.
    assert shapes(B, None, frozenset(), torch.zeros(4, 6)) == [("", 2)]
    assert shapes(B, None, frozenset({6}), torch.zeros(4, 5)) == [("", 1)]


def test_an_output_is_picked_by_key_index_or_path() -> None:
    output = {"a": (A, [B, C]), "b": Record(A, {"c": C})}
    for pick, wanted in (("a.0", A), ("a.1.1", C), ("b.hidden.c", C), ("b.0", A), ("b.scores", A)):
        assert picked(output, pick) is wanted
    assert picked((A, B), 1) is B and picked((A, B), -1) is B and picked((A, B), "0") is A
    assert picked(ModelOutput(x=A, y=B), 1) is B and picked(Pair(A, B), "second") is B
    assert shapes(output, "a.1") == [("a.1.0", None), ("a.1.1", 1)]
    assert shapes((A, C), 0) == [("0", 1)]  # the only one that counts
    assert shapes({"logits": A, "x": A}, "x") == [("x", None)]
    with pytest.raises(ada.CalibrationError, match=r"output='c': .*\['a\.0', 'a\.1\.0', 'a\.1\.1'"):
        picked(output, "c")
    with pytest.raises(ada.CalibrationError, match=r"output=1: .*it returns one tensor"):
        picked(A, 1)
    with pytest.raises(ada.CalibrationError, match="no tensor of floating point, got Tensor"):
        results_of(A.argmax(1))


@pytest.mark.filterwarnings("always:labels")
def test_class_labels_do_not_belong_to_a_map_of_features() -> None:
    """The trunk of a detector, on a loader of labelled images."""
    images = [(torch.rand(6, 3, 8, 8), torch.randint(0, 10, (6,))) for _ in range(2)]
    trunk = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2)).eval()
    with pytest.warns(UserWarning, match=r"labels \[N\] do not belong to .* \[N, 16, 2, 2\]"):
        result = ada.compress(
            trunk, images, ada.Budget(bits=4), train_loader=images, epochs=1, progress=False
        )
    x = images[0][0]
    assert result.model(x).shape == trunk(x).shape
    y = trunk(x).detach()
    with pytest.warns(UserWarning, match="are not used"):
        assert loss_of(y + 1, y, images[0][1]) == pytest.approx(loss_of(y + 1, y, None))


def test_losses_of_several_outputs() -> None:
    before = {"logits": A, "x": C}
    after = {"logits": A + 1.0, "x": C * 1.5}  # a constant leaves a softmax alone
    assert loss_of(after, before, None) == pytest.approx(0.25)
    assert loss_of(after, before, None, pick="logits") == pytest.approx(0, abs=1e-6)
    labels = torch.tensor([0, 1, 2, 0])
    entropy = float(functional.cross_entropy(A, labels))
    assert loss_of(after, before, labels) == pytest.approx(entropy)

    def whole(output: Any, target: Tensor) -> Tensor:
        return (output["x"] - C).abs().sum() + target.sum()

    def part(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).abs().sum()

    moved = 0.5 * float(C.abs().sum())
    assert loss_of(after, before, labels, whole) == pytest.approx(moved + 3, rel=1e-4)
    assert loss_of(after, before, None, part, pick="x") == pytest.approx(moved, rel=1e-4)
    # Nothing to divide by: the mean square.
    assert loss_of(A[:, 0], torch.zeros(4), None) == pytest.approx(float(A[:, 0].square().mean()))
    # A class that is masked out in both.
    masked = torch.tensor([[1.0, 2.0, -torch.inf]])
    assert loss_of(masked, masked, None) == 0
    assert metric_name(None, labels, before) == "cross_entropy"
    assert metric_name(None, None, before) == "kl_divergence + squared_error"
    assert metric_name(None, labels, (B, A[:, 0])) == "squared_error"
    assert metric_name(None, None, before, "logits") == "kl_divergence"
    with pytest.raises(ada.CalibrationError, match=r"labels \(4,\) .* do not fit logits"):
        loss_of(after, before, labels + 2)
    with pytest.raises(ada.CalibrationError, match=r"several.*\['a_logits', 'b_logits'\].*output="):
        logits_of({"a_logits": A, "b_logits": A})
    assert logits_of({"a_logits": A, "logits": A}) is A


# -- batches --------------------------------------------------------------------------------------


def test_batches_are_digested_and_divided_whole() -> None:
    image, vector, labels = pairs()[0]
    batch = Batch(Inputs((image,), {"vector": vector, "flag": 2}), {"y": labels}, 0)
    assert batch.count == 8 and batch.tokens == frozenset()
    part = batch.part(slice(2, 5))
    assert part.count == 3 and part.x.kwargs["flag"] == 2
    assert torch.equal(part.x.kwargs["vector"], vector[2:5])
    assert torch.equal(part.target["y"], labels[2:5])
    others = [
        Batch(Inputs((image,), {"vector": vector + 1, "flag": 2}), {"y": labels}, 0),
        Batch(Inputs((image,), {"vector": vector, "flag": 3}), {"y": labels}, 0),
        Batch(Inputs((image,), {"weight": vector, "flag": 2}), {"y": labels}, 0),
        Batch(Inputs((image,), {"vector": vector, "flag": 2}), {"y": labels + 1}, 0),
    ]
    assert len({each.digest() for each in (batch, *others)}) == 5


class Once:
    """Counts how often it is read."""

    def __init__(self, data: list) -> None:
        self.data, self.read = data, 0

    def __iter__(self) -> Iterator[Any]:
        self.read += 1
        return iter(self.data)


def test_one_shot_iterators_are_refused_before_the_work() -> None:
    data, budget = batches(1), ada.Budget(bits=4)
    calls = {
        "analyze": lambda given: ada.analyze(tiny(), given, progress=False),
        "allocate": lambda given: ada.allocate(
            None, budget, method="uniform", model=tiny(), calibration=given, progress=False
        ),
        "compress": lambda given: ada.compress(tiny(), given, budget, progress=False),
        "pareto": lambda given: ada.pareto(tiny(), given, progress=False),
    }
    for call in calls.values():
        with pytest.raises(ada.CalibrationError, match=r"a generator, which .* once.*give a list"):
            call(batch for batch in data)
        given = iter(data)
        with pytest.raises(ada.CalibrationError, match=r"a list_iterator, .*DataLoader"):
            call(given)
        assert next(given) is data[0]  # nothing was taken from it
    # What reads the data once keeps it.
    model = ada.capture(tiny(), data[0][0])
    statistics = dict(ada.layer_hessians(model, iter(data), progress=False))
    assert list(statistics) == ["conv1", "conv2", "fc"]


def test_batches_of_another_kind_are_named(two: GraphModel) -> None:
    for data, message in (
        ([pairs()[0], "text"], "batch 1: .*got str"),
        ([pairs()[0], pairs()[0][:1]], "batch 1: the model takes 2 inputs, but a batch holds 1"),
        ([{"image": 3}], "batch 0: expected tensors, got int"),
    ):
        with pytest.raises(ada.CalibrationError, match=message):
            ada.analyze(two, data, progress=False)
    with pytest.raises(ada.InputError, match="vector"):
        ada.analyze(two, [{"image": pairs()[0][0]}], progress=False)


# -- analysis and allocation ----------------------------------------------------------------------


def test_analysis_of_two_inputs_and_two_outputs(two: GraphModel, tmp_path: Any) -> None:
    labelled = ada.analyze(two, pairs(), progress=False)
    assert labelled.metric == "cross_entropy" and labelled.samples == 16
    # The same batches as dictionaries have the same numbers.
    assert ada.analyze(two, named(), progress=False).as_dict() == labelled.as_dict()
    scores = ada.analyze(two, named(False), cache=tmp_path / "c.json", progress=False)
    assert scores.metric == "kl_divergence + squared_error" and scores.loss == 0
    image, vector = (torch.cat(each) for each in list(zip(*pairs(), strict=True))[:2])
    layer = two.get_submodule("side")
    weight = dequantized_layer(layer, 2)
    with torch.no_grad():
        before = two(image, vector)
    after = changed(two, "side", weight, image, vector)
    kl = float(functional.kl_div(
        after["logits"].log_softmax(1), before["logits"].log_softmax(1),
        reduction="batchmean", log_target=True,
    ))  # fmt: skip
    parts = [
        float((a - b).square().sum() / b.square().sum())
        for a, b in zip(after["features"].split(8), before["features"].split(8), strict=True)
    ]
    assert scores["side"].raw == pytest.approx(kl + sum(parts) / 2, rel=1e-4)
    again = ada.analyze(two, named(False), cache=tmp_path / "c.json", progress=False)
    assert again == scores
    # One of the outputs alone; the cache does not mix them up.
    for pick, wanted in (("features", sum(parts) / 2), ("logits", kl), (1, sum(parts) / 2)):
        alone = ada.analyze(
            two, named(False), output=pick, cache=tmp_path / "c.json", progress=False
        )
        assert alone["side"].raw == pytest.approx(wanted, rel=1e-4)
    with pytest.raises(ada.CalibrationError, match=r"output='x'.*\['logits', 'features'\]"):
        ada.analyze(two, named(), output="x", progress=False)


@pytest.mark.parametrize(
    "criterion", ["accuracy_drop", "kl", "gradient", "fisher", "hessian_trace",
                  "activation_entropy", "activation_sensitivity", "input_output_change"]
)  # fmt: skip
def test_criteria_take_any_inputs_and_the_logits(
    two: GraphModel, tokens: GraphModel, criterion: str
) -> None:
    for model, data in ((two, named()), (two, named(False)), (tokens, texts())):
        scores = ada.analyze(model, data[:1], criterion=criterion, progress=False)
        assert max(s.A for s in scores.layers.values()) in (0.0, 1.0)
    if criterion == "gradient":
        with pytest.raises(ada.CalibrationError, match=r"expected .* logits.*output="):
            ada.analyze(
                ada.capture(Squeezed(), torch.randn(2, 5)), [torch.randn(8, 5)],
                criterion=criterion, progress=False,
            )  # fmt: skip


class Squeezed(nn.Module):
    """A number per sample."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh()).squeeze(1)


def test_classes_of_tokens_with_labels(tokens: GraphModel) -> None:
    data = texts()
    scores = ada.analyze(tokens, data, progress=False)
    assert scores.metric == "cross_entropy"
    wanted = [
        float(functional.cross_entropy(
            tokens(b["ids"], b["mask"]).detach().movedim(2, 1), b["labels"]
        ))
        for b in data
    ]  # fmt: skip
    assert scores.loss == pytest.approx(sum(wanted) / 2, rel=1e-5)
    truth, right = 0, 0
    for b in data:
        found = tokens(b["ids"], b["mask"]).argmax(2)
        right += int((found == b["labels"]).sum())
        truth += int((b["labels"] >= 0).sum())
    assert accuracy(tokens, data, progress=False) == pytest.approx(100 * right / truth)
    plan = ada.allocate(
        None, ada.Budget(bits=4), method="uniform", model=tokens, calibration=data, progress=False
    )
    assert plan.measured["calibration_accuracy"] == pytest.approx(right / truth, abs=0.1)
    assert plan.measured["calibration_loss"] > 0


def test_sensitivity_is_the_distance_to_second_order(two: GraphModel) -> None:
    batch = Batch(Inputs(pairs(1, 32)[0][:2]), None, 0)
    layers = {"side": two.get_submodule("side")}
    weight = layers["side"].weight.detach()
    torch.manual_seed(1)
    moved = weight + 0.02 * torch.randn_like(weight)
    for pick in (None, "features", "logits"):
        sensitivity = LogitSensitivity(two, [batch], layers, directions=200, output=pick)
        with torch.no_grad():
            real = distance(batch.x(two), changed(two, "side", moved, *batch.x.args), pick)
        assert sensitivity.error("side", moved) == pytest.approx(float(real), rel=0.15)
    # A number per sample: there is no softmax.
    model = ada.capture(Squeezed(), torch.randn(2, 5))
    x = torch.randn(64, 5)
    last = {"last": model.get_submodule("last")}
    weight = last["last"].weight.detach() + 0.01
    found = LogitSensitivity(model, [Batch(x, None, 0)], last, directions=300)
    with torch.no_grad():
        real = distance(model(x), changed(model, "last", weight, x))
    assert found.error("last", weight) == pytest.approx(float(real), rel=0.15)


def test_allocation_over_several_outputs(two: GraphModel, own_cache: Any) -> None:
    few = {"widths": (2, 4, 8), "sparsities": (0.0,), "rounds": 1, "repaired_plans": 2}
    plan = ada.allocate(
        None, ada.Budget(bits=5), method="optimal", model=two, calibration=named(False),
        options=few, progress=False,
    )  # fmt: skip
    assert plan.average_bits <= 5 and plan.float_work == {}
    # Tables of another output, or of a loss, are others.
    kinds = len(list((own_cache / "adalayer_native").glob("errors-*")))
    for rest in ({"output": "features"}, {"loss_fn": lambda y, t: (y.logits - t.logits).abs()}):
        ada.allocate(
            None, ada.Budget(bits=5), method="optimal", model=two, calibration=named(False),
            options=few, progress=False, **rest,
        )  # fmt: skip
        kinds += 1
        assert len(list((own_cache / "adalayer_native").glob("errors-*"))) == kinds
    data = Data.split(two, pairs(), None, None)
    parts = data.repair, data.table, data.check
    assert [[b.count for b in part] for part in parts] == [[8], [4], [4]]
    frontier = ada.pareto(
        two, named(), points=4, output="logits", options={"sparsities": (0.0,)}, progress=False
    )
    assert len(frontier) >= 2
    energy = ada.plan_energy(two, plan, pairs()[0][:2])
    assert list(energy) == ["conv", "side", "head"] and energy["conv"].total > 0


def test_exported_programs_and_captures_are_models() -> None:
    model, data = tiny(), batches(1)
    shapes = ({0: torch.export.Dim("n", min=2)},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (data[0][0],), dynamic_shapes=shapes, strict=False)
    wanted = ada.analyze(model, data, progress=False)
    assert ada.analyze(program, data, progress=False) == wanted
    budget = ada.Budget(bits=4)
    plan = ada.allocate(wanted, budget, model=model, calibration=data, progress=False)
    found = ada.allocate(wanted, budget, model=program, calibration=data, progress=False)
    assert found == plan
    result = ada.compress(program, data, budget, plan=plan, progress=False)
    assert result.model(data[0][0]).shape == (16, 4)


# -- compression and training ---------------------------------------------------------------------


def test_compression_by_name_with_training_and_back(two: GraphModel, tmp_path: Any) -> None:
    data = named()
    result = ada.compress(
        two, data, ada.Budget(bits=6), method="uniform", train_loader=data, epochs=1,
        progress=False,
    )  # fmt: skip
    assert result.history.epochs[0]["accuracy"] is not None
    x = {key: data[0][key] for key in ("image", "vector")}
    with torch.no_grad():
        native, wanted = result.model(**x), two(**x)
    assert type(native) is ModelOutput and list(native) == ["logits", "features"]
    assert float((native.features - wanted.features).norm() / wanted.features.norm()) < 0.2
    written = ada.save(result.model, tmp_path / "m.safetensors")
    again = ada.restore(two, tmp_path / "m.safetensors")
    assert torch.equal(again(**x).logits, native.logits)
    assert written <= ada.estimate_bytes(two, result.plan)


def test_training_without_labels_teaches_every_output(two: GraphModel) -> None:
    plan = ada.allocate(None, ada.Budget(bits=3), method="uniform", model=two, progress=False)
    prepared = ada.calibrate(ada.prepare(two, plan), named(False), progress=False)
    with pytest.raises(ada.CalibrationError, match="no labels"):
        ada.finetune(prepared, named(False), 1, progress=False)

    def far(output: str) -> float:
        batch = named(False)[0]
        with torch.no_grad():
            return float(distance(two(**batch), prepared(**batch), output))

    with torch.no_grad():
        prepared.get_submodule("side").weight.mul_(0.5)
    before = far("features")
    ada.finetune(prepared, named(False) * 4, 4, teacher=two, lr=0.05, progress=False)
    assert far("features") < 0.5 * before
    # A loss of one's own, over one output, with whatever the loader gives as labels.
    seen = []

    def loss(output: Tensor, labels: Any) -> Tensor:
        seen.append((tuple(output.shape), sorted(labels)))
        return output.square().mean()

    data = [({**batch}, {"boxes": torch.zeros(8)}) for batch in named(False)]
    ada.finetune(prepared, data, 1, loss_fn=loss, output="features", progress=False)
    assert seen == [((8, 8), ["boxes"])] * 2
    with pytest.raises(ada.CalibrationError, match="labels of type dict and no single output"):
        ada.finetune(prepared, data, 1, progress=False)


def test_a_float_network_of_tokens_trains() -> None:
    model = Tokens()
    history = fit(model, texts(), 1, lr=0.01, progress=False)
    assert 0 <= history.epochs[0]["accuracy"] <= 1
    with pytest.raises(ada.CalibrationError, match="no labels"):
        fit(model, texts(labels=False), 1, progress=False)


# -- what stays float -----------------------------------------------------------------------------


def test_what_stays_float_is_said_once(tokens: GraphModel) -> None:
    # Per token: 8 x 8 and 8 x 5 of the layers, twice 6 x 8 of the products between.
    share = 96 / (96 + 64 + 40)
    said = (
        rf"^{100 * share:.2g} % of the multiply-accumulates stay in float: "
        r"matmul \(24 %: a product of two computed tensors\); matmul_1 \(24 %: a product"
    )
    with pytest.warns(UserWarning, match=said) as seen:
        result = ada.compress(
            tokens, texts(), ada.Budget(bits=8), method="uniform", repair=False, progress=False
        )
    assert len(seen) == 1
    assert result.kept_float == {}
    assert result.float_work is not None and result.float_work.share == pytest.approx(share)
    assert list(result.plan.float_work or {}) == ["matmul", "matmul_1"]
    assert "Stays in float: matmul (24 %" in str(result.plan)
    assert ada.Plan.from_json(result.plan.to_json()) == result.plan
    with pytest.raises(ada.UnsupportedModelError, match=r"^strict: 48 % of the multiply-accumul"):
        ada.compress(tokens, texts(), ada.Budget(bits=8), strict=True, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ada.compress(tiny(), batches(1), ada.Budget(bits=8), method="uniform", repair=False,
                     strict=True, progress=False)  # fmt: skip


class Products(nn.Module):
    """Everything that multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2)
        self.deep = nn.Conv3d(4, 2, 3, padding=1)
        self.row = nn.Conv1d(16, 6, 3, padding=1)
        self.lstm = nn.LSTM(16, 5, num_layers=2, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(16, 3, batch_first=True)
        self.projected = nn.LSTM(16, 5, proj_size=3, batch_first=True)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.fixed = nn.Parameter(torch.randn(2, 16, 4))
        self.grid = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        y = self.up(self.conv(x))
        z = self.deep(y.unsqueeze(2)).squeeze(2)
        t = z.mean(1)  # [N, 16, 16]
        a = self.attention(t, t, t, need_weights=False)[0]
        bias = self.grid(torch.eye(4))  # of parameters alone: no work of a sample
        return (
            self.row(t), a, torch.einsum("ntc,nsc->nts", t, a), torch.einsum("...ab,bd", t, t[0]),
            torch.baddbmm(t, t, a), functional.conv2d(x, x[:1, :, :3, :3]), self.lstm(t[:, :2])[0],
            self.gru(t[:, :2])[0], self.projected(t[:, :2])[0],
            torch.matmul(t.unsqueeze(1), self.fixed) + bias.sum(),
        )  # fmt: skip


def test_work_of_everything_that_multiplies() -> None:
    torch.manual_seed(0)
    model = ada.capture(Products(), torch.randn(2, 3, 8, 8))
    work: dict[str, float] = {}
    for each in work_of(model):
        work[each.name] = work.get(each.name, 0) + each.macs
    lstm = {
        f"lstm.weight_{part}_l{layer}{direction}": 2 * 4 * 5 * inputs
        for layer, part, inputs in ((0, "ih", 16), (0, "hh", 5), (1, "ih", 10), (1, "hh", 5))
        for direction in ("", "_reverse")
    }
    expected = {
        "conv": 8 * 64 * 27,
        "up": 8 * 64 * 2 * 4,
        "deep": 2 * 256 * 4 * 27,
        "row": 6 * 16 * 48,
        **lstm,
        "gru.weight_ih_l0": 2 * 3 * 3 * 16,
        "gru.weight_hh_l0": 2 * 3 * 3 * 3,
        "projected": 2 * (4 * 5 * (16 + 3) + 3 * 5),
        "attention.in_proj_weight": 16 * 16 * 48,
        "attention": 2 * 16 * 16 * 16,
        "attention.out_proj": 16 * 16 * 16,
        "matmul": 16 * 16 * 16,  # how einsum is spelled now, and bmm baddbmm
        "einsum": 16 * 16 * 16,  # (with an ellipsis: as it is)
        "bmm": 16 * 16 * 16,
        "conv2d": 36 * 27,
        "matmul_1": 2 * 16 * 16 * 4,
    }
    assert work == expected
    rest = float_work(model, {"conv", "up", "row"})
    reasons = {part.name: part.reason for part in rest.parts}
    assert rest.macs == sum(expected.values())
    assert reasons["deep"] == "there is no native 3-D convolution"
    assert reasons["projected"] == "a recurrent layer"
    assert reasons["conv2d"] == "a convolution whose weights are computed"
    assert "constant" in reasons["matmul_1"]
    assert rest.parts[0].name == "deep"
    native = {"conv", "up", "row"}
    assert rest.share == pytest.approx(1 - sum(expected[n] for n in native) / rest.macs)
    # A captured model that was sent elsewhere knows no example; its fixed sizes are there.
    again = pickle.loads(pickle.dumps(ada.capture(tiny(), batches(1)[0][0])))
    assert {each.name for each in work_of(again)} == {"conv1", "conv2", "fc"}


# -- the file -------------------------------------------------------------------------------------


class Holds(nn.Module):
    """Constants, buffers that are not saved, one weight in two places, several inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.table.weight
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.register_buffer("position", torch.randn(6, 8), persistent=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, ids: Tensor, extra: Tensor) -> dict[str, Tensor]:
        x = self.table(ids) + self.position + torch.tensor([0.5] * 8)
        x = self.second(self.first(x).relu()) * self.scale + extra[:, None]
        return {"logits": self.head(x), "x": x + self.count}


@pytest.mark.parametrize(("bits", "sparsity"), [(8, 0.0), (3, 0.5)])
def test_estimates_equal_the_file(bits: int, sparsity: float, tmp_path: Any) -> None:
    data = [{"ids": torch.randint(0, 20, (4, 6)), "extra": torch.randn(4, 8)}]
    model = ada.capture(Holds(), data[0])
    for exclude in ((), ("first",)):
        plan = ada.allocate(
            None, None, method="fixed", bits=bits, model=model, exclude=exclude, progress=False
        )
        for name in plan:
            if plan[name].bits is not None:
                plan[name].sparsity = sparsity
        prepared = ada.calibrate(ada.prepare(model, plan), data, progress=False)
        native = ada.convert(prepared)
        written = ada.save(native, tmp_path / "m.safetensors")
        assert written == (tmp_path / "m.safetensors").stat().st_size
        integers = {
            name: prepared.get_submodule(name).integers()
            for name in plan
            if plan[name].bits is not None
        }
        assert ada.estimate_bytes(model, plan, integers=integers) == written
        assert written <= ada.estimate_bytes(model, plan) <= 1.1 * written
        again = ada.restore(model, tmp_path / "m.safetensors")
        assert torch.equal(again(**data[0])["x"], native(**data[0])["x"])


def test_structures_of_torch_versions_that_call_their_parts_otherwise():
    spec = pytree.tree_structure(((1, {"a": 2}), {}))
    assert children_of(spec) == list(spec.children())
    older = SimpleNamespace(children_specs=list(spec.children()))
    assert children_of(older) == list(spec.children())
