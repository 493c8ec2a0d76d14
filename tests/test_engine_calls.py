"""What an engine takes and returns: arguments of every kind, nests, integers, constants."""

from __future__ import annotations

import copy
import inspect
import json
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers_calls import (
    ModelOutput,
    Pair,
    Record,
    Tokens,
    compiled,
    token_inputs,
)
from helpers_engine import native_of
from helpers_patterns import small_engine
from torch import Tensor, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.utils import _pytree as pytree

import adalayer_native as ada
from adalayer_native import _C
from adalayer_native.engine import Engine
from adalayer_native.engine.call import Call
from adalayer_native.engine.results import Port, described, nest, thawed
from adalayer_native.errors import FileFormatError, InputError, UnsupportedModelError


@pytest.fixture(scope="module")
def tokens() -> tuple[nn.Module, Engine]:
    model = Tokens().eval()
    given = token_inputs(2)
    engine = compiled(
        model,
        given["ids"],
        given["mask"],
        images=given["images"],
        signature=inspect.signature(model.forward),
    )
    return model, engine


# -- calls ----------------------------------------------------------------------------------------


def test_inputs_have_names_sizes_and_types(tokens: tuple[nn.Module, Engine]) -> None:
    _, engine = tokens
    assert engine.inputs == (
        Port("ids", (5,), torch.int64),
        Port("mask", (5,), torch.bool),
        Port("images_pixels", (3, 8, 8), torch.uint8),
        Port("images_more_0", (6,), torch.float32),
    )
    assert {row.name for row in engine.coverage(rounds=0) if row.bits} == {"conv", "head"}


@torch.no_grad()
def test_integers_reach_the_torch_parts_as_they_are(tokens: tuple[nn.Module, Engine]) -> None:
    model, engine = tokens
    for batch in (1, 3):
        given = token_inputs(batch, seed=batch)
        expected, got = model(**given), engine(**given)
        assert type(got) is ModelOutput and list(got) == ["logits", "best"]
        torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=0.1)
        assert got["best"][0].dtype == torch.bool
        assert torch.equal(got["best"][0], got.logits > 0)


@torch.no_grad()
def test_ways_to_write_one_call(tokens: tuple[nn.Module, Engine]) -> None:
    _, engine = tokens
    given = token_inputs(2)
    ids, mask, images = given["ids"], given["mask"], given["images"]
    expected = engine(ids, mask, images=images).logits
    swapped = {"more": images["more"], "pixels": images["pixels"]}
    for got in (
        engine(ids, mask=mask, images=images),
        engine(images=images, mask=mask, ids=ids),
        engine(ids, mask, 2, images=images),
        engine(ids, mask, images=images, fancy=False, scale=2),
        engine(ids, mask, images=swapped),
        engine(ids, mask, images=OrderedDict(images)),
        engine.flat([ids, mask, images["pixels"], images["more"][0]]),
    ):
        assert torch.equal(got.logits, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {**a, "ids": a["ids"].short()}, r"'ids': expected torch.int64, got torch.int16"),
        (lambda a: {**a, "ids": a["ids"].float()}, r"'ids': expected torch.int64, got .*float32"),
        (lambda a: {**a, "mask": a["mask"].long()}, r"'mask': expected torch.bool, got .*int64"),
        (lambda a: {**a, "mask": None}, r"'mask': expected a torch.Tensor, got NoneType"),
        (lambda a: {k: a[k] for k in ("ids", "images")}, r"expected 3 inputs .*mask missing"),
        (lambda a: {**a, "scale": 3}, r"'scale': the engine was compiled for 2, got 3; compile"),
        (lambda a: {**a, "scale": 2.0}, r"'scale': the engine was compiled for 2, got 2.0"),
        (lambda a: {**a, "fancy": True}, r"'fancy': the engine was compiled for False, got True"),
        (lambda a: {**a, "fancy": 0}, r"'fancy': the engine was compiled for False, got 0"),
        (lambda a: {**a, "scale": a["ids"]}, r"compiled for 2, got a Tensor"),
        (lambda a: {**a, "other": 1}, r"no input 'other'; expected ids, mask, scale, images"),
        (lambda a: {**a, "images": a["ids"]}, r"argument 'images': expected what .*Tensor"),
        (
            lambda a: {**a, "images": {"pixels": a["images"]["pixels"]}},
            r"argument 'images': .*dict: Node",
        ),
        (
            lambda a: {**a, "images": {**a["images"], "more": (a["images"]["more"][0], 1)}},
            r"argument 'images': the engine was compiled for None, got 1",
        ),
        (
            lambda a: {**a, "ids": a["ids"][:1]},
            r"'mask': expected a batch of 1 as in the first input, got 2",
        ),
        (
            lambda a: {**a, "images": {**a["images"], "pixels": a["images"]["pixels"].float()}},
            r"'images_pixels': expected torch.uint8, got torch.float32",
        ),
    ],
)
def test_calls_that_are_refused(
    tokens: tuple[nn.Module, Engine], change: Any, message: str
) -> None:
    _, engine = tokens
    with pytest.raises(InputError, match=message):
        engine(**change(token_inputs(2)))


