"""A headless Chromium over its own debugging protocol: what a page draws, logs and asks the network for."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from websockets.sync.client import ClientConnection, connect

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_PATIENCE_SECONDS = 60.0


def find_chromium() -> str | None:
    """Where a Chromium is installed on this machine."""
    return next((found for name in _NAMES if (found := shutil.which(name))), None)


@dataclass
class Page:
    """One tab; what it asked for and complained about since the last visit."""

    socket: ClientConnection
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    _last: int = 0
    _loaded: bool = False

    def visit(self, address: str, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Open an address at a width and in a colour scheme, and wait until it is drawn."""
        self.requests, self.complaints, self._loaded = [], [], False
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=address)
        while not self._loaded:
            self._note(json.loads(self.socket.recv(timeout=_PATIENCE_SECONDS)))
        self.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def evaluate(self, expression: str) -> Any:
        """Value of a JavaScript expression; a promise is awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """Save what the page looks like, to its very end if asked."""
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command and wait for its answer."""
        self._last += 1
        self.socket.send(json.dumps({"id": self._last, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv(timeout=_PATIENCE_SECONDS))
            if message.get("id") == self._last:
                assert "error" not in message, message["error"]
                return dict(message["result"])
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        content = message.get("params", {})
        match message.get("method"):
            case "Page.loadEventFired":
                self._loaded = True
            case "Network.requestWillBeSent":
                self.requests.append(content["request"]["url"])
            case "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(content["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if content["type"] in {"error", "warning", "assert"}:
                self.complaints.append(json.dumps(content["args"]))
            case "Log.entryAdded" if content["entry"]["level"] in {"error", "warning"}:
                self.complaints.append(content["entry"]["text"])


@contextmanager
def open_page(chromium: str) -> Iterator[Page]:
    """Start a browser of our own and lend one empty tab; it ends with the block."""
    with TemporaryDirectory(prefix="entprune-browser-", ignore_cleanup_errors=True) as profile:
        flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                 "--hide-scrollbars", "--remote-debugging-port=0", f"--user-data-dir={profile}")  # fmt: skip
        process = subprocess.Popen(
            [chromium, *flags, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            port = _wait_for_port(Path(profile) / "DevToolsActivePort", process)
            with connect(_tab_address(port), max_size=None) as socket:
                page = Page(socket)
                for domain in ("Page", "Network", "Runtime", "Log"):
                    page.call(f"{domain}.enable")
                page.call("Emulation.setFocusEmulationEnabled", enabled=True)
                yield page
        finally:
            process.terminate()
            process.wait(timeout=_PATIENCE_SECONDS)


def _wait_for_port(file: Path, process: subprocess.Popen[bytes]) -> str:
    """The port is written in the first line, once the browser listens."""
    end = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < end:
        if file.is_file() and len(lines := file.read_text(encoding="utf-8").splitlines()) >= 2:
            return lines[0]
        assert process.poll() is None, f"the browser ended with code {process.returncode}"
        time.sleep(0.05)
    raise TimeoutError("the browser did not start to listen")


def _tab_address(port: str) -> str:
    from urllib.request import urlopen

    end = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < end:
        with urlopen(f"http://127.0.0.1:{port}/json/list", timeout=_PATIENCE_SECONDS) as answer:
            tabs = [tab for tab in json.load(answer) if tab["type"] == "page"]
        if tabs:
            return str(tabs[0]["webSocketDebuggerUrl"])
        time.sleep(0.05)
    raise TimeoutError("the browser opened no tab")
