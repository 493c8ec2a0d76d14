"""Gradients with few bits: rounding without bias, two processes that agree, one that dies."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from adalayer_native.distributed import OptimisticDualAveraging, QuantizedGradients
from adalayer_native.distributed.encoding import BLOCK, decoded, encoded, levels_of
from adalayer_native.errors import ClusterError, FileFormatError, PlanError

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch has no torch.distributed")


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 3000), bits=st.integers(2, 8), seed=st.integers(0, 99))
def test_a_value_comes_back_as_a_level_beside_it(count, bits, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=generator)
    data = encoded(values, bits, generator)
    back, length = decoded(torch.cat([data, torch.zeros(5, dtype=torch.uint8)]), count)
    assert length == len(data)
    for begin in range(0, count, BLOCK):
        part, got = values[begin : begin + BLOCK], back[begin : begin + BLOCK]
        step = float(part.abs().max()) / levels_of(bits)
        assert float((part - got).abs().max()) <= step * (1 + 1e-5)
        assert float((got / step - (got / step).round()).abs().max()) < 1e-3


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_rounding_has_no_bias(bits):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2 * BLOCK, generator=generator)
    draws = torch.stack(
        [decoded(encoded(values, bits, generator), len(values))[0] for _ in range(300)]
    )
    step = float(values.abs().max()) / levels_of(bits)
    # The mean of 300 draws that are at most half a step from it on average.
    assert float((draws.mean(0) - values).abs().max()) < 5 * 0.5 * step / 300**0.5
    assert abs(float((draws.mean(0) - values).mean())) < 0.01 * step


def test_bytes_are_those_of_the_bits():
    values = torch.randn(64 * BLOCK)
    for bits in range(3, 9):
        expected = len(values) * bits / 8 + 4 * 64
        assert len(encoded(values, bits)) < expected + 100
    nothing = encoded(torch.zeros(64 * BLOCK), 4)
    assert not decoded(nothing, 64 * BLOCK)[0].any()
    assert len(nothing) < 64 * BLOCK / 8


def test_damaged_bytes_are_refused():
    data = encoded(torch.randn(5000), 4)
    for bad in (data[:4], data[:100], data[:-1]):
        with pytest.raises(FileFormatError, match=r"gradient of 5000 values|packed weight"):
            decoded(bad, 5000)
    for at in (0, 40, 300):
        bad = data.clone()
        bad[at] ^= 0x55
        try:
            decoded(bad, 5000)
        except FileFormatError:
            continue
        assert 8 <= at < 8 + 4 * 5, "only a scale can be anything"
    with pytest.raises(FileFormatError, match="gradient of 9000 values"):
        decoded(data, 9000)


# ---- processes -------------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(),
        nn.Linear(64, 4),
    )  # fmt: skip


def samples(rank: int, step: int) -> tuple[Tensor, Tensor]:
    """Four directions in noise."""
    generator = torch.Generator().manual_seed(step * 2 + rank)
    y = torch.randint(4, (32,), generator=generator)
    x = torch.randn(32, 1, 8, 8, generator=generator) * 0.5
    for k in range(4):
        x[y == k, 0, 2 * k : 2 * k + 2] += 1.0
    return x, y


def start(rank: int, folder: str, timeout: float) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2,
        timeout=datetime.timedelta(seconds=timeout),
    )  # fmt: skip


def train(rank: int, folder: str) -> None:
    start(rank, folder, 120)
    ddp = DistributedDataParallel(network())
    exact = network()
    gradients = QuantizedGradients(ddp, bits=4.0, every=5)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
    losses, apart = [], []
    for step in range(30):
        x, y = samples(rank, step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(ddp(x), y)
        loss.backward()
        if step == 0:  # the gradient of both processes' samples
            whole = [torch.cat(pair) for pair in zip(samples(0, 0), samples(1, 0), strict=True)]
            nn.functional.cross_entropy(exact(whole[0]), whole[1]).backward()
            for p, q in zip(ddp.module.parameters(), exact.parameters(), strict=True):
                apart.append(float((p.grad - q.grad).norm() / q.grad.norm()))
        optimizer.step()
        losses.append(float(loss))
    torch.save(
        {
            "losses": losses,
            "apart": apart,
            "state": ddp.module.state_dict(),
            "widths": gradients.widths,
            "steps": gradients.steps,
            "ratio": gradients.ratio,
        },
        f"{folder}/{rank}.pt",
    )
    dist.destroy_process_group()


def die(rank: int, folder: str) -> None:
    start(rank, folder, 20)
    ddp = DistributedDataParallel(network())
    QuantizedGradients(ddp)
    for step in range(3):
        if rank == 1 and step == 2:  # after DDP has arranged its buckets, which is its own affair
            os._exit(0)
        x, y = samples(rank, step)
        begin = time.monotonic()
        try:
            nn.functional.cross_entropy(ddp(x), y).backward()
        except Exception as error:
            seconds = time.monotonic() - begin
            Path(folder, "error").write_text(f"{seconds}|{type(error).__name__}|{error}")
            os._exit(0)
    Path(folder, "error").write_text("0|none|no error")


def together(work: Callable[[int, str], None], folder: Path) -> None:
    mp.spawn(work, args=(str(folder),), nprocs=2, join=True)


def test_two_processes_learn_alike(tmp_path):
    together(train, tmp_path)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for key, value in one["state"].items():
        assert torch.equal(value, other["state"][key])
    assert one["widths"] == other["widths"]
    assert one["steps"] == 30
    assert one["ratio"] > 6.0
    counts = {"3.weight": 64 * 1024}
    assert set(one["widths"]) == set(counts)
    assert one["widths"]["3.weight"] == 4
    # Biases and the small layers go as they are, the large one with the noise of its rounding.
    names = [name for name, _ in network().named_parameters()]
    for name, error in zip(names, one["apart"], strict=True):
        assert error < (1.0 if name in one["widths"] else 1e-5)
    assert sum(one["losses"][-5:]) < 0.5 * sum(one["losses"][:5])


def test_a_process_that_dies_is_an_error_soon(tmp_path):
    together(die, tmp_path)
    seconds, kind, text = (tmp_path / "error").read_text().split("|", 2)
    assert kind != "none"
    assert "does not answer" in text
    assert float(seconds) < 40


def test_widths_go_where_they_help_most(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
        ddp = DistributedDataParallel(model)
        gradients = QuantizedGradients(ddp, bits=4.5, every=1)
        for name, size in (("0.weight", 100.0), ("1.weight", 1.0), ("2.weight", 0.0)):
            gradients.note(name, size * torch.randn(64, 64))
        gradients.step()
        widths = gradients.widths
        assert widths["0.weight"] == 8
        assert widths["0.weight"] > widths["1.weight"] > widths["2.weight"]
        assert sum(widths.values()) <= 4.5 * 3
        x = torch.full((4, 64), float("nan"))
        with pytest.raises(Exception, match="contains NaN or infinity"):
            ddp(x).sum().backward()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("feedback", [True, False])
def test_what_was_not_sent_is_added_to_the_next_gradient(tmp_path, feedback, bits):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        ddp = DistributedDataParallel(nn.Sequential(nn.Linear(64, 64, bias=False)))
        gradients = QuantizedGradients(ddp, bits=bits, feedback=feedback)
        gradient = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
        sent = torch.zeros(64, 64)
        for _ in range(30):
            sent += decoded(gradients.encode("0.weight", gradient), 4096)[0].view(64, 64)
        # All but what one message leaves out has arrived; without, the errors of 30 add up.
        apart = float((sent - 30 * gradient).norm() / gradient.norm())
        one = {2: 2.0, 3: 0.7, 4: 0.3}[bits]
        assert apart < one if feedback else apart > 2 * one
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"bits": 1.5}, "1.5 bits is not between 2 and 8"),
        ({"bits": 9}, "9 bits is not between"),
        ({"least": 5, "most": 4}, "got 5 and 4"),
        ({"every": 0}, "got every=0"),
    ],
)
def test_bad_arguments(options: dict[str, Any], text: str):
    with pytest.raises(PlanError, match=text):
        QuantizedGradients(network(), **options)  # type: ignore[arg-type]


def test_a_hook_without_a_group_or_a_wrapped_model(tmp_path):
    with pytest.raises(ClusterError, match="need a process group"):
        QuantizedGradients(network())  # type: ignore[arg-type]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        with pytest.raises(PlanError, match="got a Sequential"):
            QuantizedGradients(network())  # type: ignore[arg-type]
    finally:
        dist.destroy_process_group()


# ---- the optimizer ---------------------------------------------------------------------------


def played(make: Callable[[list[Tensor]], torch.optim.Optimizer], steps: int) -> float:
    """min over x, max over y of x * y, from (1, 1): how far from the saddle point in the end."""
    point = torch.tensor([1.0, 1.0], requires_grad=True)
    optimizer = make([point])
    for _ in range(steps):
        x, y = point.detach()
        point.grad = torch.stack([y, -x])
        optimizer.step()
    return float(point.detach().norm())


def test_dual_averaging_finds_the_saddle_point_that_descent_circles():
    assert played(lambda p: torch.optim.SGD(p, lr=0.3), 200) > 100
    assert played(lambda p: OptimisticDualAveraging(p, lr=0.3, adaptive=False), 200) < 1e-2
    assert played(lambda p: OptimisticDualAveraging(p, lr=1.0), 400) < 1e-2


def test_dual_averaging_learns_with_noise():
    torch.manual_seed(0)
    wanted = torch.randn(20)
    x = torch.zeros(20, requires_grad=True)
    optimizer = OptimisticDualAveraging([x], lr=5.0)
    for _ in range(600):
        optimizer.zero_grad()
        loss = optimizer.step(lambda: _noisy(x, wanted))
    assert loss is not None
    assert float((x.detach() - wanted).norm() / wanted.norm()) < 0.1
    with pytest.raises(PlanError, match="above 0, got 0"):
        OptimisticDualAveraging([x], lr=0.0)


def _noisy(x: Tensor, wanted: Tensor) -> Tensor:
    loss = 0.5 * (x - wanted).square().sum()
    loss.backward()
    assert x.grad is not None
    x.grad += 0.1 * torch.randn(20)
    return loss.detach()
