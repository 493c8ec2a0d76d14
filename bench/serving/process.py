"""A server in a process of its own, and what it costs."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

ROOT = Path(__file__).resolve().parent.parent.parent
START_SECONDS = 600.0


@dataclass
class Server:
    """One running ``adalayer serve``."""

    process: subprocess.Popen[str]
    port: int

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body."""
        return self._open(Request(f"http://127.0.0.1:{self.port}{path}"))

    def post(self, path: str, data: bytes) -> tuple[int, bytes]:
        """Status and body."""
        return self._open(Request(f"http://127.0.0.1:{self.port}{path}", data, method="POST"))

    @staticmethod
    def _open(request: Request) -> tuple[int, bytes]:
        try:
            with urlopen(request, timeout=300) as answer:
                return answer.status, answer.read()
        except HTTPError as error:
            with error:
                return error.code, error.read()

    def metric(self, name: str) -> float:
        """A metric, summed over its labels."""
        text = self.get("/metrics")[1].decode()
        rows = re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE)
        return sum(float(row) for row in rows)

    def processes(self) -> dict[int, str]:
        """The server and everything that it started: process number and title."""
        parents: dict[int, tuple[int, str]] = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                title = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            except (OSError, UnicodeDecodeError):
                continue
            parents[int(entry.name)] = parent, title
        found: dict[int, str] = {}
        for pid, (_, title) in parents.items():
            above = pid
            while above in parents and above != self.process.pid:
                above = parents[above][0]
            if above == self.process.pid:
                found[pid] = title
        return found

    def replicas(self) -> list[int]:
        """Process numbers of the replicas."""
        return [p for p, title in self.processes().items() if title.startswith("ray::ServeReplica")]

    def memory(self) -> dict[str, int]:
        """Bytes that belong to the server's own process and to its replicas alone."""
        front = _private(self.process.pid)
        return {"front": front, "replicas": sum(_private(pid) for pid in self.replicas())}

    def wait_replicas(self, count: int, seconds: float = START_SECONDS) -> None:
        """Wait until so many replicas are connected."""
        deadline = time.monotonic() + seconds
        while self.metric("adalayer_replicas") != count:
            if time.monotonic() > deadline:
                raise TimeoutError(f"not {count} replicas within {seconds:g} s")
            time.sleep(0.2)


def _private(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:  # it has just ended
        return 0
    rows = re.findall(r"^Private_(?:Clean|Dirty): +(\d+) kB$", text, re.MULTILINE)
    return 1024 * sum(int(row) for row in rows)


@contextmanager
def serving(model: Path, *options: str, name: str = "net") -> Iterator[Server]:
    """``adalayer serve MODEL`` on a free port of loopback, ended with SIGTERM."""
    command = [sys.executable, "-c", "from adalayer_native.cli import main; main()", "serve"]
    command += [f"{name}={model}", "--port", "0", *options]
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    ) as process:
        try:
            yield Server(process, _port(process))
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            code = process.wait(180)
    if code != 0:
        raise RuntimeError(f"the server ended with {code}")


def _port(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    readable, _, _ = select.select([process.stdout], [], [], START_SECONDS)
    line = process.stdout.readline() if readable else ""
    match = re.search(r" at http://[^:]+:(\d+)$", line.strip())
    if match is None:
        raise RuntimeError(f"the server did not start: {line!r}")
    return int(match[1])


def upload(server: Server, data: bytes, name: str = "net", version: str = "1") -> int:
    """Load a model from bytes; the status."""
    import base64

    text = base64.b64encode(data).decode()
    body = {"parameters": {"config": "{}", f"file:{version}/model.ada": text}}
    return server.post(f"/v2/repository/models/{name}/load", json.dumps(body).encode())[0]
