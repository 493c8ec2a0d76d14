"""Runs with one layer changed that do not compute again what lies before it."""

from __future__ import annotations

import pytest
import torch
from helpers_models import tiny
from torch import nn
from torch.func import functional_call

from adalayer_native.importance import analyze
from adalayer_native.importance.replay import Replay
from adalayer_native.models import get_model
from adalayer_native.plan import supported_layers


class Awkward(nn.Module):
    """In place, a layer that runs twice, one that a function reads, one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.twice = nn.Conv2d(6, 6, 3, padding=1)
        self.side = nn.Conv2d(6, 6, 1)
        self.spare = nn.Linear(2, 2)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The weight of `side` is read before `twice` runs, and the layer is called after it.
        x = self.stem(x).relu_() * self.side.weight.sum()
        x = self.twice(self.twice(x).relu_()).add_(x)
        return self.fc(self.side(x).mean((2, 3)))


def nets() -> list[nn.Module]:
    torch.manual_seed(0)
    return [tiny(), Awkward().eval(), get_model("resnet20").eval()]


@pytest.mark.parametrize("memory", [1 << 30, 5000, 0])
def test_results_have_the_bits_of_a_whole_run(memory: int) -> None:
    for model in nets():
        layers = supported_layers(model)
        x = torch.randn(2, 3, 8, 8)
        replay = Replay(model, layers, x, memory)
        for name, layer in layers.items():
            weight = layer.weight.detach().round(decimals=1)
            with torch.no_grad():
                whole = functional_call(model, {f"{name}.weight": weight}, (x,))
            assert torch.equal(replay.run(name, weight), whole), (type(model).__name__, name)
        with torch.no_grad():
            assert torch.equal(replay.run("fc" if "fc" in layers else "linear",
                                          layers["fc" if "fc" in layers else "linear"].weight),
                               model(x))  # fmt: skip


def test_layers_before_the_changed_one_do_not_run_again() -> None:
    model, ran = tiny(), []
    for name in ("conv1", "conv2", "fc"):
        layer = model.get_submodule(name)
        layer.register_forward_pre_hook(lambda *_, name=name: None)
        real = layer.forward
        layer.forward = lambda x, name=name, real=real: (ran.append(name), real(x))[1]
    own = {name: model.get_submodule(name).forward for name in ("conv1", "conv2", "fc")}
    replay = Replay(model, supported_layers(model), torch.randn(2, 3, 8, 8))
    assert ran == ["conv1", "conv2", "fc"]
    for name, expected in (("fc", ["fc"]), ("conv2", ["conv2", "fc"]), ("conv1", None)):
        ran.clear()
        replay.run(name, model.get_submodule(name).weight)
        assert ran == (expected or ["conv1", "conv2", "fc"])
    # What was the layer's own before is so again, after an error too.
    with pytest.raises(RuntimeError):
        replay.run("fc", torch.zeros(3, 3))
    assert all(model.get_submodule(name).forward is run for name, run in own.items())


def test_the_model_is_left_alone() -> None:
    model = tiny()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    analyze(model, [torch.randn(4, 3, 8, 8)], progress=False)
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert {name: set(d) for name, d in before.items()} == {
        name: set(module.__dict__) for name, module in model.named_modules()
    }
