"""Token ids: embeddings, RMS norms and maxima over time in modules, simulation and engine."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers_engine import compiled
from torch import Tensor, nn

import adalayer_native as ada
from adalayer_native.capture.rms_norms import rms_norms
from adalayer_native.engine import Engine
from adalayer_native.engine.export import export
from adalayer_native.errors import DeviceError, FileFormatError, InputError

VOCABULARY, LENGTH, WIDTH = 50, 7, 12


def ids_of(batch: int, *sizes: int, seed: int = 0, vocabulary: int = VOCABULARY) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (batch, *sizes), generator=generator)


class Texts(nn.Module):
    """An embedding, a linear layer over the tokens, and their mean."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.first, self.last = nn.Linear(WIDTH, 16), nn.Linear(16, 5)
        self.activation = activation

    def forward(self, ids: Tensor) -> Tensor:
        return self.last(self.activation(self.first(self.embedding(ids))).mean(1))


def in_torch(engine: Engine) -> list[str]:
    return [row.op for row in engine.coverage(rounds=0) if row.kind == "torch"]


@torch.no_grad()
def test_a_text_runs_in_one_program() -> None:
    native, engine = compiled(Texts(), ids_of(4, LENGTH))
    assert in_torch(engine) == []
    for batch in (1, 3):
        ids = ids_of(batch, LENGTH, seed=batch)
        wanted = native(ids)
        for given in (ids, ids.int(), ids.repeat(1, 2)[:, ::2][:, :LENGTH] * 0 + ids):
            assert torch.equal(engine(given), wanted)
        assert np.array_equal(engine.run(ids.numpy()), wanted.numpy())
        assert np.array_equal(engine.run(ids.numpy().astype(np.int32)), wanted.numpy())
    assert engine(ids[:0]).shape == (0, 5)
    assert engine.tables == {"ids": VOCABULARY}


@torch.no_grad()
def test_files_copies_and_pickles_take_ids(tmp_path: Path) -> None:
    native, engine = compiled(Texts(), ids_of(4, LENGTH), bits=4)
    ids = ids_of(3, LENGTH, seed=9)
    wanted = native(ids)
    engine.save(tmp_path / "text.ada")
    loaded = ada.load(tmp_path / "text.ada")
    assert loaded.inputs == engine.inputs and loaded.inputs[0].dtype == torch.int64
    for other in (loaded, copy.deepcopy(engine), pickle.loads(pickle.dumps(engine))):
        assert torch.equal(other(ids), wanted) and torch.equal(other(ids.int()), wanted)
        with pytest.raises(InputError, match="expected ids of 0 to 49"):
            other(ids + 50)
    with pytest.raises(DeviceError):
        engine.to("cuda")


