"""Copies of engines: deepcopy, pickle, torch.save, another process."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_calls import Tokens, compiled, token_inputs
from helpers_engine import native_of
from helpers_patterns import Net, Up, small_engine, smooth
from torch import Tensor, nn

import adalayer_native as ada
from adalayer_native.engine import Engine
from adalayer_native.engine.parts import NativePart
from adalayer_native.engine.policy import Times
from adalayer_native.engine.segments import TorchPart, is_layer


def _through_torch(engine: Engine) -> Engine:
    stream = io.BytesIO()
    torch.save({"engine": engine, "again": engine}, stream)
    stream.seek(0)
    found = torch.load(stream, weights_only=False)
    assert found["engine"] is found["again"]
    return found["engine"]


COPIES: dict[str, Callable[[Engine], Engine]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{
        f"pickle {protocol}": lambda e, p=protocol: pickle.loads(pickle.dumps(e, p))
        for protocol in (2, pickle.HIGHEST_PROTOCOL)
    },
    "torch.save": _through_torch,
}


class Between(nn.Module):
    """Torch operators of many kinds between two native layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = (
            ada.nn.Conv2d.from_float(layer, 8, input_range=(-3.0, 3.0))
            for layer in (nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1))
        )
        self.scale = nn.Parameter(torch.randn(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        n, c, h, w = y.shape
        y = torch.cumsum(
            y.contiguous(memory_format=torch.channels_last), dim=3, dtype=torch.float64
        )
        first, second = y.float().split([3, 5], dim=1)
        y = torch.cat([second, first[:, ::2], first[:, 1:2].abs().pow(0.5)], 1) * self.scale
        y = y.reshape(n * h, c, w).sort(dim=1).values.reshape(n, c, h, w)  # a size of n times h
        y = y.view(n, c, h * w).masked_fill(y.view(n, c, -1) < -9.0, float("-inf"))
        y = y.clamp(min=-3.0).new_full((n, 1, 1), 0.25) + y.clamp(-3.0, float("inf"))
        return self.b(F.relu(y.reshape(n, c, h, w)))


@pytest.fixture(scope="module")
def mixed() -> tuple[Engine, Tensor]:
    """Native parts around operators in torch."""
    engine = compiled(Between().eval(), smooth(2, seed=2))
    kinds = [isinstance(step.run, NativePart) for step in engine._steps]
    assert kinds == [True, False, True]
    return engine, smooth(3, seed=3)


@pytest.mark.parametrize("name", COPIES)
def test_native_engine(name: str) -> None:
    _, engine = small_engine()
    said = {"preprocessing": {"mean": [0.5]}, "class_names": ["a", "b", "c", "d"]}
    engine = Engine(engine._steps, replace(engine._interface, **said))
    other = COPIES[name](engine)
    assert other is not engine and other._single is other._steps[0].run
    assert other.inputs == engine.inputs and other.device == engine.device
    assert other.preprocessing == {"mean": [0.5]} and other.class_names == ["a", "b", "c", "d"]
    x = torch.randn(3, 3, 8, 8)
    assert torch.equal(other(x), engine(x))
    assert other.coverage(rounds=0).rows == engine.coverage(rounds=0).rows


@pytest.mark.parametrize("name", COPIES)
def test_engine_with_parts_in_torch(name: str, mixed: tuple[Engine, Tensor]) -> None:
    engine, x = mixed
    other = COPIES[name](engine)
    assert torch.equal(other(x), engine(x))
    assert torch.equal(other(x[:1]), engine(x[:1]))
    before, after = engine.coverage(rounds=0), other.coverage(rounds=0)
    assert before.rows == after.rows
    measured = [row for row in other.coverage(batch=2, rounds=1) if row.kind == "torch"]
    assert measured and all(row.microseconds > 0 for row in measured)


@pytest.mark.parametrize("name", COPIES)
def test_engine_with_layers_in_float(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from adalayer_native.engine import compiler

    def times(exported: Any, engine: Engine, batch: int) -> Times:
        layers = [node for node in exported.graph.nodes if is_layer(node)]
        return Times(dict.fromkeys(layers[1:-1], (2.0, 1.0)), 2.0)

    monkeypatch.setattr(compiler, "layer_times", times)
    monkeypatch.setattr(compiler, "fastest_of", lambda engines, batch: engines[-1])
    native = native_of(Net(Up()), smooth(8, seed=1))
    engine = ada.compile(native, smooth(1, seed=2))
    assert any(row.kind == "float" for row in engine.coverage(rounds=0))
    x = smooth(3, seed=3)
    assert torch.equal(COPIES[name](engine)(x), engine(x))


@pytest.mark.parametrize("name", COPIES)
def test_arguments_and_containers(name: str) -> None:
    model = Tokens().eval()
    given = token_inputs(2)
    engine = compiled(
        model,
        given["ids"],
        given["mask"],
        images=given["images"],
        signature=inspect.signature(model.forward),
    )
    other = COPIES[name](engine)
    expected, got = engine(**given), other(**given)
    assert type(got) is type(expected)
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got["best"][0], expected["best"][0])


def test_a_deep_copy_shares_what_nobody_can_change(mixed: tuple[Engine, Tensor]) -> None:
    engine, x = mixed
    other = copy.deepcopy(engine)
    mine, yours = engine._steps, other._steps
    assert yours[0].run is mine[0].run
    parts = [step.run.part for step in (mine[1], yours[1])]  # type: ignore[union-attr]
    for tensor in parts[1].module.buffers():
        tensor.zero_()
    assert not torch.equal(other(x), engine(x))
    assert other.preprocessing is None


def test_forms_of_weights_and_limits_are_kept() -> None:
    native, _ = small_engine()
    x = torch.zeros(1, 3, 8, 8)
    engine = ada.compile(native, x, policy="native", weights="streamed")
    part = pickle.loads(pickle.dumps(engine))._steps[0].run
    assert (part.weights, part.max_memory) == ("streamed", 0)
    part = engine._steps[0].run
    assert isinstance(part, NativePart)
    limited = NativePart(part.program, part.outputs, "resident", 1 << 30)
    again = pickle.loads(pickle.dumps(limited))
    assert (again.weights, again.max_memory) == ("resident", 1 << 30)


def test_what_the_clock_has_chosen_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADALAYER_PLAN_CACHE", "off")  # nothing but the pickle knows it
    native, _ = small_engine()
    engine = ada.compile(native, torch.zeros(1, 3, 8, 8), policy="native")
    part = engine._steps[0].run
    assert isinstance(part, NativePart)
    key, letters = part.engine.plan().split(" ")
    found = set()
    for wanted in "porx":  # packed or resident weights, the planned order of loops or the other
        chosen = NativePart(part.program, part.outputs, plan=f"{key} {wanted * len(letters)}")
        plan = chosen.engine.plan()
        found.add(plan)
        engine._steps[0].run = chosen
        again = pickle.loads(pickle.dumps(engine))
        assert again._steps[0].run.engine.plan() == plan
        assert again.coverage(rounds=0).rows == engine.coverage(rounds=0).rows
    assert len(found) > 1  # or nothing was there to choose
    # Of another machine, or damaged: measured anew.
    for line in (f"{key}0 {letters}", f"{key} {letters}a", f"{key} ?", "nonsense"):
        other = NativePart(part.program, part.outputs, plan=line).engine.plan()
        assert other.split(" ")[0] == key and len(other) == len(part.engine.plan())


def test_an_operator_that_is_not_there(mixed: tuple[Engine, Tensor]) -> None:
    engine, _ = mixed
    part = engine._steps[1].run.part  # type: ignore[union-attr]
    assert isinstance(part, TorchPart)
    state = part.__getstate__()
    texts = [entry[1] for entry in state["nodes"] if entry[0] == "call_function"]
    assert "aten.cumsum.default" in texts
    assert all(isinstance(text, str) for text in texts)
    entry = next(k for k, item in enumerate(state["nodes"]) if item[1] == "aten.cumsum.default")
    kind, _, *rest = state["nodes"][entry]
    state["nodes"][entry] = (kind, "aten.no_such_operator.default", *rest)
    with pytest.raises(pickle.UnpicklingError, match=r"aten\.no_such_operator\.default"):
        TorchPart.__new__(TorchPart).__setstate__(state)


def test_a_part_on_a_gpu_goes_back_to_that_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from adalayer_native.engine import parts

    class Fake:
        """Holds what a CUDA engine is made of."""

        def __init__(self, program: Any, device: int, **options: Any) -> None:
            self.program, self.device, self.options = program, device, options

        def run(self) -> None: ...

        def any_order(self) -> list[bool]:
            return [True]

    monkeypatch.setattr(parts.cuda, "CudaEngine", Fake)
    _, engine = small_engine()
    part = engine._steps[0].run
    assert isinstance(part, NativePart)
    moved = parts.CudaPart(part.program, part.outputs, part.weights, 1, tune=False)
    again = pickle.loads(pickle.dumps(moved))
    assert type(again) is parts.CudaPart and again.device == 1
    assert again.engine.options == {"tune": False} and again.engine.device == 1
    assert again.program.to_bytes() == part.program.to_bytes()
    assert copy.deepcopy(moved) is moved


@pytest.mark.slow
def test_another_process(mixed: tuple[Engine, Tensor], tmp_path: Path) -> None:
    engine, x = mixed
    (tmp_path / "engine.pickle").write_bytes(pickle.dumps((engine, x, engine(x))))
    code = (
        "import pickle, sys, torch\n"
        "engine, x, y = pickle.load(open(sys.argv[1], 'rb'))\n"
        "assert torch.equal(engine(x), y)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "engine.pickle")], check=True)
