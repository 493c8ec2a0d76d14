"""The parts of the soak run that decide: the pace of its questions, and what it calls growth."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="needs the extra [serve]")
pytest.importorskip("prometheus_client", reason="needs the extra [serve]")
pytest.importorskip("orjson", reason="needs the extra [serve]")
pytest.importorskip("matplotlib", reason="draws")

from helpers_serve import running
from helpers_serve_model import write_model

import adalayer_native as ada
from adalayer_native.serve.settings import ModelSource
from bench.serving.client import load, question
from bench.serving.soak import Sample, growth, picture


def test_growth_compares_thirds():
    assert growth([9, 1, 2, 2, 2, 2]) == 0
    assert growth([9, 9, 2, 2, 3, 3]) == 0.5
    assert growth([9, 1, 7, 3]) == 2  # of four, a third is one
    assert math.isnan(growth([1, 1]))


def test_the_picture_is_one():
    samples = [Sample(k / 10, 10**8 + k, 2 * 10**8, 50.0, 2.0, 4.0) for k in range(5)]
    assert picture(samples, "title").startswith(b"\x89PNG")


def test_questions_keep_the_pace(tmp_path: Path):
    path = write_model(tmp_path / "tiny.ada")
    x = np.random.default_rng(0).normal(size=(1, 3, 8, 8)).astype(np.float32)
    asked = question(x, ada.load(path).run(x), model="tiny")
    with running([ModelSource("tiny", "1", path)]) as server:
        counts, seconds = asyncio.run(load(server.port, [asked], 4, 1.0, rate=40.0))
        assert counts.perfect and 20 <= counts.sent <= 40
        assert seconds >= 0.9
        unpaced, _ = asyncio.run(load(server.port, [asked], 4, 0.5))
        assert unpaced.perfect and unpaced.sent > 10
