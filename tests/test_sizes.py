"""Engines for a range of image sizes: the bits of an engine that was compiled at that size."""

from __future__ import annotations

import copy
import pickle
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers_engine import native_of
from torch import Tensor, nn

import adalayer_native as ada
from adalayer_native import _C
from adalayer_native.engine import fitting
from adalayer_native.engine.fitting import Shown, first_difference
from adalayer_native.engine.sizes import KEY
from adalayer_native.errors import FileFormatError, InputError, UnsupportedModelError

Sizes = list[tuple[int, int]]


def _native(model: nn.Module, *shape: int) -> nn.Module:
    torch.manual_seed(1)
    return native_of(model, torch.rand(4, *shape))


def _compiled(native: nn.Module, *shape: int, sizes: Any = None) -> ada.Engine:
    example = torch.rand(1, *shape)
    return ada.compile(native, example, policy="native", weights="streamed", sizes=sizes)


def _same(got: Any, wanted: Any) -> None:
    if isinstance(wanted, Tensor):
        got, wanted = (got,), (wanted,)
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape
        assert torch.equal(a.view(torch.int32), b.view(torch.int32))


def _check(native: nn.Module, engine: ada.Engine, sizes: Sizes, channels: int = 3) -> None:
    """Bits and programs of engines that were compiled at each size."""
    for h, w in sizes:
        alone = _compiled(native, channels, h, w)
        x = torch.randn(2, channels, h, w)
        _same(engine(x), alone(x))
        part, other = engine.only_part(), alone.only_part()
        assert part is not None and other is not None
        made = part.program.at_size([h, w])
        assert first_difference(Shown(made), Shown(other.program)) is None


