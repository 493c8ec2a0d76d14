"""The HTTP endpoints, as an ASGI application."""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from urllib.parse import parse_qs

import numpy as np
import orjson

from ..detection import setting
from ..errors import InputError
from .bodies import Receive, read_body
from .connection import BROKEN
from .errors import ServeError
from .images import Placing, probabilities
from .log import StrangersLog
from .metrics import Metrics
from .models import Entry, ModelTable
from .protocol import (
    build_response,
    configuration,
    metadata,
    named_number,
    parameters_of,
    parse_object,
    parse_request,
)
from .quality import HEADER, asked_level
from .queues import Dispatcher, Job
from .runner import Description
from .settings import Settings

__all__ = ["Application"]

Send = Callable[[dict[str, Any]], Awaitable[None]]
Headers = Mapping[bytes, bytes]

_JSON = (b"content-type", b"application/json")
try:
    _VERSION = version("adalayer_native")
except PackageNotFoundError:  # a source tree that was never installed
    _VERSION = "0.0.0"
_FILE = re.compile(r"file:([1-9][0-9]{0,8})/[^/]+")


class Answer:
    """Status, headers and body."""

    __slots__ = ("body", "headers", "status")

    def __init__(
        self, body: bytes, status: int = 200, headers: tuple[tuple[bytes, bytes], ...] = (_JSON,)
    ) -> None:
        self.body, self.status, self.headers = body, status, headers

    @classmethod
    def json(
        cls, data: Any, status: int = 200, more: tuple[tuple[bytes, bytes], ...] = ()
    ) -> Answer:
        return cls(orjson.dumps(data), status, (_JSON, *more))


