"""The choice among the settings of a sweep."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from flows.sweep_content import choose


def entry(number: int, parameters: int, bound: float, *missed: str, stopped_by: int | None = None) -> Any:
    chosen = SimpleNamespace(upper_bound=bound, parameters=parameters, missed=missed)
    finish = SimpleNamespace(chosen=chosen, stopped_by=stopped_by, budget_met=not missed)
    return SimpleNamespace(setting=SimpleNamespace(number=number), finish=finish, latency_ms={"64": 1.0 * parameters})


SMALL, LARGE = entry(0, 10, 0.4), entry(1, 20, 0.2)


@pytest.mark.parametrize(
    ("entries", "max_drop", "number", "budget_met"),
    [
        ([SMALL, LARGE], 0.5, 0, True),
        ([SMALL, LARGE], 0.3, 1, True),
        ([SMALL, LARGE], 0.1, 1, False),
        ([SMALL, LARGE], None, 1, True),
        ([entry(0, 10, 0.4, stopped_by=1), LARGE], 0.5, 1, True),
        ([entry(0, 10, 0.1, "latency_removed"), LARGE], 0.5, 1, True),
        ([entry(0, 10, 0.1, "latency_removed"), LARGE], 0.15, 1, False),
        ([entry(0, 10, 0.1, "latency_removed"), LARGE], None, 1, True),
        ([entry(0, 10, 0.1, "latency_removed")], 0.5, 0, False),
        ([entry(0, 10, 0.4, "max_accuracy_drop")], 0.5, 0, True),  # of a stricter budget of its own
    ],
)
def test_smallest_within_the_budgets_is_chosen(
    entries: list[Any], max_drop: float | None, number: int, budget_met: bool
) -> None:
    chosen = choose(entries, max_drop, "parameters")
    assert (chosen.number, chosen.budget_met) == (number, budget_met)
