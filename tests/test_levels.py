"""Several widths of one network that share their stored weights."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path

import pytest
import torch
from helpers_models import TinyNet, batches, tiny
from torch import nn

import adalayer_native as ada
from adalayer_native.engine import Engine
from adalayer_native.levels import Levels, check_plans
from adalayer_native.plan import layer_kind, supported_layers
from adalayer_native.quantization import prepare
from adalayer_native.quantization.graph import layers_of
from adalayer_native.repair.cells import Cells, Nest, planes_for
from adalayer_native.repair.hessian import LayerHessian
from adalayer_native.rounding import Planes, plane_cells, upper_planes, weight_range

X = batches(1, 6, seed=9, labels=False)[0]


def _plans(widths: dict[str, tuple[int | None, ...]]) -> list[ada.Plan]:
    layers = supported_layers(tiny())
    count = len(next(iter(widths.values())))
    return [
        ada.Plan(
            {
                name: ada.LayerPlan(name, layer_kind(layer), layer.weight.numel(), widths[name][k])
                for name, layer in layers.items()
            },
            "by hand",
            {},
        )
        for k in range(count)
    ]


WIDTHS = {"conv1": (8, 5, 3), "conv2": (8, 4, 2), "fc": (7, 7, 4)}


@pytest.fixture(scope="module")
def made() -> Levels:
    """Three levels with widths of all kinds, learning at the end among them."""
    return ada.compress_levels(
        tiny(), batches(4), _plans(WIDTHS), effort="normal", seed=1, progress=False
    )


@pytest.fixture(scope="module")
def alone(made: Levels) -> list[torch.Tensor]:
    """What every level computes as a model of its own."""
    with torch.no_grad():
        return [model(X) for model in made.models]


@pytest.fixture
def engine(made: Levels) -> Engine:
    first, *others = made.models
    return ada.compile(first, X, policy="native", weights="streamed", levels=others)


@pytest.fixture
def file(engine: Engine, tmp_path: Path) -> Path:
    engine.save(tmp_path / "levels.ada")
    return tmp_path / "levels.ada"


# -- planes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [2, 5, 8])
def test_cells_are_what_planes_come_from(stored: int) -> None:
    low, high = weight_range(stored)
    every = torch.arange(low, high + 1, dtype=torch.int8)
    for bits in range(2, stored + 1):
        for drop in range(stored - bits + 1):
            planes = Planes(bits, drop)
            got = upper_planes(every, stored, planes)
            exact = torch.floor(every.double() / 2**drop + 0.5).clamp(*weight_range(bits))
            assert torch.equal(got.double(), exact)
            first, last = plane_cells(got, stored, planes)
            assert bool(((first <= every) & (every <= last)).all())
            for q in got.unique():
                own = every[got == q]
                ends = plane_cells(q.view(1), stored, planes)
                assert (int(ends[0]), int(ends[1])) == (int(own.min()), int(own.max()))
    with pytest.raises(ada.PlanError, match=f"at most {stored} planes"):
        upper_planes(every, stored, Planes(stored, 1))


def test_a_nest_leaves_what_its_widths_agree_on() -> None:
    q = torch.tensor([[-4, -1, 0, 3]], dtype=torch.int8)
    nest = Nest(8, q, torch.tensor([0.5]), Planes(3, 4))
    cells = nest.cells(Planes(4, 3))
    assert cells.low.tolist() == [[-8, -3, -1, 5]]  # of -128, -24, -8, 40: the ends of the cells
    assert cells.high.tolist() == [[-7, -1, 1, 7]]
    assert cells.scale.tolist() == [0.25]
    nest.settle(torch.tensor([[-7, -1, 1, 7]], dtype=torch.int8), Planes(4, 3))
    assert nest.low.tolist() == [[-60, -12, 4, 52]]
    assert nest.high.tolist() == [[-57, -9, 7, 127]]
    with pytest.raises(ValueError, match="no stored one"):
        nest.settle(torch.tensor([[7, 0, 0, 0]], dtype=torch.int8), Planes(4, 3))


def test_outliers_get_a_plane_of_their_own() -> None:
    torch.manual_seed(0)
    even = torch.rand(4, 1000) - 0.5
    assert planes_for(even, torch.full((4,), 1 / 7.0), 8, 3) == Planes(3, 5)
    tailed = even.clone()
    tailed[:, :20] *= 3.5
    assert planes_for(tailed, torch.full((4,), 1 / 7.0), 8, 3).drop < 5


def test_a_repair_within_cells() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 8, 3, padding=1)
    hessian = LayerHessian(layer, name="conv")
    for seed in range(3):
        hessian.add(torch.randn(8, 6, 10, 10, generator=torch.Generator().manual_seed(seed)))
    narrow = hessian.quantize(3)
    nest = Nest(8, narrow.levels, narrow.scale, Planes(3, 4))
    wide = hessian.quantize(8, cells=nest.cells(Planes(8, 0)))
    assert torch.equal(upper_planes(wide.levels, 8, Planes(3, 4)), narrow.levels)
    assert wide.error < 0.1 * narrow.error  # more bits are worth their planes
    with pytest.raises(ada.PlanError, match="cannot be pruned"):
        hessian.quantize(8, 0.5, cells=nest.cells(Planes(8, 0)))


# -- repair ---------------------------------------------------------------------------------------


def test_levels_are_planes_of_one_weight(made: Levels) -> None:
    assert [plan.average_bits for plan in made.plans] == sorted(
        (plan.average_bits for plan in made.plans), reverse=True
    )
    assert len(made.repairs) == 3
    for repair in made.repairs:
        assert list(repair.layers) == list(WIDTHS)
    for name, widths in WIDTHS.items():
        levels = [
            ada.ops.unpack_weight(model.get_submodule(name).weight_packed) for model in made.models
        ]
        for level, bits in zip(levels[1:], widths[1:], strict=True):
            planes = [Planes(bits, drop) for drop in range(widths[0] - bits + 1)]
            assert any(
                torch.equal(upper_planes(levels[0], widths[0], each), level) for each in planes
            )


def test_better_levels_are_nearer_to_the_float_model(alone: list[torch.Tensor]) -> None:
    with torch.no_grad():
        wanted = tiny()(X)
    errors = [float((y - wanted).square().mean() / wanted.var()) for y in alone]
    assert errors[0] < errors[1] < errors[2] < 1.0


def test_a_repair_goes_on_where_it_stopped(tmp_path: Path) -> None:
    plans = _plans({"conv1": (8, 3), "conv2": (8, 3), "fc": (8, 3)})
    first = ada.compress_levels(
        tiny(), batches(2), plans, effort="low", work_dir=tmp_path, progress=False
    )
    again = ada.compress_levels(
        tiny(), batches(2), plans, effort="low", work_dir=tmp_path, progress=False
    )
    assert [repair.resumed for repair in again.repairs] == [3, 3]
    with torch.no_grad():
        for one, other in zip(first.models, again.models, strict=True):
            assert torch.equal(one(X), other(X))


@pytest.mark.parametrize(
    ("widths", "text"),
    [
        ({"conv1": (8,), "conv2": (8,), "fc": (8,)}, "expected 2 to 16 levels, got 1"),
        ({"conv1": (3, 8), "conv2": (8, 8), "fc": (8, 3)}, "at most the 3 bits of the level"),
        ({"conv1": (8, 8), "conv2": (8, 8), "fc": (8, 8)}, "fewer bits from level to level"),
        ({"conv1": (8, 3), "conv2": (8, 3), "fc": (8, None)}, "quantizes other layers"),
    ],
)
def test_plans_that_are_no_levels(widths: dict[str, tuple[int | None, ...]], text: str) -> None:
    with pytest.raises(ada.PlanError, match=text):
        check_plans(_plans(widths))


def test_pruned_plans_are_no_levels() -> None:
    plans = _plans({"conv1": (8, 3), "conv2": (8, 3), "fc": (8, 3)})
    plans[1]["fc"].sparsity = 0.5
    with pytest.raises(ada.PlanError, match="level 1, layer 'fc': weights of levels"):
        check_plans(plans)


# -- engine ---------------------------------------------------------------------------------------


def test_every_level_has_the_bits_of_its_model(engine: Engine, alone: list[torch.Tensor]) -> None:
    assert (engine.levels, engine.quality) == (3, 0)
    for level in (0, 2, 1, 2, 0):
        engine.set_quality(level)
        assert engine.quality == level
        assert torch.equal(engine(X), alone[level])
        assert f"level {level} of 3" in repr(engine)
        shown = {row.name: row.bits for row in engine.coverage(rounds=0).rows if row.bits}
        assert shown == {name: widths[level] for name, widths in WIDTHS.items()}
        bits = {n: ada.ops.packed_info(w)["bits"] for n, w in engine.packed_weights().items()}
        assert bits == shown
    assert engine.quality_cache()["made"] == 2


def test_one_file_of_all_levels(file: Path, made: Levels, alone: list[torch.Tensor]) -> None:
    loaded = ada.load(file, weights="streamed")
    for level, wanted in enumerate(alone):
        assert torch.equal(loaded.at_quality(level)(X), wanted)
    assert loaded.quality == 0
    part = loaded.only_part()
    assert part is not None
    kinds = [kind for kind, _ in part.program.constants()]
    assert kinds.count("weights") == len(WIDTHS)  # once; of the others, scales and biases
    best = ada.compile(made.models[0], X, policy="native", weights="streamed")
    best.save(file.with_name("best.ada"))
    assert torch.equal(ada.load(file.with_name("best.ada"))(X), alone[0])


def test_copies_keep_their_level(engine: Engine, alone: list[torch.Tensor]) -> None:
    engine.set_quality(2)
    for again in (copy.deepcopy(engine), pickle.loads(pickle.dumps(engine)), engine.to("cpu")):
        assert again.quality == 2
        assert torch.equal(again(X), alone[2])
        again.set_quality(1)
        assert torch.equal(again(X), alone[1])
    assert torch.equal(engine(X), alone[2])


def test_levels_at_other_sizes(made: Levels) -> None:
    first, *others = made.models
    ranged = ada.compile(
        first, X, policy="native", weights="streamed", sizes=(8, 16), levels=others
    )
    x = torch.randn((2, 3, 12, 10), generator=torch.Generator().manual_seed(0))
    for level, model in enumerate(made.models):
        with torch.no_grad():
            wanted = model(x)
        assert torch.equal(ranged.at_quality(level)(x), wanted)
        assert torch.equal(ranged.at_quality(level).fixed((12, 10))(x), wanted)


def test_a_policy_by_the_clock_keeps_the_levels(made: Levels, alone: list[torch.Tensor]) -> None:
    first, *others = made.models
    engine = ada.compile(first, X, levels=others)
    for level, wanted in enumerate(alone):
        got = engine.at_quality(level)(X)
        assert torch.allclose(got, wanted, atol=0.05 * float(wanted.abs().max()))


def test_levels_leave_above_the_limits(engine: Engine, alone: list[torch.Tensor]) -> None:
    assert engine.quality_cache(entries=1)["most_entries"] == 1
    held = engine.at_quality(1)
    for level in (1, 2, 1, 2):
        engine.set_quality(level)
        assert torch.equal(engine(X), alone[level])
    assert torch.equal(held(X), alone[1])
    info = engine.quality_cache()
    assert info["entries"] == 1 and info["made"] == 4 and info["bytes"] > 0
    with pytest.raises(ValueError, match="limits of 1 or more"):
        engine.quality_cache(max_bytes=0)


def test_calls_of_many_threads_while_levels_change(
    engine: Engine, alone: list[torch.Tensor]
) -> None:
    engine.quality_cache(entries=1)  # levels are made and dropped meanwhile, too
    stop, wrong = threading.Event(), []
    counts = [0] * 3

    def call() -> None:
        while not stop.is_set():
            got = engine(X)
            for level, wanted in enumerate(alone):
                if torch.equal(got, wanted):
                    counts[level] += 1
                    break
            else:
                wrong.append(got)

    def switch(first: int) -> None:
        for k in range(30):
            engine.set_quality((first + k) % 3)

    callers = [threading.Thread(target=call) for _ in range(3)]
    switchers = [threading.Thread(target=switch, args=(k,)) for k in range(2)]
    for thread in callers + switchers:
        thread.start()
    for thread in switchers:
        thread.join()
    stop.set()
    for thread in callers:
        thread.join()
    assert not wrong
    assert sum(counts) > 0
    assert torch.equal(engine(X), alone[engine.quality])


@pytest.mark.parametrize("level", [3, -1, 1.0, True, None])
def test_levels_that_do_not_exist(engine: Engine, level: object) -> None:
    engine.set_quality(1)
    for call in (engine.set_quality, engine.at_quality):
        with pytest.raises(ada.InputError, match=r"does not exist: expected 0 \(the best\) to 2"):
            call(level)  # type: ignore[arg-type]
    assert engine.quality == 1


def test_an_engine_of_one_level(made: Levels, tmp_path: Path) -> None:
    ada.compile(made.models[0], X, policy="native", weights="streamed").save(tmp_path / "one.ada")
    engine = ada.load(tmp_path / "one.ada")
    assert (engine.levels, engine.quality) == (1, 0)
    engine.set_quality(0)
    with pytest.raises(ada.InputError, match="expected 0, the only one"):
        engine.set_quality(1)
    with pytest.raises(ada.UnsupportedModelError, match="one level of quality"):
        engine.quality_cache()


def test_models_that_are_no_levels(made: Levels) -> None:
    first, second, _ = made.models

    def refused(text: str, *levels: nn.Module) -> None:
        with pytest.raises(ada.UnsupportedModelError, match=text):
            ada.compile(first, X, policy="native", weights="streamed", levels=levels)

    other = ada.compress(tiny(3), batches(2), 4, effort="low", progress=False).model
    refused("level 1, node .*conv1.*: its weights of 4 bits are no planes of the program's of 8",
            other)  # fmt: skip
    # The wrong order: what is stored must have the most bits.
    with pytest.raises(ada.UnsupportedModelError, match="no planes of the program's of 5"):
        ada.compile(second, X, policy="native", weights="streamed", levels=[first])
    wide = ada.compress(_Wide().eval(), batches(2), 4, effort="low", progress=False).model
    refused("level 1: ", wide)
    with pytest.raises(ada.UnsupportedModelError, match="no native layers"):
        ada.compile(first, X, levels=[tiny()])


class _Wide(TinyNet):
    def __init__(self) -> None:
        super().__init__()
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.fc = nn.Linear(64, 4)


def test_damaged_levels_name_the_file(file: Path, tmp_path: Path) -> None:
    data = bytearray(file.read_bytes())
    place = data.rindex(b"conv1")  # of the node in the last level
    data[place] ^= 1
    (tmp_path / "bad.ada").write_bytes(data)
    with pytest.raises(ada.FileFormatError, match=r"bad\.ada.*section LEVL"):
        ada.load(tmp_path / "bad.ada")


def test_bounds_hold_through_learning(made: Levels) -> None:
    """Whatever learning kept, integers stay where the narrower level left them room."""
    plan = made.plans[0]
    prepared = prepare(tiny(), plan)
    layer = layers_of(prepared)["conv2"]
    cells = Cells(
        torch.full(layer.weight.shape, -1.0),
        torch.full(layer.weight.shape, 1.0),
        torch.full((12,), 0.05),
    )
    ada.calibrate(prepared, batches(2), progress=False)
    ada.repair(prepared, batches(2), cells={"conv2": cells}, equalize=False, progress=False)
    assert int(layer.integers().abs().max()) <= 1
    with pytest.raises(ada.CalibrationError, match="expected equalize=False"):
        ada.repair(prepared, batches(2), cells={"conv2": cells}, progress=False)
