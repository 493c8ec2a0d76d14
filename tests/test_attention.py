"""Attention: found in graphs, the operator's law, and modules, simulation and engine alike."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_engine import compiled
from torch import Tensor, nn

import adalayer_native as ada
from adalayer_native.capture.attention import attentions
from adalayer_native.engine import Engine
from adalayer_native.errors import FileFormatError
from adalayer_native.files import save
from adalayer_native.quantization import restore

LENGTH, WIDTH, HEADS = 9, 16, 4
INFINITY = math.inf

grid_attention = torch.ops.adalayer.grid_attention.default


def tokens(batch: int = 2, length: int = LENGTH, width: int = WIDTH, seed: int = 0) -> Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed))


def torch_operators(engine: Engine) -> list[str]:
    """What the engine leaves to torch."""
    return [row.op for row in engine.coverage().rows if row.kind == "torch"]


# -- the operator ---------------------------------------------------------------------------------

GRIDS = ((0.03, 128), (0.02, 100), (0.05, 3))


def on_grid(shape: tuple[int, ...], grid: tuple[float, int], seed: int) -> tuple[Tensor, Tensor]:
    """Random values on a grid, and their levels relative to its zero point in float64."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 256, shape, generator=generator) - grid[1]
    return levels.float() * torch.tensor(grid[0]), levels.double()


@pytest.mark.parametrize("lead", [(2, 3), (1, 1), (2, 2, 3)])
@pytest.mark.parametrize("sizes", [(7, 7, 8, 8), (25, 33, 5, 17), (1, 40, 16, 1)])
@pytest.mark.parametrize("masked", ["no", "causal", "bool", "heads"])
def test_the_law(lead: tuple[int, ...], sizes: tuple[int, ...], masked: str) -> None:
    queries, keys, depth, width = sizes
    shapes = (queries, depth), (keys, depth), (keys, width)
    items = [
        on_grid((*lead, *shape), grid, i)
        for i, (shape, grid) in enumerate(zip(shapes, GRIDS, strict=True))
    ]
    qparams = [torch.tensor([scale, float(zero), 8.0]) for scale, zero in GRIDS]
    scale = 0.4 / math.sqrt(depth)
    q, k, v = (levels for _, levels in items)
    scores = q @ k.mT * float(torch.tensor(GRIDS[0][0] * GRIDS[1][0] * scale))
    mask = None
    if masked == "bool":
        mask = torch.rand(queries, keys) > 0.4
        scores = scores.masked_fill(~mask, -INFINITY)
    elif masked == "heads":
        mask = torch.randn(1, lead[-1], queries, keys)
        scores = scores + mask
    elif masked == "causal":
        scores = scores.masked_fill(torch.ones(queries, keys).triu(1) > 0, -INFINITY)
    weights = (scores - scores.amax(-1, keepdim=True)).exp().nan_to_num()
    weights = (255 * weights).round()
    wanted = (weights @ v * GRIDS[2][0] / weights.sum(-1, keepdim=True)).nan_to_num()
    got = grid_attention(*(x for x, _ in items), mask, masked == "causal", scale, *qparams)
    assert got.shape == wanted.shape
    # Where a weight lies half way between two levels, float32 may round it otherwise.
    assert torch.allclose(got.double(), wanted, atol=0.05 * 255 / 200)
    assert float((got.double() - wanted).abs().mean()) < 1e-3


def test_weights_that_are_all_alike_keep_their_bits() -> None:
    # A fixed grid of 1 / 255 would round 300 weights of 1 / 300 to one level, or to none.
    q, k = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 300, 4)
    v = torch.arange(300.0).remainder(256).reshape(1, 1, 300, 1)
    qparams = torch.tensor([1.0, 0.0, 8.0])
    got = grid_attention(q, k, v, None, False, 1.0, qparams, qparams, qparams)
    assert float(got) == pytest.approx(float(v.mean()), rel=1e-6)


