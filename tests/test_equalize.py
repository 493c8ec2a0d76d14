"""Cross-layer equalization: which pairs there are, the same function, a lower error."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import adalayer_native as ada
from adalayer_native.plan import layer_kind, supported_layers
from adalayer_native.repair.equalize import Pair, equalize_layers, pairs_of, scale_pair
from adalayer_native.repair.streams import Data, float_twin


def conv(*args, **kwargs) -> nn.Sequential:
    """Convolution and batch norm with statistics of their own."""
    layer = nn.Conv2d(*args, bias=False, **kwargs)
    norm = nn.BatchNorm2d(layer.out_channels)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.uniform_(-0.5, 0.5)
        norm.running_mean.uniform_(-0.3, 0.3)
        norm.running_var.uniform_(0.5, 2.0)
    return nn.Sequential(layer, norm)


class Chain(nn.Module):
    """Dense, depthwise, grouped, pooled, transposed, flattened and linear pairs, and no pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.a = conv(3, 8, 3, padding=1)
        self.depth = conv(8, 8, 3, padding=1, groups=8)
        self.grouped = conv(8, 12, 1, groups=4)
        self.wide = nn.Conv2d(12, 6, 3, padding=1)
        self.up = nn.ConvTranspose2d(6, 8, 2, stride=2, groups=2)
        self.six = conv(8, 8, 1)
        self.branch = conv(8, 8, 1)
        self.after = conv(8, 8, 1)
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(8 * 16, 10)
        self.fc2 = nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.a(x))
        x = torch.relu(self.depth(x))
        x = self.pool(torch.relu(self.grouped(x)))
        x = torch.relu(self.wide(x))
        x = torch.relu(self.up(x))
        x = nn.functional.relu6(self.six(x))  # does not commute with a factor
        x = torch.relu(self.branch(x) + x)  # nor may one operand of a sum be scaled alone
        x = torch.flatten(nn.functional.avg_pool2d(torch.relu(self.after(x)), 2), 1)
        return self.fc2(torch.relu(self.fc1(x)))


PAIRS = [
    ("a.0", "depth.0"),
    ("depth.0", "grouped.0"),
    ("grouped.0", "wide"),
    ("wide", "up"),
    ("up", "six.0"),
    ("after.0", "fc1"),
    ("fc1", "fc2"),
]


def data(samples: int = 48) -> list[torch.Tensor]:
    torch.manual_seed(3)
    return list(torch.randn(samples, 3, 8, 8).split(16))


def prepared(model: nn.Module, bits: int = 3, sparsity: float = 0.0):
    plan = ada.Plan(
        {
            name: ada.LayerPlan(name, layer_kind(m), m.weight.numel(), bits, sparsity)
            for name, m in supported_layers(model).items()
        }
    )
    return ada.calibrate(ada.prepare(model, plan), data(), progress=False)


@pytest.fixture
def chain() -> nn.Module:
    torch.manual_seed(5)
    return Chain().eval()


def test_pairs_are_those_that_a_factor_passes_through(chain):
    found = pairs_of(prepared(chain))
    assert [(pair.first, pair.second) for pair in found] == PAIRS
    assert [pair.norm for pair in found] == ["a.1", "depth.1", "grouped.1", None, None, "after.1",
                                             None]  # fmt: skip


def test_what_is_read_twice_or_called_twice_is_no_pair():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 1) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.a(x))
            y = torch.relu(self.b(x))
            return self.d(torch.relu(self.c(torch.relu(self.c(x + y)))))

    assert pairs_of(prepared(Net())) == []


@pytest.mark.parametrize("name", [second for _, second in PAIRS])
def test_the_float_function_stays_the_same(chain, name: str):
    model = prepared(chain)
    pair = next(pair for pair in pairs_of(model) if pair.second == name)
    before = float_twin(model)
    torch.manual_seed(1)
    # Powers of two change no digit; others round.
    for factor, tolerance in (
        (2.0 ** torch.randint(-3, 4, (pair.channels,)), 0.0),
        (torch.rand(pair.channels) * 5 + 0.2, 1e-5),
    ):
        scale_pair(model, pair, factor)
        after = float_twin(model)
        for x in data(16):
            torch.testing.assert_close(after(x), before(x), rtol=tolerance, atol=tolerance)
    changed = model.get_submodule(name).weight
    assert not torch.equal(changed, chain.get_submodule(name).weight)


