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


def test_network_of_a_tenth_of_the_channels_is_faster() -> None:
    network = analyse(
        nn.Sequential(nn.Conv2d(3, 256, 3), nn.ReLU(), nn.Conv2d(256, 256, 3)), (3, 16, 16), PruneConfig()
    )
    (group,) = network.groups.groups
    plan = PruningPlan(groups=(GroupPlan(name=group.name, num_channels=256, kept_channels=tuple(range(25))),))
    assert measure_kept_latency(network, plan, 4, 1) < 0.6
    assert 0.5 < measure_kept_latency(network, full_plan(network.groups), 4, 1) < 2.0


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
