"""The parts of the benchmark that run engines: pairs that are equal but for what is compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from entprune.checkpoints import save_state
from entprune.errors import ConfigError
from entprune.models import build_model
from flows import cli
from infra.benchmark import library_run
from infra.benchmark.actors import ActorsMeter
from infra.benchmark.engine import EngineMeter
from infra.benchmark.engine_tables import actors_section, engine_section
from infra.benchmark.networks import Folders
from infra.benchmark.parts import Request
from infra.benchmark.records import Record, Subject
from tests.benchmark_requests import RUN_WITH_VERSIONS, TinyRequest


def record_of(part: str, values: list[dict], facts: dict) -> dict:
    """Content of a file of results."""
    cells = [{"key": {"run": number}, "values": entry, "run": 0} for number, entry in enumerate(values)]
    return {"network": "lenet", "facts": facts, "cells": cells, "runs": [RUN_WITH_VERSIONS], "part": part}


@pytest.mark.integration
def test_one_and_two_actors_solve_the_same_problems() -> None:
    meter = ActorsMeter(
        TinyRequest(network="chain", seed=0, threads=1, folders=Folders(data=Path(), checkpoints=Path()))
    )
    subject = Subject(part="actors", network="chain", seed=0)
    assert meter.facts(Record(Path("absent"), subject))["units"] >= 2
    values = meter.measure(subject, {"pair": 1})
    assert values["speed_up"] == values["seconds"]["1"] / values["seconds"]["2"]
    assert min(values["seconds"].values()) > 0


def test_library_takes_the_options_of_prune_and_writes_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_state(build_model("digits_cnn", num_classes=10, input_shape=(1, 8, 8)), tmp_path / "dense.safetensors")
    monkeypatch.setattr(cli, "_prune", library_run.run)
    command = [
        "prune",
        "--model",
        "digits_cnn",
        "--checkpoint",
        str(tmp_path / "dense.safetensors"),
        "--data",
        "digits",
    ]
    command += ["--parameters-removed", "0.5", "--calibration-samples", "128", "--validation-samples", "64"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--output", str(tmp_path / "out")])
    assert ended.value.code == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["one_shot"]["parameters_removed"] >= 0.5
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()


def test_engine_compares_runs_on_one_thread_alone() -> None:
    request = Request(network="lenet", seed=0, threads=2, folders=Folders(data=Path(), checkpoints=Path()))
    with pytest.raises(ConfigError, match="compares runs on one thread"):
        EngineMeter(request)


def test_tables_show_medians_of_pairs() -> None:
    speeds = [1.5, 1.9, 1.8]
    pairs = [{"seconds": {"1": 10.0, "2": 10.0 / gain}, "speed_up": gain, "threads": 1} for gain in speeds]
    assert "| **1.80** (1.50 to 1.90) | 3 | 1 |" in "\n".join(
        actors_section([record_of("actors", pairs, {"units": 6})])
    )
    runs = [{"seconds": {"library": 10.0, "flow": 10.0 + more}, "overhead_seconds": more} for more in (9.0, 30.0, 12.0)]
    assert "| lenet | 10.0 | 22.0 | **12.0** | 3 |" in "\n".join(engine_section([record_of("engine", runs, {})]))