WRONG = [
    (lambda ids: ids.index_fill(1, torch.tensor(4), VOCABULARY),
     r"input 0 \('ids'\): expected ids of 0 to 49, got 50 in sample 0, position 4"),
    (lambda ids: ids - VOCABULARY, r"'ids'.* expected ids of 0 to 49, got -\d+ in sample 0, pos"),
    (lambda ids: ids + 2**40, r"'ids': expected whole numbers that int32 holds, got 10995"),
    (lambda ids: ids.float(), r"'ids': expected torch.int64, got torch.float32"),
    (lambda ids: ids.short(), r"'ids': expected torch.int64, got torch.int16"),
    (lambda ids: ids[:, 1:], r"'ids': expected shape \[batch, 7\], got \[2, 6\]"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_what_is_no_id_is_refused(change: Callable[[Tensor], Tensor], message: str) -> None:
    engine = compiled(Texts(), ids_of(2, LENGTH))[1]
    with pytest.raises(InputError, match=message):
        engine(change(ids_of(2, LENGTH)))
    assert engine(ids_of(2, LENGTH)).isfinite().all()


class Shaped(nn.Module):
    """Ids of any axes."""

    def __init__(self, view: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embedding, self.last = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, 3)
        self.view = view

    def forward(self, ids: Tensor) -> Tensor:
        return self.last(F.hardswish(self.embedding(self.view(ids)) * 2.0))


@pytest.mark.parametrize(
    ("sizes", "view"),
    [
        ((), lambda ids: ids),
        ((4, 3), lambda ids: ids),
        ((4, 3), lambda ids: ids.transpose(1, 2)),
        ((6,), lambda ids: ids.reshape(-1, 2, 3)),
        ((2, 3, 2), lambda ids: ids.flatten(1).int()),
    ],
    ids=["one per sample", "image", "turned", "split", "cast"],
)
@torch.no_grad()
def test_ids_of_any_shape(sizes: tuple[int, ...], view: Callable[[Tensor], Tensor]) -> None:
    assert in_torch(compiled(Shaped(view), ids_of(3, *sizes))[1]) == []


@torch.no_grad()
def test_ids_that_are_computed_are_computed_in_torch() -> None:
    engine = compiled(Texts(), ids_of(3, LENGTH))[1]
    shifted = Shaped(lambda ids: (ids + 1) % VOCABULARY)
    native, engine = compiled(shifted, ids_of(3, LENGTH))
    assert in_torch(engine) == ["aten.add.Tensor", "aten.remainder.Scalar"]
    assert torch.equal(engine(ids_of(5, LENGTH)), native(ids_of(5, LENGTH)))


class Made(nn.Module):
    """Positions and types that are made for the sizes of every call."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.types = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(2, WIDTH)
        self.positions, self.last = nn.Embedding(2 * LENGTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor) -> Tensor:
        kinds = torch.zeros(ids.shape, dtype=torch.int64)
        places = torch.arange(ids.shape[1]).expand(ids.shape[0], -1)
        angles = torch.arange(ids.shape[1])[:, None] * torch.arange(WIDTH)
        found = self.words(ids) + self.types(kinds) + self.positions(places)
        return self.last(found * angles.cos())


@torch.no_grad()
def test_what_is_made_for_sizes_is_a_constant() -> None:
    native, engine = compiled(Made(), ids_of(3, LENGTH))
    assert in_torch(engine) == []
    for batch in (1, 4):
        assert torch.equal(engine(ids_of(batch, LENGTH)), native(ids_of(batch, LENGTH)))


class Positions(nn.Module):
    """Positions and types of tokens, as BERT has them."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.types = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(2, WIDTH)
        self.positions, self.last = nn.Embedding(2 * LENGTH, WIDTH), nn.Linear(WIDTH, 3)
        self.register_buffer("kinds", torch.zeros(1, 2 * LENGTH, dtype=torch.int64))

    def forward(self, ids: Tensor) -> Tensor:
        batch, length = ids.shape
        kinds = self.kinds[:, :length].expand(batch, length)
        places = torch.arange(length).unsqueeze(0)
        return self.last(self.words(ids) + self.types(kinds) + self.positions(places))


@torch.no_grad()
def test_what_is_looked_up_for_every_text_is_a_constant() -> None:
    native, _ = compiled(Positions(), ids_of(3, LENGTH))
    exported = export(native, (ids_of(3, LENGTH),))
    operators = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert operators.count("aten.embedding.default") == 1
    assert not {"aten.expand.default", "aten.arange.default"} & set(operators)


@torch.no_grad()
def test_two_tables_for_the_same_ids_have_the_rows_of_the_smaller() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Embedding(30, WIDTH), nn.Embedding(20, WIDTH)
            self.last = nn.Linear(WIDTH, 3)

        def forward(self, ids: Tensor, others: Tensor) -> Tensor:
            return self.last(self.a(ids) + self.b(ids) + self.b(others))

    example = ids_of(3, 4, vocabulary=20), ids_of(3, 4, seed=1, vocabulary=20)
    engine = compiled(Two(), *example)[1]
    assert engine.tables == {"ids": 20, "others": 20}
    with pytest.raises(InputError, match=r"\('others'\): expected ids of 0 to 19, got 20"):
        engine(example[0], torch.full((1, 4), 20).expand(3, 4))


# -- RMS norms ------------------------------------------------------------------------------------

Norm = Callable[[Tensor, Tensor], Tensor]
NORMS: dict[str, Norm] = {
    "operator": lambda x, w: F.rms_norm(x, (WIDTH,), w, 1e-6),
    "without weight": lambda x, w: F.rms_norm(x, (WIDTH,)),
    "llama": lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)),
    "behind": lambda x, w: x * torch.rsqrt(x.square().mean(2, keepdim=True) + 1e-5) * w,
    "quotient": lambda x, w: x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * w,
    "power": lambda x, w: (x**2).mean(-1, keepdim=True).add(1e-5).pow(-0.5) * x,
    "gemma": lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * (1 + w),
}


class Normed(nn.Module):
    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.norm, self.weight = norm, nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        x = x + self.first(self.norm(x, self.weight))
        return self.last(self.norm(x, self.weight))


@pytest.mark.parametrize("kind", NORMS)
@torch.no_grad()
def test_rms_norms_are_one_operation(kind: str) -> None:
    model = Normed(NORMS[kind])
    ids = ids_of(4, LENGTH)
    native, engine = compiled(model, ids)
    rows = list(engine.coverage(rounds=0))
    assert in_torch(engine) == [] and sum(row.op == "rms_norm" for row in rows) == 2
    assert float((native(ids) - model(ids)).norm() / model(ids).norm()) < 0.03


OTHERS: dict[str, Norm] = {
    "another axis": lambda x, w: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5),
    "a sum": lambda x, w: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-5),
    "a cube": lambda x, w: x * torch.rsqrt(x.abs().pow(3).mean(-1, keepdim=True) + 1e-5),
    "another operand": lambda x, w: (x + 1) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5),
    "no eps": lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)),
    "read twice": lambda x, w: (
        lambda s: x * torch.rsqrt(s + 1e-5) + s
    )(x.pow(2).mean(-1, keepdim=True)),
    "a root": lambda x, w: x * torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
@torch.no_grad()
def test_what_looks_like_one_is_none(kind: str) -> None:
    ids = ids_of(4, LENGTH)
    graph = ada.capture(Normed(OTHERS[kind]).eval(), ids)
    assert not rms_norms(graph.graph)
    compiled(Normed(OTHERS[kind]), ids)


