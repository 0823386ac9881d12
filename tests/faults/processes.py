"""Processes of one Ray cluster, found by their names, and servers that can be killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.servers import answers, free_port


def worker_pids(session: str, *, busy: bool | None = None) -> list[int]:
    """Processes of this project's actors in a Ray session.

    Args:
        session: name of Ray's session folder, which every process of a cluster has among its arguments or in its
            environment.
        busy: only those that run a unit, or only those that do not.
    """
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            title = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if not title.startswith("ray::Worker") or session not in _surroundings(entry):
                continue
        except OSError:  # it ended meanwhile
            continue
        if busy is None or busy == title.startswith("ray::Worker.run"):
            found.append(int(entry.name))
    return sorted(found)


def _surroundings(process: Path) -> str:
    """Log files that a worker holds open lie in its session's folder; its title has replaced its arguments."""
    names = []
    for descriptor in (process / "fd").iterdir():
        try:
            names.append(str(descriptor.readlink()))
        except OSError:
            continue
    return "\n".join(names)


def kill(pid: int) -> None:
    """SIGKILL, whether or not the process is still there."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


@dataclass
class Server:
    """A server in a process of its own that can be killed and started again on the same data.

    Attributes:
        command: what runs, without the interpreter.
        health: address that answers once it is up.
    """

    command: list[str]
    health: str
    environment: Mapping[str, str]
    folder: Path
    process: subprocess.Popen[bytes] | None = field(default=None)

    def start(self, seconds: float = 120.0) -> None:
        """Start it and wait until it answers."""
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *self.command],
                env={**os.environ, **self.environment}, cwd=self.folder, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + seconds
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise TimeoutError(f"{self.command[0]} did not start; see {self.folder / 'server.log'}")
            time.sleep(0.2)

    def answers(self) -> bool:
        """Whether it is there."""
        return answers(self.health)

    def kill(self) -> None:
        """SIGKILL to it and everything that it started."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


def mlflow_server(folder: Path) -> Server:
    """MLflow's server on a database in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    command = [
        "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}", "--host", "127.0.0.1",
        "--artifacts-destination", str(folder / "artifacts"), "--port", str(port), "--workers", "1",
    ]  # fmt: skip
    return Server(command, f"http://127.0.0.1:{port}/health", {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}, folder)


def prefect_server(folder: Path) -> Server:
    """Prefect's server on a database in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    environment = {
        "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{folder / 'prefect.db'}",
        "PREFECT_UI_ENABLED": "0",
    }
    command = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port), "--no-services"]
    return Server(command, f"http://127.0.0.1:{port}/api/health", environment, folder)
