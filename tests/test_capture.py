"""The front end: kinds of models that a symbolic trace gets wrong or refuses."""

from __future__ import annotations

import copy
import io
import pickle
from collections import namedtuple
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import utils
from torch.nn.utils import parametrizations, prune

import adalayer_native as ada
from adalayer_native.capture import GraphModel, captured, exporting
from adalayer_native.capture import vocabulary as table
from adalayer_native.engine import compiler  # noqa: F401  (it fills the table of rules)
from adalayer_native.engine.lower import RULES
from adalayer_native.errors import InputError, UnsupportedModelError
from adalayer_native.plan import LayerPlan, Plan, layer_kind, supported_layers


def plan_of(model: nn.Module, bits: int = 8) -> Plan:
    return Plan(
        {
            name: LayerPlan(name, layer_kind(layer), layer.weight.numel(), bits)
            for name, layer in supported_layers(model).items()
        }
    )


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def compressed(model: nn.Module, *inputs: Any, limit: float = 0.05) -> GraphModel:
    """All of it at 8 bits, checked on the way; the native model."""
    model.eval()
    # torch's fused attention adds up in another order, and only outside training.
    torch.backends.mha.set_fastpath_enabled(False)
    graph = ada.capture(model, inputs)
    prepared = ada.prepare(graph, plan_of(graph))
    ada.calibrate(prepared, [inputs], observer="minmax", progress=False)
    native = ada.convert(prepared)
    with torch.no_grad():
        wanted = model(*inputs)
        assert torch.equal(graph(*inputs), wanted)
        with ada.simulate(prepared) as exact:
            assert torch.equal(native(*inputs), exact(*inputs))
        assert distance(native(*inputs), wanted) < limit
        engine = ada.compile(native, inputs, policy="native", weights="resident")
        assert distance(engine(*inputs), native(*inputs)) < 1e-2
    return native


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(4, 3, 12, 12)


class Blocks(nn.Module):
    """Modules under their names, and a forward."""

    def __init__(self, forward: Any, **modules: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(1)
        for name, module in modules.items():
            self.add_module(name, module)
        self.run = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


def conv(inputs: int = 3, outputs: int = 8, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)


# -- what a forward does --------------------------------------------------------------------------


def test_write_after_another_reader(x: Tensor) -> None:
    def forward(m: Any, t: Tensor) -> Tensor:
        h = m.a(t)
        return m.head(m.b(h) + m.relu(h))

    compressed(
        Blocks(forward, a=conv(), b=conv(8), relu=nn.ReLU(inplace=True), head=conv(8, 4, 1)), x
    )


def test_writes_through_views(x: Tensor) -> None:
    def forward(m: Any, t: Tensor) -> Tensor:
        h = m.a(t).clone()
        h[:, :2] = 0.5
        h[:, 2:4].mul_(2.0)
        return m.head(F.relu(h))

    compressed(Blocks(forward, a=conv(), head=conv(8, 4, 1)), x)


def test_forward_that_reads_a_parameter_of_a_folded_layer(x: Tensor) -> None:
    def forward(m: Any, t: Tensor) -> Tensor:
        return m.head(F.relu(m.norm(m.a(t))) * m.a.bias.view(1, -1, 1, 1))

    model = Blocks(forward, a=conv(), norm=nn.BatchNorm2d(8), head=conv(8, 4, 1))
    model.norm.running_mean.normal_()
    native = compressed(model, x)
    assert any(key.startswith("constants.") for key in native.state_dict())


def _net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))


