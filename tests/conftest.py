"""Shared set-up: no telemetry, no user's servers, no user's home, one thread, one seed."""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import shutil
import signal
import tempfile
from pathlib import Path

_SESSION_HOME = Path(tempfile.mkdtemp(prefix="entprune-tests-"))
atexit.register(shutil.rmtree, _SESSION_HOME, ignore_errors=True)  # registered first: runs last
_RAY_TOKEN = _SESSION_HOME / "ray_auth_token"
_RAY_TOKEN.write_text(secrets.token_hex(32), encoding="utf-8")  # Ray would make one in the user's home

os.environ.update(
    {
        "DO_NOT_TRACK": "true",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",  # 20 are too few on a busy machine
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PREFECT_HOME": str(_SESSION_HOME / "prefect"),
        "RAY_AUTH_TOKEN_PATH": str(_RAY_TOKEN),
        "MPLCONFIGDIR": str(_SESSION_HOME / "matplotlib"),
        "MPLBACKEND": "Agg",
    }
)
for _name in ("PREFECT_API_URL", "PREFECT_API_KEY", "RAY_ADDRESS", "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
    os.environ.pop(_name, None)  # a developer's own servers are not for tests
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell makes what it runs in the background deaf to Ctrl-C,
    signal.signal(signal.SIGINT, signal.default_int_handler)  # and so all programs that the tests start

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import settings

settings.register_profile("entprune", derandomize=True, deadline=None, max_examples=30)
settings.load_profile("entprune")


def pytest_unconfigure(config: pytest.Config) -> None:
    logging.raiseExceptions = False  # Prefect logs its server's end to the stream that pytest has closed by then
    logging.getLogger("prefect").setLevel(logging.ERROR)  # and its line would follow the summary


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in one order: the same bits on every machine, and no fight with Ray's workers over cores."""
    threads_before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads_before)


@pytest.fixture(autouse=True)
def one_seed() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 -- third-party code draws from the global generator
    torch.manual_seed(0)
