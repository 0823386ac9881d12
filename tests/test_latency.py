"""Latency: measured in pairs with the dense network, so that a slower machine slows both."""

from __future__ import annotations

import numpy as np
import pytest
from torch import nn

from entprune.config import Budget, PruneConfig
from entprune.errors import ConfigError
from entprune.latency import compare_latency, measure_kept_latency
from entprune.plan import GroupPlan, PruningPlan, full_plan
from entprune.pruning import prune
from entprune.stages import analyse
from tests.micro_networks import IMAGE_SHAPE, Chain


def test_figure_is_the_quotient_of_medians_of_alternating_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[nn.Module] = []
    dense, smaller = nn.Linear(1, 1), nn.Linear(1, 1)

    def measure(model: nn.Module, shape: object, sizes: tuple[int, ...], *, repeats: int) -> dict[str, float]:
        timed.append(model)
        return {str(sizes[0]): (8.0 if model is dense else 2.0) * len(timed)}  # the machine slows down

    monkeypatch.setattr("entprune.latency.measure_latency", measure)
    assert compare_latency(dense, smaller, (1, 1, 1), 16, 1) == pytest.approx(2.0 * 4 / (8.0 * 3))
    assert timed == [dense, smaller] * 3


def test_what_is_timed_is_the_network_cut_to_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[tuple[int, object]] = []

    def compare(dense: nn.Module, smaller: nn.Module, *settings: object) -> float:
        timed.append((sum(p.numel() for p in smaller.parameters()), settings))
        return timed[-1][0] / sum(p.numel() for p in dense.parameters())

    monkeypatch.setattr("entprune.latency.compare_latency", compare)
    network = analyse(nn.Sequential(nn.Conv2d(3, 20, 3), nn.ReLU(), nn.Conv2d(20, 5, 3)), (3, 16, 16), PruneConfig())
    (group,) = network.groups.groups
    plan = PruningPlan(groups=(GroupPlan(name=group.name, num_channels=20, kept_channels=(3, 7)),))
    left = 2 * (3 * 9 + 1) + 5 * (2 * 9 + 1)
    assert measure_kept_latency(network, plan, 4, 1) == left / (20 * (3 * 9 + 1) + 5 * (20 * 9 + 1))
    assert measure_kept_latency(network, full_plan(network.groups), 4, 1) == 1.0
    assert timed[0] == (left, ((3, 16, 16), 4, 1))


def test_two_networks_are_really_timed() -> None:
    assert compare_latency(nn.Conv2d(3, 8, 3), nn.Conv2d(3, 4, 3), (3, 16, 16), 4, 1) > 0.0


def test_latency_budget_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(0).normal(size=(64, *IMAGE_SHAPE)).astype(np.float32)
    config = PruneConfig(min_rows=200, calibration_samples=64)

    def kept(network: object, plan: PruningPlan, batch_size: int, threads: int) -> float:
        assert (batch_size, threads) == (8, 1)
        return float(np.mean([len(g.kept_channels) / g.num_channels for g in plan.groups]))

    monkeypatch.setattr("entprune.latency.measure_kept_latency", kept)
    found = prune(Chain().eval(), images, budget=Budget(latency_removed=0.4, latency_batch=8), config=config)
    (entry,) = found.report["candidates"]
    assert entry["latency_kept"] == kept(None, found.plan, 8, 1) <= 0.6
    assert found.report["budget_met"]
    assert found.report["budget"] == {"latency_removed": 0.4, "latency_batch": 8}
    with pytest.raises(ConfigError, match="give --max-accuracy-drop"):
        Budget()
