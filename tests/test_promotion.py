"""Who becomes champion: the rule on plain figures, the change in a real registry, and many changes at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from entprune.errors import ConfigError, EngineError
from tasks import promotion, promotion_lock, registry, tracking
from tasks.promotion import VersionFacts, judge

ROOT = Path(__file__).resolve().parents[1]
GOOD = {
    "certificate_passed": "true",
    "accuracy": "98.5",
    "dense_accuracy": "99.0",
    "parameters": "1000",
    "macs": "5000",
    "latency_ms_1": "2.0",
    "latency_ms_64": "20.0",
    "measured_on": "here",
    "budget_max_accuracy_drop": "0.5",
}


def facts(version: int = 2, **changes: Any) -> VersionFacts:
    return replace(VersionFacts.from_tags(version, GOOD), **changes)


# --- the rule ---------------------------------------------------------------------------------------------------------


def test_first_version_within_its_own_budget_is_accepted() -> None:
    verdict = judge("net", facts(), None)
    assert verdict.accepted
    assert verdict.champion is None
    assert "a drop of 0.50, within 0.5 points" in verdict.reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"certificate_passed": False}, "the certificate did not pass"),
        ({"accuracy": 98.4}, "98.40 % against 99.00 % of the dense network is a drop of 0.60, beyond 0.5 points"),
        ({"accuracy": None}, "no accuracy is recorded"),
        ({"accuracy": float("nan")}, "beyond 0.5 points"),
        ({"dense_accuracy": None}, "no dense_accuracy is recorded"),
    ],
)
def test_unfit_version_is_refused_with_its_reason_alone(changes: dict[str, Any], reason: str) -> None:
    verdict = judge("net", facts(**changes), None)
    assert not verdict.accepted
    assert reason in verdict.reason
    assert ";" not in verdict.reason


def test_allowed_drop_is_the_given_one_or_the_budget_or_a_point() -> None:
    loser = facts(accuracy=98.2)
    assert not judge("net", loser, None).accepted
    assert judge("net", loser, None, max_accuracy_drop=0.8).accepted
    assert judge("net", replace(loser, allowed_drop=None), None).accepted
    assert not judge("net", facts(), None, max_accuracy_drop=0.0).accepted


@pytest.mark.parametrize(
    ("changes", "accepted"),
    [
        ({}, False),
        ({"parameters": 999}, True),
        ({"parameters": 1001}, False),
        ({"macs": 4999}, True),
        ({"latency_ms": {"1": 1.5}}, True),
        ({"latency_ms": {"1": 1.99}}, False),
        ({"latency_ms": {"1": 1.5}, "measured_on": "elsewhere"}, False),
        ({"latency_ms": {"7": 0.1}}, False),
        ({"parameters": None, "macs": None, "latency_ms": {}}, False),
    ],
)
def test_challenger_must_be_smaller_or_faster_than_the_champion(changes: dict[str, Any], accepted: bool) -> None:
    verdict = judge("net", facts(**changes), facts(version=1))
    assert verdict.accepted is accepted
    assert verdict.champion == 1


def test_unreadable_tags_count_as_not_recorded() -> None:
    read = VersionFacts.from_tags(1, {"accuracy": "high", "latency_ms_1": "fast", "certificate_passed": "True"})
    assert (read.accuracy, read.parameters, read.latency_ms, read.certificate_passed) == (None, None, {}, False)


# --- in a registry ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    uri = f"sqlite:///{tmp_path_factory.mktemp('promotion') / 'mlflow.db'}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        tracking.check()
        yield uri


@pytest.fixture
def client(database: str) -> MlflowClient:
    return MlflowClient(tracking_uri=database)


@pytest.fixture
def name(client: MlflowClient, request: pytest.FixtureRequest) -> str:
    chosen = request.node.name
    client.create_registered_model(chosen)
    return str(chosen)


def add_version(client: MlflowClient, name: str, **changes: str) -> int:
    version = client.create_model_version(name, source="nowhere", tags=GOOD | changes, description="# A card")
    return int(version.version)


def champion(client: MlflowClient, name: str) -> int:
    return int(client.get_model_version_by_alias(name, "champion").version)


@pytest.mark.integration
def test_accepted_version_gets_the_alias_and_the_reason(client: MlflowClient, name: str) -> None:
    first, second = add_version(client, name), add_version(client, name, parameters="500")
    assert promotion.promote(name, str(first)).accepted
    client.set_registered_model_alias(name, "challenger", str(second))
    verdict = promotion.promote(name, "challenger")
    assert verdict.accepted
    assert (verdict.champion, champion(client, name)) == (first, second)
    new, old = (client.get_model_version(name, str(version)) for version in (second, first))
    assert new.tags["promotion_status"] == "champion"
    assert "500 parameters instead of 1,000" in new.tags["promotion_reason"]
    assert new.description.startswith("# A card\n\n## Promotion\n\n**Champion** on ")
    assert old.tags["promotion_status"] == "replaced"
    assert f"version {second} took its place" in old.description
    assert old.description.count("## Promotion") == 1


@pytest.mark.integration
def test_refused_version_says_why_and_changes_no_alias(client: MlflowClient, name: str) -> None:
    first, second = add_version(client, name), add_version(client, name)
    promotion.promote(name, str(first))
    verdict = promotion.promote(name, str(second))
    assert not verdict.accepted
    assert champion(client, name) == first
    refused = client.get_model_version(name, str(second))
    assert refused.tags["promotion_status"] == "refused"
    assert refused.tags["promotion_reason"] == verdict.reason
    assert "neither smaller nor faster than champion 1" in refused.description


@pytest.mark.integration
def test_accuracy_measured_now_counts_instead_of_the_recorded_one(client: MlflowClient, name: str) -> None:
    version = add_version(client, name)
    assert not promotion.promote(name, str(version), accuracy=90.0).accepted
    assert promotion.promote(name, str(version), accuracy=99.0).accepted


@pytest.mark.integration
def test_champion_stays_champion(client: MlflowClient, name: str) -> None:
    version = add_version(client, name)
    promotion.promote(name, str(version))
    again = promotion.promote(name, "champion")
    assert (again.accepted, again.reason) == (True, "it is the champion already")
    with pytest.raises(ConfigError, match="expected a champion before version 1, found none"):
        promotion.rollback(name)


@pytest.mark.integration
def test_unknown_version_is_one_sentence(client: MlflowClient, name: str) -> None:
    for which in ("7", "challenger"):
        with pytest.raises(ConfigError, match=f"found no version '{which}'"):
            promotion.promote(name, which)
    with pytest.raises(ConfigError, match="found no version '1'"):
        promotion.promote("nobody", "1")


@pytest.mark.integration
def test_rollback_walks_back_over_what_was_deleted(client: MlflowClient, name: str) -> None:
    versions = [add_version(client, name, parameters=str(1000 - number)) for number in range(4)]
    for version in versions:
        assert promotion.promote(name, str(version)).accepted
    client.delete_model_version(name, str(versions[2]))
    assert promotion.rollback(name) == (versions[3], versions[1])
    assert champion(client, name) == versions[1]
    assert client.get_model_version(name, str(versions[3])).tags["promotion_status"] == "rolled back"
    assert client.get_model_version(name, str(versions[1])).tags["promotion_status"] == "champion"
    assert promotion.rollback(name) == (versions[1], versions[0])


@pytest.mark.integration
def test_promotion_that_was_cut_short_leaves_no_trace_in_the_history(
    client: MlflowClient, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = [add_version(client, name, parameters=str(1000 - number)) for number in range(3)]
    promotion.promote(name, str(versions[0]))

    def die(*_: object) -> None:
        raise KeyboardInterrupt("cut short")

    with monkeypatch.context() as patch:
        patch.setattr(registry, "point_alias", die)
        with pytest.raises(KeyboardInterrupt, match="cut short"):
            promotion.promote(name, str(versions[1]))
    assert champion(client, name) == versions[0]
    promotion.promote(name, str(versions[2]))
    assert promotion.rollback(name) == (versions[2], versions[0])


@pytest.mark.integration
def test_alias_that_someone_else_moved_is_noticed(
    client: MlflowClient, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = add_version(client, name), add_version(client, name)
    promotion.promote(name, str(first))
    other = client.get_model_version(name, str(first))
    monkeypatch.setattr(registry, "_by_alias", lambda *_: other)
    with pytest.raises(EngineError, match="was moved to version 1 by someone else"):
        registry.point_alias(name, "champion", second)


# --- many at once -----------------------------------------------------------------------------------------------------

PROMOTE_MANY = """
import sys
from concurrent.futures import ThreadPoolExecutor
from tasks import promotion
name, versions = sys.argv[1], sys.argv[2:]
print("ready", flush=True)
sys.stdin.readline()
with ThreadPoolExecutor(len(versions)) as threads:
    for verdict in threads.map(lambda version: promotion.promote(name, version), versions):
        print(verdict.version, int(verdict.accepted), flush=True)
