"""Requests that make no sense, with the statuses that they deserve, by what is wrong with them."""

from __future__ import annotations

import base64
import functools
import gzip
import io
import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

INFER = "/v2/models/tiny/infer"
CLASSIFY = "/v2/models/tiny/classify"
LOAD = "/v2/repository/models/tiny/load"
MAX_BODY = 1 << 20

# Name, bytes on the wire, statuses that are right.
Hostile = tuple[str, bytes, tuple[int, ...]]

BAD = (400,)
FINE = (200,)


def request(
    method: str, path: str, body: bytes = b"", headers: Sequence[tuple[str, str]] = ()
) -> bytes:
    """On the wire, as a client that knows HTTP sends it."""
    rows = [("Host", "a"), ("Connection", "close"), ("Content-Length", str(len(body))), *headers]
    head = "".join(f"{name}: {value}\r\n" for name, value in rows)
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + body


def tensor(**changes: Any) -> dict[str, Any]:
    """A right input, but for the changes."""
    row = {"name": "x", "shape": [1, 3, 8, 8], "datatype": "FP32", "data": [0.5] * 192}
    return {**row, **changes}


def infer(data: Any, *headers: tuple[str, str]) -> bytes:
    """A request for inference with this JSON."""
    text = data if isinstance(data, bytes) else json.dumps(data).encode()
    return request("POST", INFER, text, headers)


def raw() -> Iterator[Hostile]:
    """What is no HTTP."""
    get = b"GET /v2 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
    for name, data in {
        "nothing but ends of lines and rubbish": b"\r\n\r\nrubbish\r\n\r\n",
        "zeros": bytes(64),
        "high bytes": b"\xff" * 64 + b"\r\n\r\n",
        "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),
        "SSH": b"SSH-2.0-OpenSSH_9.6\r\n",
        "SMTP": b"EHLO example.org\r\n",
        "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "HTTP/0.9": b"GET /\r\n\r\n",
        "no version": b"GET / \r\n\r\n",
        "version 9.9": b"GET / HTTP/9.9\r\nHost: a\r\n\r\n",
        "version x": b"GET / HTTP/x\r\nHost: a\r\n\r\n",
        "unknown method": b"FETCH /v2 HTTP/1.1\r\nHost: a\r\n\r\n",
        "small letters": b"get /v2 HTTP/1.1\r\nHost: a\r\n\r\n",
        "no address": b"GET HTTP/1.1\r\nHost: a\r\n\r\n",
        "a zero in the address": b"GET /v2\x00 HTTP/1.1\r\nHost: a\r\n\r\n",
        "a space in the address": b"GET /v2 models HTTP/1.1\r\nHost: a\r\n\r\n",
        "high bytes in the address": b"GET /\xe2\x82\xac HTTP/1.1\r\nHost: a\r\n\r\n",
        "CONNECT": b"CONNECT example.org:443 HTTP/1.1\r\nHost: a\r\n\r\n",
        "header without a colon": get + b"nonsense\r\n\r\n",
        "header without a name": get + b": value\r\n\r\n",
        "space before the colon": get + b"X : y\r\n\r\n",
        "zero in a header": get + b"X: a\x00b\r\n\r\n",
        "carriage return in a header": get + b"X: a\rb\r\n\r\n",
        "folded header": get + b"X: a\r\n b\r\n\r\n",
        "two lengths": get + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        "length and chunks": get
        + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "negative length": get + b"Content-Length: -1\r\n\r\n",
        "length in words": get + b"Content-Length: many\r\n\r\n",
        "length of 40 digits": get + b"Content-Length: " + b"9" * 40 + b"\r\n\r\n",
        "unknown transfer encoding": get + b"Transfer-Encoding: rot13\r\n\r\n",
        "chunked twice and something": get + b"Transfer-Encoding: chunked, gzip\r\n\r\n",
    }.items():
        yield name, data, {"folded header": (400, 200), "HTTP/0.9": (404,)}.get(name, BAD)


