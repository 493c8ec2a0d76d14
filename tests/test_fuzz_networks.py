"""Random networks: whatever torch.export can follow comes out right, or as a clear error."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_networks import check
from fuzz_networks.campaign import (
    Report,
    campaign,
    case_from_json,
    finding_of,
    investigate,
    write,
)
from fuzz_networks.check import Case, case_of, judge
from fuzz_networks.generate import generate
from fuzz_networks.judging import Failed, Finding
from fuzz_networks.mutations import mutated
from fuzz_networks.network import build
from fuzz_networks.recipe import Input, Part, Recipe, Step, from_json
from torch import nn
from torch.utils import _pytree as pytree

import adalayer_native as ada
from adalayer_native.capture import exporting

# The package's function of this name hides the module.
capture_module = sys.modules["adalayer_native.capture.capture"]

# The slow test. torch.export alone takes a good part of a second for one small network; a machine
# that is slow, or busy with other tests, reaches these.
SECONDS, LEAST = 120, 50


@pytest.fixture(autouse=True)
def _one_thread():
    """The networks are so small that threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_recipes_are_data() -> None:
    for seed in range(60):
        recipe = generate(seed, odd=seed % 5 == 0, writes=seed % 2 == 0)
        assert recipe == generate(seed, odd=seed % 5 == 0, writes=seed % 2 == 0)
        assert from_json(recipe.as_json()) == recipe
        for step in recipe.steps:
            assert str(step) in str(recipe)


def test_recipes_run_with_any_batch() -> None:
    """A finding about another batch or an input must not be the generator's fault."""
    for seed in range(40):
        case = case_of(seed, 1)
        for batch in (1, 2, 5):
            result = check.evaluated(case.build(), case.call(0, batch=batch))
            leaves = pytree.tree_leaves(result)
            assert all(x.isfinite().all() for x in leaves if isinstance(x, torch.Tensor))


def test_models_of_one_recipe_are_equal() -> None:
    recipe = generate(5)
    one, other = build([recipe], "positional"), build([recipe], "positional")
    for (name, a), (_, b) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("number", range(3))
def test_networks(number: int) -> None:
    _, reports = investigate(case_of(number, 2))
    assert not reports, "\n\n".join(map(str, reports))


@pytest.mark.slow
def test_many_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """On two processes, as many as there is time for; `make fuzz-networks` goes on behind them.

    torch's float kernels are those of AVX2 on every machine, so that everywhere the same cases have
    the same floats; ours are the machine's.
    """
    for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS"):
        monkeypatch.setenv(name, "avx2" if name.startswith("ATEN") else "AVX2")
    counts: Counter[str] = Counter()
    found: list[Report] = []

    def seen(number: int, judged: Counter[str], reports: list[Report]) -> None:
        counts.update(judged)
        found.extend(reports)

    last = campaign(0, SECONDS, 2, seen=seen)
    print(f"cases 0 to {last - 1}: {dict(counts)}")
    assert not found, "\n\n".join(map(str, found))
    assert counts["cells"] >= LEAST
    assert counts["results"] >= LEAST


# ---- does the judge notice? ---------------------------------------------------------------------


CONV = {"in_channels": 3, "out_channels": 4, "kernel_size": 3}


def small_case(*steps: Step, dress: tuple[str, ...] = ()) -> Case:
    """A convolution ``v0`` of an image ``x0``, and what follows."""
    recipe = Recipe(
        seed=0,
        inputs=(Input("x0", "image", (3, 6, 6)),),
        parts=(Part("p0", "Conv2d", CONV, 1, dress),),
        steps=(Step(("v0",), "call", ("p0", "x0")), *steps),
        returns=["v0", *(name for step in steps for name in step.makes)][-1],
    )
    return Case(0, (recipe,), "positional", 2, False, False, engine=True, files=True)


def noticed(case: Case, kind: str, stage: str) -> None:
    """The judge finds something of that kind, at that stage."""
    finding = finding_of(case, judge)
    assert finding is not None
    assert (finding.kind, finding.stage) == (kind, stage), finding


@pytest.fixture(scope="module")
def whole() -> Case:
    """A case that has layers, norms and activations."""
    return case_of(0, 4)


@pytest.fixture(scope="module")
def captured(whole: Case) -> Any:
    with check.sizes(False):
        return ada.capture(whole.build(), whole.call(0).example)


def test_lost_operators_are_noticed(whole: Case, captured: Any) -> None:
    """Whatever changes a result at all is noticed in the captured model; in the native model, whose
    results are approximate, whatever changes one by a tenth of its length."""
    call = whole.call(0)
    expected = check.evaluated(whole.build(), call)
    changed = large = found = 0
    for what, model in mutated(captured):
        moved = _largest_change(call(model), expected)
        if moved == 0:
            continue
        changed += 1
        with pytest.raises(Failed, match="wrong"):
            check.same("the example", call(model), expected)
        if moved > 0.1:
            large += 1
            _, native, _ = check.check_native(model, [call])
            try:
                check.check_error(whole, native, call, expected, Counter())
                print("not noticed:", what)
            except Failed:
                found += 1
    assert changed > 10
    assert large > 5
    assert found >= 0.9 * large


def _largest_change(got: Any, expected: Any) -> float:
    return max(
        check.distance(a, b) / (check.distance(b, 0 * b) + 1e-9)
        for _, _, a, b in check.pairs("change", got, expected)
        if isinstance(b, torch.Tensor)
    )


