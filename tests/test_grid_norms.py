"""Norms of values on a grid: modules, simulation and engine have the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_capture import plan_of
from test_input_norms import settled
from torch import Tensor, nn

import adalayer_native as ada
from adalayer_native.rounding import fma_float32


class ChannelsLast(nn.Module):
    """A layer norm of images' channels, as ConvNeXt has it."""

    def __init__(self, channels: int, affine: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, elementwise_affine=affine)
        if affine:
            nn.init.uniform_(self.norm.weight, -1, 1)
            nn.init.uniform_(self.norm.bias, -1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return y


def around(*norms: nn.Module) -> nn.Module:
    """Norms between convolutions, where none folds."""
    layers: list[nn.Module] = [nn.Conv2d(3, 24, 3), nn.ReLU()]
    for norm in norms:
        layers += [norm, nn.GELU(), nn.Conv2d(24, 24, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(24, 8, 1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "layer norm": lambda: around(ChannelsLast(24), ChannelsLast(24)),
    "without parameters": lambda: around(ChannelsLast(24, affine=False)),
    "batch norm": lambda: around(settled(nn.BatchNorm2d(24)), settled(nn.BatchNorm2d(24))),
    "batch norm without parameters": lambda: around(nn.BatchNorm2d(24, affine=False)),
}


@pytest.mark.parametrize("kind", NETWORKS)
@torch.no_grad()
def test_the_engine_has_the_bits_of_the_modules(kind: str, tmp_path: Path) -> None:
    """A hundred thousand values per norm; with torch's own sums some lay on the other side."""
    torch.manual_seed(0)
    model = NETWORKS[kind]().eval()
    x = torch.randn(4, 3, 40, 40)
    graph = ada.capture(model, x)
    prepared = ada.prepare(graph, plan_of(graph))
    ada.calibrate(prepared, [x], progress=False)
    before = prepared.code, list(prepared.state_dict())
    native = ada.convert(prepared)
    assert "grid_" in native.code
    with ada.simulate(prepared) as exact:
        assert torch.equal(native(x), exact(x))
    assert (prepared.code, list(prepared.state_dict())) == before
    ada.save(native, tmp_path / "m.safetensors")
    assert torch.equal(ada.restore(graph, tmp_path / "m.safetensors")(x), native(x))
    engine = ada.compile(native, x, policy="native", weights="resident")
    assert engine.coverage(rounds=0).native_share == 1
    assert torch.equal(engine(x), native(x))
    assert float((native(x) - model(x)).norm() / model(x).norm()) < 0.05


def test_batch_norm_is_one_fused_step_per_value() -> None:
    generator = torch.Generator().manual_seed(1)
    scale, zero_point = float(np.float32(0.037)), 91
    q = torch.randint(0, 256, (3, 5, 7, 2), generator=generator)
    x = (q - zero_point).float() * scale
    norm = settled(nn.BatchNorm2d(5)).eval()
    qparams = torch.tensor([scale, zero_point, 8])
    found = torch.ops.adalayer.grid_batch_norm(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps, qparams
    )
    factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt() * scale
    addend = norm.bias.double() - norm.running_mean.double() * factor / scale - zero_point * factor
    wanted = fma_float32(q.float(), *(t.float().view(1, 5, 1, 1) for t in (factor, addend)))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found, norm(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 2, 31, 768])
def test_layer_norm_adds_whole_numbers(channels: int) -> None:
    generator = torch.Generator().manual_seed(channels)
    scale, zero_point = float(np.float32(0.01)), 3
    q = torch.randint(0, 256, (64, channels), generator=generator)
    q[0], q[1, 0] = 7, 255  # equal values; and an outlier
    x = (q - zero_point).float() * scale
    weight, bias = torch.randn(channels), torch.randn(channels)
    qparams = torch.tensor([scale, zero_point, 8])
    found = torch.ops.adalayer.grid_layer_norm(x, weight, bias, 1e-5, qparams)
    wanted = F.layer_norm(x.double(), [channels], weight.double(), bias.double(), 1e-5)
    torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-5)
    # Neither the order of the channels nor the number of rows matters.
    order = torch.randperm(channels, generator=generator)
    again = torch.ops.adalayer.grid_layer_norm(
        x[5:9, order], weight[order], bias[order], 1e-5, qparams
    )
    assert torch.equal(again, found[5:9, order])


@pytest.mark.parametrize("name", ["grid_batch_norm", "grid_layer_norm"])
def test_operators_follow_the_rules_of_torch(name: str) -> None:
    x = (torch.randint(0, 256, (2, 4, 3, 4)) - 3).float() * 0.5
    rest: list[object] = [torch.ones(4), torch.zeros(4), 1e-5, torch.tensor([0.5, 3, 8])]
    if name == "grid_batch_norm":
        rest = [torch.zeros(4), torch.ones(4), *rest]
    torch.library.opcheck(getattr(torch.ops.adalayer, name).default, (x, *rest))
