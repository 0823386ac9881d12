"""The ablation: each variant changes one thing, and its measure is what it is called."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from entprune.assembly import dense_layers
from entprune.config import PruneConfig
from entprune.models import build_model
from entprune.path import PathSetting
from entprune.regression import ConsumerProblem
from entprune.residuals import find_residuals
from entprune.tracing import trace

pytest.importorskip("torch_pruning", reason="the benchmark's peers are development dependencies")
pytest.importorskip("sklearn", reason="the benchmark's peers are development dependencies")

from infra.benchmark import ablation, trials
from infra.benchmark.networks import Folders
from tests.benchmark_requests import TinyRequest
from tests.regression_problems import random_problem

# --- the parts, on a network of a few channels ------------------------------------------------------------------------


def changed_fields(one: object, other: object) -> dict[str, object]:
    """Fields of the first dataclass that differ from the second one's."""
    pairs = ((entry.name, getattr(one, entry.name), getattr(other, entry.name)) for entry in fields(one))
    return {name: value for name, value, default in pairs if value != default}


def test_each_variant_changes_what_its_name_says_and_nothing_else() -> None:
    defaults = PruneConfig()
    found = {variant.name: changed_fields(variant.config(defaults), defaults) for variant in ablation.VARIANTS}
    alone = {
        name: changed_fields(changes.pop("settings")[0], PathSetting(entropy_weight=1.0))
        for name, changes in found.items()
        if len(changes.get("settings", ())) == 1
    }
    assert alone == {
        "entropy -1": {"entropy_weight": -1.0},
        "entropy 0": {"entropy_weight": 0.0},
        "entropy +1": {},
        "entropy +3": {"entropy_weight": 3.0},
        "elimination alone": {"method": "elimination"},
        "growth 1.5": {"l2_growth": 1.5},
        "growth 4": {"l2_growth": 4.0},
        "drop threshold 0.1": {"drop_threshold": 0.1},
    }
    assert {name: changes for name, changes in found.items() if name not in alone} == {
        "default": {},
        "loss exponent 0.7": {"loss_exponent": 0.7},
        "loss exponent 1.4": {"loss_exponent": 1.4},
        "rectified_steps 0": {"rectified_steps": 0},
        "output_temperature 0": {"output_temperature": 0.0},
        "no BatchNorm re-estimation": {"reestimate_batchnorm": False},
        "no residual correction": {"correct_residuals": False},
        "no refit at all": {},
        "swaps after the envelope": {},
        "Fisher weights of outputs": {},
        "KL of each group, probed": {},
    }
    assert not any(found[name] for name in alone)
    assert [variant.name for variant in ablation.VARIANTS if not variant.is_refit] == ["no refit at all"]
    assert [variant.trial for variant in ablation.VARIANTS if variant.trial is not None] == [
        "swaps",
        "fisher",
        "probes",
    ]


@pytest.mark.parametrize("network", list(ablation.BUDGETS))
def test_residuals_are_ablated_where_there_are_some(network: str) -> None:
    shape = (1, 28, 28) if network == "lenet" else (3, 32, 32)
    model = build_model(network, num_classes=10, input_shape=shape).eval()
    has_residuals = bool(find_residuals(trace(model).graph, model, dense_layers(model), ()))
    names = {variant.name for variant in ablation.variants_for(network)}
    assert ("no residual correction" in names) == has_residuals
    assert len(names) == len(ablation.VARIANTS) - (not has_residuals)


def test_fisher_weights_are_the_mean_squared_slopes_of_the_loss() -> None:
    bench = TinyRequest(network="lenet", seed=0, threads=1, folders=Folders(data=Path(), checkpoints=Path())).bench()
    weights = trials.fisher_weights(bench)
    assert set(weights) == set(bench.network.consumers())
    head = bench.network.consumers()[-1]
    with torch.inference_mode():
        probabilities = (
            bench.network.model(bench.calibration.split.batch(bench.calibration.indices)).softmax(1).double()
        )
    # of the logits: E[(p_o - [o is the label])^2] = p_o (1 - p_o) for labels drawn from p
    expected = (probabilities * (1 - probabilities)).mean(0).numpy()
    np.testing.assert_allclose(weights[head], expected, rtol=0.35)
    assert weights[head].shape == expected.shape


def test_reweighting_changes_the_shares_of_outputs_and_not_their_sum() -> None:
    problem = random_problem(4, (2,), seed=0)
    scale = np.array([0.0, 1.0, 3.0])
    (consumer,) = trials.reweighted(problem, {"layer0": scale}).consumers
    (before,) = problem.consumers
    assert isinstance(before, ConsumerProblem)
    assert isinstance(consumer, ConsumerProblem)
    total, other = (float(np.trace(entry.weight @ entry.gram @ entry.weight.T)) for entry in (before, consumer))
    assert other == pytest.approx(total, rel=1e-5)
    assert not consumer.weight[0].any()
    np.testing.assert_allclose(consumer.weight[2] / before.weight[2], 3 * consumer.weight[1] / before.weight[1])


def test_probed_costs_are_met_and_interpolated_between() -> None:
    errors = np.array([1.0, 0.5, 0.1, 0.02, 0.0])
    losses = trials.interpolated(errors, np.array([1, 3]), np.array([0.4, 0.004]))
    np.testing.assert_allclose(losses[[1, 3, 4]], [0.4, 0.004, 0.0])
    assert losses[0] == pytest.approx(0.8)  # beyond the probes in proportion to the error
    assert 0.004 < losses[2] < 0.4
    rising = trials.interpolated(errors, np.array([1, 3]), np.array([0.1, 0.3]))
    assert (np.diff(rising) <= 0).all()


def test_the_divergence_is_that_of_the_definition() -> None:
    dense, pruned = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    p, q = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True) for logits in (dense, pruned))
    assert ablation.divergence(dense, pruned) == pytest.approx(float((p * np.log(p / q)).sum(1).mean()), rel=1e-5)
    assert ablation.divergence(dense, dense + 3.0) == pytest.approx(0.0, abs=1e-6)
    pruned[2, 1] = np.nan
    assert ablation.divergence(dense, pruned) is None
