"""Operation: verdicts and their exit codes, schedules that mean what `prune` means, the watch over versions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from mlflow import MlflowClient
from prefect.deployments.runner import RunnerDeployment
from pydantic import ValidationError
from torch import nn

from entprune.checkpoints import load_state, save_state
from entprune.errors import CheckpointError, ConfigError, EngineError
from entprune.models import build_model
from flows import cli, operations, promote, serving, watch
from flows.parameters import PruneParameters
from tasks import dense_registry, registry, tracking
from tasks.promotion import Check, Verdict

PRUNE = ["--model", "digits_cnn", "--checkpoint", "dense.safetensors", "--data", "digits", "--output", "runs/out"]


def run_cli(*arguments: str) -> int:
    with pytest.raises(SystemExit, match=r"^\d+$") as ended:
        cli.main(arguments)
    assert isinstance(ended.value.code, int)
    return ended.value.code


def make_network() -> nn.Module:
    return build_model("digits_cnn", num_classes=10, input_shape=(1, 8, 8))


# --- promote ----------------------------------------------------------------------------------------------------------


def make_verdict(*, accepted: bool) -> Verdict:
    checks = (
        Check(name="certificate", passed=True, text="the certificate passed"),
        Check(name="cost", passed=accepted, text="neither smaller nor faster than champion 1"),
    )
    return Verdict(name="net", version=2, champion=1, accepted=accepted, checks=checks)


@pytest.mark.parametrize(("accepted", "code"), [(True, 0), (False, operations.REFUSED)])
def test_refusal_is_one_sentence_and_its_own_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], accepted: bool, code: int
) -> None:
    monkeypatch.setattr(operations, "_run_flow", lambda *_: make_verdict(accepted=accepted).to_dict())
    assert run_cli("promote", "net", "2") == code
    output = capsys.readouterr()
    if accepted:
        assert "version 2 of 'net': the certificate passed; neither" in output.out
    else:
        sentence = "version 2 of 'net' was not promoted: neither smaller nor faster than champion 1."
        assert output.err == f"entprune: refused: {sentence}\n"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--max-accuracy-drop", "-1"], "max_accuracy_drop: "),
        (["--data-root", "data"], "data_root: expected it together with data"),
    ],
)
def test_bad_promotion_is_refused_before_any_engine(
    capsys: pytest.CaptureFixture[str], options: list[str], reason: str
) -> None:
    assert run_cli("promote", "net", "2", *options) == 2
    assert reason in capsys.readouterr().err


def test_promotion_without_a_registry_makes_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_cli("rollback", "net") == 2
    assert "no MLflow database at" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_verdict_reads_well_on_the_page_of_the_run() -> None:
    text = promote.describe_verdict(make_verdict(accepted=False))
    assert text.startswith("# net: version 2 was refused\n\nChampion before: version 1. Neither smaller")
    assert "| cost | **no** | neither smaller nor faster than champion 1 |" in text


# --- schedule ---------------------------------------------------------------------------------------------------------


def test_schedule_takes_the_options_of_prune(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    options = [*PRUNE, "--max-accuracy-drop", "1", "--min-channels", "2", "--min-fraction", "0.1", "--mean", "0.3"]
    options += ["--std", "0.4", "--keep", "conv1", "--keep", "conv2", "--register", "net", "--cache-dir", "cache"]
    options += ["--parameters-removed", "0.4", "--macs-removed", "0.3", "--latency-removed", "0.2"]
    options += ["--latency-batch", "8"]
    options += ["--finetune-epochs", "2", "--finetune-lr", "0.1", "--distillation-weight", "0.5"]
    options += ["--finetune-batch-size", "64"]
    options += ["--rounds", "3", "--round-to", "4", "--seed", "5"]
    options += ["--calibration-samples", "100", "--validation-samples", "200", "--workers", "2"]
    asked: list[dict[str, Any]] = []
    served: list[tuple[PruneParameters, dict[str, Any]]] = []
    monkeypatch.setattr(cli, "_prune", lambda values, **_: asked.append(values) or 0)
    monkeypatch.setattr(serving, "require_lasting_server", lambda: None)
    monkeypatch.setattr(serving, "serve_pruning", lambda parameters, **when: served.append((parameters, when)))
    assert run_cli("prune", *options) == 0
    assert run_cli("schedule", "--cron", "0 2 * * *", "--timezone", "Europe/Berlin", *options) == 0
    ((parameters, when),) = served
    expected = PruneParameters(**asked[0]).model_dump()
    for path in ("checkpoint", "output", "cache_dir"):
        expected[path] = tmp_path / expected[path]  # whoever runs it may stand elsewhere
    assert parameters.model_dump() == expected
    assert when == {"name": "scheduled", "cron": "0 2 * * *", "timezone": "Europe/Berlin"}


def test_every_option_of_prune_is_a_field_of_a_scheduled_run() -> None:
    group = typer.main.get_command(cli.app)
    options = {parameter.name for parameter in group.commands["prune"].params} - {"help"}
    values = operations.prune_values(dict.fromkeys(options, 1) | {"mean": "0.3", "std": "0.4", "keep": ()})
    assert set(values) <= set(PruneParameters.model_fields)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--cron", "every night", *PRUNE, "--macs-removed", "0.5"], "--cron: expected minute hour day month weekday"),
        (["--cron", "0 2 * * *", "--timezone", "Mars", *PRUNE, "--macs-removed", "0.5"], "--timezone: expected a time"),
        (["--cron", "0 2 * * *", *PRUNE], "budget"),
        (["--cron", "0 2 * * *", *PRUNE, "--macs-removd", "0.5"], "No such option: --macs-removd"),
        (["--cron", "0 2 * * *", "--model", "lenet"], "Missing option"),
    ],
)
def test_bad_schedule_is_one_sentence(capsys: pytest.CaptureFixture[str], options: list[str], reason: str) -> None:
    assert run_cli("schedule", *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line


def test_schedule_without_a_lasting_server_says_how_to_start_one() -> None:
    with pytest.raises(EngineError, match="run `prefect server start` and set PREFECT_API_URL"):
        serving.require_lasting_server()


def test_served_runs_exclude_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[tuple[RunnerDeployment, dict[str, Any]]] = []
    monkeypatch.setattr(serving, "serve", lambda deployment, **options: served.append((deployment, options)))
    parameters = PruneParameters(
        model="lenet", checkpoint=Path("/a.pt"), data="mnist", macs_removed=0.5, output=Path("/out")
    )
    serving.serve_pruning(parameters, name="nightly", cron="0 2 * * *", timezone="UTC")
    ((deployment, options),) = served
    assert (options["limit"], deployment.concurrency_limit) == (1, 1)
    assert PruneParameters.model_validate(deployment.parameters["parameters"]) == parameters
    assert deployment.entrypoint == "flows.prune_model.prune_model"
    assert [schedule.schedule.cron for schedule in deployment.schedules] == ["0 2 * * *"]


# --- watch ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowClient]:
    uri = f"sqlite:///{tmp_path_factory.mktemp('operations') / 'mlflow.db'}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        tracking.check()
        yield MlflowClient(tracking_uri=uri)


def watch_parameters(name: str, **changes: Any) -> watch.WatchParameters:
    prune = {"data": "digits", "max_accuracy_drop": 1.0, "output": "runs/watched", "register": f"{name}-small"}
    return watch.WatchParameters(**{"name": name, "prune": prune} | changes)


@pytest.mark.integration
def test_dense_version_keeps_its_state_dict(client: MlflowClient, tmp_path: Path) -> None:
    model = make_network()
    number = dense_registry.register_dense(model, "kept", "digits_cnn", {"accuracy": 97.5})
    version = client.get_model_version("kept", str(number))
    assert version.tags[dense_registry.MODEL_SPEC] == "digits_cnn"
    assert version.tags["accuracy"] == "97.5"
    waiting = dense_registry.newest_waiting("kept")
    assert waiting is not None
    state = load_state(dense_registry.fetch_checkpoint(waiting, tmp_path))
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


@pytest.mark.integration
def test_each_new_version_is_pruned_once(client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[PruneParameters, set[str]]] = []
    verdicts: list[promote.PromoteParameters] = []

    def prune(parameters: PruneParameters) -> dict[str, Any]:
        seen.append((parameters, set(load_state(parameters.checkpoint))))
        return {"lineage": {"registered_version": 7}}

    monkeypatch.setattr(watch, "prune_model", prune)
    monkeypatch.setattr(watch, "promote", lambda asked: verdicts.append(asked) or {"accepted": True})
    dense_registry.register_dense(make_network(), "new", "digits_cnn", {})
    newest = dense_registry.register_dense(make_network(), "new", "digits_cnn", {})
    found = watch.watch.fn(watch_parameters("new", promote=True))
    assert found == {"dense_version": newest, "registered_version": 7, "verdict": {"accepted": True}}
    ((parameters, keys),) = seen
    assert (parameters.model, parameters.dense_version) == ("digits_cnn", f"models:/new/{newest}")
    assert parameters.output == Path(f"runs/watched/new-{newest}")
    assert keys == set(make_network().state_dict())
    assert (verdicts[0].name, verdicts[0].version) == ("new-small", "7")
    assert client.get_model_version("new", str(newest)).tags[dense_registry.STATE] == "pruned: models:/new-small/7"
    assert watch.watch.fn(watch_parameters("new"))["dense_version"] is None
    assert len(seen) == 1


@pytest.mark.integration
@pytest.mark.parametrize(
    ("error", "is_marked"), [(ConfigError("no such budget."), True), (EngineError("the cluster is down."), False)]
)
def test_version_that_cannot_be_pruned_is_not_tried_again_unless_an_engine_failed(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch, error: Exception, is_marked: bool
) -> None:
    def fail(_: PruneParameters) -> None:
        raise error

    name = f"failing-{is_marked}"
    monkeypatch.setattr(watch, "prune_model", fail)
    dense_registry.register_dense(make_network(), name, "digits_cnn", {})
    with pytest.raises(type(error), match=str(error)):
        watch.watch.fn(watch_parameters(name))
    assert (dense_registry.newest_waiting(name) is None) is is_marked


@pytest.mark.integration
def test_versions_of_another_kind_are_left_alone(client: MlflowClient, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model 'nobody': expected a registered model, found none"):
        dense_registry.newest_waiting("nobody")
    client.create_registered_model("other")
    client.create_model_version("other", source="nowhere")
    assert dense_registry.newest_waiting("other") is None
    save_state(make_network(), tmp_path / "weights.safetensors")
    tags = {dense_registry.MODEL_SPEC: "digits_cnn"}
    client.create_model_version("other", source=tmp_path.as_uri(), tags=tags)
    waiting = dense_registry.newest_waiting("other")
    assert isinstance(waiting, registry.RegisteredVersion)
    with pytest.raises(CheckpointError, match=r"models:/other/2': expected model.safetensors among its files"):
        dense_registry.fetch_checkpoint(waiting, tmp_path / "fetched")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prune": {"data": "digits", "output": "out"}}, "budget"),
        ({"prune": {"data": "digits", "output": "out", "macs_removed": 0.5, "model": "lenet"}}, r"prune\.model"),
        ({"prune": {"data": "digits", "output": "out", "macs_removed": 0.5}, "promote": True}, "prune.register"),
        ({"prune": {"data": "digits", "output": "out", "macs_removed": 0.5, "sede": 1}}, "sede"),
    ],
)
def test_bad_watch_is_refused_where_it_is_deployed(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises((ValidationError, ConfigError), match=reason):
        watch_parameters("net", **changes)