def _doubled(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out * 2.0


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_hooks_keep_their_effect(x: Tensor, place: int) -> None:
    model = _net().eval()
    plain = model(x)
    model[place].register_forward_hook(_doubled)
    assert not torch.equal(model(x), plain)
    compressed(model, x)


def test_pre_hooks_and_patched_forwards_keep_their_effect(x: Tensor) -> None:
    model = _net()
    model[3].register_forward_pre_hook(lambda module, args: (args[0] * 2.0,))
    original = model[0].forward
    model[0].forward = lambda t: original(t) * 2.0
    compressed(model, x)


@pytest.mark.parametrize("kind", ["pruned", "after backward", "weight", "spectral", "parametrized"])
def test_the_weight_in_effect_is_quantized(x: Tensor, kind: str) -> None:
    model = _net()
    if kind in ("pruned", "after backward"):
        prune.l1_unstructured(model[0], "weight", 0.5)
        if kind == "after backward":
            model(x).sum().backward()
    elif kind == "weight":
        with pytest.warns(FutureWarning):
            utils.weight_norm(model[0])
    elif kind == "spectral":
        utils.spectral_norm(model[0])
    else:
        parametrizations.weight_norm(model[0])
    native = compressed(model, x)
    assert sorted(supported_layers(ada.capture(model, x))) == ["0", "3"]
    zeros = float((native.get_submodule("0").weight_int() == 0).float().mean())
    assert (zeros >= 0.5) == (kind in ("pruned", "after backward"))


def test_layers_are_what_is_computed() -> None:
    class Padded(nn.Conv2d):
        def forward(self, t: Tensor) -> Tensor:
            return F.conv2d(F.pad(t, (0, 1, 0, 1)), self.weight, self.bias, self.stride)

    class NormAct(nn.BatchNorm2d):
        def forward(self, t: Tensor) -> Tensor:
            return F.silu(super().forward(t))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(2)
            self.stem, self.norm = Padded(3, 8, 3, stride=2), NormAct(8)
            self.kernel = nn.Parameter(torch.randn(8, 8, 3, 3) / 8)
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
            self.table = nn.Parameter(torch.randn(8, 5))

        def forward(self, t: Tensor) -> Tensor:
            t = F.conv2d(self.norm(self.stem(t)), self.kernel, padding=1).flatten(2).mT
            t = self.attn(t, t, t, need_weights=False)[0]
            return t @ self.table

    x = torch.randn(3, 3, 8, 8)
    model = Net().eval()
    graph = ada.capture(model, x)
    names = ["stem", "kernel", "attn.in_proj_weight", "attn.out_proj", "table"]
    assert list(supported_layers(graph)) == names
    layout = ada.prepare(graph, plan_of(graph)).meta["layers"]
    assert layout["stem"]["batch_norm"] == "norm"
    compressed(model, x, limit=0.1)


def test_modules_below_others_and_weights_that_are_computed(x: Tensor) -> None:
    class NormAct(nn.BatchNorm2d):
        def __init__(self, channels: int) -> None:
            super().__init__(channels)
            self.drop, self.act = nn.Dropout(0.1), nn.PReLU(channels)

        def forward(self, t: Tensor) -> Tensor:
            return self.act(self.drop(super().forward(t)))

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Conv2d(8, 8, 3, padding=1, bias=False)

        def forward(self, t: Tensor) -> Tensor:
            return self.p(t) + F.conv2d(t, self.p.weight * 0.5, padding=1)

    model = nn.Sequential(conv(), NormAct(8), Inner(), conv(8, 4, 1))
    native = compressed(model, x, limit=0.1)
    assert list(supported_layers(ada.capture(model, x))) == ["0", "2.p", "2.conv2d", "3"]
    assert torch.equal(pickle.loads(pickle.dumps(native))(x), native(x))


def test_one_dimensional_convolutions_are_images_of_height_one() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv1d(2, 8, 5, padding=2), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 8, 3, stride=2),
        nn.BatchNorm1d(8), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip
    x = torch.randn(4, 2, 40)
    native = compressed(model, x)
    engine = ada.compile(native, x, policy="native", weights="resident")
    assert engine.native_share == 1.0
    called = [str(n.target) for n in native.graph.nodes if n.op == "call_module"]
    assert called[:2] == ["0", "3"]  # nothing between them, batch norms and activations folded
    prepared = ada.prepare(model.eval(), plan_of(ada.capture(model, x)), x)
    assert [e["batch_norm"] for e in prepared.meta["layers"].values()] == ["1", "4", None]


def test_batch_norm_of_rows_behind_a_linear_layer_folds() -> None:
    class Rows(nn.Module):  # as LeViT writes it
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm, self.head = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)

        def forward(self, t: Tensor) -> Tensor:
            y = self.fc(t)
            return self.head(F.hardswish(self.norm(y.flatten(0, 1)).reshape_as(y)))

    torch.manual_seed(0)
    x = torch.randn(3, 5, 6)
    model = Rows().eval()
    model.norm.running_mean.normal_()
    graph = ada.capture(model, x)
    assert ada.prepare(graph, plan_of(graph)).meta["layers"]["fc"]["batch_norm"] == "norm"
    compressed(model, x)


# -- inputs and outputs ---------------------------------------------------------------------------


