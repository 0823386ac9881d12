"""A whole run on a cluster of two nodes, each started in processes of its own, with token authentication."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import entprune
from entprune.checkpoints import save_state
from entprune.datasets import load_data
from entprune.models import build_model
from entprune.training import TrainConfig, train

pytestmark = [pytest.mark.integration, pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]
BIN = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parents[1]
LINGER_SECONDS = 30
OWN = "ray_token"  # file of the cluster's token


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def with_token(folder: Path, name: str) -> dict[str, str]:
    """Environment of a process that shows this token."""
    token = folder / name
    if not token.exists():
        token.write_text(secrets.token_hex(32), encoding="utf-8")
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "PYTHONPATH": str(ROOT)}
    return {**os.environ, **own, "OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}"}


@contextmanager
def node(folder: Path, name: str, *options: str) -> Iterator[None]:
    """One node, for as long as the block lasts."""
    command = [str(BIN / "ray"), "start", "--block", "--num-cpus=1", "--node-ip-address=127.0.0.1"]
    command += ["--disable-usage-stats", f"--object-store-memory={200 * 2**20}", f"--memory={2 * 2**30}", *options]
    with (folder / f"{name}.log").open("w") as log:
        started = subprocess.Popen(
            command, stdout=log, stderr=log, env=with_token(folder, OWN), cwd=folder, start_new_session=True
        )
    try:
        yield
    finally:
        started.send_signal(signal.SIGTERM)
        try:
            started.wait(LINGER_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)


def wait_for_nodes(address: str, count: int, folder: Path) -> None:
    """Wait until that many nodes have joined."""
    script = f"import ray; ray.init('{address}', logging_level='ERROR'); print(sum(n['Alive'] for n in ray.nodes()))"
    answer = None
    for _ in range(30):
        answer = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env=with_token(folder, OWN), check=False
        )
        if answer.returncode == 0 and answer.stdout.split()[-1] == str(count):
            return
        time.sleep(2)
    logs = "\n".join(path.read_text()[-2000:] for path in folder.glob("*.log"))
    pytest.fail(f"the nodes did not come up: {answer}\n{logs}")


@dataclass(frozen=True)
class Ground:
    """A cluster of two nodes and a trained network."""

    folder: Path
    address: str

    def prune(self, output: str, *options: str, shown: str = OWN) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "flows.cli", "prune", "--model", "digits_cnn", "--data", "digits"]
        command += ["--checkpoint", "dense.safetensors", "--max-accuracy-drop", "2", "--calibration-samples", "256"]
        command += ["--validation-samples", "300", "--output", output, "--cache-dir", f"cache-{output}", *options]
        return subprocess.run(
            command, capture_output=True, text=True, env=with_token(self.folder, shown), cwd=self.folder, check=False
        )

    def report(self, output: str) -> dict[str, Any]:
        return json.loads((self.folder / output / "report.json").read_text())


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    folder = tmp_path_factory.mktemp("nodes")
    data = load_data("digits")
    model = build_model("digits_cnn", num_classes=data.num_classes, input_shape=data.input_shape)
    save_state(train(model, data, TrainConfig(epochs=2)).model, folder / "dense.safetensors")
    address = f"127.0.0.1:{free_port()}"
    with ExitStack() as stack:
        port = address.rpartition(":")[2]
        stack.enter_context(node(folder, "head", "--head", f"--port={port}", "--include-dashboard=false"))
        wait_for_nodes(address, 1, folder)
        stack.enter_context(node(folder, "second", f"--address={address}"))
        wait_for_nodes(address, 2, folder)
        yield Ground(folder=folder, address=address)


def test_run_uses_both_nodes_and_finds_the_plan_of_a_local_run(ground: Ground) -> None:
    done = ground.prune("joined", "--ray-address", ground.address, "--workers", "2")
    assert done.returncode == 0, done.stderr
    local = ground.prune("local", "--workers", "1")
    assert local.returncode == 0, local.stderr
    joined, alone = ground.report("joined"), ground.report("local")
    assert len(joined["engine"]["nodes"]) == 2
    assert all(entry["units"] > 0 for entry in joined["engine"]["nodes"].values())
    assert len(alone["engine"]["nodes"]) == 1
    plans = [entprune.PruningPlan.from_dict(report["plan"]).digest() for report in (joined, alone)]
    assert plans[0] == plans[1]
    weights = [(ground.folder / name / "model" / "model.safetensors").read_bytes() for name in ("joined", "local")]
    assert weights[0] == weights[1]


def test_wrong_token_is_one_sentence(ground: Ground) -> None:
    done = ground.prune("refused", "--ray-address", ground.address, shown="another")
    assert done.returncode == 2
    assert "cannot join the Ray cluster" in done.stderr
    assert "RAY_AUTH_TOKEN_PATH" in done.stderr
    assert not (ground.folder / "refused").exists()
