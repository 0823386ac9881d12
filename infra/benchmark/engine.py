"""Part `engine`: what the flow, its workers and its tracking add to a run of the library in process.

Both are processes of their own with the same settings, one worker and nothing stored before; they alternate. The clock
runs from start to exit, so imports, Ray, Prefect, MLflow and the files are in.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entprune.checkpoints import sha256_file
from entprune.errors import ConfigError
from infra.benchmark.networks import Folders, TrainedNetwork, find_network
from infra.benchmark.parts import Key, Part, Request
from infra.benchmark.records import Record, Subject

RUNS = 3
MAX_DROP = 0.5
_ROOT = Path(__file__).resolve().parents[2]
_QUIET = {"DO_NOT_TRACK": "true", "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "MLFLOW_DISABLE_TELEMETRY": "true",
          "RAY_USAGE_STATS_ENABLED": "0"}  # fmt: skip


class EngineMeter:
    """Runs the command and the library."""

    def __init__(self, request: Request) -> None:
        self._entry, self._seed = find_network(request.network), request.seed
        self._folders = Folders(
            data=request.folders.data.absolute(), checkpoints=request.folders.checkpoints.absolute()
        )
        if request.threads != 1:
            raise ConfigError("the part 'engine' compares runs on one thread; leave THREADS out.")

    def facts(self, record: Record) -> Mapping[str, Any]:  # noqa: ARG002 -- one signature for all parts
        """Hash of the checkpoint, and the budget."""
        checkpoint = self._folders.checkpoints / self._entry.checkpoint
        return {"checkpoint_sha256": sha256_file(checkpoint), "max_accuracy_drop": MAX_DROP}

    def measure(self, subject: Subject, key: Key) -> Mapping[str, Any]:  # noqa: ARG002 -- one signature for all parts
        """Wall-clock seconds of both, which must find the same network."""
        modules = {"flow": "flows.cli", "library": "infra.benchmark.library_run"}
        names = list(modules) if key["run"] % 2 else list(modules)[::-1]
        seconds, parameters, stages = {}, {}, {}
        for name in names:
            with tempfile.TemporaryDirectory(prefix="entprune-") as folder:
                seconds[name] = self._time(modules[name], Path(folder))
                report = json.loads((Path(folder) / "out" / "report.json").read_text(encoding="utf-8"))
            parameters[name], stages[name] = report["one_shot"]["parameters"], report["timings_seconds"]
        if parameters["flow"] != parameters["library"]:
            raise ConfigError(f"the flow and the library found different networks: {parameters}; please report it.")
        return {"seconds": seconds, "overhead_seconds": seconds["flow"] - seconds["library"], "stages": stages,
                "parameters": parameters["flow"], "threads": 1}  # fmt: skip

    def _time(self, module: str, folder: Path) -> float:
        command = [sys.executable, "-m", module, *self._arguments()]
        paths = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, **_QUIET, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        start = time.perf_counter()
        done = subprocess.run(  # noqa: S603 -- this project's own command
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        seconds = time.perf_counter() - start
        if done.returncode:
            raise ConfigError(f"'{module}' failed: {done.stderr.strip().splitlines()[-1]}")
        return seconds

    def _arguments(self) -> list[str]:
        entry, folders = self._entry, self._folders
        asked = ["prune", "--model", entry.name, "--checkpoint", str(folders.checkpoints / entry.checkpoint)]
        asked += ["--data", data_spec(entry, folders.data), "--data-root", str(folders.data), "--output", "out"]
        asked += ["--max-accuracy-drop", str(MAX_DROP), "--seed", str(self._seed), "--workers", "1"]
        for name, values in (("--mean", entry.mean), ("--std", entry.std)):
            asked += [] if values is None else [name, ",".join(map(str, values))]
        return asked


def data_spec(entry: TrainedNetwork, folder: Path) -> str:
    """The data set's `.npz` file where there is one."""
    packed = folder / f"{entry.data}.npz"
    return f"npz:{packed}" if packed.is_file() else entry.data


def cells(request: Request) -> list[tuple[Subject, Key]]:
    """One cell for each pair of runs."""
    subject = Subject(part="engine", network=request.network, seed=request.seed)
    return [(subject, {"run": number}) for number in range(1, RUNS + 1)]


PART = Part(
    name="engine", networks=("lenet", "vgg16_cifar"), threads=1, cells=cells, meter=EngineMeter,
    headline=("seconds", "overhead_seconds"),
)  # fmt: skip
