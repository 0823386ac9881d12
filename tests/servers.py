"""Servers of a test's own on the loopback: PostgreSQL, and whatever else a command starts; all end with the test."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_DEBIAN = Path("/usr/lib/postgresql")  # a folder for each release
_PATIENCE_SECONDS = 120.0  # a busy machine takes its time
_STOP_SECONDS = 20.0


def free_port() -> int:
    """A port of the loopback that nobody listens on at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def wait_until(happened: Callable[[], bool], what: str, seconds: float = _PATIENCE_SECONDS) -> None:
    """Ask again and again; fails with what did not happen."""
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(0.2)


def answers(url: str) -> bool:
    """Whether a server answers there without an error."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 -- the loopback
            return bool(answer.status == 200)
    except OSError:
        return False


def ask(url: str, content: object = None, *, method: str = "POST", headers: Mapping[str, str] | None = None) -> Any:
    """What a server answers, JSON in both directions."""
    request = urllib.request.Request(  # noqa: S310 -- the loopback
        url,
        data=None if content is None else json.dumps(content).encode(),
        headers={"Content-Type": "application/json", **(headers or {})},
        method=method,
    )
    with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310 -- the same
        return json.loads(answer.read() or "null")


@contextlib.contextmanager
def running(
    command: Sequence[str], log: Path, *, environment: Mapping[str, str], folder: Path, user: str | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A program at work in the background; it and what it started end with this block."""
    with log.open("wb") as stream:
        process = subprocess.Popen(
            list(command),
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            cwd=folder,
            start_new_session=True,
            user=user,
            group=None if user is None else pwd.getpwnam(user).pw_gid,
            extra_groups=None if user is None else [],
        )
    try:
        yield process
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
    # Whatever outlived the leader of the group is killed above in any case.


# --- PostgreSQL -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Postgres:
    """A database server with one user, who has to give a password."""

    port: int
    user: str
    password: str

    def uri(self, database: str, scheme: str = "postgresql") -> str:
        """Address of a database, with the password."""
        return f"{scheme}://{self.user}:{self.password}@127.0.0.1:{self.port}/{database}"


def find_postgres() -> Path | None:
    """Folder of PostgreSQL's programs: on the path, or where Debian's packages put them."""
    if (found := shutil.which("initdb")) is not None:
        return Path(found).resolve().parent  # a link says nothing about the other programs
    releases = sorted(_DEBIAN.glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    return releases[-1].parent if releases else None


def missing_for_postgres() -> str | None:
    """Why no PostgreSQL can be started here, None if one can."""
    if find_postgres() is None:
        return "PostgreSQL's server is not installed"
    if os.geteuid() == 0 and _unprivileged_user() is None:
        return "PostgreSQL refuses to run as root, and there is no other user"
    return None


@contextlib.contextmanager
def postgres(databases: Sequence[str], log: Path) -> Iterator[Postgres]:
    """PostgreSQL on the loopback, in a folder that vanishes; not as root, which it refuses."""
    programs, user = find_postgres(), _unprivileged_user() if os.geteuid() == 0 else None
    assert programs is not None
    server = Postgres(port=free_port(), user="entprune", password=secrets.token_hex(16))
    with tempfile.TemporaryDirectory(prefix="entprune-postgres-", ignore_cleanup_errors=True) as place:
        folder = Path(place)
        (folder / "password").write_text(server.password, encoding="utf-8")
        if user is not None:
            for path in (folder, folder / "password"):
                shutil.chown(path, user)
        environment = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"}
        options = [f"--username={server.user}", f"--pwfile={folder / 'password'}", "--auth=scram-sha-256", "--no-sync"]
        subprocess.run(
            [str(programs / "initdb"), f"--pgdata={folder / 'data'}", "--encoding=UTF8", *options],
            env=environment,
            cwd=folder,
            user=user,
            check=True,
            capture_output=True,
        )
        settings = {"listen_addresses": "127.0.0.1", "port": server.port, "unix_socket_directories": "", "fsync": "off"}
        command = [str(programs / "postgres"), "-D", str(folder / "data")]
        command += [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        with running(command, log, environment=environment, folder=folder, user=user):
            for database in databases:
                _create_database(server, database)
            yield server


def query(server: Postgres, database: str, statement: str) -> list[tuple]:
    """Rows of a statement."""
    import psycopg2

    with contextlib.closing(psycopg2.connect(server.uri(database))) as connection, connection.cursor() as cursor:
        cursor.execute(statement)
        return list(cursor.fetchall())


def dump(server: Postgres, database: str) -> bytes:
    """Everything that a database holds, as text."""
    programs = find_postgres()
    assert programs is not None
    options = ["--host=127.0.0.1", f"--port={server.port}", f"--username={server.user}", "--inserts"]
    done = subprocess.run(
        [str(programs / "pg_dump"), *options, database],
        env={"PATH": os.environ["PATH"], "PGPASSWORD": server.password},
        check=True,
        capture_output=True,
    )
    return done.stdout


def _create_database(server: Postgres, database: str) -> None:
    import psycopg2

    connections = []

    def connect() -> bool:
        with contextlib.suppress(psycopg2.OperationalError):
            connections.append(psycopg2.connect(server.uri("postgres")))
        return bool(connections)

    wait_until(connect, "PostgreSQL lets its user in")
    with contextlib.closing(connections[0]) as connection:
        connection.autocommit = True
        connection.cursor().execute(f'CREATE DATABASE "{database}"')


def _unprivileged_user() -> str | None:
    known = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in known), None)
