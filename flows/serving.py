"""A schedule served by this process: the short way to a nightly run, without work pools and workers."""

from __future__ import annotations

from prefect import serve
from prefect.client.schemas.schedules import CronSchedule
from prefect.deployments.runner import RunnerDeployment
from prefect.schedules import Cron
from prefect.settings import get_current_settings
from prefect.types.entrypoint import EntrypointType
from pydantic import ValidationError

from entprune.errors import ConfigError, EngineError
from flows.parameters import PruneParameters
from flows.prune_model import prune_model
from flows.server import start_server


def check_cron(cron: str, timezone: str) -> None:
    """Require a schedule that Prefect understands.

    Raises:
        ConfigError: it is none.
    """
    try:
        CronSchedule(cron=cron, timezone=timezone)
    except ValidationError as cause:
        field = str(cause.errors()[0]["loc"][0])
        given = timezone if field == "timezone" else cron
        expected = "a time zone such as Europe/Berlin" if field == "timezone" else "minute hour day month weekday"
        raise ConfigError(f"--{field}: expected {expected}, got '{given}'; correct the value.") from cause


def require_lasting_server() -> None:
    """Require a Prefect server that outlives this process and answers.

    Raises:
        EngineError: none is named, or it does not answer.
    """
    if not get_current_settings().api.url:
        raise EngineError(
            "a schedule needs a Prefect server that stays up, and PREFECT_API_URL names none; run `prefect server "
            "start` and set PREFECT_API_URL=http://127.0.0.1:4200/api."
        )
    start_server()


def serve_pruning(parameters: PruneParameters, *, name: str, cron: str, timezone: str) -> None:
    """Run the pruning flow on a schedule until this process is interrupted, one run at a time."""
    deployment = RunnerDeployment.from_flow(
        prune_model,
        name=name,
        schedule=Cron(cron, timezone=timezone),
        parameters={"parameters": parameters.model_dump(mode="json", exclude_unset=True)},
        tags=["entprune"],
        concurrency_limit=1,  # of this deployment, wherever else it may be served
        entrypoint_type=EntrypointType.MODULE_PATH,  # a path would count from the present folder
    )
    # Not `prune_model.serve`: it hands the flow to its runs as a pickle, which leaves the parameters' types behind.
    serve(deployment, limit=1, print_starting_message=False)
