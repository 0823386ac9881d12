"""Continuations that share their steps: the same bits as alone, in any order, for less work."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from entprune.path import PathSetting, SettingPath, solve_setting
from entprune.regression import GroupProblem
from entprune.shared_steps import SharedSteps
from tests.regression_problems import random_problem

SETTINGS = (
    PathSetting(),
    PathSetting(drop_threshold=0.1),
    PathSetting(drop_threshold=0.5),
    PathSetting(entropy_weight=0.0),
    PathSetting(entropy_weight=3.0, l2_growth=4.0),
    PathSetting(l2_start=0.01, iterations=1),
)


def assert_equal_bits(found: SettingPath, expected: SettingPath) -> None:
    for name in ("order", "errors", "snapshots"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert (found.setting, found.status) == (expected.setting, expected.status)


@settings(max_examples=4)
@given(
    problem=st.builds(random_problem, st.integers(2, 8), st.just([2, 1]), st.integers(0, 99)),
    order=st.permutations(SETTINGS),
)
def test_result_does_not_depend_on_what_was_solved_before(problem: GroupProblem, order: list[PathSetting]) -> None:
    shared = SharedSteps(problem)
    for setting in order:
        assert_equal_bits(solve_setting(problem, setting, shared=shared), solve_setting(problem, setting))


def test_settings_that_start_alike_share_their_first_steps() -> None:
    problem = random_problem(40, [2], 0)
    shared, counts = SharedSteps(problem), []
    for threshold in (0.2, 0.3, 0.4):
        before = shared.num_computed
        solve_setting(problem, PathSetting(drop_threshold=threshold), shared=shared)
        counts.append(shared.num_computed - before)
    alone = SharedSteps(problem)
    solve_setting(problem, PathSetting(drop_threshold=0.4), shared=alone)
    assert counts[2] < alone.num_computed
    again = shared.num_computed
    solve_setting(problem, PathSetting(drop_threshold=0.3), shared=shared)
    assert shared.num_computed == again
