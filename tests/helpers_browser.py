"""A real browser for tests: headless Chromium, through chromedriver's W3C WebDriver protocol."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MISSING = (
    "needs Chromium and chromedriver on the PATH (on Debian: apt-get install chromium "
    "chromium-driver)"
)


def installed() -> bool:
    """Whether there is a browser to test with."""
    return shutil.which("chromedriver") is not None and any(
        shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")
    )


class Browser:
    """One session; scripts are bodies of functions."""

    def __init__(self, root: str, session: str) -> None:
        self.root, self.session = root, f"{root}/session/{session}"

    def open(self, path: Path) -> None:
        """Load a file and wait until it is there."""
        _call("POST", f"{self.session}/url", {"url": path.resolve().as_uri()})

    def run(self, script: str, *arguments: object) -> Any:
        """``return`` value of a script in the page; ``arguments`` are its ``arguments``."""
        body = {"script": script, "args": list(arguments)}
        return _call("POST", f"{self.session}/execute/sync", body)

    def click(self, selector: str) -> None:
        """Click the first element that a CSS selector finds, as a user would."""
        _call("POST", f"{self._element(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        """Replace the text of an input."""
        element = self._element(selector)
        _call("POST", f"{element}/clear", {})
        _call("POST", f"{element}/value", {"text": text})

    def resize(self, width: int, height: int) -> None:
        """Size of the window in pixels."""
        _call("POST", f"{self.session}/window/rect", {"width": width, "height": height})

    def emulate(self, scheme: str) -> None:
        """``"light"`` or ``"dark"`` as the user's preference."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        body = {"cmd": "Emulation.setEmulatedMedia", "params": {"features": features}}
        _call("POST", f"{self.session}/goog/cdp/execute", body)

    def log(self, kind: str) -> list[dict[str, Any]]:
        """``"browser"``: what the console got since the last call; ``"performance"``: requests."""
        return _call("POST", f"{self.session}/se/log", {"type": kind})

    def _element(self, selector: str) -> str:
        body = {"using": "css selector", "value": selector}
        (identifier,) = _call("POST", f"{self.session}/element", body).values()
        return f"{self.session}/element/{identifier}"


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A headless session of its own; ``profile`` is an empty directory."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    driver = subprocess.Popen(
        ["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    root = f"http://127.0.0.1:{port}"
    session = None
    try:
        _wait(root)
        flags = [
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
            "--disable-component-update", "--disable-dev-shm-usage", "--no-first-run",
            f"--user-data-dir={profile}",
        ]  # fmt: skip
        wanted = {
            "goog:chromeOptions": {"args": flags},
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        body = {"capabilities": {"alwaysMatch": wanted}}
        session = _call("POST", f"{root}/session", body)["sessionId"]
        yield Browser(root, session)
    finally:
        if session is not None:
            _call("DELETE", f"{root}/session/{session}")
        driver.terminate()
        driver.wait(30)


def _wait(root: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            if _call("GET", f"{root}/status")["ready"]:
                return
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.05)


def _call(method: str, url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    # The browser's driver is here; a proxy of the environment is not asked.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=120) as answer:
            return json.loads(answer.read())["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{url}: {error.read().decode()[:500]}") from None
