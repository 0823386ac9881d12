"""Flow runs carry the names of what they prune."""

from __future__ import annotations

from typing import Any

import pytest

from flows import flow_names
from flows.flow_names import named_by
from flows.parameters import PruneParameters
from flows.tracked import run_name


class FlowRun:
    def __init__(self, parameters: dict[str, Any]) -> None:
        self.parameters, self.flow_name = parameters, "prune-model"


GIVEN = {
    "model": "lenet",
    "checkpoint": "lenet.pt",
    "data": "npz:folder/fruit.npz",
    "max_accuracy_drop": 1.0,
    "output": "runs/lenet",
}


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (PruneParameters.model_validate(GIVEN), "lenet on fruit.npz"),
        (GIVEN, "lenet on fruit.npz"),  # as a deployment holds it
        (GIVEN | {"model": 7}, "prune-model"),
        (GIVEN | {"unknown": 7}, "prune-model"),
        (None, "prune-model"),
    ],
)
def test_flow_run_is_named_by_what_it_prunes(monkeypatch: pytest.MonkeyPatch, asked: Any, expected: str) -> None:
    monkeypatch.setattr(flow_names, "flow_run", FlowRun({"parameters": asked}))
    assert named_by(PruneParameters, run_name)() == expected
