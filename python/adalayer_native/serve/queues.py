"""Queues, batches, and the connections of replicas, in the front's event loop."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import orjson

from . import wire
from .errors import ServeError
from .log import StrangersLog
from .metrics import ModelMetrics
from .quality import Quality
from .runner import Description, TensorInfo
from .settings import Settings
from .wire import Header, Kind

__all__ = ["Dispatcher", "Hub", "Job", "Lane"]

# Sent to this many replicas in vain, a request is likely to be what ends them.
MAX_ATTEMPTS = 3
MAX_HELLO = 4096
# Requests of other sizes that a batch is searched behind.
MAX_PASSED = 256
_FATAL = f"{MAX_ATTEMPTS} replicas ended while they had this request"

logger = logging.getLogger(__name__)


class Job:
    """One request on its way through a queue.

    Attributes:
        inputs: per input its bytes, in pieces as they came; one encoded image for images.
        count: samples.
        images: whether ``inputs`` is an encoded image.
        shapes: per input its sizes without the batch; None where they are the model's own.
        placing: of a detector's image, where it lies in what the network read.
        outputs: of the answer, where those are not the model's own.
        asked: level of quality; None leaves it to the server.
        level: that it was sent to.
        future: gets the bytes of every output.
        attempts: replicas that it was sent to.
        arrived: of the loop's clock.
        queued, sent: of the clock in nanoseconds, for statistics.
    """

    __slots__ = (
        "arrived",
        "asked",
        "attempts",
        "count",
        "future",
        "images",
        "inputs",
        "level",
        "outputs",
        "placing",
        "queued",
        "sent",
        "shapes",
        "timer",
    )

    def __init__(
        self,
        inputs: Sequence[Sequence[memoryview]],
        count: int,
        loop: asyncio.AbstractEventLoop,
        *,
        images: bool = False,
        shapes: tuple[tuple[int, ...], ...] | None = None,
        asked: int | None = None,
    ) -> None:
        self.inputs = inputs
        self.shapes = shapes
        self.asked = asked
        self.level = asked or 0
        self.outputs: tuple[TensorInfo, ...] | None = None
        self.placing: Any = None
        self.count = count
        self.images = images
        self.future: asyncio.Future[list[memoryview]] = loop.create_future()
        self.attempts = 0
        self.arrived = loop.time()
        self.queued = time.perf_counter_ns()
        self.sent = 0
        self.timer: asyncio.TimerHandle | None = None

    def fail(self, error: ServeError) -> None:
        """Answer with an error, unless it is answered."""
        if not self.future.done():
            self.future.set_exception(error)


class Dispatcher:
    """The queue of one loaded model version, and the lanes of its replicas.

    Args:
        key: names this deployment; replicas say it.
        app: the Ray Serve application of the replicas.
        model: reads the model file, for replicas.
    """

    def __init__(
        self,
        key: str,
        app: str,
        settings: Settings,
        metrics: ModelMetrics,
        model: Callable[[], bytes],
    ) -> None:
        self.key = key
        self.app = app
        self.model = model
        self.description: Description | None = None
        self.loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[Description] = self.loop.create_future()
        self.closing = False
        self.metrics = metrics
        self._settings = settings
        self._jobs: deque[Job] = deque()
        self._samples = 0
        self._lanes: set[Lane] = set()
        self._busy: dict[str, int] = {}  # batches per replica
        self._quality = Quality(1, settings.max_queue)  # until it is known how many there are
        self._wait: asyncio.TimerHandle | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    # -- requests ---------------------------------------------------------------------------------

    def submit(self, job: Job) -> asyncio.Future[list[memoryview]]:
        """Queue a request.

        Raises:
            ServeError: 503, the queue is full or the model is being removed.
        """
        if self.closing:
            raise ServeError(503, "this model version is being removed", retry_after=1)
        if len(self._jobs) >= self._settings.max_queue:
            self.metrics.rejected.inc()
            raise ServeError(
                503,
                f"{len(self._jobs)} requests are waiting for this model already",
                retry_after=1,
            )
        job.timer = self.loop.call_later(self._settings.timeout, self._late, job)
        job.future.add_done_callback(lambda _: job.timer.cancel() if job.timer else None)
        self._jobs.append(job)
        self._samples += job.count
        self._idle.clear()
        self._pump()
        return job.future

    def _late(self, job: Job) -> None:
        seconds = self._settings.timeout
        job.fail(ServeError(504, f"no answer within {seconds:g} s"))
        self._forget_done()

    def _forget_done(self) -> None:
        # Requests that ran out of time leave from the front, where the oldest are.
        while self._jobs and self._jobs[0].future.done():
            self._samples -= self._jobs.popleft().count
        self._set_idle()

    def _set_idle(self) -> None:
        self.metrics.queue.set(len(self._jobs))
        if not self._jobs and not any(self._busy.values()):
            self._idle.set()

    def _pump(self) -> None:
        """Give batches to free lanes."""
        while True:
            self._forget_done()
            if not self._jobs:
                return
            lane = self._free_lane()
            if lane is None:
                return
            wait = self._settings.batch_wait_ms / 1e3
            if wait > 0 and self._samples < self._settings.max_batch:
                left = self._jobs[0].arrived + wait - self.loop.time()
                if left > 0 and not self._jobs[0].attempts:
                    if self._wait is None:
                        self._wait = self.loop.call_later(left, self._waited)
                    return
            waiting = len(self._jobs)
            level = self._quality.update(waiting) if self._settings.degrade else 0
            self.metrics.level.set(level)
            self._send(lane, self._next_batch(level))

    def _waited(self) -> None:
        self._wait = None
        self._pump()

    def _free_lane(self) -> Lane | None:
        free = [lane for lane in self._lanes if not lane.batch]
        return min(free, key=lambda lane: self._busy.get(lane.replica, 0)) if free else None

    def _next_batch(self, level: int) -> list[Job]:
        """The jobs that are sent next, all at one level: the one given if they ask for none."""
        first = self._jobs.popleft()
        first.level = level if first.asked is None else first.asked
        batch, count = [first], first.count
        # What was sent before goes alone: if it ends a replica, it takes no other request with it.
        passed: list[Job] = []  # of other sizes or levels: they keep their places
        while self._jobs and not first.attempts and len(passed) < MAX_PASSED:
            job = self._jobs[0]
            if (
                job.attempts
                or job.images != first.images
                or count + job.count > self._settings.max_batch
            ):
                break
            self._jobs.popleft()
            if job.future.done():
                self._samples -= job.count
                continue
            job.level = level if job.asked is None else job.asked
            if job.shapes != first.shapes or job.level != first.level:
                passed.append(job)
                continue
            batch.append(job)
            count += job.count
        self._jobs.extendleft(reversed(passed))
        self._samples -= count
        return batch

    def _send(self, lane: Lane, batch: list[Job]) -> None:
        count = sum(job.count for job in batch)
        now = time.perf_counter_ns()
        for job in batch:
            job.attempts += 1
            job.sent = now
            if job.level and job.asked is None:
                self.metrics.degraded.inc()
        self._busy[lane.replica] = self._busy.get(lane.replica, 0) + 1
        self.metrics.batch.observe(count)
        self.metrics.queue.set(len(self._jobs))
        meta: dict[str, Any] = {"level": batch[0].level} if batch[0].level else {}
        if batch[0].images:
            parts = [piece for job in batch for piece in job.inputs[0]]
            sizes = [sum(len(piece) for piece in job.inputs[0]) for job in batch]
            lane.send(Kind.IMAGES, batch, count, parts, {"sizes": sizes, **meta})
        else:
            inputs = range(len(batch[0].inputs))
            parts = [piece for k in inputs for job in batch for piece in job.inputs[k]]
            if batch[0].shapes is not None:
                meta["shapes"] = batch[0].shapes
            lane.send(Kind.TENSORS, batch, count, parts, meta or None)

    # -- what lanes report ------------------------------------------------------------------------

    def joined(self, lane: Lane) -> None:
        """A lane is ready for batches."""
        self._lanes.add(lane)
        self._busy.setdefault(lane.replica, 0)
        self.metrics.replicas.set(self.replicas)
        self._pump()

    def answered(
        self, lane: Lane, batch: list[Job], header: Header, meta: Any, data: bytes
    ) -> None:
        """A batch's result came."""
        self._busy[lane.replica] -= 1
        if header.kind == Kind.ERROR:
            status = 400 if meta.get("input") else 500
            for job in batch:
                job.fail(ServeError(status, str(meta.get("message"))))
        else:
            self._distribute(batch, meta, memoryview(data))
        self._pump()

    def _distribute(
        self,
        batch: list[Job],
        meta: Mapping[str, Any],
        data: memoryview,
    ) -> None:
        assert self.description is not None
        errors, shapes = meta.get("errors", {}), meta.get("shapes", ())
        good = []
        for number, job in enumerate(batch):
            message = errors.get(str(number)) if batch[0].images else None
            if message is None:
                good.append(job)
            else:
                job.fail(ServeError(400, message))
        for job, placing in zip(good, meta.get("placings", ()), strict=False):
            job.placing = placing
        outputs = self.description.outputs
        if batch[0].shapes is not None:
            outputs = tuple(
                info.at([int(n) for n in shape])
                for info, shape in zip(outputs, shapes, strict=True)
            )
            for job in good:
                job.outputs = outputs
        total = sum(job.count for job in good)
        self._count(good, total)
        if len(data) != total * sum(info.bytes for info in outputs):
            for job in good:
                job.fail(ServeError(500, "the replica's answer has another size than expected"))
            return
        shares: list[list[memoryview]] = [[] for _ in good]
        start = 0
        for info in outputs:
            for share, job in zip(shares, good, strict=True):
                end = start + job.count * info.bytes
                share.append(data[start:end])
                start = end
        for share, job in zip(shares, good, strict=True):
            if not job.future.done():
                job.future.set_result(share)

    def _count(self, jobs: list[Job], samples: int) -> None:
        if not jobs:
            return
        now, statistics = time.perf_counter_ns(), self.metrics.statistics
        statistics.batch(samples, now - jobs[0].sent)
        for job in jobs:
            statistics.queue.add(job.sent - job.queued)
            statistics.compute_infer.add(now - job.sent)

    def left(self, lane: Lane) -> None:
        """A lane is gone; what its replica had not answered is sent again, first of all."""
        if lane not in self._lanes:
            return
        # The other lanes of a dead process close in a moment and must get nothing until then; a
        # living one connects again.
        unanswered: list[Job] = []
        for other in [other for other in self._lanes if other.replica == lane.replica]:
            self._lanes.discard(other)
            unanswered += other.batch
            other.batch = []
            if other is not lane:
                other.close()
        self._busy.pop(lane.replica, None)
        self.metrics.replicas.set(self.replicas)
        for job in reversed(unanswered):
            if job.future.done():
                continue
            if job.attempts >= MAX_ATTEMPTS:
                job.fail(ServeError(500, _FATAL))
                continue
            self.metrics.resent.inc()
            self._jobs.appendleft(job)
            self._samples += job.count
        self._pump()
        self._set_idle()

    # -- life -------------------------------------------------------------------------------------

    @property
    def replicas(self) -> int:
        """Replicas with a connection."""
        return len({lane.replica for lane in self._lanes})

    @property
    def inputs(self) -> tuple[TensorInfo, ...]:
        """Inputs of the model; only once it is ready."""
        assert self.description is not None
        return self.description.inputs

    def loaded(self, description: Description) -> None:
        """A replica has the model."""
        if self.description is None:
            self.description = description
            self._quality = Quality(description.levels, self._settings.max_queue)
        if not self.ready.done():
            self.ready.set_result(description)

    def failed(self, message: str) -> None:
        """A replica cannot load the model."""
        if not self.ready.done():
            self.ready.set_exception(ServeError(400, message))
        else:
            logger.warning("%s: a replica cannot load it: %s", self.app, message)

    async def drain(self, seconds: float) -> None:
        """Take nothing new and wait for what runs, then fail the rest and close the lanes."""
        self.closing = True
        if not self._idle.is_set():
            try:
                await asyncio.wait_for(self._idle.wait(), seconds)
            except asyncio.TimeoutError:
                logger.warning("%s: still busy after %g s", self.app, seconds)
        for job in [*self._jobs, *(job for lane in self._lanes for job in lane.batch)]:
            job.fail(ServeError(503, "this model version was removed", retry_after=1))
        self._jobs.clear()
        for lane in list(self._lanes):
            lane.close()