def test_integers_are_never_quantized() -> None:
    torch.manual_seed(0)
    pictures = torch.randint(0, 256, (4, 3, 12, 12), dtype=torch.uint8)
    net = Blocks(lambda m, t: m.h(F.relu(m.c(t.float() / 255))), c=conv(), h=conv(8, 4, 1))
    compressed(net, pictures)
    prepared = ada.prepare(net, plan_of(net))  # captured with a guess, which is of floats
    ada.calibrate(prepared, [pictures], progress=False)
    with torch.no_grad():
        assert distance(ada.convert(prepared)(pictures), net(pictures)) < 0.05

    def text(m: Any, ids: Tensor) -> Tensor:
        return m.f(F.relu(m.c(m.e(ids).unsqueeze(1))).amax((2, 3)))

    words = Blocks(text, e=nn.Embedding(100, 16), c=nn.Conv2d(1, 8, (3, 16)), f=nn.Linear(8, 4))
    compressed(words, torch.randint(0, 100, (4, 20)))

    def unpooled(m: Any, t: Tensor) -> Tensor:
        values, places = m.p(m.c(t))
        return m.h(m.u(values, places))

    segmenter = Blocks(
        unpooled,
        c=conv(), p=nn.MaxPool2d(2, return_indices=True), u=nn.MaxUnpool2d(2), h=conv(8, 4, 1),
    )  # fmt: skip
    compressed(segmenter, torch.randn(4, 3, 12, 12))


def test_comparisons_and_masks(x: Tensor) -> None:
    def forward(m: Any, t: Tensor) -> Tensor:
        y = m.c(t)
        return m.h(torch.where(y > 0.1, y, 0.2 * y))

    compressed(Blocks(forward, c=conv(), h=conv(8, 4, 1)), x)

    def masked(m: Any, t: Tensor, keep: Tensor) -> Tensor:
        scores = m.q(t) @ m.k(t).mT + (1.0 - keep[:, None]) * torch.finfo(torch.float32).min
        return m.o(torch.softmax(scores, -1) @ m.v(t))

    attention = Blocks(masked, **{n: nn.Linear(8, 8) for n in "qkvo"})
    keep = torch.ones(3, 6)
    keep[:, 4:] = 0
    compressed(attention, torch.randn(3, 6, 8), keep)


@pytest.mark.parametrize("value", [float("-inf"), -1e4, -50.0])
def test_padding_of_a_maximum_does_not_widen_its_grid(x: Tensor, value: float) -> None:
    def forward(m: Any, t: Tensor) -> Tensor:
        return m.h(F.max_pool2d(F.pad(m.a(t), (0, 1, 0, 1), value=value), 3, 2))

    compressed(Blocks(forward, a=conv(), h=conv(8, 4, 1)), x, limit=0.02)


def test_optional_arguments_are_at_their_defaults(x: Tensor) -> None:
    def forward(self: Any, t: Tensor, mask: Tensor | None = None, scale: float = 2.0) -> Tensor:
        y = F.relu(self.c(t)) * scale
        return self.h(y if mask is None else y * mask)

    kind = type("Net", (Blocks,), {"forward": forward})
    native = compressed(kind(None, c=conv(), h=conv(8, 4, 1)), x)
    assert torch.equal(native(x, None), native(x))
    assert torch.equal(native(x, mask=None, scale=2.0), native(x))
    with pytest.raises(InputError, match="captured with"):
        native(x, scale=3.0)


def test_several_inputs_and_results_of_any_kind(x: Tensor) -> None:
    result = namedtuple("result", "sum parts")

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.h = conv(), conv(), conv(8, 4, 1)

        def forward(self, left: Tensor, more: dict[str, Tensor], *, flag: bool = True) -> Any:
            y = F.relu(self.a(left)) + F.relu(self.b(more["right"]))
            return result(self.h(y) if flag else y, [y, {"left": left}])

    model = Two().eval()
    graph = ada.capture(model, (x, {"right": x + 1}))
    prepared = ada.prepare(graph, plan_of(graph))
    ada.calibrate(prepared, [((x, {"right": x + 1}), torch.zeros(4))], progress=False)
    native = ada.convert(prepared)
    with torch.no_grad():
        wanted, got = model(x, {"right": x}), native(x, {"right": x})
        assert type(got) is result and isinstance(got.parts, list)
        assert distance(got.sum, wanted.sum) < 0.05
        assert torch.equal(got.parts[1]["left"], x)
        engine = ada.compile(native, (x, {"right": x}), policy="native", weights="resident")
        assert torch.equal(engine(x, {"right": x}).sum, got.sum)
    with pytest.raises(InputError, match="right"):
        native(x, {"wrong": x})


