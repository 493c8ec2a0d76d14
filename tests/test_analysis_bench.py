"""bench/analysis.py and bench/latency_budget.py, and an analysis that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers_models import batches, tiny
from torch import nn

from adalayer_native import capture, ops
from adalayer_native.importance import analyze
from bench import analysis, latency_budget
from bench.images import structured_images

SLOWLY = """
import sys, time
from helpers_models import batches, tiny
from adalayer_native.importance import analyze
import importlib
module = importlib.import_module("adalayer_native.importance.analyze")
sys.modules["adalayer_native._json_cache"].SAVE_INTERVAL = 0.0

class Slowly:
    def __iter__(self):
        for index, batch in enumerate(batches(6)):
            if index == 3:
                print("three", flush=True)
                time.sleep(600)
            yield batch

analyze(tiny(), Slowly(), cache=sys.argv[1], progress=False)
"""


def test_a_killed_analysis_goes_on(tmp_path: Path, monkeypatch) -> None:
    cache = tmp_path / "analysis.json"
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", SLOWLY, str(cache)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"three\n"
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert analysis.kept_entries(cache) == 3 * 3
    model, calls = capture(tiny(), batches(1)[0][0]), []
    original = nn.Conv2d.forward
    monkeypatch.setattr(
        nn.Conv2d, "forward", lambda self, x: (calls.append(x.shape[0]), original(self, x))[1]
    )
    resumed = analyze(model, batches(6), cache=cache, progress=False)
    # Three batches alone, and perhaps the float loss of the last one before.
    each = 2 + 2 + 3
    assert 3 * each <= len([size for size in calls if size > 1]) <= 3 * each + 2
    monkeypatch.undo()
    assert resumed == analyze(model, batches(6), progress=False)
    assert not list(tmp_path.glob("*.tmp"))


def test_images_have_structure_and_repeat() -> None:
    images = structured_images(4, 32)
    assert images.shape == (4, 3, 32, 32) and bool(torch.isfinite(images).all())
    assert torch.equal(images, structured_images(4, 32))
    assert not torch.equal(images, structured_images(4, 32, seed=1))
    # Neighbours are alike, as they are not in white noise.
    steps = (images[..., 1:] - images[..., :-1]).abs().mean()
    assert float(steps) < 0.5 * float(images.std())
    loader = analysis.Images(10, 16, 4)
    assert len(loader) == 3
    sizes = [len(y) for _, y in loader]
    assert sizes == [4, 4, 2]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(loader, loader, strict=True))


def test_an_analysis_is_timed_and_its_memory_named(capsys, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        code = analysis.main(
            ["--network", "resnet20", "--images", "6", "--batch", "4", "--threads", "1",
             "--cache", str(tmp_path / "a.json"), "--no-progress"]
        )  # fmt: skip
    finally:
        torch.set_num_threads(before)
    lines = capsys.readouterr().out.splitlines()
    assert code == int(analysis.peak_bytes() > 4e9)
    assert lines[0] == "analysis of resnet20, 6 images, 1 threads"
    assert lines[1].startswith("wall time ") and "at most 360 s" in lines[1]
    assert lines[2].startswith("peak resident memory ")
    assert analysis.kept_entries(tmp_path / "a.json") == 2 * 20
    assert json.loads((tmp_path / "a.json").read_text())["batches"]


def test_calls_are_timed_in_turn() -> None:
    called: list[str] = []
    engines = {
        name: (lambda _, name=name, pause=pause: (called.append(name), time.sleep(pause)))
        for name, pause in (("slow", 0.004), ("fast", 0.0))
    }
    found = latency_budget.in_turn(engines, torch.zeros(1), 0.05)
    assert found["slow"] >= 4.0 > found["fast"]
    each = latency_budget.WARM + latency_budget.CALLS
    assert called[:each] == ["slow"] * each and called[each : 2 * each] == ["fast"] * each


def test_outcomes_are_judged() -> None:
    met = latency_budget.Outcome(1.0, 0.98, 1.09, 3, 4.0)
    missed = latency_budget.Outcome(1.0, 0.98, 1.11, 3, 4.0)
    assert met.met and met.cells()[-1] == "met" and met.cells()[3] == "+9.0 %"
    assert not missed.met and missed.cells()[-1] == "**missed**"
    assert latency_budget.Outcome(1.0, why="no").cells()[-1] == "no"


@pytest.mark.slow
@pytest.mark.skipif(ops.isas() == ["scalar"], reason="the interpreter has no profile")
def test_latency_budgets_end_to_end(capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = torch.get_num_threads(), ops.get_num_threads()
    try:
        latency_budget.main(
            ["--network", "adalayernet", "--images", "8", "--shares", "0.8", "0.01",
             "--seconds", "0.5", "--tables", str(tmp_path)]
        )  # fmt: skip
    finally:
        torch.set_num_threads(before[0])
        ops.set_num_threads(before[1])
    out = capsys.readouterr().out
    assert "8 bits everywhere" in out and "smallest reachable latency is" in out
