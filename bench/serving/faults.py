"""What goes wrong at a server, on purpose, on loopback; every scenario has a bounded duration.

    python -m bench.serving.faults                       # all, a few minutes
    python -m bench.serving.faults --only kill,upload --seconds 60

Each prints requests sent, answered and wrong, and what it did; one that did nothing has failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.engines import engine
from bench.networks import network
from bench.serving.client import Counts, Question, load, questions_of, read_answer, tensor_of
from bench.serving.process import Server, serving, upload

MAX_BODY = 8 << 20
BODY_SECONDS = 30.0  # the server's default


@dataclass
class Setting:
    """What a scenario works on."""

    server: Server
    questions: list[Question]
    model: Path
    seconds: float
    clients: int
    replicas: int


def report(name: str, good: bool, counts: Counts, extra: str) -> bool:
    """One line per scenario."""
    print(f"{'ok  ' if good else 'FAIL'} {name}: {counts.line()}; {extra}", flush=True)
    return good


def kill(setting: Setting) -> bool:
    """SIGKILL to one replica after the other, under load."""
    server, kills = setting.server, 0
    server.wait_replicas(setting.replicas)
    before = server.metric("adalayer_resent_requests_total")

    async def run() -> tuple[Counts, float]:
        nonlocal kills
        loading = asyncio.create_task(
            load(server.port, setting.questions, setting.clients, setting.seconds)
        )
        until = time.monotonic() + setting.seconds - 2
        await asyncio.sleep(1)
        while time.monotonic() < until:
            victims = await asyncio.to_thread(server.replicas)
            connected = await asyncio.to_thread(server.metric, "adalayer_replicas")
            # The next one falls when the last one's successor serves.
            if victims and connected == setting.replicas:
                os.kill(random.choice(victims), signal.SIGKILL)
                kills += 1
            await asyncio.sleep(1)
        return await loading

    counts, _ = asyncio.run(run())
    resent = server.metric("adalayer_resent_requests_total") - before
    good = counts.perfect and kills > 0 and resent > 0
    return report("kill", good, counts, f"kills {kills}, resent {resent:.0f}")


def corrupt_upload(setting: Setting) -> bool:
    """Damaged files in the place of the model, under load; then the right one again."""
    server, data = setting.server, setting.model.read_bytes()
    draw = random.Random(0)
    refused, replaced, bad = 0, 0, 0

    def damaged() -> bytes:
        kind = draw.randrange(3)
        if kind == 0:
            return data[: draw.randrange(len(data))]
        if kind == 1:
            return draw.randbytes(draw.randrange(1, 1 << 16))
        changed = bytearray(data)
        changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        return bytes(changed)

    async def run() -> tuple[Counts, float]:
        nonlocal refused, replaced, bad
        loading = asyncio.create_task(
            load(server.port, setting.questions, setting.clients, setting.seconds)
        )
        until = time.monotonic() + setting.seconds
        while time.monotonic() < until or not replaced:
            status = await asyncio.to_thread(upload, server, damaged())
            refused += status == 400
            bad += status != 400
            replaced += await asyncio.to_thread(upload, server, data) == 200
        return await loading

    counts, _ = asyncio.run(run())
    good = counts.perfect and refused > 0 and replaced > 0 and bad == 0
    return report(
        "upload", good, counts, f"damaged refused {refused}, accepted {bad}, replaced {replaced}"
    )


def slow_clients(setting: Setting) -> bool:
    """Clients that send a byte per second, or stop in the middle, beside ordinary ones."""
    server, cut = setting.server, Counts()

    async def slow(whole: bytes, start: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        cut.sent += 1
        try:
            writer.write(whole[:start])
            ended = asyncio.create_task(reader.read(1 << 16))
            for at in range(start, start + int(BODY_SECONDS) + 15):
                if ended.done():
                    break
                writer.write(whole[at : at + 1])
                await asyncio.sleep(1)
            answer = await asyncio.wait_for(ended, 1)
            cut.answered += answer == b"" or answer.startswith(b"HTTP/1.1 408")
        except (OSError, asyncio.TimeoutError) as error:
            if isinstance(error, ConnectionError):
                cut.answered += 1
            else:
                cut.fail("a slow client was never cut off")
        finally:
            writer.close()

    async def run() -> tuple[Counts, float]:
        asked = setting.questions[0].request
        inside = asked.index(b"\r\n\r\n") + 100
        slows = [slow(asked, start) for start in (20, inside) for _ in range(25)]
        seconds = max(setting.seconds, BODY_SECONDS + 15)
        others = asyncio.gather(*slows)
        result = await load(server.port, setting.questions, setting.clients, seconds)
        await others
        return result

    counts, _ = asyncio.run(run())
    good = counts.perfect and cut.answered == cut.sent > 0
    return report("slow", good, counts, f"slow clients {cut.sent}, cut off {cut.answered}")


def bad_requests(setting: Setting) -> bool:
    """Oversized bodies, malformed JSON and wrong shapes, beside ordinary requests."""
    server, draw = setting.server, random.Random(1)
    x = {"name": "x", "datatype": "FP32", "data": [0.0]}
    shapes: list[object] = [[1], [0, 3, 8, 8], [1, 3, 1, 1], [2**40, 3, 8, 8], "wide", [-1], None]
    texts = [b"", b"{", b"[]", b"null", b'{"inputs": 1}', b"[" * 5000, b"\xff" * 100]
    texts += [json.dumps({"inputs": [{**x, "shape": shape}]}).encode() for shape in shapes]
    found: dict[str, int] = {}

    def ask(kind: str, body: bytes, wanted: set[int]) -> bool:
        try:
            status, _ = server.post("/v2/models/net/infer", body)
        except OSError:  # cut off while it was sending, which a body without end deserves
            status = 0
        found[kind] = found.get(kind, 0) + 1
        return status in wanted

    async def run() -> tuple[Counts, float, int]:
        loading = asyncio.create_task(
            load(server.port, setting.questions, setting.clients, setting.seconds)
        )
        until, wrong = time.monotonic() + setting.seconds, 0
        while time.monotonic() < until:
            right = await asyncio.to_thread(ask, "malformed", draw.choice(texts), {400})
            wrong += not right
            text = bytes(draw.randrange(256) for _ in range(draw.randrange(300)))
            wrong += not await asyncio.to_thread(ask, "random", text, {400})
            if found.get("oversized", 0) < 20:
                large = bytes(MAX_BODY + 1)
                wrong += not await asyncio.to_thread(ask, "oversized", large, {413, 0})
        counts, seconds = await loading
        return counts, seconds, wrong

    counts, _, wrong = asyncio.run(run())
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(found.items()))
    good = counts.perfect and wrong == 0 and len(found) == 3
    return report("bad", good, counts, f"{kinds}, with another status than expected {wrong}")


def connections(setting: Setting) -> bool:
    """A thousand open connections, each of which asks twice."""
    server, number, counts = setting.server, 1000, Counts()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))

    async def one(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: Question
    ) -> None:
        while True:
            writer.write(asked.request)
            await writer.drain()
            status, headers, body = await read_answer(reader)
            if status == 503:  # the queue is full; the client comes again, as it is told to
                counts.refused += 1
                await asyncio.sleep(0.5)
                continue
            counts.sent += 1
            if status != 200:
                counts.fail(str(status))
            else:
                counts.answered += 1
                counts.wrong += not asked.fits(tensor_of(headers, body))
            return

    async def run() -> int:
        opened = [
            await asyncio.open_connection("127.0.0.1", server.port, limit=1 << 22)
            for _ in range(number)
        ]
        try:
            for _ in range(2):
                tasks = [
                    one(reader, writer, setting.questions[k % len(setting.questions)])
                    for k, (reader, writer) in enumerate(opened)
                ]
                await asyncio.wait_for(asyncio.gather(*tasks), 600)
        finally:
            for _, writer in opened:
                writer.close()
        return len(opened)

    count = asyncio.run(run())
    good = counts.perfect and counts.sent == 2 * number
    return report("connections", good, counts, f"connections {count}")


def drain(setting: Setting) -> bool:
    """SIGTERM under load: what was taken is answered. It comes last."""
    server, counts = setting.server, Counts()

    async def client(asked: Question) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1 << 22)
        try:
            while True:
                writer.write(asked.request)
                await writer.drain()
                try:
                    status, headers, body = await read_answer(reader)
                except (OSError, asyncio.IncompleteReadError) as error:
                    # Closed between two requests, before this one was looked at: HTTP's own race.
                    if isinstance(error, asyncio.IncompleteReadError) and error.partial:
                        counts.sent += 1
                        counts.fail("half an answer")
                    return
                counts.sent += 1
                if status != 200:
                    counts.fail(str(status))
                else:
                    counts.answered += 1
                    counts.wrong += not asked.fits(tensor_of(headers, body))
                if headers.get("connection", "") == "close":
                    return
        finally:
            writer.close()

    async def run() -> None:
        clients = [
            asyncio.create_task(client(setting.questions[k % len(setting.questions)]))
            for k in range(setting.clients)
        ]
        await asyncio.sleep(min(setting.seconds, 5))
        server.process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(asyncio.gather(*clients, return_exceptions=True), 120)

    asyncio.run(run())
    code = server.process.wait(120)
    good = counts.perfect and code == 0
    return report("drain", good, counts, f"exit status {code}")


SCENARIOS: dict[str, Callable[[Setting], bool]] = {
    "kill": kill,
    "upload": corrupt_upload,
    "slow": slow_clients,
    "bad": bad_requests,
    "connections": connections,
    "drain": drain,
}


def main() -> int:
    """Exit status 1 where any scenario failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(SCENARIOS), help="scenarios, by commas")
    parser.add_argument("--seconds", type=float, default=30.0, help="per scenario")
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--replicas", type=int, default=2)
    asked = parser.parse_args()
    chosen = asked.only.split(",")
    unknown = [name for name in chosen if name not in SCENARIOS]
    if unknown:
        parser.error(f"unknown scenario {unknown[0]!r}, expected {', '.join(SCENARIOS)}")
    compiled = engine(asked.network, asked.bits)
    questions = questions_of(compiled, network(asked.network))
    good = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "net.ada"
        compiled.save(model)
        options = ["--replicas", str(asked.replicas), "--threads", "1"]
        options += ["--max-body", str(MAX_BODY), "--timeout", "120"]
        with serving(model, *options) as server:
            setting = Setting(
                server, questions, model, asked.seconds, asked.clients, asked.replicas
            )
            for name in [n for n in SCENARIOS if n in chosen]:
                good.append(SCENARIOS[name](setting))
    return 0 if good and all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
