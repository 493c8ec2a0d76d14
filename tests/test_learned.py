"""Widths that are learned: what matters keeps bits, budgets are kept, runs go on bit for bit."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import helpers_study
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, fx, nn

import adalayer_native as ada
from adalayer_native.allocation import estimate_bytes, everywhere, float_bytes
from adalayer_native.cli import main
from adalayer_native.errors import BudgetError, PlanError
from adalayer_native.quantization import calibrate, convert, prepare
from adalayer_native.quantization.fractional import FractionalInput, FractionalWeight
from adalayer_native.quantization.graph import layers_of, quantizers_of
from adalayer_native.training import finetune, fit
from adalayer_native.training.frontier import hull, weight_errors
from adalayer_native.training.positions import Costs, move


class Two(nn.Module):
    """Two branches of one form; what the second says is all but ignored."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = nn.Conv2d(1, 16, 3, padding=1)
        self.ignored = nn.Conv2d(1, 16, 3, padding=1)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        both = self.relu(self.counts(x)) + 1e-3 * self.relu(self.ignored(x))
        return self.fc(self.flatten(self.pool(both)))


def batches(count: int = 12, size: int = 32) -> list[tuple[Tensor, Tensor]]:
    """Four classes: which quadrant of the image is bright."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        y = torch.randint(0, 4, (size,), generator=generator)
        x = 0.7 * torch.randn(size, 1, 8, 8, generator=generator)
        for image, label in zip(x, y.tolist(), strict=True):
            row, column = 4 * (label // 2), 4 * (label % 2)
            image[0, row : row + 4, column : column + 4] += 1.0
        found.append((x, y))
    return found


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)
    net = Two()
    fit(net, batches(), 6, lr=0.1, amp=False, progress=False)
    return net.eval()


def start(model: nn.Module, bits: int = 8) -> fx.GraphModule:
    prepared = prepare(model, everywhere(model, bits), torch.zeros(1, 1, 8, 8))
    calibrate(prepared, batches(2), progress=False)
    return prepared


def learn(prepared: nn.Module, model: nn.Module, budget: ada.Budget, **options: Any) -> Any:
    options = {
        "epochs": 4, "lr": 0.02, "amp": False, "progress": False, "teacher": model,
        "allocate": "learned", **options,
    }  # fmt: skip
    loader = options.pop("loader", None)
    options = {"budget": budget, **options}
    return finetune(prepared, batches() if loader is None else loader, **options)


# -- pieces ---------------------------------------------------------------------------------------


def test_a_weight_between_two_options() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    options = [(8, 0.0), (4, 0.0), (2, 0.5)]
    owner = FractionalWeight(options, 1.25, weight)
    ends = []
    for position in (1.0, 2.0):
        with torch.no_grad():
            owner.position.fill_(position)
        ends.append(owner(weight).detach())
    assert 0.45 < float((ends[1] == 0).float().mean()) < 1.0
    assert len(ends[0].unique()) > 16  # 4 bits per channel
    with torch.no_grad():
        owner.position.fill_(1.25)
    value = owner(weight)
    torch.testing.assert_close(value, 0.75 * ends[0] + 0.25 * ends[1])
    grad = torch.randn_like(value)
    value.backward(grad)
    expected = (grad * (ends[1] - ends[0])).sum()
    torch.testing.assert_close(owner.position.grad, expected)
    inside = weight.detach().abs() < 0.3  # on every grid
    torch.testing.assert_close(weight.grad[inside], grad[inside])
    owner.sharpness = 4.0
    assert owner.fraction() == 0.0
    torch.testing.assert_close(owner(weight).detach(), ends[0])


def test_an_input_between_two_widths() -> None:
    x = torch.linspace(-1.0, 3.0, 40, requires_grad=True)
    owner = FractionalInput([8, 4, 2], [(4 / 255, 64), (4 / 15, 4), (4 / 3, 1)], 1.5)
    value = owner(x)
    four = ((x * 15 / 4).round().clamp(-4, 11) * 4 / 15).detach()
    two = ((x * 3 / 4).round().clamp(-1, 2) * 4 / 3).detach()
    torch.testing.assert_close(value.detach(), (four + two) / 2)
    value.sum().backward()
    torch.testing.assert_close(owner.position.grad, (two - four).sum())
    assert float(x.grad[20]) == 1.0


def test_what_an_option_is_worth() -> None:
    """A gradient of one sign counts, noise does not; its square always does."""
    steady, noisy = (FractionalInput([8, 4], [(1.0, 0), (1.0, 0)], 0.0) for _ in range(2))
    for step in range(200):
        for owner, value in ((steady, 0.1), (noisy, 0.1 if step % 2 else -0.1)):
            owner.position.grad = torch.tensor(value)
            owner.observe(10, 0.25)
            assert owner.position.grad is None
    curve = 5 * 0.01 / 0.25
    assert noisy.sensitivity(0.25) == pytest.approx(curve, rel=1e-5)
    # The mean 0.2 less twice 0.2 / sqrt(100), over the root of the unit.
    assert steady.sensitivity(0.25) == pytest.approx(curve + (0.2 - 0.04) / 0.5, rel=1e-5)
    assert noisy.sensitivity(0.0) == 0.0


def test_errors_of_a_weight() -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0, 0.5]])
    found = weight_errors(weight, [2, 8], [0.0, 0.5])
    assert found[1, 0] < 1e-4 < found[0, 0]
    assert found[1, 1] == pytest.approx((1.0 + 0.25) / 14.25, rel=1e-3)  # the two smallest are gone


def test_hull_leaves_out_what_is_not_worth_its_cost() -> None:
    costs = np.array([1.0, 2.0, 3.0, 4.0, 2.5])
    errors = np.array([8.0, 6.0, 2.0, 1.0, 9.0])
    assert hull(costs, errors, np.ones(5, dtype=bool)) == [3, 2, 0]  # 1 lies above 0 to 2
    assert hull(costs, errors, np.array([True, True, False, True, True])) == [3, 0]
    assert hull(costs, errors, np.array([0, 1, 0, 0, 1], dtype=bool)) == [1]


def test_steps_keep_the_limit_and_balance_harm_and_saving() -> None:
    """Two layers that save alike: the one that hurts ten times as much stays rich."""
    table = np.array([[[[10.0, 10.0], [6.0, 6.0], [2.0, 2.0]]] * 2])
    costs = Costs(table, np.array([1.0]), np.array([13.0]), np.array([3, 3]), np.array([-1, -1]))
    positions = np.array([0.0, 0.0])
    assert costs.at(positions)[0] == [21.0]
    for limit in np.linspace(21.0, 13.0, 40):
        positions = move(costs, positions, np.array([1.0, 0.1]), np.array([limit]), 0.2)
        assert costs.at(positions)[0][0] <= limit + 1e-6
    for _ in range(40):
        positions = move(costs, positions, np.array([1.0, 0.1]), np.array([13.0]), 0.2)
    assert positions == pytest.approx([0.0, 2.0], abs=0.05)
    # With nothing to keep, everything gets as rich as it can.
    free = move(costs, np.array([2.0, 1.0]), np.array([1.0, 1.0]), np.array([99.0]), 0.5)
    assert free == pytest.approx([1.5, 0.5])


def test_costs_between_options_and_widths() -> None:
    table = np.zeros((1, 2, 2, 2))
    table[0, 0] = [[8.0, 4.0], [4.0, 2.0]]
    table[0, 1] = [[16.0, 8.0], [8.0, 4.0]]
    costs = Costs(table, np.zeros(1), np.ones(1), np.array([2, 2, 2]), np.array([2, 2]))
    total, savings = costs.at(np.array([0.5, 0.0, 0.5]))
    assert total[0] == pytest.approx(4.5 + 12.0)
    assert savings[0] == pytest.approx([3.0, 6.0, 3.0 + 8.0])


# -- runs -----------------------------------------------------------------------------------------


def test_a_layer_that_matters_gets_more_bits(trained: nn.Module) -> None:
    prepared = start(trained)
    history = learn(prepared, trained, ada.Budget(bits=3.0))
    plan = history.plan
    assert plan.method == "learned"
    assert plan.average_bits <= 3.0 + 1e-9
    kept = {name: layer.bits * (1 - layer.sparsity) for name, layer in plan.layers.items()}
    assert kept["counts"] > kept["ignored"] + 1.0, kept
    widths = [epoch["widths"] for epoch in history.epochs]
    assert widths[0]["counts"] > widths[-1]["ignored"]
    assert widths[-1] == pytest.approx(kept, abs=1e-3)
    for name, layer in layers_of(prepared).items():
        assert layer.bits == plan[name].bits
        assert layer.fractional is None and layer.step is None
        pruned = 0.0 if layer.mask is None else 1.0 - float(layer.mask.float().mean())
        assert pruned == pytest.approx(plan[name].sparsity, abs=0.5 / layer.weight.numel() + 1e-6)
    assert history.epochs[-1]["accuracy"] > 0.9


def test_the_file_keeps_the_budget_to_the_byte(trained: nn.Module, tmp_path: Path) -> None:
    prepared = start(trained)
    limit = 1950
    plan = learn(prepared, trained, ada.Budget(bytes=limit), epochs=2).plan
    native = convert(prepared)
    size = ada.save(native, tmp_path / "model.safetensors")
    assert size <= estimate_bytes(trained, plan) <= limit
    assert estimate_bytes(trained, plan) > 0.95 * limit  # and uses it
    assert ada.Plan.from_json(plan.to_json()) == plan
    x = batches(1)[0][0]
    torch.testing.assert_close(ada.restore(trained, tmp_path / "model.safetensors")(x), native(x))
    engine = ada.compile(native, x, policy="native")
    assert torch.equal(engine(x), native(x))


def test_bits_of_inputs_are_learned_where_they_count(trained: nn.Module) -> None:
    prepared = start(trained)
    x = torch.zeros(1, 1, 8, 8)
    full = sum(e.total for e in ada.plan_energy(trained, everywhere(trained, 8), x).values()) * 1e-6
    ops = {"counts": 144 * 64, "ignored": 144 * 64, "fc": 256}
    limit = 0.2 * 64 * sum(ops.values())
    budget = ada.Budget(bops=limit, energy=0.9 * full)
    plan = learn(prepared, trained, budget).plan
    used = sum(
        ops[name] * layer.bits * layer.activation_bits * (1 - layer.sparsity)
        for name, layer in plan.layers.items()
    )
    assert used <= limit
    assert min(layer.activation_bits for layer in plan.layers.values()) < 8
    assert plan["counts"].activation_bits == plan["ignored"].activation_bits  # one value
    quantizers = quantizers_of(prepared)
    for name, entry in prepared.meta["layers"].items():
        assert quantizers[entry["input"]].bits == plan[name].activation_bits
        assert float(quantizers[entry["input"]].qparams[2]) == plan[name].activation_bits
        assert quantizers[entry["input"]].fractional is None
    assert convert(prepared) is not None


@pytest.mark.slow
def test_a_latency_is_that_of_the_table(trained: nn.Module, tmp_path: Path) -> None:
    prepared = start(trained)
    options = {"tables": tmp_path}
    budget = ada.Budget(bits=3.0, latency=1e3)
    plan = learn(prepared, trained, budget, epochs=1, allocate_options=options).plan
    assert plan.average_bits <= 3.0
    with pytest.raises(BudgetError, match=r"smallest reachable latency is"):
        learn(start(trained), trained, ada.Budget(latency=1e-6), allocate_options=options)


def test_fixed_layers_keep_their_plan(trained: nn.Module) -> None:
    prepared = start(trained)
    plan = learn(
        prepared, trained, ada.Budget(bits=4.0), epochs=1, allocate_options={"fixed": ["ignored"]}
    ).plan
    assert (plan["ignored"].bits, plan["ignored"].sparsity) == (8, 0.0)
    assert plan.average_bits <= 4.0


class Interrupting:
    """Batches of which one raises a signal before it comes."""

    def __init__(self, at: int | None) -> None:
        self.data, self.at, self.served = batches(), at, 0

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in self.data:
            self.served += 1
            if self.served == self.at:
                os.kill(os.getpid(), signal.SIGINT)
            yield x + 0.1 * torch.randn_like(x), y


@pytest.mark.parametrize("at", [7, 30])  # while widths are learned, and after it
def test_an_interrupted_run_goes_on_bit_for_bit(
    trained: nn.Module, tmp_path: Path, at: int
) -> None:
    budget = ada.Budget(bits=2.5)
    whole = start(trained)
    expected = learn(whole, trained, budget, epochs=3, loader=Interrupting(None))
    path = tmp_path / "checkpoint.safetensors"
    broken = start(trained)
    options = {"epochs": 3, "checkpoint": path}
    with pytest.raises(KeyboardInterrupt):
        learn(broken, trained, budget, loader=Interrupting(at), **options)
    used = sum(
        layer.weight.numel() * layer.bits * (1.0 if layer.mask is None else
                                             float(layer.mask.float().mean()))
        for layer in layers_of(broken).values()
    )  # fmt: skip
    assert used <= 2.5 * sum(p.numel() for n, p in trained.named_parameters() if "weight" in n) + 16
    assert convert(broken) is not None  # what is left of it is whole, too
    again = start(trained)
    history = learn(again, trained, budget, loader=Interrupting(None), **options)
    assert history.resumed
    assert history.plan == expected.plan
    drop = ("seconds",)
    for one, two in zip(history.epochs, expected.epochs, strict=True):
        assert {k: v for k, v in one.items() if k not in drop} == {
            k: v for k, v in two.items() if k not in drop
        }
    other = again.state_dict()
    assert all(torch.equal(value, other[key]) for key, value in whole.state_dict().items())
    third = start(trained)
    assert learn(third, trained, budget, loader=Interrupting(None), **options).plan == expected.plan
    with pytest.warns(UserWarning, match="another run"):
        learn(start(trained), trained, ada.Budget(bits=3), loader=Interrupting(None), **options)


def test_refusals(trained: nn.Module) -> None:
    budget = ada.Budget(bits=3.0)
    with pytest.raises(BudgetError, match="needs a budget"):
        learn(start(trained), trained, None)
    with pytest.raises(BudgetError, match="no budget of loss"):
        learn(start(trained), trained, ada.Budget(loss=0.1))
    with pytest.raises(BudgetError, match=r"smallest reachable size is [\d,]+ bytes"):
        learn(start(trained), trained, ada.Budget(size=0.01))
    assert float_bytes(trained) > 100
    for options, message in (
        ({"teacher": None}, "needs the float model as teacher"),
        ({"allocate": "guessed"}, "must be 'learned' or None, got 'guessed'"),
        ({"allocate": None}, "a budget is for allocate='learned'"),
        ({"teacher": nn.Linear(64, 4)}, "the teacher has no layer 'counts'"),
        ({"extra_bits": 1}, "widths and extra_bits say nothing"),
        ({"allocate_options": {"finding": 1}}, r"unknown allocate_options \['finding'\]"),
        ({"allocate_options": {"search": 0.0}}, "search must be above 0"),
        ({"allocate_options": {"fall": 1.0}}, "fall must be from 0 to below 1"),
        ({"allocate_options": {"fixed": ["fc9"]}}, "fixed names 'fc9'"),
        ({"loader": iter(batches())}, "a loader with a length"),
        (
            {"allocate": None, "budget": None, "allocate_options": {"search": 0.5}},
            "options are for",
        ),
    ):
        with pytest.raises(PlanError, match=message):
            learn(start(trained), trained, **{"budget": budget, **options})
    for changes, message in (
        ({"sparsity": 0.5, "pattern": "2:4"}, "pattern '2:4' cannot be learned"),
        ({"group_size": 32}, r"'fc': bits of weight groups \(group_size 32\) cannot be learned"),
    ):
        plan = everywhere(trained, 8)
        plan["fc"] = replace(plan["fc"], **changes)
        prepared = prepare(trained, plan, torch.zeros(1, 1, 8, 8))
        calibrate(prepared, batches(1), progress=False)
        with pytest.raises(PlanError, match=message):
            learn(prepared, trained, budget)
    plan = everywhere(trained, 8)
    plan["fc"].activation_bits = 6
    prepared = prepare(trained, plan, torch.zeros(1, 1, 8, 8))
    calibrate(prepared, batches(1), progress=False)
    with pytest.raises(PlanError, match=r"the plan gives them \[6, 8\] bits"):
        learn(prepared, trained, ada.Budget(bops=1e6))


# -- in one call ----------------------------------------------------------------------------------


def test_compress_learns(trained: nn.Module, tmp_path: Path) -> None:
    data = batches()
    result = ada.compress(
        trained, data[:3], ada.Budget(size=0.8), allocate="learned", train_loader=data, epochs=2,
        allocate_options={"fixed": {"fc": 6}, "options": {"search": 0.6}}, work_dir=tmp_path,
        finetune_options={"lr": 0.02, "amp": False}, distill=False, progress=False,
    )  # fmt: skip
    assert result.plan is result.history.plan
    assert result.plan["fc"].bits == 6
    assert result.repair is None
    size = ada.save(result.model, tmp_path / "model.safetensors")
    assert size <= 0.8 * float_bytes(trained)
    common = {"train_loader": data, "allocate": "learned", "progress": False}
    with pytest.raises(PlanError, match="needs a train_loader"):
        ada.compress(trained, data, ada.Budget(size=0.3), allocate="learned", progress=False)
    with pytest.raises(BudgetError, match="needs a budget"):
        ada.compress(trained, data, None, **common)
    with pytest.raises(BudgetError, match="smallest reachable"):
        ada.compress(trained, data, ada.Budget(size=0.01), **common)
    with pytest.raises(PlanError, match=r"got options \['bits'\]"):
        ada.compress(trained, data, ada.Budget(size=0.8), allocate_options={"bits": 3}, **common)


def test_the_command_learns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    data = str(helpers_study.write_images(tmp_path / "data"))
    torch.manual_seed(0)
    weights = tmp_path / "w.safetensors"
    save_file(helpers_study.SmallNet().state_dict(), weights)
    common = [
        "compress", "helpers_study:SmallNet", "--weights", str(weights), "--data", data,
        "--image-size", "8", "--batch-size", "16", "--calibration", "20", "--out", str(out),
        "--threads", "1", "--quiet", "--allocate", "learned",
    ]  # fmt: skip
    assert run(*common) == 1
    assert "method 'learned' needs a budget: --size" in capsys.readouterr().err
    assert run(*common, "--size", "0.4", "--epochs", "0") == 1
    assert "at least one epoch" in capsys.readouterr().err
    assert run(*common, "--size", "0.4", "--epochs", "1") == 0
    plan = ada.Plan.load(out / "plan.json")
    assert plan.method == "learned"
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["bytes"] <= 0.4 * report["float_bytes"]


def run(*arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["adalayer", *arguments])
        patch.setattr("warnings.showwarning", None)  # the entry point replaces it
        with pytest.raises(SystemExit) as done:
            main()
    return int(done.value.code or 0)