def test_a_lost_hook_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = small_case(dress=("forward_hook",))
    assert finding_of(case, judge) is None
    capture = ada.capture

    def without_hooks(model: nn.Module, example: Any) -> Any:
        plain = small_case().build()
        plain.load_state_dict(model.state_dict())
        return capture(plain, example)

    monkeypatch.setattr(ada, "capture", without_hooks)
    noticed(case, "wrong", "the example")


WRITE = Step((), "write_through", ("v0",), {"view": "view", "name": "mul_"})
READ = Step(("v2",), "scalar", ("v0",), {"name": "+", "value": 1})


def test_writes_that_are_not_followed_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads a value after it was written, through a view, gets what it was before."""
    case = small_case(WRITE, READ)
    assert finding_of(case, judge) is None

    def careless(graph: torch.fx.Graph) -> bool:
        for node in graph.nodes:
            if str(node.target) == "aten.mul_.Tensor":
                node.target = torch.ops.aten.mul.Tensor
        return True

    monkeypatch.setattr(exporting, "functionalise", careless)
    # The package compares what it captured with the model, and does it another way.
    assert finding_of(case, judge) is None
    monkeypatch.setattr(capture_module, "difference", lambda *_: None)
    noticed(case, "wrong", "the example")


@pytest.mark.parametrize(
    "touch",
    [
        pytest.param(lambda model: model.train(not model.training), id="mode"),
        pytest.param(lambda model: setattr(model, "extra", 1), id="attribute"),
        pytest.param(lambda model: model.cells[0].p0.bias.data.add_(1), id="bits"),
        pytest.param(lambda model: model.cells[0].p0._forward_hooks.clear(), id="hook"),
    ],
)
def test_a_touched_model_is_noticed(monkeypatch: pytest.MonkeyPatch, touch: Any) -> None:
    capture = ada.capture

    def touching(model: nn.Module, example: Any) -> Any:
        found = capture(model, example)
        touch(model)
        return found

    monkeypatch.setattr(ada, "capture", touching)
    noticed(small_case(dress=("looking_hook",)), "wrong", "the user's model")


def louder(native: nn.Module) -> nn.Module:
    """Another native model, by one bit of every scale."""
    changed = copy.deepcopy(native)
    for name, value in changed.named_buffers():
        if name.endswith("weight_scale"):
            value.copy_(torch.nextafter(value, torch.tensor(torch.inf)))
    return changed


@pytest.mark.parametrize(
    ("name", "stage", "change"),
    [
        ("convert", "native", louder),
        ("restore", "restore", louder),
        ("estimate_bytes", "size", lambda size: size + 1),
    ],
)
def test_one_bit_is_noticed(
    monkeypatch: pytest.MonkeyPatch, name: str, stage: str, change: Any
) -> None:
    function = getattr(ada, name)
    monkeypatch.setattr(ada, name, lambda *a, **k: change(function(*a, **k)))
    noticed(small_case(), "wrong", stage)


def test_an_engine_that_is_a_level_off_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last bit of a float is excused behind some kernels of torch alone."""
    compile_, case = ada.compile, small_case(READ)
    monkeypatch.setattr(ada, "compile", lambda native, *a, **k: compile_(louder(native), *a, **k))
    noticed(case, "wrong", "engine")


# ---- the campaign -------------------------------------------------------------------------------


def test_a_failing_cell_is_found_and_made_small(tmp_path: Path) -> None:
    """By a judge that wants no additions: of four cells one has one, after a step without need."""
    bad = small_case(Step(("v1",), "flatten", ("v0",), {"start": 2}), WRITE, READ)
    good = small_case(WRITE)
    recipes = tuple(
        replace(case.recipes[0], seed=seed) for seed, case in enumerate([good, good, bad, good])
    )
    whole = replace(good, recipes=recipes, style="nested", training=True)

    def judge(case: Case) -> Counter[str]:
        check.evaluated(case.build(), case.call(0))
        if any(step.op == "scalar" for recipe in case.recipes for step in recipe.steps):
            raise Failed(Finding("capture", "wrong", "an addition"))
        return Counter(cases=1, cells=len(case.recipes))

    counts, (report,) = investigate(whole, judge)
    assert counts["cells"] == 3
    assert report.smallest is not None
    assert (report.case.style, report.case.training, report.smallest.seed) == (
        "positional",
        False,
        2,
    )
    # Its operand is the input by now: the convolution was of no importance.
    assert [str(step) for step in report.smallest.steps] == ["v2 = scalar(x0, name='+', value=1)"]
    path = write(report, tmp_path)
    assert "v2 = scalar(x0" in path.read_text()
    assert case_from_json(path.read_text().splitlines()[-1]) == report.case


def test_odd_networks_may_be_refused_but_not_be_wrong() -> None:
    case = small_case()
    odd = replace(case, recipes=(replace(case.recipes[0], odd=True),))

    def judge_of(kind: str) -> Any:
        def judge(case: Case) -> Counter[str]:
            raise Failed(Finding("capture", kind, "."))

        return judge

    assert finding_of(odd, judge_of("refused")) is None
    assert finding_of(odd, judge_of("wrong")) is not None
    assert finding_of(case, judge_of("refused")) is not None