# -- sizes ----------------------------------------------------------------------------------------


def test_other_sizes_run_or_are_refused(x: Tensor) -> None:
    def branching(m: Any, t: Tensor) -> Tensor:
        if t.shape[2] % 2 == 0:
            t = t[:, :, ::2]
        return m.c(t)

    model = Blocks(branching, c=conv()).eval()
    graph = ada.capture(model, x)
    for shape in ((4, 3, 10, 9), (1, 3, 16, 12), (7, 3, 12, 30)):
        other = torch.randn(shape)
        assert torch.equal(graph(other), model(other))
    with pytest.raises(InputError, match=r"captured for .*shape\[2\] % 2"):
        graph(torch.randn(4, 3, 11, 12))
    with pytest.raises(InputError, match=r"expected shape \[batch, 3, .*got \[4, 2, 12, 12\]"):
        graph(torch.randn(4, 2, 12, 12))
    fixed = nn.Sequential(conv(3, 2), nn.Flatten(), nn.Linear(288, 2)).eval()
    with pytest.raises(InputError, match="captured for"):
        ada.capture(fixed, x)(torch.randn(4, 3, 12, 13))


@pytest.mark.parametrize("limit", ["FREE_SECONDS", "FREE_OPERATIONS"])
def test_free_sizes_have_a_limit(x: Tensor, limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, limit, -1.0)
    model = nn.Sequential(conv(), nn.ReLU(), conv(8, 2)).eval()
    graph = ada.capture(model, x)
    assert torch.equal(graph(x[:3]), model(x[:3]))
    with pytest.raises(InputError, match=r"expected shape \[batch, 3, 12, 12\]"):
        graph(torch.randn(4, 3, 10, 12))


def test_a_batch_that_was_remembered_is_no_condition(x: Tensor) -> None:
    class Detector(nn.Module):
        shape: Any = None

        def __init__(self) -> None:
            super().__init__()
            self.c = conv()

        def forward(self, t: Tensor) -> Tensor:
            if self.shape != t.shape:
                self.shape = t.shape
            return self.c(t)

    model = Detector().eval()
    model(x)
    graph = ada.capture(model, x[:2])
    assert torch.equal(graph(x), model(x))


