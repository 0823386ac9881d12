"""The layer that gives the logits is fit to class probabilities."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from entprune.models import build_model
from entprune.output_layer import find_output_layer, fit_probabilities
from entprune.tracing import trace


def output_layer_of(model: nn.Module) -> str | None:
    return find_output_layer(trace(model.eval()).graph, model)


@pytest.mark.parametrize(("spec", "name"), [("lenet", "fc2"), ("resnet20_cifar", "linear")])
def test_output_layer_is_found(spec: str, name: str) -> None:
    shape = (1, 28, 28) if spec == "lenet" else (3, 32, 32)
    assert output_layer_of(build_model(spec, num_classes=10, input_shape=shape)) == name


def test_dropout_and_identity_behind_it_do_not_matter() -> None:
    assert output_layer_of(nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Dropout(), nn.Identity())) == "1"


def test_network_without_one_has_none() -> None:
    assert output_layer_of(nn.Sequential(nn.Conv2d(1, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())) is None
    assert output_layer_of(nn.Sequential(nn.Linear(4, 3), nn.ReLU())) is None


def divergence(rows: Tensor, logits: Tensor, weight: Tensor, bias: Tensor, temperature: float) -> float:
    present = F.log_softmax((rows @ weight.T + bias).double() / temperature, 1)
    dense = F.log_softmax(logits.double() / temperature, 1)
    return float(F.kl_div(present, dense, reduction="batchmean", log_target=True))


def problem(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, dense logits that they explain in part, and the least-squares fit."""
    torch.manual_seed(seed)
    rows, k = F.relu(torch.randn(400, 8)), 5
    logits = 2.0 * (rows @ torch.randn(8, k)) + torch.randn(400, k)
    extended = torch.cat([rows, torch.ones(400, 1)], 1)
    solution = torch.linalg.lstsq(extended, logits).solution.T
    return rows, logits, solution[:, :-1], solution[:, -1]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("seed", range(3))
def test_probabilities_come_nearer_than_by_least_squares(seed: int, temperature: float) -> None:
    rows, logits, weight, bias = problem(seed)
    before = divergence(rows, logits, weight, bias, temperature)
    after = divergence(rows, logits, *fit_probabilities(rows, logits, weight, bias, temperature), temperature)
    assert after < before


def test_it_reaches_the_optimum_that_a_general_optimiser_finds() -> None:
    rows, logits, weight, bias = problem(0)
    found = divergence(rows, logits, *fit_probabilities(rows, logits, weight, bias, 2.0), 2.0)
    layer = [weight.double().clone().requires_grad_(), bias.double().clone().requires_grad_()]
    optimiser = torch.optim.LBFGS(layer, max_iter=500, line_search_fn="strong_wolfe")
    target = F.log_softmax(logits.double() / 2.0, 1)

    def loss() -> Tensor:
        optimiser.zero_grad()
        present = F.log_softmax(F.linear(rows.double(), *layer) / 2.0, 1)
        value = F.kl_div(present, target, reduction="batchmean", log_target=True)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimiser.step(loss)  # type: ignore[arg-type]
    best = loss().item()
    assert best <= found <= 1.02 * best


def test_what_is_right_already_stays() -> None:
    rows, _, weight, bias = problem(1)
    logits = rows @ weight.T + bias
    same_weight, same_bias = fit_probabilities(rows, logits, weight, bias, 2.0)
    torch.testing.assert_close(same_weight, weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(same_bias, bias, rtol=1e-4, atol=1e-4)
    assert same_weight.dtype == torch.float32