def test_positional_calls_that_are_refused(tokens: tuple[nn.Module, Engine]) -> None:
    _, engine = tokens
    given = token_inputs(2)
    ids, mask, images = given["ids"], given["mask"], given["images"]
    with pytest.raises(InputError, match="argument 'ids' is given twice"):
        engine(ids, mask, images=images, ids=ids)
    with pytest.raises(InputError, match=r"expected 3 inputs \(ids, mask, images\), got 5"):
        engine(ids, mask, 2, images, False)
    with pytest.raises(InputError, match=r"expected 3 inputs \(ids, mask, images\), got 1"):
        engine(ids)
    with pytest.raises(InputError, match=r"expected 4 inputs \(ids, mask, .*\), got 1"):
        engine.flat([ids])


@torch.no_grad()
def test_without_a_signature_arguments_are_those_of_the_example() -> None:
    model = Tokens().eval()
    given = token_inputs(2)
    ids, mask, images = given["ids"], given["mask"], given["images"]
    engine = compiled(model, ids, None, images=images, fancy=True)
    expected = model(ids, None, images=images, fancy=True)
    for got in (
        engine(ids, None, images=images, fancy=True),
        engine(ids=ids, images=images, fancy=True),
    ):
        assert type(got) is Record
        torch.testing.assert_close(got.scores, expected.scores, rtol=0, atol=0.1)
        assert got.hidden.dtype == torch.int64
    with pytest.raises(InputError, match=r"args\[1\]': the engine was compiled for None, got a"):
        engine(ids, mask, images=images, fancy=True)
    with pytest.raises(InputError, match=r"expected 3 inputs \(ids, images, fancy\), got 2"):
        engine(ids, images=images)