def test_a_query_that_meets_no_key_is_zero() -> None:
    x, _ = on_grid((1, 1, 3, 4), GRIDS[0], 0)
    qparams = torch.tensor([*map(float, GRIDS[0]), 8.0])
    mask = torch.tensor([[True, True, False], [False, False, False], [True, False, True]])
    got = grid_attention(x, x, x, mask, False, 1.0, qparams, qparams, qparams)
    assert not got[0, 0, 1].any()
    assert got[0, 0, 0].any()


def test_opcheck() -> None:
    x, _ = on_grid((2, 2, 5, 4), GRIDS[0], 0)
    qparams = torch.tensor([*map(float, GRIDS[0]), 8.0])
    for mask in (None, torch.zeros(5, 5)):
        torch.library.opcheck(
            grid_attention, (x, x, x, mask, mask is None, 0.5, qparams, qparams, qparams)
        )


# -- in networks ----------------------------------------------------------------------------------


class Block(nn.Module):
    """Queries, keys and values of one layer, attention, another layer."""

    def __init__(self, heads: int = HEADS, key_heads: int | None = None) -> None:
        super().__init__()
        self.heads, self.key_heads = heads, key_heads or heads
        depth = WIDTH // heads
        self.q = nn.Linear(WIDTH, WIDTH)
        self.kv = nn.Linear(WIDTH, 2 * self.key_heads * depth)
        self.out = nn.Linear(WIDTH, 5)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, self.heads, -1).transpose(1, 2)
        k, v = self.kv(x).view(batch, length, 2, self.key_heads, -1).permute(2, 0, 3, 1, 4)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attend(*self.split(x))
        return self.out(y.transpose(1, 2).flatten(2))


class Spelled(Block):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        return F.dropout(scores.softmax(-1), 0.1, self.training) @ v


class ScaledQueries(Block):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(HEADS, LENGTH, LENGTH))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.matmul(q * 0.5, k.permute(0, 1, 3, 2)) + self.bias
        return torch.softmax(scores, dim=-1).matmul(v)


class Tempered(Block):
    """Scales that are parameters, and constants of the code."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature, self.width = (
            nn.Parameter(torch.rand(1) + 0.5),
            nn.Parameter(torch.rand(()) + 1),
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q / self.width) @ k.mT / torch.sqrt(torch.tensor(4.0)) * self.temperature.exp()
        return scores.softmax(-1) @ v


class Turned(Block):
    """As in detectors: values times transposed weights."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.mT * 0.5).softmax(-1)
        return (v.mT @ weights.mT).mT


class Causal(Block):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)


class Masked(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.rand(1, 1, LENGTH, LENGTH) > 0.3)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, self.mask)


