"""Latencies of one machine in a file, and plans for it made on another."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers_cli import run
from helpers_models import batches, tiny
from torch import nn

import adalayer_native as ada
from adalayer_native import ops
from adalayer_native.allocation import (
    Budget,
    Settings,
    allocate,
    latencies,
    optimal,
    profiling,
    store,
)
from adalayer_native.allocation.latencies import machine_latencies, program_of
from adalayer_native.allocation.machine_table import MachineTable
from adalayer_native.allocation.options import Option
from adalayer_native.allocation.problem import Problem
from adalayer_native.allocation.profiling import instruction_set, options_of, profile
from adalayer_native.capture import Inputs
from adalayer_native.engine import latency as timing
from adalayer_native.engine.shapes import shapes_of
from adalayer_native.errors import (
    AdaError,
    BudgetError,
    FileFormatError,
    PlanError,
    UnsupportedModelError,
)

KERNELS = [isa for isa in ops.isas() if isa != "scalar"]
pytestmark = [
    pytest.mark.usefixtures("own_cache"),
    pytest.mark.skipif(not KERNELS, reason="the scalar interpreter has no profile of its nodes"),
]
ISA = KERNELS[-1] if KERNELS else ""  # the slowest: seldom the one in use
OPTIONS = options_of((2, 8), (0.0, 0.6), ("unstructured", "block16x64"), (6,))
BATCHES = batches(2, 12)
X = BATCHES[0][0][:1]
FEW = {"step": None, "repaired_plans": 0, "rounds": 1, "interactions": False}


class Other(nn.Module):
    """TinyNet's layers but the last, which has another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.body = tiny()
        self.body.fc = nn.Linear(48, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """TinyNet as all steps see it."""
    return ada.capture(tiny(), X)


@pytest.fixture(autouse=True, scope="module")
def _briefly():
    """Short timings: their values are not tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "seconds_in_turn", partial(timing.seconds_in_turn, seconds=0.01))
        yield


def programs(model: nn.Module, *widths: int) -> dict[int | None, ada.Engine]:
    problem = Problem(ada.capture(model, X), None)
    return {width: program_of(problem, Inputs.of(X), 1, width) for width in (None, *widths)}


@pytest.fixture(scope="module")
def table(tmp_path_factory, model) -> Path:
    """TinyNet, measured on one forced instruction set."""
    path = tmp_path_factory.mktemp("table") / "pi.json"
    with instruction_set(ISA):
        profile(programs(model, 6), OPTIONS, threads=1, progress=False).save(path)
    return path


def planned(path: Path, budget: Budget, model: nn.Module, **rest) -> ada.Plan:
    options = {**FEW, "latency_table": path, **rest.pop("options", {})}
    return allocate(
        None, budget, method="optimal", model=model, calibration=BATCHES, options=options,
        progress=False, **rest,
    )  # fmt: skip


# -- the round trip -----------------------------------------------------------------------------


def test_a_file_has_what_was_measured(table) -> None:
    found = MachineTable.load(table)
    assert found.machine["isa"] == ISA and found.machine["threads"] == 1
    assert found.options == OPTIONS and found.activation_bits == 8
    assert found.widths == (2, 8) and found.sparsities == (0.0, 0.6)
    assert found.patterns == ("unstructured", "block16x64") and found.input_widths == (6,)
    conv = found.shapes["conv kernel 3x3 stride 2x2 pad 1,1,1,1: u8 8x8x8 -> u8 12x4x4"]
    assert min(conv.microseconds) > 0 and all(k.startswith(ISA) for k in conv.kernels)
    assert "quantize: f32 3x8x8 -> u8 3x8x8" in found.shapes  # what is no layer counts, too
    assert found.reference is not None and found.reference > 0
    again = table.with_name("again.json")
    found.save(again)
    assert again.read_bytes() == table.read_bytes()


@pytest.mark.parametrize("here", ["scalar", KERNELS[0] if KERNELS else ""])
def test_a_plan_for_another_machine(table, model, monkeypatch, here) -> None:
    """Nothing is timed where the plan is made, and nothing depends on what that machine has."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("timed")

    monkeypatch.setattr(optimal, "EngineClock", never)
    monkeypatch.setattr(latencies, "LayerTimes", never)
    before = ops.active_isa()
    ops.force_isa(here)
    try:
        plan = planned(table, Budget(latency=1000.0, bytes=2600), model)
    finally:
        ops.force_isa(before)
    found = MachineTable.load(table)
    layers = dict(zip(("conv1", "conv2", "fc"), [s for s in found.shapes if s[:4] == "conv"],
                      strict=True))  # fmt: skip
    total = sum(found.time(shape, None) for shape in found.shapes if shape[:4] != "conv")
    for name, shape in layers.items():
        of = plan[name]
        inputs = None if of.activation_bits == 8 else of.activation_bits
        option = Option(of.bits, of.sparsity, of.pattern, inputs)
        total += found.time(shape, option)
        assert of.kernel == found.shapes[shape].kernels[OPTIONS.index(option)]
    assert plan.measured["predicted latency"] == pytest.approx(total / 1000)
    assert "measured latency" not in plan.measured


def test_the_fastest_plan_of_another_machine(table, model) -> None:
    plan = planned(table, Budget(loss=0.05), model)
    assert 0 < plan.measured["predicted latency"] < 1
    assert {plan[name].kernel.split()[0] for name in plan} == {ISA}
    assert "measured latency of 8 bits" not in plan.measured


def test_layers_that_are_decided_or_float_have_their_time(table, model) -> None:
    settings = Settings(widths=(2, 8), sparsities=(0.0, 0.6), latency_table=table)
    free, _ = machine_latencies(Problem(model, None), X, settings)
    pinned, _ = machine_latencies(Problem(model, None, fixed={"conv2": (2, 0.6)}), X, settings)
    assert pinned.layers == ("conv1", "fc")
    time = free.value("conv2", 2, 0.6)
    assert pinned.constant == pytest.approx(free.constant + time)
    with pytest.raises(PlanError, match=r"no times of weights of 4 bits with 0 of zeros; it has"):
        machine_latencies(Problem(model, None, fixed={"conv2": 4}), X, settings)
    with pytest.raises(PlanError, match=r"no times of .*float_conv kernel 3x3.*12x4x4"):
        machine_latencies(Problem(model, None, exclude=["conv2"]), X, settings)


def test_an_interrupted_run_goes_on(model, tmp_path, monkeypatch) -> None:
    part, every = tmp_path / "pi.json.part", OPTIONS[:3]
    measured = []
    nodes = profiling.LayerTimes.nodes

    def counted(self, *option):
        measured.append(option)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return nodes(self, *option)

    monkeypatch.setattr(profiling.LayerTimes, "nodes", counted)
    network = programs(model)
    with pytest.raises(KeyboardInterrupt):
        profile(network, every, threads=1, partial=part, progress=False)
    first = MachineTable.load(part)
    assert len(first.options) == 2
    found = profile(network, every, threads=1, partial=part, progress=False)
    assert len(measured) == 4 and found.options == every and not part.exists()
    assert all(
        found.shapes[shape].microseconds[:2] == times.microseconds
        for shape, times in first.shapes.items()
    )
    first.machine["cpu"] = "another"
    first.save(part)
    with pytest.warns(UserWarning, match=r"left by a run with another machine: .*'another'"):
        profile(network, every[:1], threads=1, partial=part, progress=False)


def test_shapes_say_what_there_is_to_do() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, (1, 3), padding=(0, 1)), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8), nn.Hardswish(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip
    found = shapes_of(programs(model)[None]._steps[0].run.program)
    assert found[1:4] == [
        "conv kernel 1x3 pad 0,1,0,1: u8 3x8x8 -> u8 8x8x8",
        "max_pool kernel 2x2 stride 2x2: u8 8x8x8 -> u8 8x4x4",
        "conv kernel 3x3 pad 2,2,2,2 dilation 2x2 groups 8 with a table: u8 8x4x4 -> u8 8x4x4",
    ]


def test_processors_have_names(tmp_path) -> None:
    """x86's kernel says the model, ARM's only who made it and its number; boards say theirs."""
    info, board = tmp_path / "cpuinfo", tmp_path / "model"
    info.write_text("processor\t: 0\nmodel name\t: Xeon\n\nprocessor\t: 1\nmodel name\t: other\n")
    assert store.processor(info, board) == "Xeon"
    info.write_text("processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd0b\n")
    assert store.processor(info, board).endswith(" (0x41 0xd0b)")
    board.write_text("Raspberry Pi 5 Model B Rev 1.0\0")
    assert store.processor(info, board) == "Raspberry Pi 5 Model B Rev 1.0 (0x41 0xd0b)"
    assert store.processor(tmp_path / "gone", tmp_path / "gone")


# -- bad input ----------------------------------------------------------------------------------


def changed(table: Path, path: Path, **values: object) -> Path:
    """The file with other entries, and the checksum that belongs to them."""
    found = MachineTable.load(table)
    for name, value in values.items():
        setattr(found, name, value)
    found.save(path)
    return path


def test_files_that_cannot_be_used(table, model, tmp_path) -> None:
    text = table.read_text(encoding="utf-8")
    path = tmp_path / "bad.json"

    def refused(content: str | bytes, message: str) -> None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(FileFormatError, match=message) as caught:
            planned(path, Budget(latency=1.0), model)
        assert str(path) in str(caught.value)

    for size in (0, 1, len(text) // 2, len(text) - 3):
        refused(text[:size], "cut off or damaged")
    refused(b"\xff\xfe\x00", "cut off or damaged")
    refused("[" * 100_000, "cut off or damaged|expected a file of format")
    refused("[]", "expected a file of format 'adalayer latencies'.*got None")
    refused(json.dumps({"format": "adalayer-table-1"}), "got 'adalayer-table-1'")
    newer = json.dumps({**json.loads(text), "version": 2})
    refused(newer, "expected version 1 of the format, got 2")
    number = re.search(r'"microseconds": \[([\d.]+)', text)
    assert number
    refused(text.replace(number[1], "1e-3", 1), "changed by hand.*expected [0-9a-f]{64}")
    with pytest.raises(FileFormatError, match=r"latency table '.*gone' does not exist"):
        planned(tmp_path / "gone", Budget(latency=1.0), model)
    with pytest.raises(FileFormatError, match="is a directory; expected a file"):
        planned(tmp_path, Budget(latency=1.0), model)
    machine = {**MachineTable.load(table).machine, "kernels": "0123-00"}
    changed(table, path, machine=machine, package="9.9")
    with pytest.raises(FileFormatError, match=r"expected .* got 0123-00 \(package 9\.9\)"):
        planned(path, Budget(latency=1.0), model)
    bad = MachineTable.load(table)
    next(iter(bad.shapes.values())).microseconds.pop()
    bad.save(path)
    with pytest.raises(FileFormatError, match=r"expected \d+ times"):
        MachineTable.load(path)


def test_requests_that_do_not_fit_the_file(table, model) -> None:
    with pytest.raises(BudgetError, match=r"for a budget of latency or loss, got size 0\.5"):
        planned(table, Budget(size=0.5), model)
    with pytest.raises(PlanError, match=r"pi.json: measured with threads 1, expected 2"):
        planned(table, Budget(latency=1.0), model, options={"threads": 2})
    with pytest.raises(PlanError, match=r"pi.json: measured with latency_batch 1, expected 4"):
        planned(table, Budget(latency=1.0), model, options={"latency_batch": 4})
    with pytest.raises(PlanError, match=r"pi.json: no times of weights of 3 bits"):
        planned(table, Budget(latency=1.0), model, options={"widths": (3, 8)})
    with pytest.raises(PlanError, match=r"inputs of 8 bits, expected 7 \(activation_bits\)"):
        planned(table, Budget(latency=1.0), model, activation_bits=7)
    with pytest.raises(PlanError, match=r"no times of 'body.fc': conv .*12x2x2 -> f32 5x1x1"):
        planned(table, Budget(latency=1.0), Other().eval())
    with pytest.raises(BudgetError, match=r"smallest reachable latency is [\d.e-]+ ms"):
        planned(table, Budget(latency=1e-7), model)


def test_an_instruction_set_that_the_machine_lacks() -> None:
    lacks = next(i for i in ("neon", "avx2") if i not in ops.isas())
    for name in (lacks, "scalar", "sse9"):
        with pytest.raises(PlanError, match=rf"{name!r} cannot be measured .* expected one of"), \
             instruction_set(name):  # fmt: skip
            pass


def test_a_network_with_parts_in_torch_is_refused() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = tiny()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x).sort(dim=1).values

    with pytest.raises(UnsupportedModelError, match="parts in torch"):
        profile(programs(Sorted().eval()), OPTIONS[:1], progress=False)


def test_programs_of_two_networks_are_refused(model) -> None:
    other = programs(Other().eval())[None]
    with pytest.raises(PlanError, match=r"inputs of 6 bits is of another network: .*f32 5x1x1"):
        profile({None: programs(model)[None], 6: other}, OPTIONS[:1], progress=False)


# -- the command line ---------------------------------------------------------------------------


def test_profile_and_compress(tmp_path, monkeypatch, capsys) -> None:
    """Shapes here, times there, a plan here; what the target runs needs no code of the model."""
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "profile", "helpers_models:TinyNet", "--classes", 4,
               "--image-size", 8, "--input-bits", 6, "--shapes", "net") == 0  # fmt: skip
    assert sorted(p.name for p in Path("net").iterdir()) == ["inputs6.ada", "inputs8.ada"]
    few = ("--bits", "4,8", "--sparsities", "0", "--patterns", "unstructured", "--threads", 1)
    capsys.readouterr()
    assert run(monkeypatch, "profile", "net", "--isa", ISA, "--input-bits", "none", *few,
               "--out", "pi.json", "--json") == 0  # fmt: skip
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["machine"]["isa"] == ISA and found["bits"] == 8 and found["milliseconds"] > 0
    assert "Microseconds per layer" in printed.err and "conv kernel 3x3" in printed.err
    assert "measuring latencies: 2/2" in printed.err
    assert MachineTable.load("pi.json").options == [Option(4), Option(8)]
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "cache") == ["net", "pi.json"]
    Path("empty").mkdir()
    for arguments, message in (
        (("net", "--isa", "sse9"), "'sse9' cannot be measured"),
        (("net", "--input-bits", 5), "expected inputs5.ada beside inputs8.ada"),
        (("empty",), "expected files inputs8.ada"),
        (("nope",), "unknown model 'nope'"),
        (("gone.ada",), "gone.ada: does not exist; expected an .ada file"),
    ):
        assert run(monkeypatch, "profile", *arguments) == 1
        assert message in capsys.readouterr().err
    for option, value in (("--bits", "9"), ("--sparsities", "0.5"), ("--patterns", "block16x64"),
                          ("--sparsities", "0,0"), ("--input-bits", "8")):  # fmt: skip
        assert run(monkeypatch, "profile", "net", option, value) == 2
        assert option in capsys.readouterr().err
    assert issubclass(PlanError, AdaError)  # one sentence, no traceback
