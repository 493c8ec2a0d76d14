"""Where quantizers stand, which layers stay float, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from adalayer_native.errors import CalibrationError, PlanError, UnsupportedModelError
from adalayer_native.plan import LayerPlan, Plan, layer_kind, supported_layers
from adalayer_native.quantization import calibrate, convert, prepare, simulate, stored_model
from adalayer_native.quantization.fake_quant import QuantConv2d, QuantLinear
from adalayer_native.quantization.graph import quantizers_of


def plan_for(
    model: nn.Module,
    bits: int | None = 4,
    sparsity: float = 0.0,
    floats: tuple[str, ...] = (),
    activation_bits: dict[str, int] | None = None,
) -> Plan:
    return Plan(
        {
            name: LayerPlan(
                name,
                layer_kind(module),
                module.weight.numel(),
                None if name in floats else bits,
                sparsity,
                activation_bits=(activation_bits or {}).get(name, 8),
            )
            for name, module in supported_layers(model).items()
        }
    )


def sites(prepared: fx.GraphModule) -> list[str]:
    """Names of the quantizers, without their prefix, in graph order."""
    return [
        str(node.target).removeprefix("act_quant.")
        for node in prepared.graph.nodes
        if node.op == "call_module" and str(node.target).startswith("act_quant.")
    ]


class Net(nn.Module):
    """Runs a function of itself, so that tests can state a forward in one line."""

    def __init__(self, forward: Callable[[Net, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def conv(i: int = 3, o: int = 3, **kwargs: object) -> nn.Conv2d:
    return nn.Conv2d(i, o, 3, padding=1, **kwargs)  # type: ignore[arg-type]


def test_chain_of_conv_bn_relu_has_no_quantizer_inside() -> None:
    model = nn.Sequential(
        conv(), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(), conv(), nn.Flatten()
    )
    prepared = prepare(model, plan_for(model))
    assert sites(prepared) == ["input_1", "_2"]
    assert prepared.meta["layers"]["0"]["batch_norm"] == "1"
    assert isinstance(prepared.get_submodule("1"), nn.BatchNorm2d)
    assert isinstance(prepared.get_submodule("0"), QuantConv2d)


def test_residual_addition_is_fused_into_the_later_chain() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        short = m.bn_s(m.down(x))
        y = m.bn(m.conv(x))
        return m.last(F.relu(y + short))

    model = Net(
        forward,
        down=conv(),
        bn_s=nn.BatchNorm2d(3),
        conv=conv(),
        bn=nn.BatchNorm2d(3),
        last=conv(),
    )
    assert sites(prepare(model, plan_for(model))) == ["x", "bn_s", "relu"]


def test_other_operations_get_quantizers_and_grid_preserving_ones_do_not() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.conv(x)
        gate = torch.sigmoid(F.adaptive_avg_pool2d(y, 1))
        y = y * gate
        y = torch.cat([y, y[:, 1:2]], dim=1)
        y = F.pad(y, (1, 1, 1, 1))
        a, b = y.chunk(2, dim=1)
        y = m.conv2(a) + b
        return m.fc(y.mean((2, 3)).view(y.size(0), -1))

    model = Net(forward, conv=conv(), conv2=conv(2, 2), fc=nn.Linear(2, 5))
    prepared = prepare(model, plan_for(model))
    assert sites(prepared) == [
        "x",
        "conv",
        "adaptive_avg_pool2d",
        "sigmoid",
        "mul",
        "cat",
        "add",
        "mean",
    ]
    calibrate(prepared, [torch.randn(2, 3, 8, 8)], progress=False)
    assert prepared(torch.randn(2, 3, 8, 8)).shape == (2, 5)


def test_float_tail_and_values_for_float_layers_have_none() -> None:
    model = nn.Sequential(conv(), nn.ReLU(), conv(), nn.ReLU(), conv(), nn.ReLU())
    prepared = prepare(model, plan_for(model, floats=("0", "4")))
    # The input and the tail are float; only the middle layer's input is stored as u8.
    assert sites(prepared) == ["_1"]
    assert type(prepared.get_submodule("0")) is nn.Conv2d
    assert sites(prepare(model, plan_for(model, bits=None))) == []


def test_layer_called_twice_shares_one_quantizer() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        y = F.relu(m.shared(x))
        return m.fc(F.relu(m.shared(y)).mean((2, 3)))

    model = Net(forward, shared=conv(), fc=nn.Linear(3, 2))
    prepared = prepare(model, plan_for(model))
    assert sites(prepared) == ["x", "x", "relu_1", "mean"]
    calibrate(prepared, [torch.randn(4, 3, 8, 8)], progress=False)
    assert quantizers_of(prepared)["act_quant.x"].calibrated


def test_batch_norm_shared_by_two_layers_is_not_folded() -> None:
    model = Net(
        lambda m, x: m.fc(m.bn(m.b(F.relu(m.bn(m.a(x))))).mean((2, 3))),
        a=conv(),
        b=conv(),
        bn=nn.BatchNorm2d(3),
        fc=nn.Linear(3, 2),
    )
    prepared = prepare(model, plan_for(model))
    assert prepared.meta["layers"]["a"]["batch_norm"] is None
    assert sites(prepared) == ["x", "a", "relu", "b", "bn_1", "mean"]


def test_batch_norm_read_beside_the_convolution_is_not_folded() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.conv(x)
        return m.fc((m.bn(y) * y).mean((2, 3)))

    model = Net(forward, conv=conv(), bn=nn.BatchNorm2d(3), fc=nn.Linear(3, 2))
    prepared = prepare(model, plan_for(model))
    assert prepared.meta["layers"]["conv"]["batch_norm"] is None


def test_batch_norm_that_no_layer_absorbs_is_a_chain_with_its_activation() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        y = torch.cat([x, m.conv(x)], dim=1)
        return m.fc(m.pool(F.relu(m.bn(y))).flatten(1))

    model = Net(
        forward,
        conv=conv(),
        bn=nn.BatchNorm2d(6),
        pool=nn.AdaptiveAvgPool2d(1),
        fc=nn.Linear(6, 2),
    )
    assert sites(prepare(model, plan_for(model))) == ["x", "conv", "cat", "relu", "pool"]


def test_addition_to_a_linear_layer_and_of_a_constant_are_operations_of_their_own() -> None:
    class Biased(Net):
        def __init__(self) -> None:
            super().__init__(
                lambda m, x: m.last(m.fc(m.conv(x) + m.offset) + x),
                conv=conv(),
                fc=nn.Linear(8, 8),
                last=nn.Linear(8, 2),
            )
            self.offset = nn.Parameter(torch.randn(3, 1, 1))

    model = Biased()
    prepared = prepare(model, plan_for(model))
    assert sites(prepared) == ["x", "conv", "add", "fc", "add_1"]
    calibrate(prepared, [torch.randn(2, 3, 8, 8)], progress=False)
    native = convert(prepared)
    assert [n.name for n in native.graph.nodes if n.op == "call_function"] == [
        "grid_line_default",
        "add_1",
    ]
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad(), simulate(prepared):
        assert torch.equal(native(x), prepared(x))


def test_dropped_branches_do_not_separate_a_convolution_from_its_addition() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.drop(m.bn(m.gap(m.conv(x))))
        y = F.dropout(m.other(y), training=m.training) + y
        return m.last(m.relu(m.gap(y)))

    model = Net(
        forward,
        conv=conv(),
        gap=nn.Identity(),
        bn=nn.BatchNorm2d(3),
        drop=nn.Dropout2d(),
        other=conv(),
        relu=nn.ReLU(),
        last=conv(),
    )
    prepared = prepare(model, plan_for(model))
    assert prepared.meta["layers"]["conv"]["batch_norm"] == "bn"
    assert sites(prepared) == ["x", "bn", "relu"]
    calibrate(prepared, [torch.randn(2, 3, 8, 8)], progress=False)
    native = convert(prepared)
    called = [str(node.target) for node in native.graph.nodes if node.op.startswith("call")]
    assert called == ["conv", "other", "last"]
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad(), simulate(prepared):
        assert torch.equal(native(x), prepared(x))
    prepared.train()
    x = torch.randn(16, 3, 8, 8)
    assert not torch.equal(prepared(x), prepared(x))  # dropout is alive in training


def test_tensor_that_was_overwritten_is_read_through_the_operation() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.conv(x)
        F.relu(y, inplace=True)
        z = m.other(y)
        z += y
        z.clamp_(0, 4)
        return m.last(z)

    model = Net(forward, conv=conv(), other=conv(), last=conv())
    prepared = prepare(model, plan_for(model))
    assert sites(prepared) == ["x", "relu", "clamp"]
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(prepare(model, plan_for(model, bits=None))(x), model(x))
    calibrate(prepared, [x], progress=False)
    native = convert(prepared)
    assert (native.get_submodule("conv").lo, native.get_submodule("other").hi) == (0.0, 4.0)
    with torch.no_grad(), simulate(prepared):
        assert torch.equal(native(x), prepared(x))


def test_layer_called_twice_keeps_what_only_one_call_has_outside() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        return m.last(F.relu(m.shared(x)) + m.shared(m.other(x)))

    model = Net(forward, shared=conv(), other=conv(), last=conv())
    prepared = prepare(model, plan_for(model))
    assert sites(prepared) == ["x", "shared", "relu", "x", "shared_1", "add"]
    calibrate(prepared, [torch.randn(2, 3, 8, 8)], progress=False)
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad(), simulate(prepared):
        assert torch.equal(convert(prepared)(x), prepared(x))


def test_quantizer_takes_the_fewest_bits_of_its_readers() -> None:
    model = Net(
        lambda m, x: m.fc((m.a(x) + m.b(x)).mean((2, 3))), a=conv(), b=conv(), fc=nn.Linear(3, 2)
    )
    plan = plan_for(model, activation_bits={"a": 6, "b": 5})
    bits = {name: item.bits for name, item in quantizers_of(prepare(model, plan)).items()}
    # a is the stored operand of the addition: nobody but the addition reads it
    assert bits == {"act_quant.x": 5, "act_quant.a": 8, "act_quant.add": 8, "act_quant.mean": 8}


def test_prepare_leaves_the_model_alone_and_masks_exactly() -> None:
    model = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 4))
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    prepared = prepare(model, plan_for(model, bits=3, sparsity=0.5))
    assert model.training
    assert not prepared.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    layer = prepared.get_submodule("3")
    assert isinstance(layer, QuantConv2d)
    assert layer.mask is not None
    assert int((~layer.mask).sum()) == layer.weight.numel() // 2
    assert int((layer.quantized_weight() == 0).sum()) >= layer.weight.numel() // 2


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(3, 3, 3, padding=1).double(), "float64"),
        (nn.Linear(70_000, 2), "overflow"),
    ],
    ids=["dtype", "accumulator"],
)
def test_layers_that_stay_float_are_reported(layer: nn.Module, reason: str) -> None:
    model = nn.Sequential(layer)
    with pytest.warns(UserWarning, match=reason):
        prepared = prepare(model, plan_for(model, bits=8))
    assert reason in prepared.meta["kept_float"]["0"]
    assert type(prepared.get_submodule("0")) is type(layer)
    assert reason in stored_model(model, plan_for(model, bits=8)).kept_float["0"]


def test_layer_that_forward_does_not_call_stays_float() -> None:
    model = Net(lambda m, x: m.used(x), used=nn.Linear(3, 3), unused=nn.Linear(3, 3))
    with pytest.warns(UserWarning, match="unused.*not called"):
        prepare(model, plan_for(model))


def test_refusals() -> None:
    branching = Net(lambda m, x: m.fc(x) if x.sum() > 0 else x, fc=nn.Linear(3, 3))
    with pytest.raises(
        UnsupportedModelError,
        match=r"Net cannot be captured at .*test_quantization_graph.*exclude=",
    ):
        prepare(branching, plan_for(branching))
    bare = nn.Sequential(nn.ReLU())
    with pytest.raises(UnsupportedModelError, match="give example_inputs="):
        prepare(bare, Plan({}))
    with pytest.raises(UnsupportedModelError, match="no convolution or linear layer"):
        prepare(bare, Plan({}), torch.ones(2, 3))
    model = nn.Sequential(nn.Linear(3, 3))
    wrong = plan_for(model)
    wrong.layers["fc1"] = LayerPlan("fc1", "linear", 9, 4)
    with pytest.raises(PlanError, match="fc1"):
        prepare(model, wrong)
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match=r"layer '0'.*NaN"):
        prepare(model, plan_for(model))
    with pytest.raises(UnsupportedModelError, match="prepare"):
        calibrate(model, [torch.ones(1, 3)], progress=False)


# -- calibration ----------------------------------------------------------------------------------


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 4),
    )  # fmt: skip


def test_calibrate_takes_tensors_tuples_and_generators() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(4, 3, 8, 8) for _ in range(3)]
    results = []
    for loader in (
        batches,
        [(x, torch.zeros(4)) for x in batches],
        (x for x in batches),
        [*batches, torch.full((4, 3, 8, 8), 1e6)],
    ):
        prepared = prepare(small(), plan_for(small()))
        calibrate(prepared, loader, batches=3, bn_reestimate=True, progress=False)
        results.append(prepared.state_dict())
    for other in results[1:]:
        for key, value in results[0].items():
            assert torch.equal(value, other[key]), key


def test_bn_reestimate_gives_the_statistics_of_the_data() -> None:
    prepared = prepare(small(), plan_for(small(), bits=2))
    x = torch.randn(64, 3, 8, 8) * 3 + 1
    calibrate(prepared, [x], bn_reestimate=True, progress=False)
    layer, norm = prepared.get_submodule("0"), prepared.get_submodule("1")
    y = layer(x)
    assert torch.allclose(norm.running_mean, y.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(norm.running_var, y.var((0, 2, 3)), rtol=1e-4)
    assert norm.momentum == 0.1
    assert not prepared.training


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "empty"),
        ([torch.full((1, 3, 8, 8), float("nan"))], "NaN"),
        ([torch.full((1, 3, 8, 8), 3e38)], "act_quant"),
        (["image"], "got str"),
        ([{"x": 1}], "does not fit"),
    ],
    ids=["empty", "nan", "overflow", "text", "dict"],
)
def test_calibrate_refuses_and_changes_nothing(loader: list[object], message: str) -> None:
    prepared = prepare(small(), plan_for(small()))
    calibrate(prepared, [torch.randn(4, 3, 8, 8)], progress=False)
    before = {key: value.clone() for key, value in prepared.state_dict().items()}
    with pytest.raises(CalibrationError, match=message):
        calibrate(prepared, loader, bn_reestimate=message == "empty", progress=False)
    for key, value in prepared.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(item.observer is None for item in quantizers_of(prepared).values())


def test_deepcopy_and_state_dict_round_trip() -> None:
    import copy

    prepared = prepare(small(), plan_for(small(), sparsity=0.25))
    calibrate(prepared, [torch.randn(4, 3, 8, 8)], progress=False)
    x = torch.randn(2, 3, 8, 8)
    twin = copy.deepcopy(prepared)
    assert torch.equal(twin(x), prepared(x))
    assert twin.meta == prepared.meta
    fresh = prepare(small(), plan_for(small(), sparsity=0.25))
    fresh.load_state_dict(prepared.state_dict())
    assert torch.equal(fresh(x), prepared(x))
    assert isinstance(fresh.get_submodule("5"), QuantLinear)
