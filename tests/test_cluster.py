"""Clusters that are not there, and a local one that does not come up."""

from __future__ import annotations

import socket

import pytest
import ray

from entprune.errors import ConfigError, EngineError
from tasks import cluster
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


@pytest.mark.parametrize(("failures", "starts"), [(0, 1), (2, 3)])
def test_ray_that_does_not_start_is_started_again(
    failures: int, starts: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    begun = fail_to_start(monkeypatch, failures)
    cluster._start_local(1, None)
    assert begun == ["started", *["ended", "started"] * (starts - 1)]
    assert [record.getMessage() for record in caplog.records] == [
        f"Ray did not start (the node ended); trying again, {number} of 3" for number in range(2, starts + 1)
    ]


def test_ray_that_never_starts_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = fail_to_start(monkeypatch, 3)
    with pytest.raises(EngineError, match=r"^cannot start Ray on this machine: the node ended; free memory and disk"):
        cluster._start_local(1, None)
    assert begun == ["started", "ended"] * 3


def fail_to_start(monkeypatch: pytest.MonkeyPatch, failures: int) -> list[str]:
    """Let Ray fail so often; what was called is in the list."""
    begun: list[str] = []

    def init(**_: object) -> None:
        begun.append("started")
        if begun.count("started") <= failures:
            raise RuntimeError("the node ended.\nmore of it")

    monkeypatch.setattr(cluster.ray, "init", init)
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: begun.append("ended"))
    return begun