class Halves(nn.Module):
    """Two float inputs and one of integers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(4, 6)
        self.head = ada.nn.Linear.from_float(nn.Linear(6, 4), 8, input_range=(-4.0, 4.0))

    def forward(self, kinds: Tensor, x: Tensor, *rest: Tensor, bias: Tensor) -> Any:
        y = self.head(x + self.table(kinds) + sum(rest))
        y = y + bias
        return Pair(y, {"class": y.argmax(1), "nothing": None})


@torch.no_grad()
def test_types_of_floats_and_their_results() -> None:
    model = Halves().eval()
    kinds, x, z = torch.tensor([1, 3]), torch.randn(2, 6), torch.randn(2, 6)
    bias = torch.randn(2, 4)
    engine = compiled(model, kinds, x, z, signature=inspect.signature(model.forward), bias=bias)
    assert [port.name for port in engine.inputs] == ["kinds", "x", "rest_0", "bias"]
    got = engine(kinds, x, z, bias=bias)
    assert type(got) is Pair and got.second["nothing"] is None
    for dtype in (torch.float16, torch.bfloat16):
        low = [t.to(dtype) for t in (x, z, bias)]
        halves = engine(kinds, low[0], low[1], bias=low[2])
        assert halves.first.dtype == dtype
        assert halves.second["class"].dtype == torch.int64
        full = engine(kinds, *(t.float() for t in low[:2]), bias=low[2].float())
        assert torch.equal(halves.first, full.first.to(dtype))
        assert torch.equal(halves.second["class"], full.second["class"])
    with pytest.raises(InputError, match=r"'rest_0': expected torch.bfloat16 as in the first"):
        engine(kinds, x.bfloat16(), z, bias=bias)
    with pytest.raises(InputError, match=r"expected 4 inputs \(kinds, x, rest\[0\], bias\), got 2"):
        engine(kinds, x)


@torch.no_grad()
def test_numpy_in_and_out(tokens: tuple[nn.Module, Engine]) -> None:
    _, engine = tokens
    given = token_inputs(3)
    expected = engine(**given)
    arrays = pytree.tree_map(lambda t: t.numpy() if isinstance(t, Tensor) else t, given)
    got = engine.run(**arrays)
    assert type(got) is ModelOutput
    assert np.array_equal(got.logits, expected.logits.numpy())
    assert got["best"][0].dtype == np.bool_
    flat = [arrays["ids"], arrays["mask"], arrays["images"]["pixels"], arrays["images"]["more"][0]]
    assert np.array_equal(engine.run_flat(flat).logits, got.logits)
    with pytest.raises(InputError, match="'ids': expected an array of int64, got int16"):
        engine.run(**{**arrays, "ids": arrays["ids"].astype(np.int16)})
    with pytest.raises(InputError, match="'images_more_0': expected an array of float32, got int8"):
        engine.run_flat([*flat[:3], flat[3].astype(np.int8)])


def test_coverage_measures_with_integers(tokens: tuple[nn.Module, Engine]) -> None:
    _, engine = tokens
    rows = {row.op: row for row in engine.coverage(batch=2, rounds=1)}
    assert rows["aten.embedding.default"].microseconds > 0


def test_one_tensor_with_defaults_behind_it_is_the_fast_path() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = ada.nn.Linear.from_float(nn.Linear(6, 4), 8, input_range=(-4.0, 4.0))

        def forward(self, x: Tensor, mask: Tensor | None = None, flag: bool = True) -> Tensor:
            return self.fc(x) if mask is None else self.fc(x * mask)

    model = Scaled().eval()
    x = torch.randn(2, 6)
    engine = compiled(model, x, signature=inspect.signature(model.forward))
    assert engine._single is not None
    for got in (engine(x), engine(x, None), engine(x=x, flag=True), engine(x, None, True)):
        assert torch.equal(got, model(x))
    with pytest.raises(InputError, match=r"'mask': the engine was compiled for None, got a Tensor"):
        engine(x, x)
    without = compiled(model, x, torch.ones(2, 6), signature=inspect.signature(model.forward))
    assert without._single is None


def test_inputs_that_no_engine_takes() -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = ada.nn.Linear.from_float(nn.Linear(6, 4), 8, input_range=(-4.0, 4.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.real)

    x = torch.zeros(2, 6, dtype=torch.complex64)
    with pytest.raises(UnsupportedModelError, match=r"'x': expected floats, .* got .*complex64"):
        compiled(Complex().eval(), x)


# -- files ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_tensors_that_are_not_of_the_batch() -> None:
    class Shifted(nn.Module):
        """A table of positions that all samples share, given in front of them, and a factor."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fc = ada.nn.Linear.from_float(nn.Linear(6, 4), 8, input_range=(-4.0, 4.0))

        def forward(self, x: Tensor, positions: Tensor, factor: Tensor) -> Tensor:
            return self.fc((x + positions) * factor)

    model = Shifted().eval()
    x, positions, factor = torch.randn(3, 6), torch.randn(6), torch.tensor(0.5)
    engine = ada.compile(model, (x[:1], positions, factor), policy="native")
    assert [str(port) for port in engine.inputs] == ["[batch, 6]", "[6]", "[]"]
    assert repr(engine).startswith("Engine(x[batch, 6], positions[6], factor[]; ")
    for n in (1, 3):
        torch.testing.assert_close(
            engine(x[:n], positions, factor), model(x[:n], positions, factor)
        )
    assert engine.coverage(batch=2, rounds=1).native_share == 1.0
    with pytest.raises(InputError, match=r"'positions': expected shape \[6\], got \[1, 6\]"):
        engine(x, positions[None], factor)
    with pytest.raises(InputError, match=r"'factor': expected torch.bfloat16 as in the first"):
        engine(x.bfloat16(), positions.bfloat16(), factor)
    with pytest.raises(InputError, match=r"'x': expected shape \[batch, 6\], got \[6\]"):
        engine(x[0], positions, factor)


