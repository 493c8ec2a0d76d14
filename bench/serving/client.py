"""Clients that keep their connections and check every answer."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from adalayer_native.engine import Engine
from bench.networks import Network

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Question:
    """A request's bytes, and the tensor that has to come back.

    ``tolerance`` is relative to the tensor's largest value: 0 for the engine, whose bits do not
    depend on what shares a batch; float runtimes choose other kernels for other batches.
    """

    request: bytes
    answer: Array
    tolerance: float = 0.0

    def fits(self, got: Array) -> bool:
        """Whether an answer is right."""
        if self.tolerance == 0.0:
            return np.array_equal(got, self.answer.reshape(-1))
        largest = float(np.abs(self.answer).max())
        same = got.shape == self.answer.reshape(-1).shape
        return same and float(np.abs(got - self.answer.reshape(-1)).max()) <= (
            self.tolerance * largest
        )


@dataclass
class Counts:
    """What a run did.

    Attributes:
        sent: requests written.
        answered: answers with status 200.
        wrong: of these, with another tensor than expected.
        refused: answers 503.
        failed: other answers, and connections that ended.
        seconds: of every answer with status 200.
        first: the first failure in words.
    """

    sent: int = 0
    answered: int = 0
    wrong: int = 0
    refused: int = 0
    failed: int = 0
    seconds: list[float] = field(default_factory=list)
    first: str = ""

    def line(self) -> str:
        """For a report."""
        text = (
            f"sent {self.sent}, answered {self.answered}, wrong {self.wrong}, "
            f"refused {self.refused}, failed {self.failed}"
        )
        return text + (f" ({self.first})" if self.first else "")

    def fail(self, why: str) -> None:
        """Count a request that was not answered."""
        self.failed += 1
        self.first = self.first or why

    def percentile(self, share: float) -> float:
        """Milliseconds."""
        return 1e3 * float(np.quantile(self.seconds, share)) if self.seconds else float("nan")

    def add(self, other: Counts) -> None:
        """Add what another run did, but for its times."""
        self.sent += other.sent
        self.answered += other.answered
        self.wrong += other.wrong
        self.refused += other.refused
        self.failed += other.failed
        self.first = self.first or other.first

    @property
    def perfect(self) -> bool:
        """Something was asked, and everything was answered rightly."""
        return self.answered == self.sent > 0 and self.wrong == 0


def question(x: Array, answer: Array, *, model: str = "net", tolerance: float = 0.0) -> Question:
    """Tensor ``x`` as bytes, the output as bytes."""
    head = {
        "inputs": [
            {
                "name": "x",
                "shape": list(x.shape),
                "datatype": "FP32",
                "parameters": {"binary_data_size": x.nbytes},
            }
        ],
        "outputs": [{"name": "output", "parameters": {"binary_data": True}}],
    }
    text = json.dumps(head).encode()
    top = (
        f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: localhost\r\n"
        f"Inference-Header-Content-Length: {len(text)}\r\n"
        f"Content-Length: {len(text) + x.nbytes}\r\n\r\n"
    )
    return Question(top.encode() + text + x.tobytes(), answer, tolerance)


def questions_of(compiled: Engine, source: Network) -> list[Question]:
    """Sixteen questions to an engine, of one and of two images, with its answers."""
    questions = []
    for seed in range(16):
        x = source.images(1 + seed % 2, seed).numpy()
        questions.append(question(x, np.array(compiled.run(x))))
    return questions


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the next answer."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {}
    for row in head[1:]:
        key, _, value = row.partition(":")
        headers[key.strip().lower()] = value.strip()
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return int(head[0].split()[1]), headers, body


def tensor_of(headers: dict[str, str], body: bytes) -> Array:
    """The one binary output of an answer."""
    return np.frombuffer(body, np.float32, offset=int(headers["inference-header-content-length"]))


async def _client(
    port: int,
    questions: Sequence[Question],
    first: int,
    until: float,
    counts: Counts,
    due: float,
    pause: float,
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    turn = first
    try:
        while True:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            if time.monotonic() >= until:
                return
            due += pause
            asked = questions[turn % len(questions)]
            turn += 1
            start = time.perf_counter()
            counts.sent += 1
            writer.write(asked.request)
            await writer.drain()
            status, headers, body = await read_answer(reader)
            if status == 503:
                counts.refused += 1
            elif status != 200:
                counts.fail(f"{status}: {body[:200]!r}")
            else:
                counts.answered += 1
                counts.seconds.append(time.perf_counter() - start)
                counts.wrong += not asked.fits(tensor_of(headers, body))
    except (OSError, asyncio.IncompleteReadError) as error:
        counts.fail(f"{type(error).__name__}: {error}")
    finally:
        writer.close()


async def load(
    port: int,
    questions: Sequence[Question],
    clients: int,
    seconds: float,
    *,
    rate: float = math.inf,
) -> tuple[Counts, float]:
    """Ask from so many connections for a time; what happened, and how long it took.

    Args:
        rate: requests per second of all connections together; by default each asks again as soon
            as it has its answer.
    """
    counts = Counts()
    start = time.monotonic()
    pause = clients / rate
    await asyncio.gather(
        *(
            _client(port, questions, first, start + seconds, counts, start + first / rate, pause)
            for first in range(clients)
        )
    )
    return counts, time.monotonic() - start
