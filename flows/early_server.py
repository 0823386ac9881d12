"""A flow engine's server of a command's own, begun before anything else: it takes as long as all other imports.

python -m flows.early_server PORT  (does nothing where Prefect's settings name a server)
"""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
_DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux' prctl
_STOP_SECONDS = 10.0
_LOOK_SECONDS = 0.05

_begun: ContextVar[EarlyServer | None] = ContextVar("begun_server", default=None)


class EarlyServer:
    """A server in a process of its own, which ends with this one, however that ends."""

    def __init__(self) -> None:
        self._port = _free_port()
        self.url = f"http://127.0.0.1:{self._port}/api"
        paths = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(  # noqa: S603 -- this module
            [sys.executable, "-m", "flows.early_server", str(self._port)],
            env={**os.environ, "PREFECT_UI_ENABLED": "false", "PYTHONPATH": paths},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # out of reach of Ctrl-C: it must live until the run is reported as interrupted
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,  # noqa: PLW1509 -- no other thread yet
        )
        self.was_needed = False
        atexit.register(self.stop)  # before Prefect is imported, hence after what that does at the end

    def wait(self, seconds: float) -> bool:
        """Whether it answers, within so many seconds or as soon as that is clear."""
        deadline = time.monotonic() + seconds
        while self._process.poll() is None and time.monotonic() < deadline:
            if self._is_healthy():
                self.was_needed = True
                return True
            time.sleep(_LOOK_SECONDS)
        return False

    def is_running(self) -> bool:
        """Whether the process is there."""
        return self._process.poll() is None

    def stop(self) -> None:
        """End it; more than once does no harm."""
        atexit.unregister(self.stop)
        if self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:  # noqa: S310 -- the loopback
                return bool(answer.status == 200)
        except OSError:
            return False


@contextmanager
def begun_server() -> Iterator[None]:
    """Start a server that the flow of this block will need, while other things start; none where one is named."""
    if os.environ.get("PREFECT_API_URL"):
        yield
        return
    server = EarlyServer()
    token = _begun.set(server)
    try:
        yield
    finally:
        _begun.reset(token)
        if not server.was_needed:  # else it lives as long as this process: Prefect reports to the very end
            server.stop()


def begun() -> EarlyServer | None:
    """The server that was begun for this block, if one was."""
    return _begun.get()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGTERM)


def main() -> None:
    """Become Prefect's server, unless there is one already or none may be started."""
    from prefect.settings import (  # noqa: PLC0415 -- not in the process that imports this module for its class
        PREFECT_API_URL,
        PREFECT_SERVER_ALLOW_EPHEMERAL_MODE,
    )

    if PREFECT_API_URL.value() is None and PREFECT_SERVER_ALLOW_EPHEMERAL_MODE.value():
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", sys.argv[1]]
        os.execv(command[0], command)  # noqa: S606 -- Prefect's own command


if __name__ == "__main__":
    main()