def test_a_product_that_is_no_weight_stays_one() -> None:
    graph = ada.capture(Normed(lambda x, w: NORMS["power"](x, w) * x).eval(), ids_of(4, LENGTH))
    assert [norm.weight for norm in rms_norms(graph.graph).values()] == [None, None]


@pytest.mark.parametrize("channels", [1, 2, 31, 768])
def test_rms_norm_adds_whole_numbers(channels: int) -> None:
    generator = torch.Generator().manual_seed(channels)
    scale, zero_point = float(np.float32(0.01)), 3
    q = torch.randint(0, 256, (64, channels), generator=generator)
    q[0], q[1, 0] = 3, 255  # zeros; and an outlier
    x = (q - zero_point).float() * scale
    weight = torch.randn(channels)
    qparams = torch.tensor([scale, zero_point, 8])
    found = torch.ops.adalayer.grid_rms_norm(x, weight, 1e-5, qparams)
    wanted = F.rms_norm(x.double(), [channels], weight.double(), 1e-5)
    torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-5)
    order = torch.randperm(channels, generator=generator)
    again = torch.ops.adalayer.grid_rms_norm(x[5:9, order], weight[order], 1e-5, qparams)
    assert torch.equal(again, found[5:9, order])


def test_the_operator_follows_the_rules_of_torch() -> None:
    x = (torch.randint(0, 256, (2, 3, 4)) - 3).float() * 0.5
    rest = (torch.ones(1, 1, 4), 1e-5, torch.tensor([0.5, 3, 8]))
    torch.library.opcheck(torch.ops.adalayer.grid_rms_norm.default, (x, *rest))


# -- maxima ---------------------------------------------------------------------------------------


class Maxima(nn.Module):
    def __init__(self, pool: Callable[[Tensor], Tensor], features: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.conv, self.last = nn.Conv1d(WIDTH, 6, 3), nn.Linear(features, 3)
        self.pool = pool

    def forward(self, ids: Tensor) -> Tensor:
        return self.last(self.pool(F.relu(self.conv(self.embedding(ids).transpose(1, 2)))))


@pytest.mark.parametrize(
    ("pool", "features"),
    [
        (lambda x: x.max(dim=2).values, 6),
        (lambda x: x.max(2, keepdim=True)[0].flatten(1), 6),
        (lambda x: x.amax(-1), 6),
        (lambda x: x.amax((1, 2)).unsqueeze(1), 1),
        (lambda x: x.transpose(1, 2).amax(2), LENGTH - 2),
        (lambda x: x.amax(1), LENGTH - 2),
        (lambda x: x.unflatten(2, (1, LENGTH - 2)).amax((2, 3)), 6),
        (lambda x: x.unflatten(1, (2, 3)).amax(2).flatten(1), 2 * (LENGTH - 2)),
    ],
)
@torch.no_grad()
def test_maxima_along_axes(pool: Callable[[Tensor], Tensor], features: int) -> None:
    engine = compiled(Maxima(pool, features), ids_of(4, LENGTH))[1]
    assert not {"aten.max.dim", "aten.amax.default", "getitem"} & set(in_torch(engine))


@torch.no_grad()
def test_the_places_of_maxima_are_found_in_torch() -> None:
    engine = compiled(Maxima(lambda x: x.max(2).indices.float(), 6), ids_of(4, LENGTH))[1]
    assert "aten.max.dim" in in_torch(engine)


# -- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("adalayer.inputs", '[["ids", [7]]]'),
        ("adalayer.inputs", '[["ids", [7], "int16"]]'),
        ("adalayer.inputs", '[["ids", [8], "int64"]]'),
        ("adalayer.inputs", '[["ids", [7], "int64", false]]'),
    ],
)
def test_texts_that_do_not_describe_ids(tmp_path: Path, key: str, text: str) -> None:
    engine = compiled(Texts(), ids_of(2, LENGTH))[1]
    engine.save(tmp_path / "text.ada")
    program = ada._C.Program.load(str(tmp_path / "text.ada"))
    program.set_metadata(key, text)
    program.save(str(tmp_path / "other.ada"))
    with pytest.raises(FileFormatError, match="do not describe its program"):
        ada.load(tmp_path / "other.ada")


def test_a_file_without_texts_takes_ids(tmp_path: Path) -> None:
    from helpers_program import Builder, Grid, inverse

    b, grid = Builder(), Grid()
    ids = b.input((1, 1, 4), "i32")
    table = b.constant(np.arange(15, dtype=np.uint8))
    x = b.node("embedding", [ids], b.value((3, 1, 4), grid), constants=[table])
    assert inverse(grid) == 2.0
    y = b.node("dequantize", [x], b.value((3, 1, 4)))
    b.finish([y]).save(str(tmp_path / "plain.ada"))
    engine = ada.load(tmp_path / "plain.ada")
    assert engine.inputs[0].dtype == torch.int32 and engine.tables == {"v1": 5}
    got = engine(torch.tensor([[[[0, 4, 2, 0]]]]))
    assert got[0, :, 0, 1].tolist() == [1.0, 1.5, 2.0]
