"""Peak memory of a piece of work, in a process of its own.

``python -m adalayer_native.study.memory '{"mode": …}'`` prints how many bytes the resident memory
grew beyond what it was before the work, as one JSON number, or ``null`` where Linux does not say.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["peak_bytes"]

RUNS = 5


def peak_bytes(job: Mapping[str, Any]) -> int | None:
    """Run a job in a fresh process.

    Args:
        job: ``{"mode": "engine", "file": path of an .ada file}``, ``{"mode": "float", "network":
            name, "classes": n, "weights": path}`` (five images one by one), or ``{"mode": "train",
            "blocks": n, "classes": n, "configuration": name, "fixed": bits, "batch": n}`` (three
            steps).

    Returns:
        Bytes, or ``None`` if the machine does not say or the process fails.
    """
    package = str(Path(__file__).resolve().parents[2])
    known = os.environ.get("PYTHONPATH")
    environment = {**os.environ, "PYTHONPATH": f"{package}:{known}" if known else package}
    done = subprocess.run(
        [sys.executable, "-m", "adalayer_native.study.memory", json.dumps(job)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        return None
    return found if isinstance(found, int) else None


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {key}")


def _growth(job: Mapping[str, Any]) -> int | None:
    import torch

    import adalayer_native as ada

    torch.set_num_threads(1)
    ada.set_num_threads(1)
    work = {"engine": _engine, "float": _float, "train": _train}[job["mode"]]
    try:
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak so far
        work(job)
        return max(0, _status("VmHWM") - before)
    except OSError:
        return None


def _engine(job: Mapping[str, Any]) -> None:
    import torch

    import adalayer_native as ada

    engine = ada.load(job["file"])
    x = torch.zeros(1, *engine.inputs[0].shape)
    for _ in range(RUNS):
        engine(x)


def _float(job: Mapping[str, Any]) -> None:
    import torch

    from adalayer_native.models import get_model, load_weights

    model = load_weights(get_model(job["network"], job["classes"]), job["weights"])
    x = torch.zeros(1, 3, job["size"], job["size"])
    with torch.inference_mode():
        for _ in range(RUNS):
            model(x)


def _train(job: Mapping[str, Any]) -> None:
    import torch

    from adalayer_native.study.configurations import configuration, network
    from adalayer_native.study.training import prepared_of, train

    x = torch.randn(job["batch"], 3, job["size"], job["size"])
    data = [(x, torch.arange(job["batch"]) % job["classes"])]
    chosen = configuration(job["configuration"], job["fixed"])
    model = prepared_of(network(job["blocks"], job["classes"], 0), chosen, data)
    train(model, chosen, data * 3, 1, lr=1e-3, progress=False)


if __name__ == "__main__":
    print(json.dumps(_growth(json.loads(sys.argv[1]))))