class Apart(nn.Module):
    """Two inputs with batches of their own; what is asked of the second one's is no comparison of
    sizes with one another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 4), nn.Conv1d(3, 2, 1)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        n, _, width = y.shape
        z = self.second(y)
        return self.first(x), z * 1 if n * width // 4 * 4 != width else z.clone()


def test_a_single_sample_of_inputs_whose_batches_are_apart() -> None:
    torch.manual_seed(0)
    model, x, y = Apart().eval(), torch.randn(2, 8), torch.randn(2, 3, 8)
    captured = ada.capture(model, (x, y))
    assert captured.signature.single
    for found, wanted in zip(captured(x[:1], y[:1]), model(x[:1], y[:1]), strict=True):
        assert torch.equal(found, wanted)


def test_a_single_sample_that_is_treated_otherwise_is_refused(x: Tensor) -> None:
    model = Blocks(lambda m, t: m.c(t) if t.shape[0] > 1 else m.c(t) * 2, c=conv()).eval()
    graph = ada.capture(model, x)
    with pytest.raises(InputError, match="batch of 1"):
        graph(x[:1])


# -- what cannot be captured ----------------------------------------------------------------------


def test_branches_on_values_name_the_line(x: Tensor) -> None:
    def forward(m: Any, t: Tensor) -> Tensor:
        y = m.c(t)
        if y.sum() > 0:
            y = y + 1
        return y

    message = r"cannot be captured at .*test_capture.py:\d+, `if y.sum\(\) > 0:`.*exclude="
    with pytest.raises(UnsupportedModelError, match=message):
        ada.capture(Blocks(forward, c=conv()), x)


def test_a_state_is_refused_unless_nothing_depends_on_it(x: Tensor) -> None:
    class Counting(nn.Module):
        def __init__(self, read: bool) -> None:
            super().__init__()
            self.c, self.read = conv(), read
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, t: Tensor) -> Tensor:
            self.calls += 1
            return self.c(t) * self.calls if self.read else self.c(t)

    model = Counting(False).eval()
    assert torch.equal(ada.capture(model, x)(x), model(x))
    with pytest.raises(UnsupportedModelError, match="'calls'"):
        ada.capture(Counting(True), x)


def test_random_results_are_refused(x: Tensor) -> None:
    states = iter(range(1000))
    model = Blocks(lambda m, t: m.c(t) * (1 + next(states)), c=conv())
    with pytest.raises(UnsupportedModelError, match="does not compute what the model computes"):
        ada.capture(model, x)


def test_scripted_models_are_refused_and_wrappers_are_opened(x: Tensor) -> None:
    model = nn.Sequential(conv()).eval()
    assert torch.equal(ada.capture(nn.DataParallel(model), x)(x), model(x))
    assert torch.equal(ada.capture(torch.compile(model, backend="eager"), x)(x), model(x))


# -- the model and the files ----------------------------------------------------------------------


def test_the_model_is_left_alone(x: Tensor) -> None:
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c, self.d, self.seen = conv(), nn.Dropout(0.5), []

        def forward(self, t: Tensor) -> Tensor:
            self.last = self.c(t)
            self.seen.append(t)
            return self.d(self.last)

    model = Keeping().train()
    model.d.eval()
    attributes, state = set(vars(model)), copy.deepcopy(model.state_dict())
    graph = ada.capture(model, x)
    assert set(vars(model)) == attributes and model.seen == []
    assert model.training and model.c.training and not model.d.training
    assert "forward" not in vars(model.d)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
    graph.train()
    assert not torch.equal(graph(x), graph(x))  # the dropout lives


def test_constants_of_a_forward_are_in_the_file(x: Tensor, tmp_path: Any) -> None:
    class Normalising(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = conv(), conv(8, 4)
            self.register_buffer("deviation", torch.tensor(0.2), persistent=False)
            self.plain = torch.ones(1, 8, 1, 1) * 0.5

        def forward(self, t: Tensor) -> Tensor:
            mean = torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1)
            return self.b(F.relu(self.a((t - mean) / self.deviation)) * self.plain)

    native = compressed(Normalising(), x)
    path = tmp_path / "model.safetensors"
    ada.save(native, path)
    assert torch.equal(ada.restore(Normalising().eval(), path)(x), native(x))
    with torch.device("meta"):
        skeleton = Normalising().eval()
    assert torch.equal(ada.restore(skeleton, path)(x), native(x))


def test_copies_and_pickles(x: Tensor) -> None:
    model = _net().eval()
    prepared = ada.prepare(model, plan_of(model), x)
    ada.calibrate(prepared, [x], progress=False)
    native = ada.convert(prepared)
    buffer = io.BytesIO()
    torch.save(prepared, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert torch.equal(again(x), prepared(x))
    assert torch.equal(ada.convert(again)(x), native(x))
    for other in (copy.deepcopy(native), pickle.loads(pickle.dumps(native))):
        assert torch.equal(other(x), native(x))
        with pytest.raises(InputError, match="expected shape"):
            other(x[:, :2])


def test_captures_are_kept_as_long_as_the_model_stays(x: Tensor) -> None:
    model = _net().eval()
    first = captured(model, [x])
    assert captured(model) is first and captured(model, [(x, None)]) is first
    with torch.no_grad():
        model[0].weight.data[0, 0, 0, 0] += 1.0
    second = captured(model, [x])
    assert second is not first
    assert torch.equal(second(x), model(x))


def test_exported_programs_are_models(x: Tensor) -> None:
    model = _net().eval()
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=False)
    graph = ada.capture(program)
    assert torch.equal(graph(x), model(x)) and list(supported_layers(graph)) == ["0", "3"]
    fixed = torch.export.export(model, (x,), strict=False)
    with pytest.raises(UnsupportedModelError, match="batch"):
        ada.capture(fixed)


def test_the_tables_of_operators_agree_with_the_engine() -> None:
    """What is said to work on levels has a rule, and what has one is known."""
    assert set(RULES) >= table.INTEGER_OPERATORS
    new = {name for name in RULES if name.startswith("aten.")} - table.INTEGER_OPERATORS
    casts = {"aten._to_copy.default", "aten.to.dtype", "aten.to.dtype_layout"}
    looked_through = {"aten.dropout.default", "aten.feature_dropout.default"}
    lifted = {"aten.lift_fresh_copy.default"}
    assert new - table.MOVES - casts - looked_through - lifted == set()
