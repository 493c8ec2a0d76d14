"""Pieces between layers that keep networks whole in the engine: responses, heads of detectors,
attention across channels, sums of embeddings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_engine import native_of, node_differences, plan_of
from torch import Tensor, nn

import adalayer_native as ada
from adalayer_native.engine import compiler
from adalayer_native.engine.policy import Times
from adalayer_native.engine.segments import is_layer
from adalayer_native.plan import Plan


def whole(model: nn.Module, *example: Tensor, folder: Path) -> None:
    """Everything in the engine, with the modules' bits, and from a file again."""
    graph = ada.capture(model, example)
    prepared = ada.prepare(graph, plan_of(graph))
    ada.calibrate(prepared, [example], observer="minmax", progress=False)
    native = ada.convert(prepared)
    engine = ada.compile(native, example, policy="native", weights="resident")
    outside = [(row.name, row.why) for row in engine.coverage(rounds=0) if row.kind == "torch"]
    assert not outside
    wanted = _list(native(*example))
    with ada.simulate(prepared) as exact:
        _check_equal(_list(exact(*example)), wanted)
    _check_equal(_list(engine(*example)), wanted)
    for difference in node_differences(native, example):
        difference.check()
    engine.save(folder / "net.ada")
    _check_equal(_list(ada.load(folder / "net.ada")(*example)), wanted)
    for got, floats in zip(wanted, _list(model(*example)), strict=True):
        assert float((got - floats).norm()) < 0.1 * float(floats.norm())


def _check_equal(got: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other)


def _list(result: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


class Response(nn.Module):
    """ConvNeXt V2's norm of responses, over channels that lie first or last."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.last = last
        shape = (12,) if last else (1, 12, 1, 1)
        self.weight, self.bias = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(shape))
        self.first, self.second = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        axes, channels = ((1, 2), -1) if self.last else ((2, 3), 1)
        y = y.permute(0, 2, 3, 1) if self.last else y
        g = y.norm(p=2, dim=axes, keepdim=True)
        n = g / (g.mean(dim=channels, keepdim=True) + 1e-6)
        y = y + torch.addcmul(self.bias, self.weight, y * n)
        y = y.permute(0, 3, 1, 2) if self.last else y
        return self.second(y)  # type: ignore[no-any-return]


@pytest.mark.parametrize("last", [False, True])
@torch.no_grad()
def test_responses(last: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole(Response(last).eval(), torch.randn(3, 3, 9, 7), folder=tmp_path)


class CrossCovariance(nn.Module):
    """Channels attend to channels: queries and keys have length one along the tokens."""

    def __init__(self, heads: int, one: bool) -> None:
        super().__init__()
        self.heads = heads
        shape = (1, 1, 1) if one else (heads, 1, 1)
        self.temperature = nn.Parameter(torch.linspace(2.0, 5.0, shape[0]).reshape(shape))
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 4, 1).unbind(0)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        y = (scores * self.temperature).softmax(-1) @ v
        return self.proj(y.permute(0, 3, 1, 2).reshape(b, n, c))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("heads", "one"), [(4, False), (2, True)])
@torch.no_grad()
def test_attention_across_channels(heads: int, one: bool, tmp_path: Path) -> None:
    torch.manual_seed(1)
    whole(CrossCovariance(heads, one).eval(), torch.randn(2, 15, 16), folder=tmp_path)


class Windows(nn.Module):
    """Attention with a factor for every head, and a mask of the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.5, 1.5]).reshape(2, 1, 1))
        self.mask = nn.Parameter(torch.randn(2, 6, 6))
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, -1).permute(2, 0, 3, 1, 4).unbind(0)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        y = (scores * self.scale.clamp(max=4.0).exp() + self.mask).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(b, n, c))  # type: ignore[no-any-return]


@torch.no_grad()
def test_a_factor_per_head_and_a_mask(tmp_path: Path) -> None:
    torch.manual_seed(2)
    whole(Windows().eval(), torch.randn(3, 6, 8), folder=tmp_path)


