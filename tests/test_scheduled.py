"""The whole operation on this machine: PostgreSQL behind both servers, a worker, a schedule that nobody starts by hand,
and the champion in the hands of a program that has no entprune.

One set of servers, one dense network and one scheduled run serve all tests of this file. The network is LeNet; it wants
28x28 pixels, so scikit-learn's digits are blown up.
"""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import json
import os
import secrets
import signal
import subprocess
import sys
import urllib.error
import venv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from mlflow import MlflowClient

from entprune.datasets import ArraySplit, load_data
from tests import servers

ROOT = Path(__file__).resolve().parents[1]
DEPLOYMENTS = ROOT / "infra/prefect/prefect.yaml"
DATA, CHECKPOINT = "npz:digits28.npz", "checkpoints/lenet.safetensors"
SCHEDULED, OTHER = "watch-dense-model/watch-dense", "promote-model/nightly-promotion"
NIGHTLY = "prune-model/nightly-pruning"
WAITING, ENDED = ("SCHEDULED", "PENDING", "RUNNING"), ("COMPLETED", "FAILED", "CRASHED")

REASON = servers.missing_for_postgres() or (
    None if importlib.util.find_spec("psycopg2") else "psycopg2 is not installed: pip install 'entprune[server]'"
)
pytestmark = [pytest.mark.integration, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

# What a consumer runs: mlflow and torch, in an environment that cannot import entprune.
CONSUMER = """
import importlib.util, json, sys

for name in ("entprune", "flows", "tasks"):
    if importlib.util.find_spec(name) is not None:
        raise SystemExit(f"{name} can be imported")

import mlflow, numpy as np, torch

uri = sys.argv[1]
with np.load(sys.argv[2]) as stored:
    pixels, labels = stored["pixels"], stored["labels"]
folder = mlflow.artifacts.download_artifacts(uri)
with open(f"{folder}/extra_files/preprocessing.json") as stream:
    preparation = json.load(stream)
mean, std = (np.reshape(preparation[name], (1, -1, 1, 1)) for name in ("mean", "std"))
images = ((pixels - mean) / std).astype("float32")
with torch.no_grad():
    logits = mlflow.pytorch.load_model(uri)(torch.from_numpy(images)).numpy()
answers = mlflow.pyfunc.load_model(uri).predict(images)
accuracies = [100.0 * float((found.argmax(1) == labels).mean()) for found in (logits, answers)]
print(json.dumps({"accuracies": accuracies, "images": images[:3].tolist(), "logits": logits[:3].tolist()}))
"""


@dataclass(frozen=True)
class Site:
    """Servers at work, and the folder that its relative paths count from."""

    folder: Path
    environment: Mapping[str, str]
    database: servers.Postgres
    prefect: str
    mlflow: MlflowClient
    secrets: tuple[str, ...]

    def run(self, *command: str) -> str:
        """Run a program of this environment as a user would; what it prints."""
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def ask(self, path: str, content: Mapping[str, Any] | None = None, method: str = "POST") -> Any:
        """What Prefect's server answers."""
        login = base64.b64encode(self.environment["PREFECT_API_AUTH_STRING"].encode()).decode()
        return servers.ask(
            f"{self.prefect}/{path}", content, method=method, headers={"Authorization": f"Basic {login}"}
        )

    def deployment(self, name: str) -> dict[str, Any]:
        """What Prefect knows about a deployment."""
        return self.ask(f"deployments/name/{name}", method="GET")

    def runs(self, name: str, *states: str) -> list[dict[str, Any]]:
        """Runs of a deployment in some states, the first one first."""
        asked = {
            "deployments": {"id": {"any_": [self.deployment(name)["id"]]}},
            "flow_runs": {"state": {"type": {"any_": list(states)}}},
            "sort": "START_TIME_ASC",
        }
        return self.ask("flow_runs/filter", asked)

    def state_of(self, run: str) -> str:
        """What has become of a run."""
        return self.ask(f"flow_runs/{run}", method="GET")["state_type"]

    def set_schedules(self, name: str, *, active: bool) -> None:
        """Switch a deployment's schedules on or off."""
        found = self.deployment(name)
        for schedule in found["schedules"]:
            self.ask(f"deployments/{found['id']}/schedules/{schedule['id']}", {"active": active}, method="PATCH")

    def idle(self, name: str) -> bool:
        """Whether no run of a deployment is under way; runs that are only planned are withdrawn.

        Switching the schedules off withdraws them too, but the server may be planning the next ones at that moment.
        """
        for run in self.runs(name, "SCHEDULED"):
            with contextlib.suppress(urllib.error.HTTPError):  # 404: gone meanwhile
                self.ask(f"flow_runs/{run['id']}", method="DELETE")
        return self.runs(name, *WAITING) == []


def write_digits(folder: Path) -> None:
    """The bundled digits, 8x8 pixels each, as 28x28."""
    digits, arrays = load_data("digits"), {}
    for name, split in (("train", digits.train), ("test", digits.test)):
        assert isinstance(split, ArraySplit)
        blown_up = np.kron(split.images, np.ones((3, 3), split.images.dtype))
        arrays[f"x_{name}"] = np.pad(blown_up, ((0, 0), (0, 0), (2, 2), (2, 2)))
        arrays[f"y_{name}"] = split.labels
    np.savez(folder / DATA.removeprefix("npz:"), **arrays)


def write_deployments(folder: Path) -> None:
    """The real deployments; one of them is due every five seconds, and asks for what surely passes the promotion."""
    content = yaml.safe_load(DEPLOYMENTS.read_text(encoding="utf-8"))
    for entry in content["deployments"]:
        if OTHER.endswith(entry["name"]):
            entry["parameters"]["parameters"]["data"] = DATA
        if NIGHTLY.endswith(entry["name"]):
            entry["parameters"]["parameters"] |= {
                "model": "lenet",
                "checkpoint": CHECKPOINT,
                "data": DATA,
                "cache_dir": "cache",
            }
        if SCHEDULED.endswith(entry["name"]):
            entry["schedules"] = [{"interval": 5, "active": True}]
            prune = entry["parameters"]["parameters"]["prune"]
            del prune["max_accuracy_drop"]  # 449 test images say little about one point
            prune |= {"parameters_removed": 0.6, "data": DATA}
    (folder / "prefect.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    with contextlib.ExitStack() as stack:
        database = stack.enter_context(servers.postgres(["prefect", "mlflow"], folder / "postgres.log"))
        ports = {"prefect": servers.free_port(), "mlflow": servers.free_port()}
        passwords = {"prefect": secrets.token_hex(16), "mlflow": secrets.token_hex(16)}
        environment = dict(os.environ) | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_API_URL": f"http://127.0.0.1:{ports['prefect']}/api",
            "PREFECT_API_AUTH_STRING": f"admin:{passwords['prefect']}",
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            "PREFECT_RUNNER_POLL_FREQUENCY": "2",
            "PREFECT_LOGGING_LEVEL": "DEBUG",  # a test looks for passwords in what is written
            "MLFLOW_TRACKING_URI": f"http://admin:{passwords['mlflow']}@127.0.0.1:{ports['mlflow']}",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # runs of MLflow's own, which nobody asks for here
        }

        def start(name: str, *command: str, **further: str) -> None:
            program = servers.running(
                [sys.executable, "-m", *command],
                folder / f"{name}.log",
                environment=environment | further,
                folder=folder,
            )
            stack.enter_context(program)

        start(
            "prefect", "prefect", "server", "start", "--port", str(ports["prefect"]),
            PREFECT_API_DATABASE_CONNECTION_URL=database.uri("prefect", "postgresql+asyncpg"),
            PREFECT_SERVER_API_AUTH_STRING=environment["PREFECT_API_AUTH_STRING"],
            PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS="3",
        )  # fmt: skip
        start(
            "mlflow", "mlflow", "server", "--port", str(ports["mlflow"]), "--workers", "1",
            "--serve-artifacts", "--artifacts-destination", str(folder / "artifacts"),
            MLFLOW_BACKEND_STORE_URI=database.uri("mlflow"),
        )  # fmt: skip
        tracking = f"http://127.0.0.1:{ports['mlflow']}"
        servers.wait_until(lambda: servers.answers(f"{tracking}/health"), "MLflow answers")
        servers.wait_until(lambda: servers.answers(f"{environment['PREFECT_API_URL']}/health"), "Prefect answers")
        made = Site(
            folder=folder,
            environment=environment,
            database=database,
            prefect=environment["PREFECT_API_URL"],
            mlflow=MlflowClient(tracking_uri=tracking),
            secrets=(database.password, *passwords.values()),
        )
        write_digits(folder)
        made.run(
            "flows.cli", "train", "--model", "lenet", "--data", DATA, "--epochs", "6",
            "--output", CHECKPOINT, "--register", "digits-dense",
        )  # fmt: skip
        subprocess.run(
            ["/bin/sh", str(ROOT / "infra/prefect/create_pools.sh")], env=environment, check=True, capture_output=True
        )
        write_deployments(folder)
        made.run("prefect", "--no-prompt", "deploy", "--prefect-file", "prefect.yaml", "--all")
        start("worker", "prefect", "worker", "start", "--pool", "entprune-process")
        yield made


@pytest.fixture(scope="module")
def first_run(site: Site) -> dict[str, Any]:
    """The first run that the schedule brought about, at its end; none is under way any more."""
    servers.wait_until(lambda: site.runs(SCHEDULED, "RUNNING") != [], "a scheduled run starts")
    site.set_schedules(SCHEDULED, active=False)
    servers.wait_until(lambda: site.idle(SCHEDULED), "the scheduled run ends", 300)
    return site.runs(SCHEDULED, *ENDED)[0]


@pytest.fixture(scope="module")
def champion(site: Site, first_run: dict[str, Any]) -> Any:
    """The version that the schedule made champion, without a command of ours."""
    return site.mlflow.get_model_version_by_alias("digits-small", "champion")


@pytest.fixture(scope="module")
def consumer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a virtual environment with the packages of this one, apart from what is installed as editable."""
    folder = tmp_path_factory.mktemp("consumer")
    venv.create(folder / "venv", with_pip=False)
    (packages,) = (folder / "venv/lib").glob("python*/site-packages")
    places = [place for place in sys.path if place.endswith(("site-packages", "dist-packages"))]
    (packages / "shared.pth").write_text("\n".join(places) + "\n", encoding="utf-8")
    python, program = folder / "venv/bin/python", folder / "venv/bin/uvicorn"  # which MLflow starts by its name
    program.write_text(f'#!/bin/sh\nexec "{python}" -m uvicorn "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    return python


def consumer_environment(site: Site, consumer: Path) -> dict[str, str]:
    kept = {name: value for name, value in site.environment.items() if not name.startswith(("PYTHON", "PREFECT"))}
    return kept | {
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "PATH": f"{consumer.parent}{os.pathsep}{site.environment['PATH']}",
    }


def write_images(site: Site, path: Path) -> None:
    data = load_data(f"npz:{site.folder / DATA.removeprefix('npz:')}")
    pixels = data.test.batch(np.arange(len(data.test))).numpy() * data.std[0] + data.mean[0]
    np.savez(path, pixels=pixels, labels=data.test.labels)


def test_schedule_prunes_registers_and_promotes(site: Site, first_run: dict[str, Any], champion: Any) -> None:
    assert (first_run["state_type"], first_run["auto_scheduled"]) == ("COMPLETED", True)
    tags = champion.tags
    assert (tags["certificate_passed"], tags["promotion_status"]) == ("true", "champion")
    assert tags["dense_version"] == "models:/digits-dense/1"
    assert int(tags["parameters"]) < int(tags["dense_parameters"])
    dense = site.mlflow.get_model_version("digits-dense", "1")
    assert dense.tags["entprune.state"] == f"pruned: models:/digits-small/{champion.version}"
    pruning = site.ask(f"flow_runs/{tags['prefect_flow_run_id']}", method="GET")
    assert pruning["state_type"] == "COMPLETED"
    assert pruning["parent_task_run_id"] is not None
    report = json.loads((site.folder / "runs/watched/digits-dense-1/report.json").read_text(encoding="utf-8"))
    assert report["lineage"]["registered_version"] == int(champion.version)


def test_postgres_holds_both_records(site: Site, champion: Any) -> None:
    runs = servers.query(site.database, "prefect", "SELECT name FROM flow_run WHERE state_type = 'COMPLETED'")
    assert runs
    versions = servers.query(site.database, "mlflow", "SELECT name, version FROM model_versions")
    assert ("digits-small", int(champion.version)) in versions
    assert not list(site.folder.rglob("*.db"))


def test_no_password_is_in_anything_that_was_written(site: Site, champion: Any) -> None:
    written = {str(path): path.read_bytes() for path in site.folder.rglob("*") if path.is_file()}
    written |= {name: servers.dump(site.database, name) for name in ("prefect", "mlflow")}
    assert len(written["prefect"]) > 10_000
    assert champion.name.encode() in written["mlflow"]
    showing = [name for name, content in written.items() if any(secret.encode() in content for secret in site.secrets)]
    assert showing == []


def test_champion_answers_in_an_environment_without_entprune(site: Site, champion: Any, consumer: Path) -> None:
    write_images(site, site.folder / "test_images.npz")
    environment = consumer_environment(site, consumer)
    done = subprocess.run(
        [str(consumer), "-c", CONSUMER, "models:/digits-small@champion", str(site.folder / "test_images.npz")],
        env=environment,
        cwd=consumer.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["accuracies"] == pytest.approx([float(champion.tags["accuracy"])] * 2, abs=1e-4)  # as it is rounded

    address = f"http://127.0.0.1:{(port := servers.free_port())}"
    command = [str(consumer), "-m", "mlflow", "models", "serve", "--model-uri", "models:/digits-small@champion"]
    command += ["--env-manager", "local", "--port", str(port)]
    with servers.running(command, site.folder / "serve.log", environment=environment, folder=consumer.parent):
        servers.wait_until(lambda: servers.answers(f"{address}/ping"), "the scoring server answers")
        served = servers.ask(f"{address}/invocations", {"inputs": found["images"]})["predictions"]
    assert np.abs(np.asarray(served) - np.asarray(found["logits"])).max() <= 1e-5


def test_second_run_waits_for_the_pool(site: Site, champion: Any) -> None:
    started = [
        site.ask(f"deployments/{site.deployment(name)['id']}/create_flow_run", {"state": {"type": "SCHEDULED"}})["id"]
        for name in (SCHEDULED, OTHER)
    ]

    servers.wait_until(lambda: all(site.state_of(run) in ENDED for run in started), "both runs end")
    assert [site.state_of(run) for run in started] == ["COMPLETED"] * 2
    spans = []
    for run in started:
        history = site.ask(f"flow_run_states/?flow_run_id={run}", method="GET")
        times = {entry["type"]: datetime.fromisoformat(entry["timestamp"]) for entry in history}
        spans.append((times["RUNNING"], times["COMPLETED"]))
    (_, first_end), (second_start, _) = sorted(spans)
    assert first_end <= second_start


def workers_of(site: Site) -> list[str]:
    """Names of this site's Ray workers."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it may end meanwhile
            name = (process / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
            if name.startswith("ray::") and str(site.folder).encode() in (process / "environ").read_bytes():
                found.append(name)
    return found


def results_in(cache: Path) -> dict[str, int]:
    """When each complete result of a store was written, apart from those that are replaced by a whole."""
    files = [path for path in cache.rglob("*") if path.is_file() and ".partial" not in path.name]
    names = {path: str(path.relative_to(cache)) for path in files}
    return {name: path.stat().st_mtime_ns for path, name in names.items() if not name.startswith(("shards", "ranges"))}


def test_cancelled_run_frees_its_workers_and_goes_on_when_started_again(site: Site, champion: Any) -> None:
    def start() -> str:
        asked = {"state": {"type": "SCHEDULED"}}
        return site.ask(f"deployments/{site.deployment(NIGHTLY)['id']}/create_flow_run", asked)["id"]

    def is_searching(run: str) -> bool:
        asked = {"flow_runs": {"id": {"any_": [run]}}, "task_runs": {"state": {"type": {"any_": ["RUNNING"]}}}}
        return any(task["name"].startswith("search") for task in site.ask("task_runs/filter", asked))

    first = start()
    servers.wait_until(lambda: is_searching(first), "the search begins")
    assert workers_of(site)
    site.ask(f"flow_runs/{first}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
    servers.wait_until(lambda: site.state_of(first) == "CANCELLED", "the run is cancelled")
    servers.wait_until(lambda: workers_of(site) == [], "its workers end", 60)
    assert not (site.folder / "runs/nightly").exists()
    kept = results_in(cache := site.folder / "cache/store")
    assert any(path.startswith("paths") for path in kept)
    second = start()
    servers.wait_until(lambda: site.state_of(second) in ENDED, "the run ends")
    assert site.state_of(second) == "COMPLETED"
    assert (site.folder / "runs/nightly/report.json").is_file()
    assert kept.items() <= results_in(cache).items()  # what the first attempt had stored is not written again


def test_served_schedule_prunes_and_ends_with_ctrl_c(site: Site, champion: Any) -> None:
    log = site.folder / "schedule.log"
    given = ["--model", "lenet", "--checkpoint", CHECKPOINT, "--data", DATA]
    given += ["--parameters-removed", "0.6", "--output", "runs/served"]
    command = [sys.executable, "-m", "flows.cli", "schedule", "--cron", "0 2 * * *", "--name", "served", *given]

    def is_polled() -> bool:
        with contextlib.suppress(urllib.error.HTTPError):  # 404 until it is there
            return site.deployment("prune-model/served")["last_polled"] is not None
        return False

    def is_paused() -> bool:
        return site.deployment("prune-model/served")["paused"]

    with servers.running(command, log, environment=site.environment, folder=site.folder) as process:
        servers.wait_until(is_polled, "the schedule is served")
        assert not is_paused()
        site.ask(f"deployments/{site.deployment('prune-model/served')['id']}/create_flow_run", {})
        servers.wait_until(lambda: site.runs("prune-model/served", *ENDED) != [], "the served run ends", 300)
        assert site.runs("prune-model/served", *ENDED)[0]["state_type"] == "COMPLETED"
        assert (site.folder / "runs/served/report.json").is_file()
        process.send_signal(signal.SIGINT)
        assert process.wait(180) == 0
    assert is_paused()
    lines = log.read_text(encoding="utf-8").splitlines()
    assert "schedule   served: 0 2 * * * (UTC); end it with Ctrl-C" in lines
    assert "Traceback" not in "\n".join(lines)
