"""What needs Ray itself: layers scored by several processes, and the command `adalayer serve`."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from helpers_models import batches, tiny

import adalayer_native as ada

pytestmark = pytest.mark.slow

pytest.importorskip("ray", reason="needs the extra [serve]")


# In a process of its own, because Ray leaves sockets and threads in its driver.
SERIAL_AND_SHARED = """
import pathlib
import sys

import torch
from helpers_models import batches, tiny

import adalayer_native as ada
from adalayer_native._ray import connect


def squared_error(output, target):
    return (output - target).square().mean()


def error_of(**options):
    try:
        ada.analyze(extreme, [1e5 * batches(1)[0][0].abs()], progress=False, **options)
    except ada.CalibrationError as error:
        return str(error)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, compared = pathlib.Path(sys.argv[1]), 0
    assert connect(None, 2)  # one cluster for all
    model, data, unlabelled = tiny().train(), batches(3), batches(2, labels=False)
    serial = ada.analyze(model, data, progress=False)
    assert ada.analyze(model, data, progress=False, workers=2).to_json() == serial.to_json()
    assert model.training
    compared += 1
    # A criterion that gets all layers from one pass, a loss of our own, data without labels, and a
    # cache that holds a part. (Each process costs seconds: it imports torch.)
    for criterion, loss, workers in (
        ("gradient", squared_error, 3),  # more than there are CPUs
        ("accuracy", None, 2),
        ("weight_error", None, 1),
    ):
        options = {"criterion": criterion, "loss_fn": loss, "progress": False}
        serial = ada.analyze(model, unlabelled, **options)
        cache = folder / f"{criterion}.json"
        ada.analyze(model, unlabelled, batches=1, cache=cache, **options)
        assert ada.analyze(model, unlabelled, workers=workers, cache=cache, **options) == serial
        assert ada.analyze(model, unlabelled, cache=cache, **options) == serial
        compared += 1
    extreme = tiny()
    with torch.no_grad():
        extreme.fc.weight[0, :2] = torch.tensor([1e30, 3e38])
    message = error_of()
    assert message is not None and error_of(workers=1) == message
    # Ray's processes were started without this module's folder.
    far = folder / "far"
    far.mkdir()
    (far / "elsewhere.py").write_text(
        "from torch import nn\\nclass Net(nn.Linear): pass\\n"
        "def loss(output, target): return (output - target).square().mean()\\n"
    )
    sys.path.insert(0, str(far))
    import elsewhere

    # The processes get the captured graph, which needs no code of the model's.
    net, few = elsewhere.Net(3, 2), [torch.rand(2, 3)]
    serial = ada.analyze(net, few, progress=False)
    assert ada.analyze(net, few, progress=False, workers=1) == serial
    compared += 1
    try:
        ada.analyze(net, few, elsewhere.loss, progress=False, workers=1)
    except ada.AdaError as error:
        assert "elsewhere" in str(error) and "every machine can import" in str(error)
        compared += 1
    print("compared", compared)
"""


def test_analyze_has_the_same_numbers(tmp_path: Path):
    script = tmp_path / "shared.py"
    script.write_text(SERIAL_AND_SHARED, encoding="utf-8")
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # Ray may print a last word of its own.
    assert "compared 6" in done.stdout.splitlines(), done.stdout


def test_workers_are_checked():
    with pytest.raises(ValueError, match="workers: expected at least 1"):
        ada.analyze(tiny(), batches(1), workers=0)


class Client:
    """A keep-alive connection that asks one question."""

    def __init__(self, port: int, x: np.ndarray) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        tensor = {
            "name": "x",
            "shape": list(x.shape),
            "datatype": "FP32",
            "data": x.ravel().tolist(),
        }
        self._body = json.dumps({"inputs": [tensor]})

    def ask(self) -> np.ndarray:
        self._connection.request("POST", "/v2/models/tiny/infer", self._body)
        answer = self._connection.getresponse()
        data = json.loads(answer.read())
        assert answer.status == 200, data
        (output,) = data["outputs"]
        return np.array(output["data"], np.float32).reshape(output["shape"])

    def close(self) -> None:
        self._connection.close()


def replicas_of(server: int) -> list[int]:
    """Processes of Ray Serve replicas below a server's."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            name = (entry / "cmdline").read_bytes()
            parents, pid = [], int(entry.name)
            while pid > 1 and len(parents) < 10:
                pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
                parents.append(pid)
        except OSError:
            continue
        if name.startswith(b"ray::ServeReplica:") and server in parents:
            found.append(int(entry.name))
    return found


def test_serve_command(tmp_path: Path):
    """Start, answer, lose a replica under load, drain."""
    from helpers_serve_model import write_model

    path = write_model(tmp_path / "tiny.ada")
    engine = ada.load(path)
    command = [sys.executable, "-c", "from adalayer_native.cli import main; main()", "serve"]
    command += [str(path), "--port", "0", "--replicas", "2", "--threads", "1", "--timeout", "60"]
    # The folder of Ray's sockets: their names may have 107 characters.
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            match = re.fullmatch(r"serving tiny:1 at http://127\.0\.0\.1:(\d+)\n", line)
            assert match is not None, line
            port = int(match[1])
            answered, wrong, errors = [0], [0], []
            stop = threading.Event()

            def work(seed: int) -> None:
                x = np.random.default_rng(seed).normal(size=(1 + seed % 2, 3, 8, 8))
                x = x.astype(np.float32)
                wanted, client = engine.run(x), Client(port, x)
                try:
                    while not stop.is_set():
                        got = client.ask()
                        answered[0] += 1
                        wrong[0] += not np.array_equal(got, wanted)
                except Exception as error:
                    errors.append(error)
                finally:
                    client.close()

            threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
            for thread in threads:
                thread.start()
            deadline = time.monotonic() + 60
            while len(victims := replicas_of(server.pid)) < 2:
                assert time.monotonic() < deadline
                time.sleep(0.2)
            os.kill(victims[0], signal.SIGKILL)
            before = answered[0]
            while answered[0] < before + 50:
                assert time.monotonic() < deadline + 60 and not errors, errors
                time.sleep(0.1)
            stop.set()
            for thread in threads:
                thread.join(60)
            assert not errors and wrong == [0] and answered[0] > 50
        finally:
            server.send_signal(signal.SIGTERM)
            assert server.wait(120) == 0
    assert replicas_of(server.pid) == []