@pytest.mark.parametrize("depthwise", [False, True])
def test_unequal_channels_are_equalized_and_the_output_is_nearer(depthwise: bool):
    torch.manual_seed(2)
    model = nn.Sequential(
        *conv(3, 8, 3, padding=1), nn.ReLU(),
        *conv(8, 8, 3, padding=1, groups=8 if depthwise else 1), nn.ReLU(),
        nn.Conv2d(8, 4, 1),
    ).eval()  # fmt: skip
    with torch.no_grad():  # values of some channels a hundred times as large, weights as small
        spread = torch.logspace(0, 2, 8)
        model[1].weight.mul_(spread)
        model[1].bias.mul_(spread)
        model[3].weight.div_(spread.view((-1, 1, 1, 1) if depthwise else (1, -1, 1, 1)))
    model[3].requires_grad_(False)
    ready = prepared(model, bits=4)
    found = equalize_layers(ready, Data(ready, data(), None), progress=False)
    first = found[0]
    assert (first.first, first.second) == ("0", "3")
    assert first.kind != "none"
    assert first.after < 0.5 * first.before

    def error(**options) -> float:
        repaired = prepared(model, bits=4)
        ada.repair(repaired, data(), progress=False, **options)
        with torch.no_grad():
            return sum(float((repaired(x) - model(x)).square().sum()) for x in data())

    assert error() < 0.5 * error(equalize=False)


def test_nothing_is_scaled_where_it_does_not_help():
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    ready = prepared(model, bits=8)
    before = copy.deepcopy(ready.state_dict())
    (row,) = equalize_layers(ready, Data(ready, data(), None), progress=False)
    assert row.kind == "none"
    assert (row.before, row.after) == (None, None)
    assert all(torch.equal(value, before[key]) for key, value in ready.state_dict().items())


def test_dead_channels_and_pruned_layers(chain):
    with torch.no_grad():
        chain.a[1].weight[:3] = 0.0
        chain.a[1].bias[:3] = -1.0  # never active
        chain.depth[0].weight[5] = 0.0
        chain.wide.weight[:, 2] = 0.0
    for masks in (True, False):
        ready = prepared(chain, bits=3, sparsity=0.5)
        kept = int(ready.fc1.mask.sum())
        masked = ready.fc1.mask.clone()
        report = ada.repair(ready, data(), choose_masks=masks, progress=False)
        assert [(row.first, row.second) for row in report.pairs] == PAIRS
        assert all(bool(torch.isfinite(v).all()) for v in ready.state_dict().values())
        assert int(ready.fc1.mask.sum()) == kept
        assert masks or torch.equal(ready.fc1.mask, masked)
        native = ada.convert(ready)
        assert bool(torch.isfinite(native(data()[0])).all())


@pytest.mark.parametrize("pattern", ["block16x64", "2:4"])
def test_masks_keep_to_their_pattern(pattern: str):
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1)
    ).eval()
    with torch.no_grad():  # unequal channels, so that there is something to equalize
        spread = torch.logspace(0, 2, 64)
        model[0].weight.mul_(spread.view(-1, 1, 1, 1))
        model[0].bias.mul_(spread)
        model[2].weight.div_(spread.view(1, -1, 1, 1))
    plan = ada.Plan(
        {
            "0": ada.LayerPlan("0", "conv2d", model[0].weight.numel(), 8),
            "2": ada.LayerPlan("2", "conv2d", model[2].weight.numel(), 4, 0.5, pattern=pattern),
        }
    )
    ready = ada.calibrate(ada.prepare(model, plan), data(), progress=False)
    (row,) = equalize_layers(ready, Data(ready, data(), None), progress=False)
    assert row.kind != "none"
    mask = ready.get_submodule("2").mask
    if pattern == "2:4":
        assert int(mask.reshape(64, 16, 4, 9).sum(2).max()) == 2
    else:
        blocks = mask.reshape(4, 16, 64, 9).float().mean((1, 2))
        assert set(blocks.unique().tolist()) == {0.0, 1.0}


def test_a_failure_leaves_the_model_as_it_was(chain, monkeypatch):
    from adalayer_native.repair import model as module

    def fails(*_, **__):
        raise KeyboardInterrupt

    spread = torch.logspace(0, 2, 8)
    with torch.no_grad():
        chain.a[1].weight.mul_(spread)
        chain.a[1].bias.mul_(spread)
    ready = prepared(chain)
    before = copy.deepcopy(ready.state_dict())
    monkeypatch.setattr(module, "Streams", fails)
    with pytest.raises(KeyboardInterrupt):
        ada.repair(ready, data(), progress=False)
    after = ready.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_a_pair_is_plain_data():
    pair = Pair("a", "b", None, ("act_quant.relu",), 8)
    assert pair == Pair("a", "b", None, ("act_quant.relu",), 8)


def test_the_float_twin_keeps_a_padding_of_its_own() -> None:
    """Padding with more at one end, as in the layers of stride 2 of EfficientNet-Lite."""
    torch.manual_seed(5)
    net = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 8, 3, stride=2), nn.ReLU())
    x = torch.randn(4, 3, 8, 8)
    model = ada.capture(net.eval(), x)
    plan = ada.Plan(
        {n: ada.LayerPlan(n, layer_kind(m), m.weight.numel(), 8)
         for n, m in supported_layers(model).items()}
    )  # fmt: skip
    prepared = ada.prepare(model, plan)
    ada.calibrate(prepared, [x], progress=False)
    torch.testing.assert_close(float_twin(prepared)(x), net(x))
    (report,) = ada.repair(prepared, [x], progress=False).layers.values()
    assert report.error < 1e-3
