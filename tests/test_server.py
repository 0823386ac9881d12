"""The flow engine's server: found, or refused in one sentence."""

from __future__ import annotations

import signal
import socket
import threading
from typing import Self

import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from entprune.errors import EngineError
from flows.server import start_server


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
