"""A model on two hosts of a Ray cluster; one of them is switched off under load.

    sudo python -m bench.serving.cluster

The second host is a network namespace of this machine, with an address and a Ray node of its own,
so this needs Linux, root and the command ``ip``. The front and Ray's head run outside of it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from bench.engines import engine
from bench.networks import network
from bench.serving.client import Counts, load, question
from bench.serving.process import serving

HERE, THERE, PORT = "10.213.77.1", "10.213.77.2", 6390
RAY = str(Path(sys.executable).with_name("ray"))


class Host:
    """A network namespace, and a wire to it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._far = f"{name}-far"
        self._ip("netns", "add", name)

    def connect(self) -> None:
        """Addresses ``HERE`` outside, ``THERE`` inside."""
        self._ip("link", "add", self.name, "type", "veth", "peer", "name", self._far)
        self._ip("link", "set", self._far, "netns", self.name)
        self._ip("addr", "add", f"{HERE}/30", "dev", self.name)
        self._ip("link", "set", self.name, "up")
        self._ip("-n", self.name, "addr", "add", f"{THERE}/30", "dev", self._far)
        for device in (self._far, "lo"):
            self._ip("-n", self.name, "link", "set", device, "up")

    @staticmethod
    def _ip(*arguments: str) -> str:
        return subprocess.run(
            ["ip", *arguments], check=True, text=True, stdout=subprocess.PIPE
        ).stdout

    def processes(self) -> dict[int, str]:
        """Process numbers and titles of whatever runs on it."""
        found = {}
        for pid in map(int, self._ip("netns", "pids", self.name).split()):
            try:
                found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
            except OSError:  # it has just ended
                continue
        return found

    def switch_off(self) -> int:
        """SIGKILL to all of them; how many there were."""
        victims = list(self.processes())
        for pid in victims:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        return len(victims)

    def remove(self) -> None:
        """Nothing of it is left."""
        self.switch_off()
        self._ip("netns", "del", self.name)


@contextmanager
def cluster(folder: Path) -> Iterator[Host]:
    """A Ray node with one CPU here, and one on another host."""
    if os.geteuid() != 0:
        raise SystemExit("a network namespace needs root")
    os.environ["RAY_AUTH_MODE"] = "token"
    start = [RAY, "start", "--block", "--num-cpus", "1", "--disable-usage-stats"]
    with ExitStack() as stack:
        host = Host(f"ada{os.getpid()}")
        stack.callback(host.remove)
        host.connect()
        nodes = {
            "here": [*start, "--head", "--node-ip-address", HERE, "--port", str(PORT),
                     "--include-dashboard=false"],
            "there": ["ip", "netns", "exec", host.name, *start, "--node-ip-address", THERE,
                      "--address", f"{HERE}:{PORT}"],
        }  # fmt: skip
        for name, command in nodes.items():
            (folder / name).mkdir()
            node = subprocess.Popen(
                command,
                env={**os.environ, "RAY_TMPDIR": str(folder / name)},
                stdout=subprocess.DEVNULL,
            )
            stack.callback(_end, node)
            if name == "here":
                _wait_for_port(node)
        yield host


def _wait_for_port(node: subprocess.Popen[bytes], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((HERE, PORT), 1).close()
            return
        except OSError:
            if node.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _end(node: subprocess.Popen[bytes]) -> None:
    """SIGTERM, on which a Ray node ends all that it started."""
    if node.poll() is None:
        node.terminate()
    node.wait(60)


def main() -> int:
    """Exit status 1 where an answer was lost or wrong, or no host died."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0, help="of load")
    parser.add_argument("--clients", type=int, default=8)
    asked = parser.parse_args()
    compiled, source = engine("resnet20", 8), network("resnet20")
    questions = []
    for seed in range(16):
        x = source.images(1, seed).numpy()
        questions.append(question(x, np.array(compiled.run(x))))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        compiled.save(folder / "net.ada")
        with cluster(folder) as host:
            options = ["--address", f"{HERE}:{PORT}", "--replicas", "2", "--threads", "1"]
            with serving(folder / "net.ada", *options) as server:
                server.wait_replicas(2)
                remote = sum("ServeReplica" in title for title in host.processes().values())

                async def run() -> tuple[Counts, int]:
                    loading = asyncio.create_task(
                        load(server.port, questions, asked.clients, asked.seconds)
                    )
                    await asyncio.sleep(asked.seconds / 3)
                    killed = await asyncio.to_thread(host.switch_off)
                    counts, _ = await loading
                    return counts, killed

                counts, killed = asyncio.run(run())
                left = server.metric("adalayer_replicas")
    good = counts.perfect and remote == 1 and killed > 0 and left >= 1
    print(
        f"{'ok  ' if good else 'FAIL'} cluster: {counts.line()}; replicas on the other host "
        f"{remote}, processes killed there {killed}, replicas left {left:.0f}"
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
