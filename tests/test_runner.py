"""Running units in this process: results in the order of the work, the largest begun first, errors not swallowed."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entprune.errors import ConfigError
from entprune.runner import InProcessRunner, Work, largest_first, torch_threads


def work_of(costs: list[float]) -> list[Work]:
    return [Work(shared="shared", item=number, cost=cost) for number, cost in enumerate(costs)]


@settings(max_examples=15)
@given(st.lists(st.integers(0, 3), max_size=6), st.integers(1, 3))
def test_results_come_in_the_order_of_the_work(costs: list[int], workers: int) -> None:
    seen: dict[int, Any] = {}
    results = InProcessRunner(workers=workers).run(
        lambda shared, item: (shared, item), work_of([float(cost) for cost in costs]),
        stage="test", on_result=seen.__setitem__,
    )  # fmt: skip
    assert results == [("shared", number) for number in range(len(costs))]
    assert seen == dict(enumerate(results))


def test_results_that_are_not_kept_go_to_the_caller_alone() -> None:
    seen: dict[int, Any] = {}
    kept = InProcessRunner().run(
        lambda _, item: item, work_of([1.0, 2.0]), stage="test", on_result=seen.__setitem__, keep=False
    )
    assert kept == [None, None]
    assert seen == {0: 0, 1: 1}


def test_largest_work_is_begun_first_and_equal_work_in_its_order() -> None:
    begun: list[int] = []
    InProcessRunner().run(lambda _, item: begun.append(item), work_of([1.0, 3.0, 2.0, 3.0]), stage="test")
    assert begun == [1, 3, 2, 0] == largest_first(work_of([1.0, 3.0, 2.0, 3.0]))


def test_as_many_units_run_at_a_time_as_there_are_workers() -> None:
    barrier = threading.Barrier(2, timeout=10)  # passes only if two units wait at once
    InProcessRunner(workers=2).run(lambda _, __: barrier.wait(), work_of([1.0, 1.0]), stage="test")


def test_results_are_handed_over_in_the_callers_thread() -> None:
    threads: set[int] = set()
    InProcessRunner(workers=2).run(
        lambda _, item: item, work_of([1.0, 1.0]), stage="test",
        on_result=lambda _, __: threads.add(threading.get_ident()),
    )  # fmt: skip
    assert threads == {threading.get_ident()}


def test_error_of_a_unit_reaches_the_caller_and_nothing_new_is_begun() -> None:
    begun: list[int] = []

    def unit(_: Any, item: int) -> None:
        begun.append(item)
        time.sleep(0.05)
        raise ValueError("unit failed")

    with pytest.raises(ValueError, match="unit failed"):
        InProcessRunner().run(unit, work_of([1.0] * 20), stage="test")
    assert len(begun) <= 2


def test_units_run_with_the_threads_asked_for_and_the_setting_is_restored() -> None:
    before = torch.get_num_threads()
    inside = InProcessRunner(threads=2).run(lambda _, __: torch.get_num_threads(), work_of([1.0]), stage="test")
    assert inside == [2]
    assert torch.get_num_threads() == before
    with torch_threads(3):
        assert torch.get_num_threads() == 3
    assert torch.get_num_threads() == before


def test_progress_counts_to_the_end() -> None:
    calls: list[tuple[str, int, int]] = []
    runner = InProcessRunner(progress=lambda stage, done, total: calls.append((stage, done, total)))
    runner.run(lambda _, item: item, work_of([1.0, 1.0]), stage="solve")
    assert calls == [("solve", 1, 2), ("solve", 2, 2)]


@pytest.mark.parametrize("option", [{"workers": 0}, {"threads": 0}])
def test_impossible_numbers_are_explained(option: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="expected at least one worker and one thread"):
        InProcessRunner(**option)
