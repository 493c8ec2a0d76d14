"""Forced instruction sets beside OpenVINO int8 capped to them; see isa_worker.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from adalayer_native import ops
from bench.conftest import Bench
from bench.interleave import Comparison
from bench.networks import NETWORKS
from bench.record import Target

# Our name, oneDNN's name, wanted speed over the capped peer.
CAPS = {
    "avx512vnni": ("AVX512_CORE_VNNI", 1.1),
    "avx512": ("AVX512_CORE", 1.0),
    "avx2": ("AVX2", 1.0),
}
PEERS = ("openvino int8 capped", "openvino f32 capped")
ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("isa", CAPS)
def test_capped(bench: Bench, isa: str, name: str) -> None:
    if isa not in ops.isas():
        pytest.skip(f"this machine has no {isa}")
    cap, wanted = CAPS[isa]
    command = [sys.executable, "-m", "bench.isa_worker", name, isa, "2", str(5 * bench.scale)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": cap},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    comparison = Comparison.from_dict(json.loads(done.stdout.splitlines()[-1]))
    bench.keep(comparison, [Target(f"ours {isa}", PEERS, wanted)])