class FewKeys(Block):
    def __init__(self) -> None:
        super().__init__(4, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


class SharedKeys(Block):
    """The same without the operator's option: keys are repeated."""

    @staticmethod
    def repeat(x: Tensor) -> Tensor:
        return x.repeat_interleave(2, 1)

    def __init__(self) -> None:
        super().__init__(4, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = type(self).repeat(k), type(self).repeat(v)
        return (q @ k.mT * 0.5).softmax(-1) @ v


class ExpandedKeys(SharedKeys):
    @staticmethod
    def repeat(x: Tensor) -> Tensor:
        batch, heads, length, depth = x.shape
        x = x[:, :, None, :, :].expand(batch, heads, 2, length, depth)
        return x.reshape(batch, 2 * heads, length, depth)


class TiledKeys(SharedKeys):
    """One head for all, as often as there are heads of queries."""

    @staticmethod
    def repeat(x: Tensor) -> Tensor:
        return x[:, :1].repeat(1, HEADS, 1, 1)


class Across(nn.Module):
    """Two sequences of different lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        short = x[:, :4]
        q, k, v = self.q(short), self.k(x), self.v(x)
        return self.out(F.scaled_dot_product_attention(q, k, v))


class Windows(nn.Module):
    """Pixels in windows of 2 x 2, one of which hides a key, as in shifted windows."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 5)
        self.bias = nn.Parameter(torch.randn(1, HEADS, 4, 4))
        mask = torch.zeros(6, 1, 4, 4)
        mask[2, :, :, 1] = -100.0
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        batch, h, w, c = x.shape
        x = x.view(batch, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        qkv = self.qkv(x).reshape(-1, 4, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        scores = (q * 0.5) @ k.transpose(-2, -1) + self.bias
        scores = scores.view(batch, 6, HEADS, 4, 4) + self.mask
        weights = scores.view(-1, HEADS, 4, 4).softmax(-1)
        y = (weights @ v).transpose(1, 2).reshape(-1, 4, c)
        y = self.out(y).view(batch, h // 2, w // 2, 2, 2, 5).permute(0, 1, 3, 2, 4, 5)
        return y.reshape(batch, h, w, 5)


class Pixels(nn.Module):
    """Attention over the pixels of an image, channels first, heads outermost."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Conv2d(3, 2 * 20, 1), nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, h, w = x.shape
        q, k, v = self.qkv(x).view(batch, 2, 20, h * w).split([6, 6, 8], 2)
        weights = (q.transpose(-2, -1) @ k * 0.4).softmax(-1)
        y = (v @ weights.transpose(-2, -1)).view(batch, 16, h, w)
        return self.out(y)


class Letters(Block):
    """Sums over letters; tokens before heads."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.einsum("bihd, bjhd -> bhij", q.transpose(1, 2), k.transpose(1, 2))
        weights = (weights * 0.5).softmax(-1)
        return torch.einsum("bhij,bhjd->bihd", weights, v).transpose(1, 2)


class Folded(Block):
    """Heads in the batch, a product with a sum."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        folded, size = [item.flatten(0, 1) for item in (q, k, v)], (LENGTH, LENGTH)
        mask = torch.zeros(size).masked_fill(torch.ones(size).triu(1) > 0, -INFINITY)
        mask = mask.expand(folded[0].shape[0], -1, -1)
        weights = torch.baddbmm(mask, folded[0], folded[1].mT, alpha=0.5).softmax(-1)
        return torch.bmm(weights, folded[2]).view_as(q)


SMALLEST = torch.finfo(torch.float32).min


class Hidden(Block):
    """Scores that others take the place of; a row may see nothing at all."""

    hide: Any
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.ones(LENGTH, LENGTH).tril()[None, None])

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = type(self).hide(q @ k.mT * 0.5, self.seen).softmax(-1)
        return weights @ v


# (Torch gives NaN for a row of nothing but infinities.)
HIDING: list[Any] = [
    (lambda scores, seen: scores.masked_fill(seen == 0, -INFINITY), False),
    (lambda scores, seen: scores.masked_fill(~(seen > 0), SMALLEST), True),
    (lambda scores, seen: torch.where(seen > 0, scores, torch.tensor(-1e9)), True),
    (lambda scores, seen: torch.where(seen > 0, scores, torch.full([], SMALLEST)), False),
    (lambda scores, seen: torch.where(seen == 0, SMALLEST, scores), False),
    (lambda scores, seen: (scores + seen).masked_fill(seen == 0, torch.tensor(-1e12)), False),
]


def hidden(hide: Any) -> Hidden:
    made: Hidden = type("Net", (Hidden,), {"hide": staticmethod(hide)})().eval()
    return made


@pytest.mark.parametrize(("hide", "blind"), HIDING)
def test_hidden_scores(hide: Any, blind: bool) -> None:
    torch.manual_seed(8)
    model, x = hidden(hide), tokens(3)
    if blind:
        model.seen[..., 2, :] = 0
    native, engine = compiled(model, x)
    assert not torch_operators(engine)
    with torch.no_grad():
        assert F.cosine_similarity(native(x).flatten(), model(x).flatten(), 0) > 0.99


def test_what_takes_the_place_of_scores_may_be_seen_itself() -> None:
    # Where all are hidden, weights are alike; a sum with -10,000 would keep their differences.
    model = hidden(lambda scores, seen: scores.masked_fill(seen == 0, -1e4))
    assert not attentions(ada.capture(model, tokens()))


class Slopes(Folded):
    """A bias that grows with the distance, by heads, as BLOOM adds it."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        slopes = torch.arange(LENGTH).float() * torch.tensor([0.5, 0.25, 0.1, 0.0])[:, None, None]
        bias = slopes[None].expand(q.shape[0], -1, -1, -1).reshape(-1, 1, LENGTH)
        folded = [item.flatten(0, 1) for item in (q, k, v)]
        weights = torch.baddbmm(bias, folded[0], folded[1].mT, alpha=0.5).softmax(-1)
        return torch.bmm(weights, folded[2]).view_as(q)


NETWORKS: dict[str, Any] = {
    "letters": (Letters, tokens),
    "folded": (Folded, tokens),
    "slopes": (Slopes, tokens),
    "operator": (Block, tokens),
    "one head": (lambda: Block(1), tokens),
    "spelled out": (Spelled, tokens),
    "scaled queries": (ScaledQueries, tokens),
    "tempered": (Tempered, tokens),
    "turned": (Turned, tokens),
    "causal": (Causal, tokens),
    "bool mask": (Masked, tokens),
    "few heads of keys": (FewKeys, tokens),
    "shared keys": (SharedKeys, tokens),
    "expanded keys": (ExpandedKeys, tokens),
    "tiled keys": (TiledKeys, tokens),
    "across": (Across, tokens),
    "windows": (Windows, lambda: torch.randn(2, 4, 6, WIDTH)),
    "pixels": (Pixels, lambda: torch.randn(2, 3, 3, 4)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_modules_simulation_and_engine_agree(name: str) -> None:
    torch.manual_seed(1)
    make, example = NETWORKS[name]
    model, x = make().eval(), example()
    native, engine = compiled(model, x)
    assert not torch_operators(engine)
    assert any(row.op == "attention" for row in engine.coverage().rows)
    with torch.no_grad():
        wanted = model(x)
        more = torch.cat([x, x.flip(0), 2 * x])
        assert torch.equal(engine(more), native(more))
        assert F.cosine_similarity(native(x).flatten(), wanted.flatten(), 0) > 0.99


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_torchs_own_module(need_weights: bool, batch_first: bool, masked: bool) -> None:
    """Its tokens come before the batch for a while, or all the time."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(WIDTH, WIDTH)
            self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first)
            self.last = nn.Linear(WIDTH, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            y = y if batch_first else y.transpose(0, 1)
            mask = torch.ones(LENGTH, LENGTH).triu(1) > 0 if masked else None
            y, _ = self.attention(y, y, y, need_weights=need_weights, attn_mask=mask)
            return self.last(y if batch_first else y.transpose(0, 1))

    torch.manual_seed(2)
    x = tokens()
    native, engine = compiled(Net().eval(), x)
    if not need_weights:  # (their mean over the heads is computed, read or not)
        assert not torch_operators(engine)
    assert torch.equal(engine(x[:1]), native(x[:1]))


def test_a_transformer_layer_is_one_program(tmp_path: Any) -> None:
    torch.manual_seed(3)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 24, batch_first=True, norm_first=True)
    model = nn.Sequential(
        nn.Linear(WIDTH, WIDTH),
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        nn.Linear(WIDTH, 3),
    )
    x = tokens(length=33)
    native, engine = compiled(model.eval(), x)
    assert not torch_operators(engine)
    engine.save(tmp_path / "model.ada")
    loaded = ada.load(tmp_path / "model.ada")
    assert torch.equal(loaded(x), native(x))
    assert (tmp_path / "model.ada").read_bytes()[10:12] == b"\2\0"  # format 1.2


def test_distances_are_computed_in_float() -> None:
    """Buckets of distances, as T5 has them: the logarithm of no distance is no activation."""

    class Buckets(Block):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(8, HEADS)

        def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            places = torch.arange(q.shape[2])
            distance = (places[None] - places[:, None]).abs()
            far = 4 + (torch.log(distance.float() / 4) * 2).to(torch.int64)
            far = torch.min(far, torch.full_like(far, 7))
            bias = self.table(torch.where(distance < 4, distance, far)).permute(2, 0, 1)
            return F.scaled_dot_product_attention(q, k, v, bias[None])

    torch.manual_seed(4)
    model, x = Buckets().eval(), tokens()
    native, engine = compiled(model, x)
    assert not torch_operators(engine)
    with torch.no_grad():
        assert F.cosine_similarity(native(x).flatten(), model(x).flatten(), 0) > 0.99


def test_scores_that_somebody_reads_are_no_attention() -> None:
    class Shown(Block):
        def forward(self, x: Tensor) -> Any:
            q, k, v = self.split(x)
            weights = (q @ k.mT).softmax(-1)
            return self.out((weights @ v).transpose(1, 2).flatten(2)), weights

    torch.manual_seed(4)
    graph = ada.capture(Shown().eval(), tokens())
    assert not attentions(graph)


@pytest.mark.parametrize(
    "attend",
    [
        lambda q, k, v: (q @ k.mT).softmax(-2) @ v,  # over the queries
        lambda q, k, v: ((q @ k.mT + 1.5) * 2).softmax(-1) @ v,
        lambda q, k, v: (q @ k.mT).sigmoid() @ v,
        lambda q, k, v: (q @ k.mT + q.sum(-1, keepdim=True)).softmax(-1) @ v,
        lambda q, k, v: (q @ k.mT + (torch.arange(LENGTH) > 3)).softmax(-1) @ v,  # one, no mask
    ],
)
def test_what_is_spelled_otherwise_is_computed_as_it_says(attend: Any) -> None:
    class Other(Block):
        def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            result: Tensor = attend(q, k, v)
            return result

    torch.manual_seed(5)
    model, x = Other().eval(), tokens()
    native, engine = compiled(model, x)
    with torch.no_grad():
        assert F.cosine_similarity(native(x).flatten(), model(x).flatten(), 0) > 0.97
        assert torch.equal(engine(x), native(x))


REPEATED: list[Any] = [
    # A bias for every head, of scores that have one; for every query, and for every key.
    lambda q, k, v, b: (q[:, :1] @ k[:, :1].mT + b).softmax(-1) @ v[:, :1],
    lambda q, k, v, b: (q[:, :, :1] @ k.mT + b).softmax(-1) @ v,
    lambda q, k, v, b: (q @ k[:, :, :1].mT + b).softmax(-1) @ v,
    lambda q, k, v, b: F.scaled_dot_product_attention(q, k[:, :1], v),
    lambda q, k, v, b: F.scaled_dot_product_attention(q, k, v[:, :1]),
    lambda q, k, v, b: F.scaled_dot_product_attention(q, k[:, :2], v[:, :1], enable_gqa=True),
    lambda q, k, v, b: F.scaled_dot_product_attention(q[:, :1], k, v),
]


@pytest.mark.parametrize("attend", REPEATED)
def test_scores_that_are_repeated_stay_in_torch(attend: Any) -> None:
    class Repeated(Block):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.randn(1, HEADS, LENGTH, LENGTH))

        def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            result: Tensor = attend(q, k, v, self.bias)
            return result

    torch.manual_seed(5)
    model, x = Repeated().eval(), tokens()
    native, engine = compiled(model, x)
    with torch.no_grad():
        assert F.cosine_similarity(native(x).flatten(), model(x).flatten(), 0) > 0.97
        assert torch.equal(engine(x[:1]), native(x[:1]))


class Batched(Block):
    """A mask that is made for the batch, as transformers makes it."""

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        seen = torch.ones(batch, length).cumsum(-1).le(7)[:, None, None, :]
        seen = seen & torch.ones(length, length, dtype=torch.bool).tril()
        mask = torch.where(seen, torch.tensor(0.0), torch.finfo(torch.float32).min)
        y = F.scaled_dot_product_attention(*self.split(x), mask)
        return self.out(y.transpose(1, 2).flatten(2))


class ShiftedWindows(Windows):
    """A mask that is made as long as the values, as torchvision has it."""

    def forward(self, x: Tensor) -> Tensor:
        batch, h, w, c = x.shape
        x = x.view(batch, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        q, k, v = self.qkv(x).reshape(-1, 4, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4)
        places = x.new_zeros((6, 4))
        places[4:, 2:] = 1
        mask = places.unsqueeze(1) - places.unsqueeze(2)
        mask = mask.masked_fill(mask != 0, -100.0).masked_fill(mask == 0, 0.0)
        scores = q @ k.mT * 0.5 + self.bias
        scores = scores.view(batch, 6, HEADS, 4, 4) + mask.unsqueeze(1).unsqueeze(0)
        y = scores.view(-1, HEADS, 4, 4).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(-1, 4, c)).view(batch, 6, 4, 5)


class BatchedWindows(Windows):
    """Shifted windows whose mask and bias are one sum."""

    def forward(self, x: Tensor) -> Tensor:
        batch, h, w, c = x.shape
        x = x.view(batch, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        q, k, v = self.qkv(x).reshape(-1, 4, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4)
        mask = self.bias + self.mask[None].expand(batch, -1, -1, -1, -1).reshape(-1, 1, 4, 4)
        y = F.scaled_dot_product_attention(q, k, v, mask)
        return self.out(y.transpose(1, 2).reshape(-1, 4, c)).view(batch, 6, 4, 5)


@pytest.mark.parametrize(
    ("make", "x"),
    [
        (Batched, tokens(3)),
        *((net, torch.randn(2, 4, 6, WIDTH)) for net in (BatchedWindows, ShiftedWindows)),
    ],
)
def test_masks_that_are_made_for_the_batch(make: type[nn.Module], x: Tensor) -> None:
    torch.manual_seed(6)
    model = make().eval()
    native, engine = compiled(model, x)
    assert not torch_operators(engine)
    with torch.no_grad():
        for given in (x[:1], torch.cat([x, x])):
            assert torch.equal(engine(given), native(given))
        assert F.cosine_similarity(native(x).flatten(), model(x).flatten(), 0) > 0.99


def test_what_differs_between_samples_is_no_repeated_constant() -> None:
    class Numbered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

        def forward(self, x: Tensor) -> Tensor:
            places = torch.arange(x.shape[0]) // 3 + torch.ones(x.shape[0]) / x.shape[0]
            return self.last(self.first(x) + places[:, None])

    x = torch.randn(7, WIDTH)
    native, engine = compiled(Numbered().eval(), x)
    assert torch.equal(engine(x[:5]), native(x[:5]))


def test_a_mask_that_is_computed_stays_in_torch() -> None:
    class Padded(Block):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.split(x)
            seen = (x.abs().sum(-1) > 12)[:, None, None, :]
            y = F.scaled_dot_product_attention(q, k, v, seen)
            return self.out(y.transpose(1, 2).flatten(2))

    torch.manual_seed(6)
    x = tokens()
    native, engine = compiled(Padded().eval(), x)
    assert "adalayer.grid_attention.default" in torch_operators(engine)
    assert torch.equal(engine(x), native(x))


@pytest.mark.parametrize("make", [Block, Tempered])
def test_files_of_attention(make: type[Block], tmp_path: Any) -> None:
    torch.manual_seed(7)
    model, x = make().eval(), tokens()
    native, engine = compiled(model, x)
    save(native, tmp_path / "model.safetensors")
    restored = restore(make(), tmp_path / "model.safetensors", x)
    assert torch.equal(restored(x), native(x))
    engine.save(tmp_path / "model.ada")
    data = bytearray((tmp_path / "model.ada").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "model.ada").write_bytes(data)
    with pytest.raises(FileFormatError):
        ada.load(tmp_path / "model.ada")