def headers() -> Iterator[Hostile]:
    """Too many, too long, or contradictory headers."""
    for number in (101, 1000, 5000):
        rows = [(f"X-{k}", "y") for k in range(number)]
        yield f"{number} headers", request("GET", "/v2", headers=rows), (431,)
    yield "5000 headers of one name", request("GET", "/v2", headers=[("a", "b")] * 5000), (431,)
    for size in (70_000, 1_000_000):
        text = "a" * size
        yield f"a value of {size}", request("GET", "/v2", headers=[("X", text)]), (431,)
        yield f"a name of {size}", request("GET", "/v2", headers=[(text, "x")]), (431,)
        yield f"an address of {size}", request("GET", "/" + text), (431,)
    good = json.dumps({"inputs": [tensor()]}).encode()
    for value in ("-1", "99999", "x", "", "1e3", "9" * 5000, "0x10", "1.5", "+5"):
        head = [("Inference-Header-Content-Length", value)]
        yield f"JSON of {value[:9]!r} bytes", request("POST", INFER, good, head), BAD
    for value in ("br", "zstd", "gzip, gzip", "x" * 1000):
        yield f"encoding {value[:9]}", infer(good, ("Content-Encoding", value)), (415,)
    upgrade = [("Upgrade", "websocket"), ("Connection", "Upgrade")]
    yield "upgrade", request("GET", "/v2", headers=upgrade), BAD  # it has a Content-Length
    plain = b"GET /v2 HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
    yield "upgrade without a body", plain, FINE
    yield "expects miracles", request("GET", "/v2", headers=[("Expect", "miracles")]), FINE


def paths() -> Iterator[Hostile]:
    """Addresses and methods that are not there."""
    for path in (
        *("/", "//", "/v1", "/v2/", "/v3", "/v2/models", "/v2/models/", "/v2/models//", "/V2"),
        *("/v2/models/none", "/v2/models/tiny/versions", "/v2/models/tiny/versions/0"),
        *("/v2/models/tiny/versions/99", "/v2/models/tiny/versions/1/2/3", "/v2/models/tiny/x"),
        *("/v2/models/tiny/versions/-1/ready", "/v2/models/tiny/versions/1e9", "/v2/health"),
        *("/../../etc/passwd", "/v2/models/..%2f..%2fetc%2fpasswd", "/v2/models/%00", "/%"),
        *("/v2/models/tiny%0d%0aX-Injected:%201", "/%c3%28", "/metrics/x", "/?" + "a=b&" * 9000),
        *("/v2/models/" + "a" * 5000, "/v2/models/tiny/trace/setting", "/v2/systemsharedmemory"),
    ):
        yield f"GET {path[:40]}", request("GET", path), FINE if path == "/v2/" else (404,)
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND"):
        yield f"{method} infer", request(method, INFER), (405,)
        yield f"{method} /v2", request(method, "/v2"), (405,)
    for path in (INFER, CLASSIFY, LOAD, "/v2/repository/index"):
        yield f"GET {path}", request("GET", path), (405,)
    for path in ("/v2/health/live", "/metrics", "/v2/models/tiny", "/v2/models/tiny/config"):
        yield f"POST {path}", request("POST", path, b"{}"), (405,)
    for top in ("0", "-1", "x", "1e3", "", "9" * 5000, "%00", "٣"):
        path = f"{CLASSIFY}?top={top if top.isascii() else '%D9%A3'}"
        # parse_qs leaves an empty value out, which is as if it were not there.
        yield (
            f"top {top[:9]!r}",
            request("POST", path, png(np.zeros((8, 8, 3), np.uint8))),
            (FINE if top == "" else BAD),
        )


# Values that a field may be given, and which of them are right for which field.
_VALUES: dict[str, Any] = {
    "null": None,
    "true": True,
    "one": 1,
    "minus one": -1,
    "a fraction": 1.5,
    "infinity": float("inf"),
    "2**70": 2**70,
    "no text": "",
    "a long text": "x" * 1000,
    "half a pair": "\ud800",
    "an empty list": [],
    "lists in lists": json.loads("[" * 200 + "]" * 200),
    "an object": {},
}
_RIGHT = {
    "id": {"null", "no text", "a long text"},
    "parameters": {"null", "an object"},
    "outputs": {"null", "an empty list"},
    "input parameters": {"null", "an object"},
    "binary_data_size": {"null"},
    "binary_data_output": {"null", "true"},
    "output": set(),
    "inputs": set(),
    "input": set(),
    "name": set(),
    "shape": set(),
    "datatype": set(),
    "data": set(),
}


def fields() -> Iterator[Hostile]:
    """Every field of a request with values of all kinds."""
    for field, right in _RIGHT.items():
        for name, value in _VALUES.items():
            body: dict[str, Any] = {"inputs": [tensor()]}
            if field in ("id", "parameters", "outputs", "inputs"):
                body[field] = value
            elif field == "input":
                body["inputs"] = [value]
            elif field == "output":
                body["outputs"] = [value]
            elif field == "binary_data_output":
                body["parameters"] = {field: value}
            elif field == "binary_data_size":
                body["inputs"] = [tensor(parameters={field: value})]
            elif field == "input parameters":
                body["inputs"] = [tensor(parameters=value)]
            else:
                body["inputs"] = [tensor(**{field: value})]
            yield f"{field}: {name}", infer(body), FINE if name in right else BAD