"""


@pytest.mark.integration
@pytest.mark.timeout(400)  # new processes import torch and MLflow: long on a busy machine
def test_twenty_promotions_at_once_end_with_the_smallest_as_champion(client: MlflowClient, name: str) -> None:
    sizes = [500 + 37 * number % 20 for number in range(20)]
    versions = [add_version(client, name, parameters=str(size)) for size in sizes]
    process = subprocess.Popen(
        [sys.executable, "-c", PROMOTE_MANY, name, *(str(version) for version in versions[::2])],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    with ThreadPoolExecutor(10) as threads:
        process.stdin.write("go\n")
        process.stdin.flush()
        own = list(threads.map(lambda version: promotion.promote(name, str(version)), versions[1::2]))
    output, _ = process.communicate(timeout=300)
    others = [line.split() for line in output.splitlines()]
    accepted = {verdict.version for verdict in own if verdict.accepted}
    accepted |= {int(version) for version, is_accepted in others if is_accepted == "1"}
    assert (process.returncode, len(own) + len(others)) == (0, 20)

    size_of = dict(zip(versions, sizes, strict=True))
    assert size_of[champion(client, name)] == min(sizes)
    history = json.loads(client.get_registered_model(name).tags["entprune.champions"])
    reigns = [size_of[version] for version in history]
    assert reigns == sorted(set(reigns), reverse=True)  # each champion beat the one before: none was overwritten unseen
    assert accepted == set(history)
    for version in versions:
        status = client.get_model_version(name, str(version)).tags["promotion_status"]
        expected = "champion" if version == history[-1] else "replaced" if version in history else "refused"
        assert status == expected


@pytest.mark.integration
def test_lock_on_a_server_keeps_promotions_apart(
    client: MlflowClient, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "database_file", lambda: None)  # as if the registry were a server's
    monkeypatch.setattr(promotion_lock, "_POLL_SECONDS", 0.01)
    inside: list[int] = []
    most: list[int] = []

    def hold(number: int) -> None:
        with promotion_lock.exclusive(name):
            inside.append(number)
            most.append(len(inside))
            inside.remove(number)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(hold, range(8)))
    assert most == [1] * 8
    assert f"{name}.promotion-lock" not in {model.name for model in client.search_registered_models()}


@pytest.mark.integration
def test_lock_that_its_holder_left_behind_is_taken_over(
    client: MlflowClient, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "database_file", lambda: None)
    client.create_registered_model(f"{name}.promotion-lock", tags={"entprune.owner": "dead"})
    with (
        pytest.raises(EngineError, match=f"other promotions have been under way for 0 s; .*{name}.promotion-lock"),
        promotion_lock.exclusive(name, patience_seconds=0.0),
    ):
        pytest.fail("the lock is held")
    monkeypatch.setattr(promotion_lock, "_STALE_SECONDS", -1.0)
    with promotion_lock.exclusive(name, patience_seconds=0.0):
        assert client.get_registered_model(f"{name}.promotion-lock").tags["entprune.owner"] != "dead"


@pytest.mark.integration
def test_busy_lock_file_is_one_sentence(name: str) -> None:
    with (
        promotion_lock.exclusive(name),
        pytest.raises(EngineError, match=r"other promotions have been under way .*mlflow.db.promotion.lock"),
        promotion_lock.exclusive(name, patience_seconds=0.0),
    ):
        pytest.fail("the lock is held")
