"""The flow engine's server: found, or refused in one sentence."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

import pytest
from httpx import ConnectError
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from entprune.errors import DataError, EngineError
from flows import early_server
from flows.server import finished, own_server, run_flow, start_server

ROOT = Path(__file__).resolve().parents[1]


def test_server_that_does_not_answer_is_one_sentence() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, but nobody listens
        address = f"http://127.0.0.1:{unused.getsockname()[1]}/api"
        with (
            temporary_settings({PREFECT_API_URL: address, PREFECT_CLIENT_MAX_RETRIES: 0}),
            pytest.raises(EngineError, match=r"^Prefect's server does not answer \(.*\); check PREFECT_API_URL"),
        ):
            start_server()


def test_server_is_started_out_of_reach_of_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, bool]] = []

    class Client:
        def __enter__(self) -> Self:
            is_blocked = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, set())
            seen.append((is_blocked, threading.current_thread() is threading.main_thread()))
            return self

        def __exit__(self, *_: object) -> None: ...

        def api_healthcheck(self) -> None: ...

    monkeypatch.setattr("prefect.client.orchestration.get_client", lambda **_: Client())
    start_server()
    assert seen == [(True, False)]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, set())


# --- a server that is lost --------------------------------------------------------------------------------------------


def lost() -> RuntimeError:
    error = RuntimeError("crashed")
    error.__cause__ = ConnectError("all connection attempts failed")
    return error


@pytest.fixture
def own_servers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Counts own servers instead of starting them."""
    started: list[str] = []

    @contextmanager
    def own_server() -> Iterator[None]:
        started.append("own")
        yield

    monkeypatch.setattr("flows.server.start_server", lambda: None)
    monkeypatch.setattr("flows.server.own_server", own_server)
    return started


def test_flow_is_run_again_on_a_server_of_its_own(own_servers: list[str], caplog: pytest.LogCaptureFixture) -> None:
    def flow(number: int) -> int:
        if not own_servers:
            raise lost()
        return finished(number + 1)

    assert run_flow(flow, 1) == 2
    assert own_servers == ["own"]
    assert caplog.messages == ["Prefect's server is lost (crashed); the run goes on with one of its own"]


def test_finished_work_is_not_done_twice(own_servers: list[str], caplog: pytest.LogCaptureFixture) -> None:
    def flow(number: int) -> int:
        finished(number + 1)
        raise lost()  # while the end is reported

    assert run_flow(flow, 1) == 2
    assert own_servers == []
    assert "the run is complete, but Prefect's server did not hear of it" in caplog.text


def test_other_failures_are_the_flows_own(own_servers: list[str]) -> None:
    def flow(number: int) -> int:
        raise DataError("expected images, got none.")

    with pytest.raises(DataError, match="expected images"):
        run_flow(flow, 1)
    assert own_servers == []


def test_own_server_ignores_the_address_that_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        with own_server():
            assert PREFECT_API_URL.value() is None
        assert PREFECT_API_URL.value() == "http://127.0.0.1:9/api"
    assert os.environ["PREFECT_API_URL"] == "http://127.0.0.1:9/api"


# --- a server that is begun before anything else ----------------------------------------------------------------------


def listens(url: str) -> bool:
    with socket.socket() as knocking:
        return knocking.connect_ex((urlsplit(url).hostname, urlsplit(url).port)) == 0


@pytest.mark.integration
def test_flow_runs_on_the_server_that_was_begun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setattr("flows.server.start_server", lambda: pytest.fail("another server was started"))
    with temporary_settings(restore_defaults={PREFECT_API_URL}), early_server.begun_server():
        server = early_server.begun()
        assert server is not None
        assert run_flow(lambda _: PREFECT_API_URL.value(), None) == server.url
        assert listens(server.url)
    assert listens(server.url)  # until the process ends
    server.stop()
    assert not listens(server.url)
    server.stop()


def test_server_that_was_not_needed_ends_with_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with early_server.begun_server():
        server = early_server.begun()
        assert server is not None
        assert server.is_running()
    assert not server.is_running()
    assert early_server.begun() is None


def test_no_server_is_begun_where_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")
    with early_server.begun_server():
        assert early_server.begun() is None


def test_server_named_by_a_profile_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "profiles.toml").write_text(
        'active = "site"\n[profiles.site]\nPREFECT_API_URL = "http://127.0.0.1:1/api"\n', encoding="utf-8"
    )
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    monkeypatch.setenv("PREFECT_PROFILES_PATH", str(tmp_path / "profiles.toml"))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    server = early_server.EarlyServer()
    assert not server.wait(60)  # it ends by itself
    assert not server.is_running()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
def test_server_ends_with_a_killed_parent() -> None:
    program = (
        "import time; from flows.early_server import EarlyServer; server = EarlyServer(); "
        "print(server.wait(120), server.url, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert parent.stdout is not None
    answers, url = parent.stdout.readline().split()
    assert answers == "True"
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while listens(url) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not listens(url)