def bodies() -> Iterator[Hostile]:
    """Bodies that are no request."""
    good = json.dumps({"inputs": [tensor()]}).encode()
    for name, data in {
        "nothing": b"",
        "a brace": b"{",
        "a list": b"[]",
        "a number": b"7",
        "NaN": b"NaN",
        "zeros": bytes(1000),
        "high bytes": b"\xff\xfe" * 100,
        "UTF-16": good.decode().encode("utf-16"),
        "a byte order mark": b"\xef\xbb\xbf" + good,
        "half a request": good[:-20],
        "two requests": good + good,
        "something behind": good + b"\x00",
        "lists without end": b"[" * 500_000,
        "objects without end": b'{"a":' * 100_000,
        "half a million objects": b'{"inputs": [' + b"{}," * 300_000 + b"{}]}",
        "a number of 100,000 digits": b'{"inputs": [' + b"9" * 100_000 + b"]}",
        "a key many times": b"{" + b'"inputs":[],' * 50_000 + b'"inputs":[]}',
        "more data than the shape": infer_text(data=[0.5] * 100_000),
        "a batch of 257": infer_text(shape=[257, 3, 8, 8], data=[0] * 257 * 192),
        "a batch of 2**62": infer_text(shape=[2**62, 3, 8, 8]),
        "texts as data": infer_text(data=["x" * 50] * 192),
        "bare names among lists": infer_text(data=[[float("nan")], [1, 2]]),
    }.items():
        yield name, infer(data), BAD
    yield "no number", infer(infer_text(data=[float("nan")] * 192)), FINE
    yield "too large", infer(b" " * (MAX_BODY + 1)), (413,)
    yield "gzip that is none", infer(b"rubbish", ("Content-Encoding", "gzip")), BAD
    whole = gzip.compress(good)
    yield "half of gzip", infer(whole[:-9], ("Content-Encoding", "gzip")), BAD
    yield "gzip twice", infer(whole + whole, ("Content-Encoding", "gzip")), BAD
    zeros = bytes(8 << 20)
    for form, bomb in (("gzip", gzip.compress(zeros)), ("deflate", zlib.compress(zeros))):
        yield f"a bomb as {form}", infer(bomb, ("Content-Encoding", form)), (413,)
    chunked = request("POST", INFER).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    for name, data in {
        "a chunk of words": b"zz\r\n",
        "a negative chunk": b"-5\r\nhello\r\n0\r\n\r\n",
        "a chunk that is longer": b"2\r\nhello\r\n0\r\n\r\n",
        "a chunk of 2**70": b"f" * 18 + b"\r\nhello\r\n",
        "chunks of nothing": b"0\r\n\r\n",
        "trailers": b"2\r\n{}\r\n0\r\nX: y\r\n\r\n",
    }.items():
        yield name, chunked + data, BAD
    many = b"".join(b"T-%d: y\r\n" % k for k in range(3000))
    yield "trailers without end", chunked + b"2\r\n{}\r\n0\r\n" + many + b"\r\n", BAD
    late = b"POST " + INFER.encode() + b" HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{"
    yield "a body that never comes", late, (408,)
    yield "headers that never come", b"POST / HTTP/1.1\r\nHost:", (408,)


def infer_text(**changes: Any) -> bytes:
    """A request for one input with these changes."""
    return json.dumps({"inputs": [tensor(**changes)]}).encode()


def binary() -> Iterator[Hostile]:
    """Tensors as bytes that do not fit what is said of them."""
    x = np.full(192, 0.5, np.float32).tobytes()

    def ask(size: Any, behind: bytes, **changes: Any) -> bytes:
        row = tensor(parameters={"binary_data_size": size}, **changes)
        if "data" not in changes:
            del row["data"]
        text = json.dumps({"inputs": [row]}).encode()
        return infer(text + behind, ("Inference-Header-Content-Length", str(len(text))))

    yield "right", ask(768, x), FINE
    for size in (0, -768, 767, 769, 2**40, 2**70, "768", 768.0, True, [768], {}):
        yield f"{size} bytes", ask(size, x), BAD
    yield "too few bytes", ask(768, x[:-1]), BAD
    yield "too many bytes", ask(768, x + b"1"), BAD
    yield "no bytes", ask(768, b""), BAD
    yield "FP16 of the size of FP32", ask(768, x, datatype="FP16"), BAD
    yield "data twice", ask(768, x, data=[0] * 192), BAD
    yield "bytes that no tensor has", ask(None, x, data=[0] * 192), BAD