class Lane(asyncio.Protocol):
    """A connection of a replica: at most one batch at a time."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._dispatcher: Dispatcher | None = None
        self._buffer = bytearray()
        self._header: Header | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._accepted = False
        self.replica = ""
        self.batch: list[Job] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for the hello, not for ever."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self._watch(10.0)

    def connection_lost(self, error: Exception | None) -> None:
        """Give back what was not answered."""
        self._unwatch()
        if self._dispatcher is not None and self._accepted:
            self._dispatcher.left(self)
        self._buffer.clear()

    def close(self) -> None:
        """End the connection at once."""
        self._transport.abort()

    def send(
        self,
        kind: Kind,
        batch: list[Job],
        count: int,
        parts: list[memoryview],
        meta: Any,
    ) -> None:
        """Send a batch; its answer, or the end of the connection, goes to the dispatcher."""
        self.batch = batch
        size = sum(len(part) for part in parts)
        head = wire.frame_head(kind, count=count, meta=meta, payload=size)
        self._transport.writelines([head, *parts])
        self._watch(self._hub.settings.replica_timeout)

    def _watch(self, seconds: float) -> None:
        self._unwatch()
        self._timer = self._hub.loop.call_later(seconds, self._silent)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _silent(self) -> None:
        if self._accepted:
            logger.warning("replica %s did not answer in time; its batch is resent", self.replica)
        self.close()

    def data_received(self, data: bytes) -> None:
        """Collect frames."""
        self._buffer += data
        try:
            while self._take_frame():
                pass
        except (ConnectionError, ValueError, KeyError, TypeError) as error:
            address = self._transport.get_extra_info("peername")
            self._hub.strangers.warning(address, f"data port: {type(error).__name__}: {error}")
            self.close()

    def _take_frame(self) -> bool:
        if self._header is None:
            if len(self._buffer) < wire.HEADER.size:
                return False
            self._header = Header.parse(self._buffer)
            self._check(self._header)
        header = self._header
        end = wire.HEADER.size + header.meta
        if len(self._buffer) < end + header.payload:
            return False
        text = bytes(self._buffer[wire.HEADER.size : end])
        payload = bytes(memoryview(self._buffer)[end : end + header.payload])
        del self._buffer[: end + header.payload]
        self._header = None
        meta = orjson.loads(text) if text else {}
        self._frame(header, meta, payload)
        return True

    def _check(self, header: Header) -> None:
        """Before anything of a frame is kept: may it come now, and may it be so long?"""
        if self._dispatcher is None:
            if header.kind != Kind.HELLO or header.meta > MAX_HELLO or header.payload:
                raise wire.FrameError("expected a hello, got something else")
            return
        if header.kind in (Kind.READY, Kind.FAILED) and not self._accepted:
            if header.payload:
                raise wire.FrameError("expected no payload")
            return
        if header.kind not in (Kind.RESULT, Kind.ERROR) or not self.batch:
            raise wire.FrameError(f"unexpected {header.kind.name}")
        assert self._dispatcher.description is not None
        description = self._dispatcher.description
        sample = sum(info.bytes for info in description.outputs)
        if self.batch[0].shapes is not None:
            sample = description.most_output
        if header.payload > sample * sum(job.count for job in self.batch):
            raise wire.FrameError(f"a result of {header.payload} bytes")

    def _frame(self, header: Header, meta: dict[str, Any], payload: bytes) -> None:
        if self._dispatcher is None:
            self._hello(meta)
        elif header.kind == Kind.READY:
            self._dispatcher.loaded(Description.from_dict(meta))
            self._accept(self._dispatcher)
        elif header.kind == Kind.FAILED:
            self._dispatcher.failed(str(meta.get("message")))
        else:
            self._unwatch()
            batch, self.batch = self.batch, []
            self._dispatcher.answered(self, batch, header, meta, payload)

    def _hello(self, meta: dict[str, Any]) -> None:
        if not hmac.compare_digest(str(meta["token"]), self._hub.token):
            raise wire.FrameError("a hello with another token")
        dispatcher = self._hub.dispatchers.get(str(meta["key"]))
        if dispatcher is None:
            # A replica of a version that was removed, until Ray Serve has ended it.
            logger.debug("a hello for a model that is not served any more")
            self.close()
            return
        self._dispatcher = dispatcher
        self.replica = str(meta["replica"])
        if meta["fetch"]:
            model = dispatcher.model()
            self._transport.writelines([wire.frame_head(Kind.MODEL, payload=len(model)), model])
            self._watch(self._hub.settings.start_timeout)
        else:
            self._accept(dispatcher)

    def _accept(self, dispatcher: Dispatcher) -> None:
        self._unwatch()
        self._accepted = True
        if dispatcher.description is None:
            raise wire.FrameError("a lane before the model is loaded")
        dispatcher.joined(self)


class Hub:
    """The data port, to which replicas connect.

    Attributes:
        dispatchers: by key.
        port: that it listens on, after :meth:`start`.
    """

    def __init__(self, settings: Settings, token: str, strangers: StrangersLog) -> None:
        self.settings = settings
        self.token = token
        self.strangers = strangers
        self.loop = asyncio.get_running_loop()
        self.dispatchers: dict[str, Dispatcher] = {}
        self.port = 0
        self._server: asyncio.Server | None = None

    async def start(self, host: str) -> None:
        """Listen on a free port."""
        self._server = await self.loop.create_server(lambda: Lane(self), host, 0, backlog=256)
        self.port = self._server.sockets[0].getsockname()[1]

    def close(self) -> None:
        """Take no new connections."""
        if self._server is not None:
            self._server.close()
