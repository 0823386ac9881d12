"""What the fault tests stand on: a small trained network, the run that nothing disturbs, and counts of its units."""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from entprune import PruningPlan
from entprune.checkpoints import save_state
from entprune.datasets import load_data
from entprune.models import build_model
from entprune.storage import atomic_write_text
from entprune.training import TrainConfig, train
from flows.parameters import PruneParameters

WORKERS = 2
BEING_STORED = 4  # results that a process may hold: two that wait for the disk, and two that have just come in
UNIT_STAGES = frozenset({"shards", "paths", "candidates", "ranges"})  # one stored result for each unit


@dataclass(frozen=True)
class Ground:
    """A folder with a dense network in it."""

    folder: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / "dense.safetensors"

    def parameters(self, name: str, **changes: Any) -> PruneParameters:
        """A run with a store of its own."""
        values = {
            "model": "digits_cnn",
            "checkpoint": self.checkpoint,
            "data": "digits",
            "max_accuracy_drop": 2.0,
            "calibration_samples": 512,
            "validation_samples": 400,
            "workers": WORKERS,
            "output": self.folder / name / "out",
            "cache_dir": self.folder / name / "cache",
            "overrides": {"min_rows": 1000, "max_rounds": 3, "calibration_shards": 6},
        }
        return PruneParameters(**values | changes)


def lay_ground(folder: Path) -> Ground:
    """Train the dense network."""
    ground = Ground(folder)
    data = load_data("digits")
    model = build_model("digits_cnn", num_classes=data.num_classes, input_shape=data.input_shape)
    save_state(train(model, data, TrainConfig(epochs=3)).model, ground.checkpoint)
    return ground


@dataclass
class Events(logging.Handler):
    """Counts what a run hands out and stores, and calls back at every event: kills happen there.

    Attributes:
        handed_out: units by stage.
        stored: results by kind.
        lines: what was said to the user.
    """

    on_event: Callable[[str, int], None] = lambda _, __: None
    handed_out: Counter[str] = field(default_factory=Counter)
    stored: Counter[str] = field(default_factory=Counter)
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(logging.DEBUG)

    __hash__ = logging.Handler.__hash__

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno >= logging.WARNING:
            self.lines.append(text)
        kind = note(text, self.handed_out, self.stored)
        if kind is not None:
            self.on_event(kind, self.handed_out.total())


def note(text: str, handed_out: Counter[str], stored: Counter[str]) -> str | None:
    """Count one line of a run's log; returns what kind of event it is, if any."""
    _, _, rest = text.partition("stage '")
    stage, _, what = rest.partition("': ")
    if what.endswith("is handed out"):
        handed_out[stage] += 1
        return "handed out"
    if what.startswith("stored ") and stage in UNIT_STAGES:
        stored[stage] += 1
        return "stored"
    return None


@contextmanager
def listening(events: logging.Handler) -> Iterator[None]:
    """Let a handler hear the loggers of the runner, the queue, the store and the tracker."""
    loggers = [logging.getLogger(name) for name in ("tasks", "flows.server")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(events)
        logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(events)
            logger.setLevel(level)


@dataclass(frozen=True)
class Baseline:
    """The run that nothing disturbs."""

    plan: str
    accuracy: float
    units: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """One kill point and what came of it.

    Attributes:
        point: where in the run.
        died: what was killed, and how.
        outcome: how the run went on.
        same_plan: whether it ended in the plan of the undisturbed run.
        in_flight: units that were handed out and not stored when it was killed.
        redone: units that were done again because of it.
        seconds: from the kill, or the start of the run, to the end of the run.
    """

    point: str
    died: str
    outcome: str
    same_plan: bool
    in_flight: int
    redone: int
    seconds: float


def write_table(path: Path, rows: list[Row], seconds: float) -> None:
    """All rows with what they were made with."""
    content = {
        "command": "make faults",
        "workers": WORKERS,
        "bound_in_flight": WORKERS + BEING_STORED,
        "versions": {name: version(name) for name in ("torch", "ray", "prefect", "mlflow")},
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "seconds": round(seconds),
        "rows": [asdict(row) for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, json.dumps(content, indent=1) + "\n")


def plan_of(report: dict[str, Any]) -> str:
    """Digest of a report's plan."""
    return PruningPlan.from_dict(report["plan"]).digest()


def read_report(parameters: PruneParameters) -> dict[str, Any]:
    """What a run wrote."""
    content: dict[str, Any] = json.loads((parameters.output / "report.json").read_text(encoding="utf-8"))
    return content


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Look until something has come about."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:g} s for {what}")
        time.sleep(0.02)
