"""Parts of a model's code that are no plain operators: regions, branches, excluded submodules."""

from __future__ import annotations

import copy
import pickle
from typing import Any, NamedTuple

import pytest
import torch
from test_capture import plan_of
from torch import Tensor, nn

import adalayer_native as ada
from adalayer_native.capture import GraphModel
from adalayer_native.capture.work import float_work
from adalayer_native.errors import InputError, UnsupportedModelError
from adalayer_native.plan import supported_layers


class Regions(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first(x)
        if self.kind == "no gradient":
            with torch.no_grad():
                y = self.last(y) * 2
            y = y + 1
        elif self.kind == "no autocast":
            with torch.autocast("cpu", enabled=False):
                y = self.last(y.float())
        elif self.kind == "nested":
            with torch.no_grad():
                z = y * 2
                with torch.autocast("cpu", enabled=False):
                    y, z = self.last(z), y.relu()
                y = y + z
        elif self.kind == "writes":
            with torch.autocast("cpu", enabled=False):
                y = self.last(y)
                y += 1
                y[:, 0] = 2.0
        elif self.kind == "bfloat16":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.last(y)
            y = y.float()
        return y


@pytest.mark.parametrize("kind", ["no gradient", "no autocast", "nested", "writes", "bfloat16"])
def test_regions_are_part_of_the_graph(kind: str) -> None:
    x = torch.randn(2, 3, 7, 8)
    model = Regions(kind).eval()
    graph = ada.capture(model, x)
    assert torch.equal(graph(x), model(x))
    assert torch.equal(graph(torch.cat([x, x])), model(torch.cat([x, x])))
    # What the region casts to another type cannot be quantized.
    assert ("last" in {str(node.target) for node in graph.graph.nodes}) == (kind != "bfloat16")


class Counter(nn.Module):
    """Keeps a state that no result depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.history = [torch.zeros(1)]
        self.remember = False
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.calls, Tensor)
        self.calls += 1
        if self.remember:
            self.history[0].add_(1)
        y: Tensor = self.conv(x)
        return y


def test_a_state_that_calls_change_is_what_it_was() -> None:
    model = Counter().eval()
    ada.capture(model, torch.randn(2, 3, 8, 8))
    assert float(model.calls) == 0.0
    model.remember = True
    with pytest.raises(UnsupportedModelError, match="mutated"):
        ada.capture(model, torch.randn(2, 3, 8, 8))
    assert float(model.calls) == 0.0 and float(model.history[0]) == 0.0


def test_reading_a_parametrized_weight_in_training_changes_nothing() -> None:
    spectral = nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 8, 3, bias=False))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(), spectral).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randn(2, 3, 8, 8)
    graph = ada.capture(model, x)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    with torch.no_grad():
        assert torch.equal(graph(x), model.eval()(x))


# -- excluded submodules --------------------------------------------------------------------------


class Picky(nn.Module):
    """What no graph can do: it branches on values and counts."""

    def __init__(self, pair: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.pair = pair

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Any:
        y = self.conv(x) * scale if float(x.mean()) > 0 else x - 1
        return (y, y.mean((2, 3))) if self.pair else y


class WithPicky(nn.Module):
    def __init__(self, pair: bool = False) -> None:
        super().__init__()
        self.first, self.picky, self.last = nn.Conv2d(3, 4, 3), Picky(pair), nn.Conv2d(4, 5, 3)

    def forward(self, x: Tensor) -> Any:
        y = self.picky(self.first(x).relu(), scale=0.5)
        if not self.picky.pair:
            return self.last(y.relu())
        return self.last(y[0].relu()), self.picky(y[0], scale=2.0)[1]


def test_branches_on_values_name_exclude() -> None:
    with pytest.raises(UnsupportedModelError, match=r"test_capture_regions\.py.*exclude="):
        ada.capture(WithPicky().eval(), torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("pair", [False, True], ids=["one result", "two results, called twice"])
@torch.no_grad()
def test_an_excluded_submodule_stays_as_it_is(pair: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    model = WithPicky(pair).eval()
    graph = ada.capture(model, x, exclude=["picky"])
    assert list(supported_layers(graph)) == ["first", "last"]
    assert "picky.conv.weight" in graph.state_dict()
    more = torch.randn(5, 3, 8, 8)
    for batch in (x, more, more[:1]):
        torch.testing.assert_close(graph(batch), model(batch), rtol=0, atol=0)
    with pytest.raises(InputError, match="expected shape"):
        graph(torch.randn(2, 3, 9, 9))
    plan = plan_of(graph)
    rest = float_work(graph, set(plan.layers))
    assert {part.name for part in rest.parts} == {"picky"}
    assert 0 < rest.share < 1
    prepared = ada.prepare(graph, plan)
    ada.calibrate(prepared, [more], progress=False)
    native = ada.convert(prepared)
    with ada.simulate(prepared) as exact:
        torch.testing.assert_close(native(more), exact(more), rtol=0, atol=0)
    for other in (copy.deepcopy(native), pickle.loads(pickle.dumps(native))):
        torch.testing.assert_close(other(more), native(more), rtol=0, atol=0)
    engine = ada.compile(native, x, policy="native", weights="resident")
    for batch in (x, more, more[:1]):
        torch.testing.assert_close(engine(batch), native(batch), rtol=0, atol=1e-6)
    for same in (copy.deepcopy(engine), pickle.loads(pickle.dumps(engine))):
        torch.testing.assert_close(same(more), engine(more), rtol=0, atol=0)
    assert engine.coverage(rounds=0).native_share < 1
    assert isinstance(graph, GraphModel) and not graph.training


@torch.no_grad()
def test_files_of_models_with_excluded_submodules(tmp_path: Any) -> None:
    x = torch.randn(4, 3, 8, 8)
    model = WithPicky().eval()
    graph = ada.capture(model, x, exclude=("picky",))
    with pytest.warns(UserWarning, match=r"stay in float: picky .*an excluded submodule"):
        result = ada.compress(graph, [x], None, plan=plan_of(graph), repair=False, progress=False)
    ada.save(result.model, tmp_path / "m.safetensors")
    again = ada.restore(ada.capture(WithPicky().eval(), x, exclude=["picky"]),
                     tmp_path / "m.safetensors")  # fmt: skip
    assert torch.equal(again(x), result.model(x))


class Odd(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.calls = kind, 0

    def forward(self, x: Tensor) -> Any:
        if self.kind == "a number":
            return x, 1.0
        if self.kind == "writes":
            return x.mul_(2)
        return x[torch.arange(len(x) * len(x)) % len(x)]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("a number", r"tensors in \(named\) tuples.*got float in a tuple"),
        ("writes", r"excluded module '1' writes into its input"),
        ("squares", "not proportional"),
    ],
)
def test_what_cannot_be_excluded_is_said(kind: str, said: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Odd(kind)).eval()
    with pytest.raises(UnsupportedModelError, match=said):
        ada.capture(model, torch.randn(2, 3, 8, 8), exclude=["1"])


def test_exclude_takes_names_of_submodules() -> None:
    model, x = WithPicky().eval(), torch.randn(2, 3, 8, 8)
    for name in ("pick", ""):
        with pytest.raises(UnsupportedModelError, match="no submodule"):
            ada.capture(model, x, exclude=[name])
    with pytest.raises(UnsupportedModelError, match="sequence of names"):
        ada.capture(model, x, exclude="picky")
    graph = ada.capture(model, x, exclude=["picky"])
    assert ada.capture(graph, exclude=["picky"]) is graph
    with pytest.raises(UnsupportedModelError, match="captured already"):
        ada.capture(graph, exclude=["first"])


class Conditional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.cond(x.sum() > 0, lambda v: self.conv(v), lambda v: v * 2, (x,))
        return y


@torch.no_grad()
def test_torch_cond_is_refused_with_its_place_or_excluded() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 3, 1), Conditional()).eval(), torch.randn(2, 3, 8, 8)
    with pytest.raises(UnsupportedModelError, match=r"torch\.cond.*exclude="):
        ada.capture(model, x)
    graph = ada.capture(model, x, exclude=["1"])
    for batch in (x, -x, torch.randn(3, 3, 8, 8)):
        assert torch.equal(graph(batch), model(batch))


class Plain(nn.Module):
    """Without parameters, and with a hook; the result is nested."""

    def forward(self, x: Tensor, factor: Any = None) -> Any:
        y = x if float(x.mean()) > 0 else -x
        return {"y": [y, None], "z": (y + 1,)}


class Around(nn.Module):
    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Conv2d(3, 4, 3), middle, nn.Conv2d(4, 4, 1)
        self.register_buffer("anchors", torch.rand(3, 2))

    def forward(self, x: Tensor) -> Any:
        found = self.middle(self.first(x), factor=None)
        return self.last(found["y"][0] + found["z"][0]), self.anchors


def converted(graph: GraphModel, x: Tensor) -> GraphModel:
    prepared = ada.prepare(graph, plan_of(graph))
    ada.calibrate(prepared, [x], progress=False)
    return ada.convert(prepared)


@torch.no_grad()
def test_nested_results_hooks_and_results_that_are_constants() -> None:
    x = torch.randn(2, 3, 8, 8)
    model = Around(Plain()).eval()
    model.middle.register_forward_hook(
        lambda module, args, result: {**result, "y": [result["y"][0].clamp(max=2) * 3, None]}
    )
    graph = ada.capture(model, x, exclude=["middle"])
    native = converted(graph, x)
    engine = ada.compile(native, x, policy="native", weights="resident")
    for batch in (x, 20 * torch.randn(3, 3, 8, 8)):
        wanted, anchors = model(batch)
        assert torch.equal(graph(batch)[0], wanted) and torch.equal(graph(batch)[1], anchors)
        for one, other in zip(engine(batch), native(batch), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    engine(x)[1].zero_()
    assert torch.equal(engine(x)[1], model.anchors)


class Named(NamedTuple):
    y: Any
    z: Any


class GivesNamed(Plain):
    def forward(self, x: Tensor, factor: Any = None) -> Any:
        return Named(**super().forward(x))


class TakesNamed(Around):
    def forward(self, x: Tensor) -> Any:
        found = self.middle(self.first(x))
        return self.last(found.y[0] + found.z[0])


@torch.no_grad()
def test_an_excluded_submodule_may_give_a_named_tuple() -> None:
    x = torch.randn(2, 3, 8, 8)
    model = TakesNamed(GivesNamed()).eval()
    graph = ada.capture(model, x, exclude=["middle"])
    assert torch.equal(graph(x), model(x))
    native = converted(graph, x)
    engine = ada.compile(native, x, policy="native", weights="resident")
    torch.testing.assert_close(engine(x), native(x), rtol=0, atol=1e-6)


def test_an_excluded_submodule_gives_tensors_of_the_whole_batch() -> None:
    class PerSample(Plain):
        def forward(self, x: Tensor, factor: Any = None) -> Any:
            return list(x)

    class Head(Around):
        def forward(self, x: Tensor) -> Any:
            return self.middle(self.first(x))

    with pytest.raises(
        UnsupportedModelError, match=r"'middle'.*nested otherwise for another batch"
    ):
        ada.capture(Head(PerSample()).eval(), torch.randn(2, 3, 8, 8), exclude=["middle"])


def test_an_excluded_submodule_is_not_called_under_autocast() -> None:
    class Half(TakesNamed):
        def forward(self, x: Tensor) -> Any:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(x)

    with pytest.raises(UnsupportedModelError, match=r"'middle' is called under torch\.autocast"):
        ada.capture(Half(GivesNamed()).eval(), torch.randn(2, 3, 8, 8), exclude=["middle"])


class Crop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.other: Any = None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x if self.other is None else self.other(x)
        return y


@pytest.mark.parametrize(
    "other",
    [
        lambda x: x[:, :, :5], lambda x: x[:, :2], lambda x: x[:1], lambda x: x.double(),
        lambda x: x.half(), lambda x: x.to("meta"), lambda x: x.add_(1), lambda x: (x, x),
    ],
    ids=["rows", "channels", "batch", "double", "half", "meta", "writes", "two results"],
)  # fmt: skip
@torch.no_grad()
def test_the_engine_checks_what_an_excluded_submodule_gives(other: Any) -> None:
    x = torch.randn(2, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), Crop(), nn.Conv2d(4, 4, 1)).eval()
    engine = ada.compile(converted(ada.capture(model, x, exclude=["2"]), x), x, policy="native")
    assert engine(x).shape == model(x).shape
    found = [
        module
        for step in engine._steps
        if hasattr(step.run, "part")
        for module in step.run.part.module.modules()
        if isinstance(module, Crop)
    ]
    for module in found:
        module.other = other
    assert found
    with pytest.raises(InputError, match=r"excluded module '2'"):
        engine(x)


class Lazy(nn.Module):
    """Initialises itself in its first call, and keeps running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.mean: Any = None
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        if self.mean is None:
            self.mean = x.mean((0, 2, 3), keepdim=True)
        y: Tensor = self.norm(x - self.mean)
        return y


@torch.no_grad()
def test_the_graphs_copy_begins_where_the_model_is_and_has_its_own_state() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Lazy(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    graph = ada.capture(model, torch.zeros(2, 3, 8, 8), exclude=["1"])
    x = torch.randn(2, 3, 8, 8)
    graph.train()(x)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model[1].mean is None
    graph = ada.capture(model, torch.zeros(2, 3, 8, 8), exclude=["1"])
    assert torch.equal(graph(x), model(x))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_weight_that_is_computed_in_an_excluded_submodule() -> None:
    inner = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(4, 4, 1)), nn.ReLU())
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), inner).eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(ada.capture(model, x, exclude=["1"])(x), model(x))


