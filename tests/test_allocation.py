"""Budgets, sizes, equations (2) and (3), and the methods."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers_models import batches, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

from adalayer_native.allocation import (
    Budget,
    allocate,
    estimate_bytes,
    float_bytes,
    packed_bytes,
    safetensors_bytes,
)
from adalayer_native.allocation.adalayer import HYPER, _unrounded
from adalayer_native.allocation.closed_form import closed_form
from adalayer_native.allocation.evaluate import Evaluator, Measurement, best_of
from adalayer_native.allocation.options import Option
from adalayer_native.allocation.problem import Problem
from adalayer_native.allocation.size import layer_bytes
from adalayer_native.allocation.uniform import uniform_pairs
from adalayer_native.capture import capture
from adalayer_native.errors import BudgetError, CalibrationError, PlanError, UnsupportedModelError
from adalayer_native.importance import analyze
from adalayer_native.models import get_model
from adalayer_native.ops import pack_weight
from adalayer_native.plan import Plan
from adalayer_native.pruning.masks import magnitude_mask
from adalayer_native.quantization import calibrate, convert, prepare
from adalayer_native.rounding import quantize_weight


@pytest.fixture(scope="module")
def scored():
    model = tiny()
    return model, analyze(model, batches(), progress=False)


def quiet(scores, budget, **options) -> Plan:
    return allocate(scores, budget, progress=False, **options)


# -- budgets ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"size": 0.1, "bytes": 4000},
        {"size": 0.1, "latency": 0},
        {"energy": -2.0},
        {"bops": float("inf")},
        {"size": 0},
        {"size": -1},
        {"size": float("nan")},
        {"bytes": float("inf")},
        {"bits": "4"},
        {"bits": True},
    ],
)
def test_ill_formed_budgets(options) -> None:
    with pytest.raises(BudgetError):
        Budget(**options)


def test_budget_in_bytes() -> None:
    assert Budget(size=0.165).limit_bytes(1000) == 165
    assert Budget(bytes=77).limit_bytes(1000) == 77
    assert Budget(bits=4).limit_bytes(1000) is None
    assert str(Budget(size=0.165)) == "size 0.165 of the float file"
    several = Budget(bytes=2000, latency=0.5, bops=1e6)
    assert str(several) == "2,000 bytes and latency 0.5 ms and 1,000,000 bit operations per image"
    assert several.given == {"bytes": 2000, "latency": 0.5, "bops": 1e6}
    assert not several.single and not Budget(latency=1).single and Budget(bits=4).single


# -- sizes --------------------------------------------------------------------------------------


def test_packed_bytes_by_hand() -> None:
    # 13 weights of 5 bits: planes of 4 and 1 bits take ceil(52/8) + ceil(13/8) = 7 + 2 bytes.
    assert packed_bytes(13, 13, 5) == 64 + 9
    # With 2 left: mask 2, then 1 + 1.
    assert packed_bytes(13, 2, 5) == 64 + 4
    assert packed_bytes(8, 6, 4) == 64 + 4  # 1 + 3 = 4: a tie is stored dense, same size
    assert packed_bytes(0, 0, 7) == 64


@given(st.integers(0, 5000), st.floats(0, 1), st.integers(2, 8))
def test_packed_bytes_properties(count: int, share: float, bits: int) -> None:
    nonzero = int(count * share)
    size = packed_bytes(count, nonzero, bits)
    assert 64 <= size <= packed_bytes(count, count, bits)
    assert packed_bytes(count, count, bits) - 64 - count * bits / 8 < 3
    if nonzero:
        assert packed_bytes(count, nonzero - 1, bits) <= size


@settings(deadline=None, max_examples=40)
@given(
    st.dictionaries(
        st.text('abcdé."\\_0', min_size=1, max_size=12),
        st.tuples(
            st.sampled_from(
                [torch.uint8, torch.float32, torch.int64, torch.float16, torch.int8, torch.bool]
            ),
            st.lists(st.integers(0, 40), max_size=3),
        ),
        max_size=8,
    ),
    st.booleans(),
)
def test_safetensors_size_is_exact(tensors, with_metadata: bool) -> None:
    names = {
        torch.uint8: "U8", torch.float32: "F32", torch.int64: "I64", torch.float16: "F16",
        torch.int8: "I8", torch.bool: "BOOL",
    }  # fmt: skip
    metadata = {"format": "pt"} if with_metadata else None
    real = save({k: torch.zeros(s, dtype=d) for k, (d, s) in tensors.items()}, metadata)
    entries = [(k, names[d], tuple(s)) for k, (d, s) in tensors.items()]
    assert safetensors_bytes(entries, metadata) == len(real)


@pytest.mark.parametrize("name", ["adalayernet", "resnet20"])
def test_float_bytes_is_exact(name: str) -> None:
    model = get_model(name)
    assert float_bytes(model) == len(save(model.state_dict()))
    assert float_bytes(model.half()) == len(save(get_model(name).state_dict()))


def test_estimate_grows_with_bits_and_shrinks_with_sparsity(scored) -> None:
    model, _ = scored
    problem = Problem(model, None)
    sizes = [problem.cost(problem.uniform(bits, 0.0)) for bits in range(2, 9)]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 7
    assert problem.cost(problem.uniform(8, 0.5)) < sizes[-1]
    assert sizes[-1] < float_bytes(model)
    plan = problem.plan(problem.uniform(4, 0.5))
    few = torch.zeros_like(model.conv2.weight)
    few.view(-1)[:10] = 1
    fewer = estimate_bytes(model, plan, integers={"conv2": few})
    assert fewer < estimate_bytes(model, plan)


@pytest.mark.parametrize(("bits", "sparsity"), [(2, 0.0), (3, 0.5), (5, 0.0), (7, 0.35), (8, 0.9)])
@pytest.mark.parametrize("name", ["tiny", "resnet20"])
def test_estimate_is_an_upper_bound_of_the_real_file(name: str, bits: int, sparsity: float) -> None:
    torch.manual_seed(0)
    model = tiny() if name == "tiny" else get_model(name)
    problem = Problem(model, None)
    layers = problem.free if bits != 7 else problem.free[1:]  # one layer stays float
    plan = problem.plan(dict.fromkeys(layers, (bits, sparsity)))
    prepared = prepare(model, plan)
    calibrate(prepared, batches(1, 4), observer="minmax", progress=False)
    native = convert(prepared)
    real = len(save({k: v.contiguous() for k, v in native.state_dict().items()}))
    estimate = estimate_bytes(model, plan)
    assert real <= estimate <= 1.01 * real + 16
    integers = {
        name: quantize_weight(w, bits, magnitude_mask(w, sparsity))[0]
        for name, w in ((name, model.get_submodule(name).weight) for name in layers)
    }
    assert estimate_bytes(model, plan, integers=integers) == real


@pytest.mark.parametrize("shape", [(8, 3, 3, 3), (33, 70, 1, 3), (16, 64, 2, 2), (5, 200)])
@pytest.mark.parametrize("kept", [0.0, 0.002, 0.1, 1.0])
def test_layer_bytes_are_those_of_packed_integers(shape: tuple[int, ...], kept: float) -> None:
    """Zeros that nobody pruned make a file smaller, too."""
    generator = torch.Generator().manual_seed(len(shape))
    integers = torch.randint(1, 4, shape, generator=generator).to(torch.int8)
    integers[torch.rand(shape, generator=generator) >= kept] = 0
    for bits in range(3, 9):
        packed = pack_weight(integers, bits)
        assert layer_bytes(shape, bits, 0.0, integers=integers) == packed.numel()


def test_cost_table_is_a_tight_upper_bound(scored) -> None:
    model, _ = scored
    for budget in (Budget(size=0.2), Budget(bits=3)):
        problem = Problem(model, budget)
        table, constant, slack = problem.cost_table()
        rng = np.random.default_rng(0)
        for _ in range(20):
            bits, percent = rng.integers(2, 9, 3), rng.integers(0, 96, 3)
            choice = {
                n: (int(b), p / 100) for n, b, p in zip(problem.free, bits, percent, strict=True)
            }
            bound = constant + table[np.arange(3), bits - 2, percent].sum()
            assert bound - slack - 1e-9 <= problem.cost(choice) <= bound + 1e-9


# -- equations ----------------------------------------------------------------------------------


def test_closed_form_rounds_and_clamps() -> None:
    importance, redundancy = np.array([1.0, 0.5, 0.0]), np.array([0.0, 1.0, 0.5])
    bits, percent = closed_form(importance, redundancy, 0.4, 0.1, 4.0, 7.5)
    # B = 7.5, 5.5, 3.5: halves round up; P = 0, 0.4 * 0.5 + 0.1, 0.4 + 0.05.
    assert bits.tolist() == [8, 6, 4]
    assert percent.tolist() == [0, 30, 45]
    bits, percent = closed_form(importance, redundancy, 3.0, 0.0, 20.0, 12.0)
    assert bits.tolist() == [8, 2, 2]
    assert percent.tolist() == [0, 95, 95]


# -- methods ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["adalayer", "uniform"])
@pytest.mark.parametrize("budget", [Budget(size=0.35), Budget(bytes=2200), Budget(bits=3.3)])
def test_plans_hold_the_budget_and_use_it(scored, method: str, budget: Budget) -> None:
    model, scores = scored
    plan = quiet(scores, budget, method=method, model=model, calibration=batches())
    plan.validate(model)
    if budget.bits is not None:
        assert 0.9 * budget.bits <= plan.average_bits <= budget.bits + 1e-9
    else:
        limit = budget.limit_bytes(float_bytes(model))
        assert 0.9 * limit <= estimate_bytes(model, plan) <= limit
    assert plan.method == method
    assert "calibration_loss" in plan.measured
    assert Plan.from_json(plan.to_json()) == plan
    again = quiet(scores, budget, method=method, model=model, calibration=batches())
    assert again == plan


def test_adalayer_obeys_its_equations(scored) -> None:
    model, scores = scored
    plan = quiet(scores, Budget(size=0.35), model=model, calibration=batches())
    h = plan.hyper
    for name, layer in plan.layers.items():
        s = scores[name]
        importance = min(1.0, h["alpha"] * s.A + h["beta"] * s.F)
        assert plan.scores[name]["I"] == pytest.approx(importance)
        bits, percent = closed_form(
            np.array(importance), np.array(s.R), h["gamma"], h["delta"], h["lambda"], h["bmax"]
        )
        assert layer.bits == bits
        # A sparsity that saves no bytes is dropped.
        assert round(100 * layer.sparsity) in (0, int(percent))
        dense = packed_bytes(layer.params, layer.params, layer.bits)
        if layer.sparsity == 0 and percent > 0:
            kept = layer.params - int(layer.params * percent / 100 + 0.5)
            assert packed_bytes(layer.params, kept, layer.bits) == dense


def test_adalayer_is_not_worse_than_uniform_on_calibration(scored) -> None:
    model, scores = scored
    data = batches(8, 32, labels=False)
    for size in (0.3, 0.4):
        results = [
            quiet(scores, Budget(size=size), method=m, model=model, calibration=data)
            for m in ("uniform", "adalayer")
        ]
        uniform, layered = (plan.measured["calibration_loss"] for plan in results)
        # The uniform plans are tried with whole per cents; that is the only difference.
        assert layered <= uniform * 1.25 + 1e-6


def test_a_uniform_winner_is_not_rounded_to_per_cents(scored) -> None:
    model, _ = scored
    problem, evaluator = Problem(model, Budget(bytes=1700)), Evaluator(model, batches())
    bits, sparsity = next((b, s) for b, s in uniform_pairs(problem) if round(100 * s, 6) % 1)
    rounded = np.ceil(100 * sparsity) / 100
    hyper = {**dict.fromkeys(HYPER, 0.0), "gamma": rounded, "bmax": float(bits)}
    plan = problem.plan(problem.uniform(bits, rounded), "adalayer", hyper)
    plan.measured = {"calibration_loss": math.inf}
    exact = _unrounded(problem, evaluator, plan)
    assert {(e.bits, e.sparsity) for e in exact.layers.values()} == {(bits, sparsity)}
    assert exact.hyper["gamma"] == sparsity
    assert exact.measured["calibration_loss"] < math.inf
    plan.measured = {"calibration_loss": 0.0}  # more pruned and better, by whatever chance
    assert _unrounded(problem, evaluator, plan) is plan
    plan.measured, plan.hyper["alpha"] = {"calibration_loss": math.inf}, 1.0
    assert _unrounded(problem, evaluator, plan) is plan


def test_fixed_hyper_parameters(scored) -> None:
    model, scores = scored
    hyper = {"alpha": 1, "beta": 0, "gamma": 0.5, "delta": 0, "lambda": 2, "bmax": 5}
    plan = quiet(scores, Budget(size=0.5), model=model, hyper=hyper)
    assert plan.hyper == hyper
    with pytest.raises(BudgetError, match="with these hyper-parameters: the smallest reachable"):
        quiet(scores, Budget(size=0.26), model=model, hyper={**hyper, "bmax": 9, "lambda": 0})
    for bad in ({"delte": 1}, {"gamma": -1}, {"gamma": float("nan")}, {"gamma": "x"}):
        with pytest.raises(PlanError, match="hyper-parameter"):
            quiet(scores, Budget(size=0.5), model=model, hyper=bad)


@pytest.mark.parametrize("method", ["adalayer", "uniform"])
def test_impossible_budget_states_a_size_that_works(scored, method: str) -> None:
    model, scores = scored
    with pytest.raises(BudgetError, match="smallest reachable size is") as caught:
        quiet(scores, Budget(bytes=1000), method=method, model=model)
    words = str(caught.value).split("smallest reachable size is ")[1]
    smallest = int(words.split(" bytes")[0].replace(",", ""))
    share = float(words.split("bytes, ")[1].split(" ")[0])
    for budget in (Budget(bytes=smallest), Budget(size=share)):
        plan = quiet(scores, budget, method=method, model=model)
        assert estimate_bytes(model, plan) <= smallest
    with pytest.raises(BudgetError, match="smallest reachable size is"):
        quiet(scores, Budget(bytes=smallest - 32), method=method, model=model)
    with pytest.raises(BudgetError, match="bits per weight"):
        quiet(scores, Budget(bits=0.01), method=method, model=model)


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_uniform_average_bits_go_to_every_layer(scored, bits: int) -> None:
    model, _ = scored
    plan = quiet(None, Budget(bits=bits), method="uniform", model=model)
    assert {(layer.bits, layer.sparsity) for layer in plan.layers.values()} == {(bits, 0.0)}


def test_generous_budgets_give_eight_bits(scored) -> None:
    model, scores = scored
    for method in ("uniform", "adalayer"):
        plan = quiet(scores, Budget(size=5), method=method, model=model, calibration=batches())
        assert all(layer.bits == 8 and layer.sparsity == 0 for layer in plan.layers.values())


def test_ascending_descending_fixed(scored) -> None:
    model, _ = scored

    def bits(plan: Plan) -> list:
        return [layer.bits for layer in plan.layers.values()]

    assert bits(quiet(None, None, method="ascending", model=model)) == [2, 3, 4]
    assert bits(quiet(None, None, method="descending", model=model)) == [4, 3, 2]
    assert bits(quiet(None, None, method="fixed", model=model, bits=5)) == [5, 5, 5]
    assert bits(quiet(None, None, method="fixed", model=model, bits=(2, 3, 4))) == [4, 4, 4]
    named = quiet(None, None, method="ascending", model=model, bits=(6, 3), stages=["conv1", "fc"])
    assert bits(named) == [3, None, 6]
    net = get_model("resnet20")
    plan = quiet(None, None, method="descending", model=net, stages=["layer1", "layer2", "layer3"])
    assert plan["conv1"].bits is None
    assert plan["linear"].bits is None
    assert [plan[f"layer{i}.0.conv1"].bits for i in (1, 2, 3)] == [4, 3, 2]


def test_stage_methods_and_budgets(scored) -> None:
    model, _ = scored
    plan = quiet(None, Budget(bits=3), method="fixed", model=model, bits=(2, 3, 4))
    assert plan["fc"].bits == 3
    with pytest.raises(BudgetError, match=r"'ascending'.*smallest reachable average width is 3\."):
        quiet(None, Budget(bits=2), method="ascending", model=model, bits=(3, 4))
    for options in (
        {"bits": (1, 2, 3)},
        {"bits": ()},
        {"bits": (2.0, 3)},
        {"stages": ["conv1"]},
        {"stages": ["conv1", "fc", "nope"]},
        {"stages": ["conv1", "fc", "fc"]},
        {"stages": "conv1"},
    ):
        with pytest.raises(PlanError):
            quiet(None, None, method="ascending", model=model, **options)


def test_bad_calls(scored) -> None:
    model, scores = scored
    with pytest.raises(PlanError, match="unknown method"):
        quiet(scores, Budget(size=0.5), method="magic", model=model)
    with pytest.raises(BudgetError, match="needs a budget"):
        quiet(scores, None, model=model)
    for several in (Budget(size=0.5, bits=4), Budget(latency=1.0), Budget(energy=1.0)):
        with pytest.raises(BudgetError, match="takes one limit of size, bytes and bits"):
            quiet(scores, several, model=model)
    with pytest.raises(PlanError, match="takes no options"):
        quiet(scores, Budget(size=0.5), model=model, options={"rounds": 1})
    with pytest.raises(PlanError, match="needs scores"):
        quiet(None, Budget(size=0.5), model=model)
    with pytest.raises(PlanError, match="no scores for layer"):
        quiet(scores, Budget(size=0.5), model=get_model("resnet20"))
    with pytest.raises(PlanError, match="activation_bits"):
        quiet(scores, Budget(size=0.5), model=model, activation_bits=9)
    with pytest.raises(CalibrationError, match="empty"):
        quiet(scores, Budget(size=0.5), model=model, calibration=[])
    with pytest.raises(UnsupportedModelError):
        quiet(scores, Budget(size=0.5), model=nn.Sequential(nn.ReLU()))


def test_layers_the_native_code_lacks_stay_float() -> None:
    torch.manual_seed(0)
    model = capture(too_large(), batches()[0][0])
    scores = analyze(model, batches(), progress=False)
    plan = quiet(scores, Budget(size=1.0), model=model, calibration=batches())
    assert plan["0"].bits is not None
    assert plan["3"].bits is None
    assert list(plan.float_work) == ["3"]
    share = 4 * 66240 / (4 * 66240 + 64 * 3 * 1035)
    assert plan.float_work["3"]["share"] == pytest.approx(share)


def too_large() -> nn.Sequential:
    """Products of 8 bits that can overflow the accumulator of the last layer."""
    return nn.Sequential(nn.Conv2d(3, 1035, 1), nn.ReLU(), nn.Flatten(), nn.Linear(66240, 4)).eval()


# -- what a person decides ----------------------------------------------------------------------


@pytest.mark.parametrize("method", ["adalayer", "uniform", "ascending"])
def test_fixed_and_excluded_layers_are_respected(scored, method: str) -> None:
    model, scores = scored
    budget = None if method == "ascending" else Budget(bytes=2300)
    extra = {"bits": (2, 3)} if method == "ascending" else {"calibration": batches()}
    plan = quiet(scores, budget, method=method, model=model, fixed={"fc": (7, 0.25)}, **extra)
    assert (plan["fc"].bits, plan["fc"].sparsity) == (7, 0.25)
    assert all(plan[name].bits is not None for name in ("conv1", "conv2"))
    if budget is not None:
        assert 0.9 * 2300 <= estimate_bytes(model, plan) <= 2300
    again = quiet(
        scores, budget, method=method, model=model, fixed={"fc": plan["fc"]}, **extra
    )  # an entry of another plan
    assert again == plan
    budget = None if method == "ascending" else Budget(bytes=2900)
    floats = quiet(scores, budget, method=method, model=model, exclude=["conv1"], **extra)
    assert floats["conv1"].bits is None
    assert floats["fc"].bits is not None
    if budget is not None:
        assert estimate_bytes(model, floats) <= 2900


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fixed": {"conv": 4}}, "fixed: unknown layer 'conv'; closest names: .*conv"),
        ({"exclude": ["fcc"]}, "exclude: unknown layer 'fcc'; closest names: 'fc'"),
        ({"exclude": "fc"}, "exclude must be a sequence of names"),
        ({"fixed": {"fc": 9}}, "'fc': bits must be"),
        ({"fixed": {"fc": (4, 1.0)}}, "'fc': sparsity must be"),
        ({"fixed": {"fc": 4}, "exclude": ["fc"]}, "'fc' is both fixed and excluded"),
        ({"exclude": ["conv1", "conv2", "fc"]}, "nothing to decide"),
    ],
)
def test_bad_overrides(scored, options, message: str) -> None:
    model, scores = scored
    with pytest.raises(PlanError, match=message):
        quiet(scores, Budget(size=0.5), model=model, **options)


def test_a_layer_without_native_form_cannot_be_fixed() -> None:
    model = capture(too_large(), batches()[0][0])
    with pytest.raises(PlanError, match=r"'3' cannot be fixed to 8 bits: .*accumulator"):
        quiet(None, Budget(size=1.0), method="uniform", model=model, fixed={"3": 8})


# -- evaluation ---------------------------------------------------------------------------------


def test_evaluator_measures_the_float_model_as_perfect(scored) -> None:
    model, _ = scored
    evaluator = Evaluator(model, batches(labels=False))
    nothing = evaluator.measure(dict.fromkeys(("conv1", "conv2", "fc"), (None, 0.0)))
    assert nothing.loss == pytest.approx(0.0, abs=1e-7)
    assert nothing.accuracy == 1.0
    two = evaluator.measure(dict.fromkeys(("conv1", "conv2", "fc"), (2, 0.5)))
    assert two.loss > nothing.loss
    weight = evaluator.replacement("fc", Option(3, 0.25))[0]
    assert (weight == 0).sum() >= 48
    assert all(len(row.unique()) <= 8 for row in weight)


def test_evaluator_cache_resumes(scored, tmp_path, monkeypatch) -> None:
    model, scores = scored
    options = {"model": model, "calibration": batches(), "cache": tmp_path / "trials.json"}
    original = Evaluator._measure
    calls: list[int] = []

    def interrupted(self, layers):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return original(self, layers)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "_measure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quiet(scores, Budget(size=0.35), **options)
        calls.clear()
        calls.extend([0] * 100)
        resumed = quiet(scores, Budget(size=0.35), **options)
        first = len(calls) - 100
        calls.clear()
        calls.extend([0] * 100)
        assert quiet(scores, Budget(size=0.35), **options) == resumed
        assert len(calls) == 100
    options["cache"] = None
    assert quiet(scores, Budget(size=0.35), **options) == resumed
    assert first > 0
    (tmp_path / "trials.json").write_text("[]")
    assert quiet(scores, Budget(size=0.35), **{**options, "cache": tmp_path / "trials.json"}) == (
        resumed
    )


def test_best_of_breaks_ties_by_loss() -> None:
    measured = [Measurement(0.5, 0.90), Measurement(0.2, 0.89), Measurement(0.1, 0.50)]
    assert best_of(measured, 500) == 1  # two standard errors of 0.90 at 500 are 0.027
    assert best_of(measured, 10**6) == 0
    assert best_of([Measurement(2.0, math.nan), Measurement(1.0, math.nan)], 10) == 1