class _Block(nn.Module):
    def __init__(self, ins: int, outs: int, stride: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(ins, outs, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(outs)
        self.b = nn.Conv2d(outs, outs, 3, padding=1)
        self.skip = nn.Conv2d(ins, outs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(F.relu(self.norm(self.a(x))))
        return F.relu(y + self.skip(x))


class _ResNet(nn.Module):
    def __init__(self, ceil: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 7, 2, 3)
        self.pool = nn.MaxPool2d(3, 2, 1, ceil_mode=ceil)
        self.blocks = nn.Sequential(_Block(16, 16, 1), _Block(16, 32, 2))
        self.fc = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(self.pool(F.relu(self.stem(x))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(y, 1), 1))


class _UNet(nn.Module):
    """Odd sizes, too: what comes up is as large as what it meets."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, 2, 1)
        self.c = nn.Conv2d(16, 16, 3, 2, 1)
        self.up = nn.ConvTranspose2d(16, 16, 2, 2)
        self.d, self.e = nn.Conv2d(32, 8, 3, padding=1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.a(x))
        b = F.relu(self.b(a))
        c = F.relu(self.up(F.relu(self.c(b))))
        c = F.interpolate(c, size=b.shape[-2:], mode="nearest")
        d = F.relu(self.d(torch.cat([b, c], 1)))
        d = F.interpolate(d, size=x.shape[-2:], mode="bilinear", align_corners=False)
        return self.e(torch.cat([a, d], 1))


class _Detector(nn.Module):
    """Two levels, heads as lists of boxes, a dictionary of results."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 2, 1)
        self.lateral = nn.Conv2d(16, 16, 1)
        self.boxes, self.scores = nn.Conv2d(16, 12, 3, padding=1), nn.Conv2d(16, 6, 1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        low = F.relu(self.stem(x))
        high = F.relu(self.down(low))
        low = F.relu(self.lateral(low) + F.interpolate(high, scale_factor=2.0, mode="nearest"))
        n = x.shape[0]
        boxes = [self.boxes(y).permute(0, 2, 3, 1).reshape(n, -1, 4) for y in (low, high)]
        return {"boxes": boxes, "scores": torch.sigmoid(self.scores(high))}


class _Mixed(nn.Module):
    """What else follows the size: borders, shuffles, crops, Focus, pools of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(12, 16, 3), nn.Conv2d(4, 8, 3, padding=1)
        self.c, self.d = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        focus = [x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]
        y = F.relu(self.a(F.pad(torch.cat(focus, 1), (1, 1, 1, 1), mode="reflect")))
        y = F.relu(self.b(F.pixel_shuffle(y, 2)))
        y = F.avg_pool2d(y[..., 1:, :-1], 3, 2, 1, ceil_mode=True, count_include_pad=False)
        y = F.relu(self.c(y))
        gate = torch.sigmoid(y.mean((2, 3), keepdim=True))
        return self.d(y * gate), F.softmax(self.d(F.adaptive_avg_pool2d(y, (3, 2))), 1)


class _Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.c = nn.Conv2d(8, 2, 1)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.c(F.relu(self.a(left) + self.b(right)))


# -- the same bits ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "example", "sizes", "tried"),
    [
        (_ResNet, (40, 36), (20, 96), [(40, 36), (37, 51), (96, 20)]),
        (lambda: _ResNet(ceil=True), (40, 36), (20, 96), [(39, 50), (96, 21)]),
        (_UNet, (24, 32), (12, 64), [(25, 30), (13, 63)]),
        (_Detector, (32, 48), (16, 96, 4), [(36, 44), (96, 16)]),
        (_Mixed, (24, 28), (16, 80, 2), [(26, 30), (80, 16)]),
    ],
    ids=["resnet", "resnet-ceil", "unet", "detector", "mixed"],
)
def test_bits(
    make: Callable[[], nn.Module], example: tuple[int, int], sizes: Any, tried: Sizes
) -> None:
    native = _native(make(), 3, *example)
    engine = _compiled(native, 3, *example, sizes=sizes)
    if make is _Detector:
        for h, w in tried:
            x = torch.randn(2, 3, h, w)
            got, wanted = engine(x), _compiled(native, 3, h, w)(x)
            _same([*got["boxes"], got["scores"]], [*wanted["boxes"], wanted["scores"]])
    else:
        _check(native, engine, tried)


def _random_network(seed: int) -> nn.Module:
    """Convolutions, pools and resizings of any parameters, one after the other."""
    draw = random.Random(seed)
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU()]
    for _ in range(draw.randint(3, 5)):
        kernel, stride, dilation = draw.choice((1, 2, 3, 5)), draw.choice((1, 1, 2)), 1
        kind = draw.choice(("conv", "conv", "max", "avg", "up", "transposed"))
        pad = draw.randint(0, kernel // 2)
        if kind == "conv":
            groups = draw.choice((1, 1, 2, 8))
            dilation = draw.choice((1, 2)) if kernel == 3 else 1
            layers += [nn.Conv2d(8, 8, kernel, stride, pad * dilation, dilation, groups), nn.ReLU()]
        elif kind == "max":
            layers.append(nn.MaxPool2d(kernel, stride, pad, ceil_mode=draw.random() < 0.5))
        elif kind == "avg":
            counts = draw.random() < 0.5
            up = draw.random() < 0.5
            layers.append(nn.AvgPool2d(kernel, stride, pad, up, count_include_pad=counts))
        elif kind == "up":
            mode = draw.choice(("nearest", "nearest-exact", "bilinear"))
            align = draw.random() < 0.5 if mode == "bilinear" else None
            factor = draw.choice((1.5, 2.0, 0.75))
            layers.append(nn.Upsample(scale_factor=factor, mode=mode, align_corners=align))
        else:
            extra = draw.randint(0, stride - 1)
            layers += [nn.ConvTranspose2d(8, 8, kernel, stride, pad, extra), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(8, 4, 1))


@pytest.mark.parametrize("seed", range(2))
def test_random_networks(seed: int) -> None:
    native = _native(_random_network(seed), 3, 33, 40)
    engine = _compiled(native, 3, 33, 40, sizes=(28, 70))
    _check(native, engine, [(34, 39), (51, 28)])


def _refuses(native: Any, h: int, w: int) -> bool:
    """Whether a captured model takes no images of that size."""
    try:
        native.signature.check([torch.zeros(1, 1, 1, 1).expand(2, 3, h, w)])
    except InputError:
        return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 40))
def test_more_random_networks(seed: int) -> None:
    native = _native(_random_network(seed), 3, 33, 40)
    try:
        engine = _compiled(native, 3, 33, 40, sizes=(28, 70))
    except UnsupportedModelError as error:
        # A pooling that rounds up takes one of two branches in torch's code, and a captured model
        # takes the sizes of its own alone.
        if "it was captured where" not in str(error):
            raise
        sides = range(28, 71)
        assert any(_refuses(native, h, w) for h in sides for w in sides)
        return
    _check(native, engine, [(34, 39), (51, 28), (70, 70), (29, 47)])


def test_two_inputs_of_one_size() -> None:
    torch.manual_seed(0)
    model = _Named().eval()
    left, right = torch.rand(2, 3, 12, 16), torch.rand(2, 3, 12, 16)
    example = (left, right)
    plan = ada.allocate(
        None, ada.Budget(bits=8), method="uniform", model=model, calibration=[example]
    )
    prepared = ada.prepare(model, plan)
    ada.calibrate(prepared, [example], progress=False)
    native = ada.convert(prepared)
    engine = ada.compile(native, example, policy="native", sizes=(8, 40))
    assert list(engine.sizes) == ["height", "width"]
    x = torch.rand(1, 3, 21, 9), torch.rand(1, 3, 21, 9)
    _same(engine(*x), ada.compile(native, x, policy="native")(*x))
    with pytest.raises(InputError, match=r"expected 21 at axis 2 \(height\)"):
        engine(x[0], torch.rand(1, 3, 20, 9))
    # Axes that have to be equal, and nobody said so.
    apart = {name: {2: (8, 40), 3: (8, 40)} for name in ("left", "right")}
    with pytest.raises(UnsupportedModelError, match="does not take all of"):
        ada.compile(native, example, policy="native", sizes=apart)


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, ada.Engine]:
    native = _native(_ResNet(), 3, 40, 36)
    return native, _compiled(native, 3, 40, 36, sizes=(20, 96))


def test_calls(pair: tuple[nn.Module, ada.Engine]) -> None:
    native, engine = pair
    assert engine.sizes["height"].max == 96 and "20..96" in repr(engine)
    x = torch.randn(3, 3, 30, 50)
    wanted = _compiled(native, 3, 30, 50)(x)
    _same(engine(x), wanted)
    _same(engine(x.contiguous(memory_format=torch.channels_last)), wanted)
    _same(torch.from_numpy(engine.run(x.numpy())), wanted)
    assert torch.equal(engine(x.half()), engine(x.half().float()).half())
    assert engine(x[:0]).shape == (0, 5)
    fixed = engine.fixed({"width": 50, "height": 30})
    _same(fixed(x), wanted)
    assert fixed.sizes == {}
    for bad in (x[:, :, :19], torch.rand(1, 3, 97, 40), torch.rand(1, 2, 40, 36), x[0]):
        with pytest.raises(InputError, match="expected shape"):
            engine(bad)
        with pytest.raises(InputError, match="expected shape"):
            fixed(bad)
    with pytest.raises(UnsupportedModelError, match=r"fixed\(sizes\)"):
        engine.to("cuda")
    with pytest.raises(UnsupportedModelError, match="one size"):
        fixed.warm_up((30, 50))
    assert engine.coverage(rounds=0).native_share == 1.0


def test_copies_and_files(pair: tuple[nn.Module, ada.Engine], tmp_path: Path) -> None:
    _, engine = pair
    x = torch.randn(2, 3, 57, 44)
    wanted = engine(x)
    engine.save(tmp_path / "net.ada", class_names=list("abcde"))
    loaded = ada.load(tmp_path / "net.ada")
    assert loaded.sizes == engine.sizes
    for other in (loaded, copy.deepcopy(engine), pickle.loads(pickle.dumps(engine))):
        _same(other(x), wanted)
        _same(other(x[..., :36][..., :40, :]), engine(x[..., :36][..., :40, :]))


def test_warmed_up_sizes(pair: tuple[nn.Module, ada.Engine]) -> None:
    native, _ = pair
    example = torch.rand(1, 3, 40, 36)
    engine = ada.compile(native, example, policy="native", sizes=(20, 96))
    x = torch.randn(1, 3, 64, 64)
    wanted = engine(x)
    engine.warm_up((64, 64), {"height": 20, "width": 21})
    _same(engine(x), wanted)
    assert engine.size_cache()["entries"] == 2
    for bad in ((64,), (64, 97), {"height": 64}, (64, "a")):
        with pytest.raises(InputError):
            engine.warm_up(bad)


# -- the cache -------------------------------------------------------------------------------------


def test_memory_is_bounded(pair: tuple[nn.Module, ada.Engine]) -> None:
    """Fifty sizes in a row, with the bits of engines of their own where one looks."""
    native, _ = pair
    engine = _compiled(native, 3, 40, 36, sizes=(20, 96))
    engine.size_cache(entries=8)
    for k in range(50):
        engine(torch.zeros(1, 3, 20 + k, 96 - k))
    info = engine.size_cache()
    assert info["entries"] == 8 and info["made"] == 50
    x = torch.randn(1, 3, 20, 96)  # left long ago
    _same(engine(x), _compiled(native, 3, 20, 96)(x))
    few = engine.size_cache(max_bytes=1)
    assert few["entries"] == 1  # the last one stays
    _same(engine(x), _compiled(native, 3, 20, 96)(x))
    assert engine.size_cache()["made"] == 51
    with pytest.raises(ValueError, match="1 or more"):
        engine.size_cache(entries=0)


def test_weights_are_held_once(pair: tuple[nn.Module, ada.Engine]) -> None:
    _, engine = pair
    part = engine.only_part()
    assert part is not None and part.sized is not None
    weights = engine.weight_bytes
    for side in (32, 48, 64, 80):
        other = part.sized.at([side, side])
        assert other.weight_bytes() == weights
        assert other.own_bytes() < weights + 200_000


def test_threads_make_a_size_once(pair: tuple[nn.Module, ada.Engine]) -> None:
    native, _ = pair
    engine = _compiled(native, 3, 40, 36, sizes=(20, 96))
    sizes = [(33, 47), (60, 30), (90, 90)]
    inputs = [torch.randn(1, 3, h, w) for h, w in sizes]
    wanted = [_compiled(native, 3, h, w)(x) for (h, w), x in zip(sizes, inputs, strict=True)]
    start = threading.Barrier(6)
    failures: list[str] = []

    def work(number: int) -> None:
        start.wait()
        for k in range(9):
            place = (k + number) % 3
            if not torch.equal(engine(inputs[place]), wanted[place]):
                failures.append(f"thread {number}, size {sizes[place]}")

    threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert engine.size_cache()["made"] == 3


# -- what is refused -------------------------------------------------------------------------------


class _Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc = nn.Conv2d(3, 4, 3, 2, 1), nn.Linear(4 * 8 * 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(F.relu(self.a(x)), 1))


class _Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 1)
        self.where = nn.Parameter(torch.randn(1, 4, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)) + self.where)


class _Branch(nn.Module):
    """Another network for large images."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        if x.shape[-1] > 100:
            y = F.max_pool2d(y, 2)
        return self.b(y)


class _Rare(nn.Module):
    """Another network for one width in seven, of which no size that is tried need be one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        if x.shape[-1] % 7 == 3:
            y = F.max_pool2d(y, 2)
        return self.b(y)


class _Share(nn.Module):
    """A number that follows from the size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x))) * (1.0 / x.shape[-1])


@pytest.mark.parametrize(
    "make", [_Flat, _Positions, _Branch, _Rare], ids=["flat", "positions", "branch", "rare"]
)
def test_what_does_not_follow_the_size(make: type[nn.Module]) -> None:
    native = _native(make(), 3, 16, 16)
    with pytest.raises(UnsupportedModelError, match="sizes"):
        _compiled(native, 3, 16, 16, sizes=(8, 200))


def test_a_number_that_follows_the_size() -> None:
    """It is a constant of the program."""
    native = _native(_Share(), 3, 16, 16)
    with pytest.raises(UnsupportedModelError, match="sizes"):
        _compiled(native, 3, 16, 16, sizes=(8, 64))


def test_multiples() -> None:
    """A network that joins what was halved takes multiples alone, and says so."""

    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(7, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            up = F.interpolate(F.relu(self.a(x)), scale_factor=2.0)
            return self.b(torch.cat([x, up], 1))

    native = _native(Halved(), 3, 16, 16)
    with pytest.raises(UnsupportedModelError, match="sizes"):
        _compiled(native, 3, 16, 16, sizes=(8, 64))
    engine = _compiled(native, 3, 16, 16, sizes=ada.Size(8, 64, multiple_of=2))
    _check(native, engine, [(18, 30)])
    with pytest.raises(InputError, match=r"8\.\.64 by 2"):
        engine(torch.rand(1, 3, 17, 16))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ("large", "expected"),
        ((40, 8), "smallest size, 40, is above the largest, 8"),
        ((9, 15, 16), "no multiple of 16 from 9 to 15"),
        ((8, 64, 0), "whole numbers from 1"),
        ([(8, 64), (8, 64)], "whole numbers from 1"),
        ((0, 8), "whole numbers"),
        ((50, 60), "not in"),
        ({"y": {2: (8, 64)}}, "no input"),
        ({"x": {0: (8, 64)}}, "axes 1 to 3"),
        ({"x": (8, 64)}, "by axis"),
        ({}, "at least one"),
    ],
)
def test_ranges_that_make_no_sense(
    pair: tuple[nn.Module, ada.Engine], sizes: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _compiled(pair[0], 3, 40, 36, sizes=sizes)


def test_dims_of_torch(pair: tuple[nn.Module, ada.Engine]) -> None:
    side = torch.export.Dim("side", min=5, max=20)
    native, _ = pair
    name = ada.compile(native, torch.rand(1, 3, 40, 40), policy="native").inputs[0].name
    example = torch.rand(1, 3, 40, 40)
    engine = ada.compile(native, example, policy="native", sizes={name: {2: 4 * side, 3: 4 * side}})
    assert str(engine.sizes["side"]) == "20..80 by 4"
    x = torch.randn(1, 3, 64, 64)
    _same(engine(x), _compiled(native, 3, 64, 64)(x))
    with pytest.raises(InputError, match="as in another input"):
        engine(torch.randn(1, 3, 64, 60))


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.replace('"height", 20', '"height", 41'),
        lambda t: t.replace('"height", 20', '"height", 0'),
        lambda t: t.replace('"nodes": {', '"nodes": {"999": {}, '),
        lambda t: t.replace('"nodes": {', '"nodes": {"1": {"window": ["up", "up"]}, '),
        lambda t: t.replace('"ports": [[null, 0, 1]]', '"ports": [[null, 1, 0]]'),
        lambda t: t.replace('"ports": [[null, 0, 1]]', '"ports": []'),
        lambda t: t.replace('"inputs": [[0, 1]]', '"inputs": [[0, null]]'),
        lambda t: t.replace('"shape": [5]', '"shape": [6]'),
        lambda t: t.replace('"shape": [5]', '"shape": [[5, 2, 1, 1]]'),
        lambda t: t.replace('"atoms": null', '"atoms": [[5, 2]]'),
        lambda t: t[:-1],
        lambda t: "[]",
    ],
)
def test_hostile_rules(
    pair: tuple[nn.Module, ada.Engine], tmp_path: Path, change: Callable[[str], str]
) -> None:
    """Refused when the file is read, or at the size where it shows; never a read outside."""
    engine = pair[1]
    engine.save(tmp_path / "net.ada")
    program = _C.Program.load(str(tmp_path / "net.ada"))
    text = program.metadata()[KEY]
    assert change(text) != text
    program.set_metadata(KEY, change(text))
    program.save(str(tmp_path / "bad.ada"))
    with pytest.raises((FileFormatError, InputError)):
        ada.load(tmp_path / "bad.ada", weights="streamed")(torch.rand(1, 3, 60, 44))