def test_an_excluded_submodule_takes_a_tensor_and_may_be_of_no_use() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.other = nn.Conv2d(3, 4, 3), Crop()

        def forward(self, x: Tensor) -> Tensor:
            self.other(x)
            y: Tensor = self.conv(x)
            return y

    class Source(nn.Module):
        def forward(self) -> Tensor:
            return torch.ones(())

    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.source = nn.Conv2d(3, 4, 3), Source()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(x) + self.source()
            return y

    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        native = converted(ada.capture(Unused().eval(), x, exclude=["other"]), x)
        assert torch.equal(ada.compile(native, x, policy="native")(x), native(x))
    with pytest.raises(UnsupportedModelError, match="a tensor among its arguments"):
        ada.capture(Adds().eval(), x, exclude=["source"])


def _picky_that_no_pickle_holds() -> nn.Module:
    class Local(nn.Module):
        pair = False

        def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
            return x * scale if x.sum() > 0 else x

    return Local()


def test_an_excluded_submodule_that_cannot_be_pickled_is_named() -> None:
    x = torch.randn(4, 3, 8, 8)
    model = WithPicky().eval()
    model.picky = _picky_that_no_pickle_holds()
    graph = ada.capture(model, x, exclude=("picky",))
    prepared = ada.prepare(graph, plan_of(graph))
    ada.calibrate(prepared, [x], progress=False)
    native = ada.convert(prepared)
    engine = ada.compile(native, x, policy="native", weights="resident")
    for made in (graph, prepared, native, engine):
        with pytest.raises(UnsupportedModelError, match=r"'picky' \(Local\) cannot be pickled"):
            pickle.dumps(made)
        with torch.no_grad():
            assert torch.equal(copy.deepcopy(made)(x), made(x))
