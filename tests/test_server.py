"""The flow engine's server: found, or refused in one sentence."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

import pytest
from httpx import ConnectError
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from entprune.errors import DataError, EngineError
from flows.server import begun_server, finished, own_server, run_flow, start_server


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


# --- a server that starts while other things do -----------------------------------------------------------------------


def test_begun_server_is_started_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Client:
        def __enter__(self) -> Self:
            asked.append(threading.current_thread().name)
            return self

        def __exit__(self, *_: object) -> None: ...

        def api_healthcheck(self) -> Exception:
            return ConnectError("nobody there")

    monkeypatch.setattr("prefect.client.orchestration.get_client", lambda **_: Client())
    with begun_server() as wait_for_imports:
        wait_for_imports()
        with pytest.raises(EngineError, match="nobody there"):
            start_server()
        assert len(asked) == 1
        assert asked[0] != threading.main_thread().name
    with pytest.raises(EngineError, match="nobody there"):  # asked anew: what was begun is over
        start_server()
    assert len(asked) == 2