def png(pixels: np.ndarray, form: str = "PNG", **options: Any) -> bytes:
    """An encoded picture."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form, **options)
    return stream.getvalue()


def png_of(width: int, height: int, data: bytes, *, extra: bytes = b"") -> bytes:
    """A PNG whose header says what it likes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def images() -> Iterator[Hostile]:
    """Pictures that are none, that lie, or that are strange and right."""
    noise = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    good, jpeg = png(noise), png(noise, "JPEG")
    damaged = bytearray(good)
    damaged[len(good) // 2] ^= 0xFF
    text = zlib.compress(bytes(8 << 20))
    for name, data in {
        "nothing": b"",
        "text": b"a picture of a cat",
        "the beginning of a PNG": good[:8],
        "half a PNG": good[: len(good) // 2],
        "a damaged PNG": bytes(damaged),
        "the beginning of a JPEG": jpeg[:20],
        "a GIF": png(noise, "GIF"),
        "a BMP": png(noise, "BMP"),
        "a TIFF": png(noise, "TIFF"),
        "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "60,000 x 60,000": png_of(60_000, 60_000, b"x"),
        "2**31 - 1 wide": png_of(2**31 - 1, 1, b"x"),
        "no pixels": png_of(0, 0, b""),
        "fewer pixels than it says": png_of(1000, 1000, bytes(3000)),
        "2,000,000 in a line": png_of(2_000_000, 1, b"x"),
        "a line upright": png_of(1, 2_000_000, b"x"),
    }.items():
        yield name, request("POST", CLASSIFY, data), BAD
    bomb = b"zTXt", b"k\x00\x00" + text
    extra = struct.pack(">I", len(bomb[1])) + bomb[0] + bomb[1]
    extra += struct.pack(">I", zlib.crc32(bomb[0] + bomb[1]))
    flat = bytes((1 + 3 * 8) * 8)
    yield (
        "8 MB of text in a PNG",
        request("POST", CLASSIFY, png_of(8, 8, flat, extra=extra)),
        (
            *BAD,
            *FINE,
        ),
    )
    for name, data in {
        "right": good,
        "one pixel": png(noise[:1, :1]),
        "grey": png(noise[..., 0]),
        "with transparency": png(np.dstack([noise, noise[..., :1]])),
        "16 bits": png(noise[..., 0].astype(np.uint16) * 257),
        "JPEG": jpeg,
        "something behind it": jpeg + b"\x00" * 1000,
        "a line": png_of(100_000, 1, bytes(300_001)),
    }.items():
        yield name, request("POST", CLASSIFY, data), FINE


def repository() -> Iterator[Hostile]:
    """Models that are none."""
    text = base64.b64encode(b"no model").decode()
    for name, data in {
        "a list": b"[]",
        "half of JSON": b'{"parameters": {',
        "parameters that are a list": b'{"parameters": []}',
        "a version that is a number": b'{"parameters": {"version": 1}}',
        "no base64": b'{"parameters": {"file:1/model.ada": "%%%"}}',
        "a number as file": b'{"parameters": {"file:1/model.ada": 7}}',
        "a file without a version": b'{"parameters": {"file:model.ada": ""}}',
        "a file elsewhere": b'{"parameters": {"file:../../x": ""}}',
        "an empty file": b'{"parameters": {"file:1/model.ada": ""}}',
        "no model": json.dumps({"parameters": {"file:1/model.ada": text}}).encode(),
        "version 0": json.dumps({"parameters": {"file:0/model.ada": text}}).encode(),
        "a long version": json.dumps({"parameters": {f"file:{'9' * 50}/m": text}}).encode(),
    }.items():
        yield name, request("POST", LOAD, data), BAD
    for name in ("-x", ".", "..", "a b", "a" * 200, "%00"):
        path = f"/v2/repository/models/{name.replace(' ', '%20')}/load"
        body = json.dumps({"parameters": {"file:1/model.ada": text}}).encode()
        yield f"the name {name[:9]!r}", request("POST", path, body), BAD
    for path in ("none/unload", "none/load", "tiny/else", "load", "a/b/load", "", "..%2fx/load"):
        yield f"POST {path}", request("POST", f"/v2/repository/models/{path}", b"{}"), (404,)
    body = b'{"parameters": {"version": "77"}}'
    yield "a version that is not there", request("POST", LOAD, body), (404,)
    unload = "/v2/repository/models/tiny/unload"
    yield "unloading such a version", request("POST", unload, body), (404,)


_GROUPS = (raw, headers, paths, fields, bodies, binary, images, repository)
GROUPS = {group.__name__: functools.cache(lambda made=group: list(made())) for group in _GROUPS}