class Detector(nn.Module):
    """Two sizes of maps, boxes from a distribution over distances, anchors, strides."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.down = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 2, 1)
        self.boxes, self.scores = nn.Conv2d(16, 32, 1), nn.Conv2d(16, 6, 1)
        self.distances = nn.Conv2d(8, 1, 1, bias=False)
        self.distances.weight.data = torch.arange(8.0).reshape(1, 8, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.trunk(x).relu()
        maps = [fine, self.down(fine).relu()]
        b = x.shape[0]
        boxes = torch.cat([self.boxes(m).reshape(b, 32, -1) for m in maps], -1)
        scores = torch.cat([self.scores(m).reshape(b, 6, -1) for m in maps], -1)
        points, strides = [], []
        for k, m in enumerate(maps):
            h, w = m.shape[2:]
            rows = torch.arange(h, device=x.device).type_as(m) + 0.5
            columns = torch.arange(w, device=x.device).type_as(m) + 0.5
            y, z = torch.meshgrid(rows, columns, indexing="ij")
            points.append(torch.stack((z, y), -1).reshape(-1, 2))
            strides.append(torch.full((h * w, 1), 2.0 * 2**k))
        anchors = torch.cat(points).transpose(0, 1).unsqueeze(0)
        steps = torch.cat(strides).transpose(0, 1)
        split = boxes.reshape(b, 4, 8, -1).transpose(2, 1).softmax(1)
        low, high = self.distances(split).reshape(b, 4, -1).chunk(2, 1)
        low, high = anchors - low, anchors + high
        found = torch.cat(((low + high) / 2, high - low), 1) * steps
        return torch.cat((found, scores.sigmoid()), 1), boxes


@torch.no_grad()
def test_heads_of_detectors(tmp_path: Path) -> None:
    torch.manual_seed(3)
    whole(Detector().eval(), torch.randn(2, 3, 16, 16), folder=tmp_path)


class Embedded(nn.Module):
    """Words, their types and their places; both kinds of ids may be given, or one."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.kinds = nn.Embedding(30, 16), nn.Embedding(2, 16)
        self.places, self.norm = nn.Embedding(12, 16), nn.LayerNorm(16)
        self.qkv, self.last = nn.Linear(16, 48), nn.Linear(16, 5)
        self.register_buffer("zeros", torch.zeros(1, 12, dtype=torch.long), persistent=False)

    def forward(self, ids: Tensor, mask: Tensor, kinds: Tensor | None = None) -> Tensor:
        b, n = ids.shape
        if kinds is None:
            kinds = torch.gather(
                self.zeros.expand(b, -1), 1, torch.arange(n).unsqueeze(0).expand(b, -1)
            )
        places = torch.arange(n).unsqueeze(0)
        x = self.norm(self.words(ids) + self.kinds(kinds) + self.places(places))
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, 8).permute(2, 0, 3, 1, 4)
        hidden = torch.zeros(mask.shape).masked_fill(mask == 0, torch.finfo(torch.float32).min)
        x = F.scaled_dot_product_attention(q, k, v, hidden[:, None, None].expand(b, 1, n, n))
        return self.last(x.transpose(1, 2).reshape(b, n, 16))  # type: ignore[no-any-return]


@pytest.mark.parametrize("given", [False, True])
@torch.no_grad()
def test_sums_of_embeddings(given: bool, tmp_path: Path) -> None:
    torch.manual_seed(4)
    ids = torch.randint(0, 30, (3, 9))
    mask = (torch.arange(9) < torch.tensor([[9], [5], [7]])).long()
    kinds = (torch.arange(9) > 4).long().expand(3, 9).contiguous()
    whole(Embedded().eval(), *([ids, mask, kinds] if given else [ids, mask]), folder=tmp_path)


class Between(nn.Module):
    def __init__(self, step: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.step = step
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.step(self.first(x)))
        return y


STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "share of a pixel": lambda y: y / (y.abs().mean(1, keepdim=True) + 0.1),
    "share of a channel": lambda y: y / (y.norm(dim=(2, 3), keepdim=True) + 1e-6),
    "share of everything": lambda y: (
        y / (torch.linalg.vector_norm(y, dim=(1, 2, 3), keepdim=True) + 1e-6)
    ),
    "share of rows": lambda y: y / (y.norm(dim=3, keepdim=True) + 0.5),
    "length one along channels": lambda y: F.normalize(y.permute(0, 2, 3, 1), dim=-1).permute(
        0, 3, 1, 2
    ),
    "softmax over channels": lambda y: y.softmax(1),
    "softmax over columns": lambda y: y.softmax(3),
    "gate of channels": lambda y: y * y.mean((2, 3), keepdim=True).softmax(1),
    "sums": lambda y: y * y.abs().sum(1, keepdim=True) + y.sum((2, 3), keepdim=True).expand_as(y),
    "mean of channels": lambda y: y - y.mean(1, keepdim=True).expand_as(y),
}


@pytest.mark.parametrize("name", STEPS)
@torch.no_grad()
def test_between_layers(name: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    whole(Between(STEPS[name]).eval(), torch.randn(3, 3, 8, 6), folder=tmp_path)


class Upsampled(nn.Module):
    def __init__(self, layer: nn.ConvTranspose2d) -> None:
        super().__init__()
        self.first, self.up, self.last = nn.Conv2d(3, 6, 3), layer, nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.up(self.first(x).relu()).relu())
        return y


TRANSPOSED: dict[str, dict[str, Any]] = {
    "stride 2": {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    "kernel 2": {"kernel_size": 2, "stride": 2, "bias": False},
    "holes": {"kernel_size": (2, 1), "stride": (3, 2), "output_padding": (2, 1)},
    "groups": {"kernel_size": 4, "stride": (2, 1), "padding": (1, 2), "groups": 2},
    "dilation": {"kernel_size": 3, "stride": (2, 3), "padding": 2, "dilation": (3, 2)},
    "dilation and stride": {"kernel_size": 3, "stride": 2, "dilation": 2, "output_padding": 1},
    "cut off": {"kernel_size": 5, "stride": 2, "padding": 4},
}


@pytest.mark.parametrize("name", TRANSPOSED)
@torch.no_grad()
def test_transposed_convolutions_in_float(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A native one that the clock puts there, and one that the plan leaves alone."""
    torch.manual_seed(6)
    layer = nn.ConvTranspose2d(6, 4, **TRANSPOSED[name])
    model, x = Upsampled(layer).eval(), torch.randn(2, 3, 9, 8)
    graph = ada.capture(model, x)
    native = native_of(graph, x)
    monkeypatch.setattr(compiler, "layer_times", lambda exported, *rest: Times(
        {n: (2.0, 1.0) for n in exported.graph.nodes if is_layer(n)}, 100.0
    ))  # fmt: skip
    monkeypatch.setattr(compiler, "fastest_of", lambda engines, batch: engines[1])
    floats = ada.compile(native, x, strict=True)
    assert {row.kind for row in floats.coverage(rounds=0)} == {"native", "float"}
    torch.testing.assert_close(floats(x), native(x), rtol=0, atol=0.02)
    kept = {key: item for key, item in plan_of(graph).layers.items() if key != "up"}
    prepared = ada.prepare(graph, Plan(kept))
    ada.calibrate(prepared, [x], progress=False)
    converted = ada.convert(prepared)
    torch.testing.assert_close(converted(x), model(x), rtol=0.1, atol=0.1)
    engine = ada.compile(converted, x, policy="native", strict=True)
    assert torch.equal(engine(x), converted(x))
    with ada.simulate(prepared) as exact:
        assert torch.equal(exact(x), converted(x))
    engine.save(tmp_path / "net.ada")
    assert torch.equal(ada.load(tmp_path / "net.ada")(x), converted(x))
