"""Layers that a ReLU reads: found, and refit so that what it lets through comes nearer to the dense network's."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from entprune.models import build_model
from entprune.rectifiers import CutOff, Rectifier, cut_off, find_rectifiers
from entprune.refit import PrimalFit, make_fit
from entprune.residuals import find_residuals
from entprune.tracing import called_modules, trace
from tests.micro_networks import Residual, warm_up


def rectifiers_of(model: nn.Module) -> dict[str, Rectifier]:
    graph = copy.deepcopy(trace(model).graph)
    free = {name for name, count in called_modules(graph).items() if count == 1}
    layers = [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    return find_rectifiers(graph, model, find_residuals(graph, model, layers), free)


def test_layers_before_a_relu_are_found_with_their_normalisation() -> None:
    found = rectifiers_of(build_model("vgg16_cifar", num_classes=10, input_shape=(3, 32, 32)).eval())
    assert found["features.0"] == Rectifier(layer="features.0", norm="features.1")
    assert len(found) == 13  # all convolutions, not the classifier


def test_corrected_branch_is_followed_through_its_addition() -> None:
    found = rectifiers_of(Residual().eval())
    assert found["conv2"].norm == "bn2"


class Elsewhere(nn.Module):
    """Pre-activations that something else reads, too, or that another activation takes."""

    def __init__(self) -> None:
        super().__init__()
        self.read_twice, self.smooth, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.read_twice(x)
        return self.last(torch.tanh(self.smooth(torch.relu(y) + y)))


def test_other_readers_and_other_activations_end_the_search() -> None:
    assert rectifiers_of(Elsewhere().eval()) == {}


def test_threshold_is_where_the_normalised_value_is_zero() -> None:
    model: Any = warm_up(Residual())
    with torch.no_grad():
        model.bn2.weight[0], model.bn2.weight[1] = -0.7, 0.0
        model.bn2.bias[0] = 0.3
    cut = cut_off(model, Rectifier(layer="conv2", norm="bn2"))
    assert cut is not None
    assert cut.side[0] == -1.0
    assert cut.side[1] == 0.0
    value = torch.zeros(1, len(cut.threshold), 1, 1)
    value[0, :, 0, 0] = cut.threshold
    assert model.bn2(value)[0, 0].item() == pytest.approx(0.0, abs=1e-6)


def test_without_statistics_there_is_no_threshold() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3, track_running_stats=False), nn.ReLU()).eval()
    assert cut_off(model, Rectifier(layer="0", norm="1")) is None


def passed(values: Tensor, cut: CutOff) -> Tensor:
    return F.relu((values - cut.threshold) * cut.side)


@given(seed=st.integers(0, 10_000), num_rows=st.sampled_from([40, 200]))
def test_no_step_lets_the_bound_of_the_error_behind_the_relu_rise(seed: int, num_rows: int) -> None:
    """Majorisation: without a pull, a ridge or other readers, every fit to the targets lowers the bound."""
    torch.manual_seed(seed)
    d, m = 20, 3
    rows, noise = torch.randn(num_rows, d), torch.randn(num_rows, m)
    dense = rows @ torch.randn(d, m) + 3.0 * noise
    cut = CutOff(threshold=0.5 * torch.randn(m), side=torch.tensor([1.0, -1.0, 1.0]))
    fit = make_fit(num_rows, d, m, True, "cpu")
    fit.update(rows, dense)
    passes = passed(dense, cut) > 0
    bounds = []
    for _ in range(5):
        weight, bias = fit.solve(torch.zeros(m, d), 1e-9)
        present = rows @ weight.T + bias
        bounds.append(float(torch.where(passes, present - dense, passed(present, cut)).square().sum()))
        error = float((passed(present, cut) - passed(dense, cut)).square().sum())
        assert error <= bounds[-1] * (1 + 1e-4)
        fit.forget_answers()
        fit.answer_again(rows, cut.targets(dense, present, 0.0))
    assert all(later <= earlier * (1 + 1e-4) + 1e-4 for earlier, later in pairwise(bounds))


def test_alternation_gains_where_much_is_cut_off() -> None:
    torch.manual_seed(1)
    rows = torch.randn(2000, 6)
    hidden = F.relu(rows @ torch.randn(6, 12))
    dense = hidden @ torch.randn(12, 2) - 2.0
    cut = CutOff(threshold=torch.zeros(2), side=torch.ones(2))
    fit = PrimalFit(6, 2, True, "cpu")
    fit.update(rows, dense)
    weight, bias = fit.solve(torch.zeros(2, 6), 1e-6)
    plain = float((passed(rows @ weight.T + bias, cut) - passed(dense, cut)).square().mean())
    for _ in range(8):
        fit.forget_answers()
        fit.answer_again(rows, cut.targets(dense, rows @ weight.T + bias, 0.1))
        weight, bias = fit.solve(torch.zeros(2, 6), 1e-6)
    aware = float((passed(rows @ weight.T + bias, cut) - passed(dense, cut)).square().mean())
    assert aware < 0.9 * plain


@pytest.mark.parametrize("num_rows", [9, 60])
@pytest.mark.parametrize("intercept", [True, False])
def test_exchanged_answers_give_what_a_new_fit_gives(num_rows: int, intercept: bool) -> None:
    torch.manual_seed(0)
    rows, first, second = torch.randn(num_rows, 12), torch.randn(num_rows, 2), 3.0 + torch.randn(num_rows, 2)
    prior = torch.randn(2, 12)
    fit, fresh = (make_fit(num_rows, 12, 2, intercept, "cpu") for _ in range(2))
    for part in (slice(0, 5), slice(5, None)):
        fit.update(rows[part], first[part])
        fresh.update(rows[part], second[part])
    fit.solve(prior, 1e-2)
    fit.forget_answers()
    for part in (slice(0, 5), slice(5, None)):
        fit.answer_again(rows[part], second[part])
    for found, expected in zip(fit.solve(prior, 1e-2), fresh.solve(prior, 1e-2), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