def test_limits_of_memory(pair: tuple[nn.Module, ada.Engine], tmp_path: Path) -> None:
    pair[1].save(tmp_path / "net.ada")
    program = _C.Program.load(str(tmp_path / "net.ada"))
    program.set_metadata(KEY, program.metadata()[KEY].replace(", 96, 1]", ", 100000, 1]"))
    program.save(str(tmp_path / "wide.ada"))
    engine = ada.load(tmp_path / "wide.ada", weights="streamed", max_memory=64 << 20)
    x = torch.rand(1, 3, 60, 44)
    _same(engine(x), pair[1](x))
    part = engine.only_part()
    assert part is not None
    with pytest.raises((InputError, MemoryError, RuntimeError), match=r"limit|memory|elements"):
        part.at([90_000, 90_000])


# -- how rules are found ---------------------------------------------------------------------------


def test_parts_of_tables() -> None:
    table = np.add.outer(np.arange(4) * 30, np.arange(5) * 2).reshape(-1)
    assert fitting._parts(table) == [(4, 30), (5, 2)]
    assert fitting._parts(np.arange(7)) == [(7, 1)]
    assert fitting._parts(np.array([0, 1, 3])) is None
    assert fitting._border(np.pad(np.arange(6), (2, 1), mode="reflect") * 7, 6) == (
        *("reflect", 2, 1),
        7,
    )


def test_monomials() -> None:
    sides = [(4, 6), (5, 9), (10, 3)]
    for values, shown in (
        ([7, 7, 7], 7),
        ([8, 10, 20], [2, 1, 1, 0]),
        ([3, 9, 3], None),
        ([12, 22, 15], None),
        ([72, 135, 90], [3, 1, 1, 1]),
    ):
        found = fitting.monomial(values, sides)
        assert (None if found is None else found.as_json()) == shown