class Application:
    """Answers HTTP requests.

    Attributes:
        started: whether the models named at the start are loaded.
        draining: whether the server is about to end.
    """

    def __init__(
        self, settings: Settings, table: ModelTable, metrics: Metrics, strangers: StrangersLog
    ) -> None:
        self.started = False
        self.draining = False
        self._settings = settings
        self._table = table
        self._metrics = metrics
        self._strangers = strangers

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            raise RuntimeError(f"expected an HTTP request, got {scope['type']}")
        where = f"{scope['method']} {scope['path']}:"

        async def checked() -> Mapping[str, Any]:
            message = await receive()
            if BROKEN in scope:
                raise ServeError(400, scope[BROKEN], close=True)
            return message

        try:
            answer = await self._route(scope, checked)
        except ServeError as error:
            self._strangers.warning(scope["client"], f"{where} {error.status} {error.message}")
            answer = _error_answer(error)
        except Exception as error:
            self._strangers.warning(scope["client"], f"{where} 500", error)
            answer = Answer.json({"error": "internal error; the server's log says more"}, 500)
        await self._answer(scope, send, answer)

    async def overloaded(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """ASGI, where there are more connections than allowed."""
        limit = self._settings.max_connections
        error = ServeError(
            503, f"more than {limit} connections are open already", retry_after=1, close=True
        )
        self._strangers.warning(scope["client"], f"{error.status} {error.message}")
        await self._answer(scope, send, _error_answer(error))

    @staticmethod
    async def _answer(scope: Mapping[str, Any], send: Send, answer: Answer) -> None:
        length = (b"content-length", str(len(answer.body)).encode())
        await send(
            {
                "type": "http.response.start",
                "status": answer.status,
                "headers": [length, *answer.headers],
            }
        )
        body = b"" if scope["method"] == "HEAD" else answer.body
        await send({"type": "http.response.body", "body": body})

    async def _route(self, scope: Mapping[str, Any], receive: Receive) -> Answer:
        parts = scope["path"].strip("/").split("/")
        method = scope["method"]
        if parts[0] == "v2" and len(parts) >= 4 and parts[1] == "models":
            name, version, rest = parts[2], None, parts[3:]
            if rest[0] == "versions" and len(rest) >= 2:
                version, rest = rest[1], rest[2:]
            if rest == ["infer"]:
                _expect(method, "POST")
                return await self._infer(name, version, scope, receive)
            if rest == ["classify"]:
                _expect(method, "POST")
                return await self._classify(name, version, scope, receive)
            if rest == ["detect"]:
                _expect(method, "POST")
                return await self._detect(name, version, scope, receive)
            _expect(method, "GET", "HEAD")
            if rest == ["ready"]:
                return self._model_ready(name, version)
            if rest == ["config"]:
                return self._config(name, version)
            if rest == ["stats"]:
                return self._statistics(name, version)
            if rest == []:
                return self._model(name, version)
        elif parts[:2] == ["v2", "repository"]:
            _expect(method, "POST")
            return await self._repository(parts[2:], scope, receive)
        else:
            found = self._plain(parts)
            if found is not None:
                _expect(method, "GET", "HEAD")
                return found
        raise ServeError(404, f"there is nothing at {scope['path'][:200]}")

    # -- the server -------------------------------------------------------------------------------

    def _plain(self, parts: list[str]) -> Answer | None:
        if parts == ["v2"]:
            return Answer.json(
                {
                    "name": "adalayer_native",
                    "version": _VERSION,
                    "extensions": [
                        "binary_tensor_data",
                        "model_configuration",
                        "model_repository",
                        "statistics",
                    ],
                }
            )
        if parts == ["v2", "health", "live"]:
            return Answer.json({"live": True})
        if parts == ["v2", "health", "ready"]:
            ready = self.started and not self.draining and self._table.ready()
            return Answer.json({"ready": ready}, 200 if ready else 503)
        if parts == ["v2", "models", "stats"]:
            return self._statistics(None, None)
        if len(parts) == 3 and parts[:2] == ["v2", "models"]:
            return self._model(parts[2], None)
        if parts == ["metrics"]:
            kind = (b"content-type", b"text/plain; version=0.0.4; charset=utf-8")
            return Answer(self._metrics.text(), headers=(kind,))
        return None

    def _model(self, name: str, version: str | None) -> Answer:
        entry = self._table.find(name, version)
        dispatcher = _dispatcher(entry)
        assert dispatcher.description is not None
        versions = self._table.versions(name) if version is None else [version]
        return Answer.json(metadata(name, versions, dispatcher.description))

    def _config(self, name: str, version: str | None) -> Answer:
        dispatcher = _dispatcher(self._table.find(name, version))
        assert dispatcher.description is not None
        return Answer.json(configuration(name, dispatcher.description, self._settings))

    def _statistics(self, name: str | None, version: str | None) -> Answer:
        if name is not None:
            self._table.find(name, version)
        rows = [
            _dispatcher(e).metrics.statistics.as_dict(e.name, e.version)
            for e in self._table.entries()
            if e.dispatcher is not None and name in (None, e.name) and version in (None, e.version)
        ]
        return Answer.json({"model_stats": rows})

    def _model_ready(self, name: str, version: str | None) -> Answer:
        entry = self._table.find(name, version)
        ready = _dispatcher(entry).replicas > 0
        return Answer.json({"name": name, "ready": ready}, 200 if ready else 503)

    # -- inference --------------------------------------------------------------------------------

    async def _infer(
        self, name: str, version: str | None, scope: Mapping[str, Any], receive: Receive
    ) -> Answer:
        settings = self._settings
        headers = dict(scope["headers"])
        self._table.find(name, version)
        body = await read_body(headers, receive, settings.max_body, settings.body_timeout)
        # Looked up again: while the body came, the version may have been replaced.
        entry = self._table.find(name, version)
        dispatcher = _dispatcher(entry)
        try:
            model = dispatcher.description
            assert model is not None
            size = headers.get(b"inference-header-content-length")
            if size is not None and not (size.isdigit() and len(size) < 19):
                raise ServeError(
                    400,
                    "Inference-Header-Content-Length: expected the number of bytes of the JSON, "
                    f"got {size[:40].decode('latin-1')!r}",
                )
            begin = time.perf_counter_ns()
            request = parse_request(
                body, None if size is None else int(size), model, settings.largest_request
            )
            parsed = time.perf_counter_ns()
            job = Job(
                request.inputs,
                request.count,
                dispatcher.loop,
                shapes=request.shapes,
                asked=asked_level(headers, request.parameters, model.levels),
            )
            results = await self._run(dispatcher, job)
        except ServeError as error:
            dispatcher.metrics.error(error.status)
            raise
        done = time.perf_counter_ns()
        infos = job.outputs or model.outputs
        text, head_size = build_response(name, entry.version, request, infos, results)
        statistics = dispatcher.metrics.statistics
        statistics.compute_input.add(parsed - begin)
        statistics.compute_output.add(time.perf_counter_ns() - done)
        if head_size is None:
            return Answer(text, headers=(_JSON, *_level(model, job)))
        kind = (b"content-type", b"application/octet-stream")
        size_of_head = (b"inference-header-content-length", str(head_size).encode())
        return Answer(text, headers=(kind, size_of_head, *_level(model, job)))

    async def _classify(
        self, name: str, version: str | None, scope: Mapping[str, Any], receive: Receive
    ) -> Answer:
        query = parse_qs(scope["query_string"].decode("latin-1"))
        top = query.get("top", ["5"])[-1]
        if not (top.isascii() and top.isdigit() and len(top) < 7 and int(top) > 0):
            raise ServeError(400, f"top: expected a number of classes, got {top[:20]!r}")
        entry, model, job, results = await self._image(name, version, scope, receive, _classifies)
        scores = np.frombuffer(results[0], np.float32)
        found = scores.astype(np.float64) if model.softmax else probabilities(scores)
        names = model.class_names
        classes = []
        for index in np.argsort(-found, kind="stable")[: int(top)].tolist():
            row: dict[str, Any] = {"index": index, "probability": named_number(float(found[index]))}
            if names is not None and index < len(names):
                row["name"] = names[index]
            classes.append(row)
        return Answer.json(
            {"model_name": name, "model_version": entry.version, "classes": classes},
            more=_level(model, job),
        )

    async def _detect(
        self, name: str, version: str | None, scope: Mapping[str, Any], receive: Receive
    ) -> Answer:
        asked = _detect_settings(scope["query_string"].decode("latin-1"))
        entry, model, job, results = await self._image(name, version, scope, receive, _detects)
        assert model.detection is not None
        detection = model.detection.changed(**asked)
        outputs = {
            info.name: np.frombuffer(data, np.float32).reshape(1, *info.shape)
            for info, data in zip(job.outputs or model.outputs, results, strict=True)
        }
        (found,) = await asyncio.to_thread(detection, outputs)  # milliseconds, if there are many
        placing = Placing(*job.placing)
        names = model.class_names
        rows = []
        for box, score, index in zip(
            placing.located(found.boxes).tolist(),
            found.scores.tolist(),
            found.classes.tolist(),
            strict=True,
        ):
            row: dict[str, Any] = {"box": box, "score": score, "index": index}
            if names is not None and index < len(names):
                row["name"] = names[index]
            rows.append(row)
        width, height = placing.image
        return Answer.json(
            {
                "model_name": name,
                "model_version": entry.version,
                "image": {"width": width, "height": height},
                "detections": rows,
            },
            more=_level(model, job),
        )

    async def _image(
        self,
        name: str,
        version: str | None,
        scope: Mapping[str, Any],
        receive: Receive,
        check: Callable[[str, Description], None],
    ) -> tuple[Entry, Description, Job, list[memoryview]]:
        """An image through a model, with what is known of both.

        ``check`` raises where the model does not do what is asked.
        """
        settings = self._settings
        entry = self._table.find(name, version)
        model = _dispatcher(entry).description
        assert model is not None
        check(name, model)
        headers = dict(scope["headers"])
        body = await read_body(headers, receive, settings.max_body, settings.body_timeout)
        # Looked up again: while the body came, the version may have been replaced.
        entry = self._table.find(name, version)
        dispatcher = _dispatcher(entry)
        model = dispatcher.description
        assert model is not None
        try:
            check(name, model)
            if body.size == 0:
                raise ServeError(400, "expected a JPEG or PNG as the body, got nothing")
            asked = asked_level(headers, None, model.levels)
            image = body.take(0, body.size)
            job = Job([image], 1, dispatcher.loop, images=True, asked=asked)
            results = await self._run(dispatcher, job)
        except ServeError as error:
            dispatcher.metrics.error(error.status)
            raise
        return entry, model, job, results

    async def _run(self, dispatcher: Dispatcher, job: Job) -> list[memoryview]:
        begin = time.perf_counter_ns()
        statistics = dispatcher.metrics.statistics
        outcome = statistics.fail
        try:
            results = await dispatcher.submit(job)
            outcome = statistics.success
            return results
        finally:
            dispatcher.metrics.latency.observe(dispatcher.loop.time() - job.arrived)
            outcome.add(time.perf_counter_ns() - begin)

    # -- the model repository ---------------------------------------------------------------------

    async def _repository(
        self, parts: list[str], scope: Mapping[str, Any], receive: Receive
    ) -> Answer:
        settings = self._settings
        if parts == ["index"]:
            body = await read_body(
                dict(scope["headers"]), receive, settings.max_body, settings.body_timeout
            )
            asked = parse_object(body.joined(0, body.size) or b"{}", "a filter")
            rows = [
                {"name": e.name, "version": e.version, "state": e.state, "reason": e.reason}
                for e in self._table.entries()
                if e.state == "READY" or asked.get("ready") is not True
            ]
            return Answer.json(rows)
        if len(parts) != 3 or parts[0] != "models" or parts[2] not in ("load", "unload"):
            raise ServeError(404, f"there is nothing at {scope['path'][:200]}")
        if not settings.control:
            raise ServeError(403, "this server does not let clients load and unload models")
        limit = settings.max_upload // 3 * 4 + (1 << 20)  # in base64
        body = await read_body(dict(scope["headers"]), receive, limit, settings.body_timeout)
        asked = parse_object(body.joined(0, body.size) or b"{}", "a request")
        del body
        parameters = parameters_of(asked, "the request")
        if self.draining:
            raise ServeError(503, "this server is about to end")
        version = parameters.get("version")
        if version is not None and not isinstance(version, str):
            raise ServeError(400, "parameters: expected a string as version")
        # A client that goes away does not leave half of a change.
        if parts[2] == "load":
            work = asyncio.ensure_future(self._load(parts[1], version, parameters))
        else:
            work = asyncio.ensure_future(self._table.unload(parts[1], version))
        await asyncio.shield(work)
        return Answer.json({})

    async def _load(self, name: str, version: str | None, parameters: dict[str, Any]) -> None:
        files = {key: value for key, value in parameters.items() if key.startswith("file:")}
        if not files:
            await self._table.load(name, version or "1")
            return
        for key in list(files):
            match = _FILE.fullmatch(key)
            if match is None:
                raise ServeError(400, f"{key[:80]!r}: expected file:VERSION/NAME")
            text = files.pop(key)
            parameters.pop(key)
            try:
                data = await asyncio.to_thread(base64.b64decode, text, validate=True)
            except (binascii.Error, ValueError, TypeError):
                raise ServeError(400, f"{key!r}: expected a file in base64") from None
            del text
            await self._table.load(name, match.group(1), data=data)


def _dispatcher(entry: Entry) -> Dispatcher:
    assert entry.dispatcher is not None
    return entry.dispatcher


def _level(model: Description, job: Job) -> tuple[tuple[bytes, bytes], ...]:
    """The header that says at which quality a request was answered."""
    return ((HEADER, str(job.level).encode()),) if model.levels > 1 else ()


def _classifies(name: str, model: Description) -> None:
    """Raise unless a model's first output may be scores of classes."""
    if model.detection is not None:
        raise ServeError(400, f"model {name!r} is a detector: ask …/detect for its boxes")


def _detects(name: str, model: Description) -> None:
    """Raise unless a model is a detector."""
    if model.detection is None:
        raise ServeError(
            400,
            f"model {name!r} is no detector: its file says nothing of boxes "
            "(engine.save(…, detection={…})); …/classify and …/infer are there",
        )


_SETTINGS = {"score": "score_threshold", "iou": "iou_threshold", "max": "max_boxes"}


def _detect_settings(query: str) -> dict[str, float | int]:
    """The settings that a client asks for."""
    found: dict[str, float | int] = {}
    for key, values in parse_qs(query, keep_blank_values=True).items():
        if key not in _SETTINGS:
            raise ServeError(
                400, f"unknown setting {key[:40]!r}, expected some of {sorted(_SETTINGS)}"
            )
        try:
            found[_SETTINGS[key]] = setting(_SETTINGS[key], _number(values[-1]))
        except InputError as error:
            raise ServeError(400, f"{key}: {str(error).partition(': ')[2]}") from error
    return found


def _number(text: str) -> float | str:
    """The number that a short text is, else the text."""
    try:
        return float(text) if len(text) < 20 and text.isascii() else text[:20]
    except ValueError:
        return text[:20]


def _expect(method: str, *allowed: str) -> None:
    if method not in allowed:
        raise ServeError(405, f"expected {' or '.join(allowed)}, got {method}", close=True)


def _error_answer(error: ServeError) -> Answer:
    headers = [_JSON]
    if error.retry_after is not None:
        headers.append((b"retry-after", str(error.retry_after).encode()))
    if error.close:
        headers.append((b"connection", b"close"))
    return Answer(orjson.dumps({"error": error.message}), error.status, tuple(headers))
