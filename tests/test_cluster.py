"""Addresses of clusters that are not there."""

from __future__ import annotations

import socket

import pytest
import ray

from entprune.errors import ConfigError, EngineError
from tasks.cluster import connect


@pytest.fixture(autouse=True)
def _not_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # other test modules may have started one


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.parametrize("prefix", ["", "ray://"])
def test_address_without_a_cluster_is_refused_at_once(prefix: str) -> None:
    address = f"{prefix}127.0.0.1:{closed_port()}"
    with pytest.raises(EngineError, match=f"no Ray cluster answers at '{address}'"), connect(address):
        pass


@pytest.mark.parametrize("address", ["nowhere", "host:port", ":6379"])
def test_malformed_address_is_refused(address: str) -> None:
    with pytest.raises(EngineError, match="expected a Ray address such as host:6379"), connect(address):
        pass


def test_no_workers_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected at least one worker, got 0"), connect(None, workers=0):
        pass