class Nested(nn.Module):
    """Everything native, with a nest on either side."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = ada.nn.Conv2d.from_float(nn.Conv2d(3, 4, 3), 8, input_range=(-3.0, 3.0))
        self.fc = ada.nn.Linear.from_float(nn.Linear(4, 5), 8, input_range=(-3.0, 3.0))

    def forward(
        self, batch: dict[str, Any], flag: bool = True, *, skip: Tensor, unused: Any = None
    ) -> Any:
        y, z = self.fc(self.conv(batch["images"][0]).flatten(1)), self.fc(skip)
        return ModelOutput(logits=y, parts=Pair(y.softmax(1), None), record=Record(z.relu()))


@torch.no_grad()
def test_a_file_keeps_the_call_and_the_result(tmp_path: Path) -> None:
    model = Nested().eval()
    x, skip = torch.randn(2, 3, 3, 3), torch.randn(2, 4)
    kinds = torch.zeros(2, 7, dtype=torch.int32)
    engine = compiled(
        model,
        {"images": [x, None], "kinds": kinds},
        skip=skip,
        signature=inspect.signature(model.forward),
    )
    assert engine.native_share == 1.0 and len(engine._steps) == 1
    path = tmp_path / "model.ada"
    engine.save(path)
    loaded = ada.load(path)
    assert loaded.inputs == engine.inputs
    call = {"images": [x, None], "kinds": kinds}
    expected, got = engine(call, skip=skip), loaded(call, True, skip=skip, unused=None)
    assert type(got) is dict and type(got["parts"]) is tuple and type(got["record"]) is dict
    assert torch.equal(got["logits"], expected.logits)
    assert torch.equal(got["parts"][0], expected.parts.first) and got["parts"][1] is None
    assert torch.equal(got["record"]["scores"], expected.record.scores)
    assert got["record"]["hidden"] is None
    again = tmp_path / "again.ada"
    loaded.save(again)
    assert torch.equal(ada.load(again)(call, skip=skip)["logits"], expected.logits)
    with pytest.raises(InputError, match="'flag': the engine was compiled for True, got False"):
        loaded(call, False, skip=skip)
    longer = {"images": [x, None], "kinds": kinds.long()}
    assert torch.equal(loaded(longer, skip=skip)["logits"], expected.logits)
    with pytest.raises(InputError, match=r"'batch_kinds': expected torch.int32, got torch.int16"):
        loaded({"images": [x, None], "kinds": kinds.short()}, skip=skip)
    with pytest.raises(InputError, match=r"'batch_kinds': .* that int32 holds, got 2147483648"):
        loaded({"images": [x, None], "kinds": kinds.long() + 2**31}, skip=skip)
    with pytest.raises(InputError, match=r"expected 2 inputs \(batch, skip\), got 1"):
        loaded(call)


@torch.no_grad()
def test_a_file_is_served_by_the_names_of_its_tensors(tmp_path: Path) -> None:
    from adalayer_native.serve.runner import EngineRunner

    model = Nested().eval()
    x, skip = torch.randn(2, 3, 3, 3), torch.randn(2, 4)
    engine = ada.compile(model, {"batch": {"images": [x]}, "skip": skip}, policy="native")
    engine.save(tmp_path / "model.ada")
    runner = EngineRunner(tmp_path / "model.ada", ada.get_num_threads())
    assert [info.name for info in runner.description.inputs] == ["batch_images_0", "skip"]
    names = [info.name for info in runner.description.outputs]
    assert names == ["logits", "parts_0", "record.scores"]
    expected = engine({"images": [x]}, skip=skip)
    got = runner.run([x.numpy(), skip.numpy()])
    assert np.array_equal(got[0], expected.logits) and np.array_equal(
        got[2], expected.record.scores
    )
    kinds = torch.zeros(2, 7, dtype=torch.int16)
    call = {"batch": {"images": [x], "kinds": kinds}, "skip": skip}
    ada.compile(model, call, policy="native").save(tmp_path / "model.ada")
    with pytest.raises(UnsupportedModelError, match=r"'batch_kinds': .* torch.int16 \[batch, 7\]"):
        EngineRunner(tmp_path / "model.ada", ada.get_num_threads())


def test_plain_files_are_what_they_were(tmp_path: Path) -> None:
    _, engine = small_engine()
    path = tmp_path / "model.ada"
    engine.save(path)
    texts = _C.Program.load(str(path)).metadata()
    assert "adalayer.call" not in texts
    assert json.loads(texts["adalayer.inputs"]) == [["x", [3, 8, 8]]]
    assert texts["adalayer.structure"] == "0"


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("adalayer.call", "{}"),
        ("adalayer.call", "[]"),
        ("adalayer.call", '[{"name": "x"}]'),
        ("adalayer.inputs", '[["x", [3, 8, 8], "complex64"]]'),
        ("adalayer.inputs", '[["x", [3, 8, 8], "int64"]]'),
        ("adalayer.inputs", '[["x", [3, 8, 8], []]]'),
        ("adalayer.inputs", '[["x", [3, 8, 8], "float32", false]]'),
        ("adalayer.structure", "true"),
        ("adalayer.structure", "-1"),
        ("adalayer.structure", '{"set": [0]}'),
    ],
)
def test_calls_in_files_that_make_no_sense(tmp_path: Path, key: str, text: str) -> None:
    _, engine = small_engine()
    path = tmp_path / "model.ada"
    engine.save(path)
    program = _C.Program.load(str(path))
    program.set_metadata(key, text)
    program.save(str(path))
    with pytest.raises(FileFormatError, match="metadata"):
        ada.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"leaves": [{"input": 1}]},
        {"leaves": [{"input": -1}]},
        {"leaves": [{"constant": None}]},
        {"leaves": []},
        {"structure": 1},
        {"structure": {"dict": [0]}},
        {"optional": True},
        {"structure": {"tuple": [0, 0]}},
    ],
)
def test_an_argument_in_a_file_that_makes_no_sense(change: dict[str, Any]) -> None:
    ports = [Port("x", (3,))]
    row = {"name": "x", "position": True, "keyword": True, "optional": False}
    row |= {"structure": 0, "leaves": [{"input": 0}]}
    assert Call.from_json([row], ports) == Call.flat(ports)
    with pytest.raises((LookupError, TypeError, ValueError, AttributeError)):
        Call.from_json([{**row, **change}], ports)


@torch.no_grad()
def test_what_a_file_has_no_form_for(tmp_path: Path) -> None:
    class Keyed(Nested):
        def forward(  # type: ignore[override]
            self, x: Any, kind: torch.dtype = torch.float32, fast: bool = True
        ) -> Any:
            return {1: self.fc(self.conv(x[3]).flatten(1))}

    model = Keyed().eval()
    x = torch.randn(2, 3, 3, 3)
    engine = compiled(model, {3: x}, signature=inspect.signature(model.forward))
    assert list(engine({3: x}, torch.float32, True)) == [1]
    path = tmp_path / "model.ada"
    with pytest.raises(UnsupportedModelError, match=r"the model's result: a file holds .* a dict"):
        engine.save(path)
    leaf = pytree.tree_structure(0)
    interface = engine._interface
    engine._interface = replace(interface, out_spec=leaf)
    with pytest.raises(UnsupportedModelError, match=r"argument 'x': a file holds .* a dict"):
        engine.save(path)
    assert list(tmp_path.iterdir()) == []
    # A default value of any kind may be left out.
    first, *others = interface.call.arguments
    call = Call([replace(first, spec=leaf), *others], 1)
    engine._interface = replace(interface, out_spec=leaf, call=call)
    engine.save(path)
    loaded = ada.load(path)
    engine._interface = replace(interface, call=call)
    assert torch.equal(loaded(x), engine(x)[1])
    assert torch.equal(loaded(x, fast=True), loaded(x))
    with pytest.raises(InputError, match="'fast': the engine was compiled for True, got False"):
        loaded(x, fast=False)


def test_nests_for_json() -> None:
    nested = {"a": (1, [2, None]), "b": Record(3, None), "c": Pair(4, {"d": 5})}
    leaves, spec = pytree.tree_flatten(nested)
    structure, found = described(spec, leaves, "it")
    assert structure == {
        "dict": {
            "a": {"tuple": [0, {"list": [1, 2]}]},
            "b": {"dict": {"scores": 3, "hidden": 6}},
            "c": {"tuple": [4, {"dict": {"d": 5}}]},
        }
    }
    assert found == [1, 2, None, 3, 4, 5, None]
    again, ordered = nest(json.loads(json.dumps(structure)), found)
    assert pytree.tree_unflatten(ordered, again) == {
        "a": (1, [2, None]),
        "b": {"scores": 3, "hidden": None},
        "c": (4, {"d": 5}),
    }


def test_containers_of_graphs_become_ordinary_ones() -> None:
    frozen = Pair(immutable_list([1, immutable_dict({"a": Record(2), "b": 3})]), ())
    leaves, spec = pytree.tree_flatten(frozen)
    nested = pytree.tree_unflatten(leaves, thawed(spec))
    assert nested == Pair([1, {"a": Record(2), "b": 3}], ())
    assert type(nested.first) is list and type(nested.first[1]) is dict


@torch.no_grad()
def test_a_batch_of_one_that_a_model_squeezes_is_refused(tmp_path: Path) -> None:
    class Squeezes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(F.adaptive_avg_pool2d(self.conv(x).relu(), 1).squeeze())
            return y

    x = torch.randn(4, 3, 8, 8)
    native = native_of(Squeezes().eval(), x)
    engine = ada.compile(native, x, policy="native", weights="resident")
    engine.save(tmp_path / "m.ada")
    for one in (engine, ada.load(tmp_path / "m.ada"), copy.deepcopy(engine)):
        assert torch.equal(one(x), native(x))
        with pytest.raises(InputError, match=r"a batch of 2 or more, got 1.*squeeze\(\)"):
            one(x[:1])
    assert native(x[:1]).shape == (5,)
