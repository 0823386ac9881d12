"""Names of flow runs on Prefect's page: what is pruned, instead of two random words."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from prefect.runtime import flow_run
from pydantic import BaseModel

from entprune.errors import EntpruneError

Parameters = TypeVar("Parameters", bound=BaseModel)


def named_by(kind: type[Parameters], describe: Callable[[Parameters], str]) -> Callable[[], str]:
    """Make what `flow_run_name` asks for.

    Args:
        kind: of the flow's one argument, `parameters`; a deployment holds it as JSON, which may be wrong.
        describe: says it in a few words.
    """

    def name() -> str:
        asked = flow_run.parameters.get("parameters")
        try:
            return describe(asked if isinstance(asked, kind) else kind.model_validate(asked))
        except (ValueError, EntpruneError):  # the flow itself says what is wrong
            return str(flow_run.flow_name)

    return name
